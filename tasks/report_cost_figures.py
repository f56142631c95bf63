"""Figures of what the search cost: accuracy against time, what was stopped where, estimate against measurement, what sharing saved."""

from __future__ import annotations

import string
from collections import Counter
from typing import Any

import plotly.graph_objects as go

from tasks.report_figures import CHALLENGER, CHAMPION, NEUTRAL, PROBE, Figure, accuracy_window, finished
from tasks.report_search_figures import HOVER, decade_ticks, depth_colours, named, sampled
from tasks.report_search_words import ENDINGS, flops, usable
from tasks.report_words import Values, duration, number, plain

MOST_COSTED = 750
NAMES = string.ascii_uppercase[:12]
"""What the named points of the Pareto front are called."""
CLEARLY_CHEAPER = 0.75
TIMES = ((3600, "h"), (60, "min"))


def front(search: Values) -> list[Values]:
    """The Pareto front of seconds against val accuracy, cheapest first: no trial is both cheaper and as accurate."""
    found: list[Values] = []
    for trial in sorted(_costed(search), key=lambda trial: (float(trial["seconds"]), -float(trial["accuracy"]))):
        if not found or trial["accuracy"] > found[-1]["accuracy"]:
            found.append(trial)
    return found


def named_front(search: Values) -> list[tuple[str, Values]]:
    """The points of the front that deserve a name: the most accurate, and before each the next that is clearly cheaper."""
    found: list[Values] = []
    for point in reversed(front(search)):
        if not found or point["seconds"] <= CLEARLY_CHEAPER * found[-1]["seconds"]:
            found.append(point)
    return list(zip(NAMES, reversed(found[: len(NAMES)]), strict=False))


def cost_against_accuracy(search: Values) -> Figure | None:
    """Seconds of each trial (log) against its val accuracy, coloured by depth, with the front as a line."""
    trials = sampled(_costed(search), MOST_COSTED)
    if not trials:
        return None
    colours, points, figure = depth_colours(search), front(search), go.Figure()
    for depth, colour in colours.items():
        of_depth = [trial for trial in trials if int(trial["unfreeze_depth"]) == depth]
        if of_depth:
            figure.add_scatter(
                x=[trial["seconds"] for trial in of_depth], y=[trial["accuracy"] for trial in of_depth], mode="markers",
                name=f"depth {depth}", customdata=named(of_depth), **HOVER,
                marker={"size": 9 if len(trials) <= 40 else 7 if len(trials) <= 200 else 5, "opacity": 0.75, "color": colour},
            )  # fmt: skip
    figure.add_scatter(
        x=[point["seconds"] for point in points], y=[point["accuracy"] for point in points], mode="lines", name="Pareto front",
        line={"color": CHAMPION, "width": 2, "shape": "hv"}, hoverinfo="skip",
    )  # fmt: skip
    labelled = named_front(search)
    figure.add_scatter(
        x=[point["seconds"] for _, point in labelled], y=[point["accuracy"] for _, point in labelled], mode="markers+text",
        text=[f"<b>{name}</b>" for name, _ in labelled], textposition="top left", showlegend=False, hoverinfo="skip", cliponaxis=False,
        marker={"symbol": "circle-open", "size": 12, "color": CHAMPION, "line": {"width": 2}},
    )  # fmt: skip
    seconds = [float(trial["seconds"]) for trial in trials]
    figure.update_xaxes(title="seconds of the trial (log scale)", type="log", **decade_ticks(seconds, text=plain))
    figure.update_yaxes(title="val accuracy", tickformat=".0%", range=accuracy_window([trial["accuracy"] for trial in trials]))
    return finished(figure, height=400, narrow={"xaxis": decade_ticks(seconds, roomy=False, text=plain)})


def how_trials_ended(search: Values) -> Figure | None:
    """Trials by where and how they ended, stacked by depth: each rung, the budget, the end, and each failure."""
    trials = search.get("trials_detail") or []
    if not trials or all(trial.get("status") == "finished" for trial in trials):
        return None
    counts = Counter((_ending(trial), int(trial["unfreeze_depth"])) for trial in trials)
    endings = sorted({ending for ending, _ in counts})
    totals = [sum(count for (ending, _), count in counts.items() if ending == one) for one in endings]
    figure = go.Figure()
    for depth, colour in depth_colours(search).items():
        of_depth = [counts[ending, depth] for ending in endings]
        figure.add_bar(
            y=list(range(len(endings))), x=of_depth, orientation="h", name=f"depth {depth}", marker={"color": colour, "line": {"width": 0}},
            customdata=[f"{count:,} of {total:,} are of depth {depth}" for count, total in zip(of_depth, totals, strict=True)],
            hovertemplate="%{customdata}<extra></extra>",
        )  # fmt: skip
    figure.add_scatter(
        x=totals, y=list(range(len(endings))), mode="text", text=[f" {total:,}" for total in totals], textposition="middle right",
        showlegend=False, hoverinfo="skip", cliponaxis=False,
    )  # fmt: skip
    words = [words for _, _, words in endings]
    figure.update_yaxes(tickvals=list(range(len(endings))), ticktext=words, autorange="reversed", showgrid=False)
    figure.update_xaxes(title="trials", tickformat=",d", range=[0, 1.15 * max(totals)], nticks=6, tickangle=0)
    figure.update_layout(barmode="stack", bargap=0.35, legend={"traceorder": "normal"})
    return finished(figure, height=130 + 36 * len(endings), narrow={"xaxis": {"range": [0, 1.35 * max(totals)], "nticks": 4}})


def estimate(search: Values) -> Figure | None:
    """The planner's estimate above what was measured, each split into the shared prefix and the trials."""
    cost, plan = search.get("cost") or {}, search.get("plan") or {}
    measured, prefix = number(cost.get("measured_s")), number(cost.get("prefix_s"))
    planned = [number(plan.get(key)) for key in ("prefix_s", "trials_s")]
    if measured is None or prefix is None or None in planned:
        return None
    size, unit = next(((size, unit) for size, unit in TIMES if measured >= 3 * size), (1, "s"))
    parts = {"shared features": (planned[0] or 0.0, prefix), "trials": (planned[1] or 0.0, max(0.0, measured - prefix))}
    figure = go.Figure()
    for (name, values), colour in zip(parts.items(), (PROBE, CHALLENGER), strict=True):
        figure.add_bar(
            y=[0, 1], x=[value / size for value in values], orientation="h", name=name, marker={"color": colour, "line": {"width": 0}},
            customdata=[f"{name}: {duration(value)}" for value in values], hovertemplate="%{customdata}<extra></extra>",
        )  # fmt: skip
    totals = [sum(pair) for pair in zip(*parts.values(), strict=True)]
    _label_ends(figure, [total / size for total in totals], [duration(total) for total in totals])
    figure.update_yaxes(tickvals=[0, 1], ticktext=["estimated", "measured"], autorange="reversed", showgrid=False)
    figure.update_xaxes(title=f"wall time ({unit})", range=[0, 1.3 * max(totals) / size or 1.0], nticks=6)
    figure.update_layout(barmode="stack", bargap=0.4, legend={"traceorder": "normal"})
    return finished(figure, height=190, narrow={"xaxis": {"range": [0, 1.7 * max(totals) / size or 1.0], "nticks": 4}})


def flops_saved(search: Values) -> Figure | None:
    """FLOPs with the prefix shared, and of the same epochs with the whole backbone in every trial."""
    cost = search.get("cost") or {}
    counted = [number(cost.get("flops")), number(cost.get("flops_without_sharing"))]
    if not all(counted):
        return None
    values = [value or 0.0 for value in counted]
    figure = go.Figure()
    figure.add_bar(y=[0, 1], x=values, orientation="h", marker={"color": [CHALLENGER, NEUTRAL]}, hoverinfo="skip", showlegend=False)
    _label_ends(figure, values, [flops(value) for value in values])
    figure.update_yaxes(
        tickvals=[0, 1], ticktext=["prefix shared", "whole backbone<br>in every trial"], autorange="reversed", showgrid=False
    )
    figure.update_xaxes(title="FLOP", range=[0, 1.3 * max(values)], tickformat="~s", nticks=5)
    figure.update_layout(bargap=0.4)
    return finished(figure, height=190, narrow={"xaxis": {"range": [0, 1.8 * max(values)], "nticks": 4}})


def _label_ends(figure: Any, ends: list[float], words: list[str]) -> None:
    figure.add_scatter(
        x=ends, y=list(range(len(ends))), mode="text", text=[f" {said}" for said in words], textposition="middle right",
        showlegend=False, hoverinfo="skip", cliponaxis=False,
    )  # fmt: skip


def _costed(search: Values) -> list[Values]:
    return [trial for trial in usable(search) if (number(trial.get("seconds")) or 0.0) > 0]


def _ending(trial: Values) -> tuple[int, int, str]:
    """Where a trial ended, as a row of the figure that sorts in the order of a search."""
    status = trial.get("status") if trial.get("status") in ENDINGS else "failed"
    if status != "stopped":
        return (2 if status == "finished" else 3, list(ENDINGS).index(str(status)), ENDINGS[str(status)])
    if "budget" in str(trial.get("reason")):
        return (1, 0, "stopped by the budget")
    epochs = int(number(trial.get("epochs")) or 0)
    return (0, epochs, f"stopped after {epochs} epoch{'s' if epochs != 1 else ''}")
