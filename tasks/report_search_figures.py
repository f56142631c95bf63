"""The search's figures: the landscape of trials, accuracy by depth and by every other dimension, and learning curves.

A trace that names its trials in `customdata` under `meta` = TRIALS is given their descriptions by the page, which holds each once.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from tasks.report_figures import CHALLENGER, CHAMPION, NEUTRAL, Figure, accuracy_window, epoch_ticks, finished
from tasks.report_search_words import best_by_depth, best_trial, usable, value_of, varied
from tasks.report_words import Values, duration, number, percent, plot_text, rate, words_of

ACCURACY_SCALE = sample_colorscale("Plasma", [0.2 + 0.62 * i / 8 for i in range(9)])
STATUSES = {
    "finished": ("ran to the end", "circle"),
    "stopped": ("stopped early", "circle-open"),
    "diverged": ("diverged", "x-thin-open"),
    "out_of_memory": ("out of memory", "square-x-open"),
    "failed": ("failed", "triangle-down-open"),
}
MOST_CURVES = 200
MOST_MARKS = 1500
MOST_CATEGORIES = 8
TRIALS = "trials"
CURVE_HOVER = {"meta": TRIALS, "hovertemplate": "%{text}<br>here: epoch %{x}, %{y:.1%}<extra></extra>"}
HOVER = {"meta": TRIALS, "hovertemplate": "%{text}<extra></extra>"}


def landscape(search: Values) -> Figure | None:
    """Depth against learning rate, coloured by val accuracy, shaped by how the trial ended."""
    trials = sampled([trial for trial in search.get("trials_detail") or [] if number(trial.get("lr"))], MOST_MARKS)
    if not trials:
        return None
    depths = sorted({int(trial["unfreeze_depth"]) for trial in trials})
    row = {depth: index for index, depth in enumerate(depths)}
    jitter = 0.28 if len(trials) > 40 else 0.0
    place = {id(trial): row[int(trial["unfreeze_depth"])] + jitter * spread(index) for index, trial in enumerate(trials)}
    size = 15 if len(trials) <= 40 else 11 if len(trials) <= 200 else 7
    figure = go.Figure()
    for status in dict.fromkeys(known_status(trial) for trial in trials):
        of_status = [trial for trial in trials if known_status(trial) == status]
        _add_trials(figure, of_status, status, size, place)
    best = best_trial(search)
    if best:
        rank = sorted(float(trial["lr"]) for trial in trials).index(float(best["lr"])) / len(trials)
        side = "top right" if rank < 0.2 else "top left" if rank > 0.8 else "top center"
        figure.add_scatter(
            x=[best["lr"]], y=[place[id(best)]], mode="markers+text", showlegend=False, hoverinfo="skip",
            text=[f"<b>best {percent(best['accuracy'])}</b>"], textposition=side,
            marker={"symbol": "circle-open", "size": size + 10, "color": CHALLENGER, "line": {"width": 3}},
        )  # fmt: skip
    figure.update_xaxes(title="learning rate (log scale)", type="log", **decade_ticks([float(trial["lr"]) for trial in trials]))
    figure.update_yaxes(
        title="unfreeze depth (groups)",
        tickvals=list(row.values()),
        ticktext=[str(depth) for depth in depths],
        range=[-0.6, len(depths) - 0.3],
    )
    low, high = colour_range(trials)
    bar = {"title": {"text": "val<br>accuracy", "font": {"size": 13}}, "tickformat": ".0%", "thickness": 10, "outlinewidth": 0, "nticks": 5}
    figure.update_layout(coloraxis={"colorscale": ACCURACY_SCALE, "cmin": low, "cmax": high, "colorbar": bar})
    few = {"xaxis": decade_ticks([float(trial["lr"]) for trial in trials], roomy=False)}
    return finished(figure, height=min(620, max(320, 150 + 62 * len(depths))), narrow=few)


def _add_trials(figure: Any, trials: Sequence[Values], status: str, size: int, place: Mapping[int, float]) -> None:
    words, symbol = STATUSES[status]
    coloured = status in ("finished", "stopped")
    with_accuracy = [trial for trial in trials if coloured and number(trial.get("accuracy")) is not None]
    without = [trial for trial in trials if not (coloured and number(trial.get("accuracy")) is not None)]
    for group, colour in ((with_accuracy, {"coloraxis": "coloraxis"}), (without, {})):
        if group:
            shade = [number(trial.get("accuracy")) for trial in group] if colour else NEUTRAL
            figure.add_scatter(
                x=[float(trial["lr"]) for trial in group], y=[place[id(trial)] for trial in group], mode="markers", legendgroup=status,
                marker={"symbol": symbol, "size": size, "color": shade, "line": {"width": 0 if symbol == "circle" else 2}, **colour},
                showlegend=False, customdata=named(group), **HOVER,
            )  # fmt: skip
    key = {"symbol": symbol, "size": 10, "color": NEUTRAL, "line": {"width": 0 if symbol == "circle" else 2}}
    figure.add_scatter(
        x=[None], y=[None], mode="markers", name=words, legendgroup=status, marker=key
    )  # a legend without a misleading colour


def accuracy_by_depth(search: Values) -> Figure | None:
    """Every trial's val accuracy by depth, and the best of each depth as a line: where does going deeper stop paying?"""
    best = best_by_depth(search)
    if not best:
        return None
    colours, depths = depth_colours(search), list(best)
    figure = go.Figure()
    trials = sampled(usable(search), MOST_MARKS)
    figure.add_scatter(
        x=[depths.index(int(trial["unfreeze_depth"])) + 0.22 * spread(index) for index, trial in enumerate(trials)],
        y=[trial["accuracy"] for trial in trials], mode="markers", name="a trial",
        marker={
            "size": 7 if len(trials) <= 200 else 5, "opacity": 0.65, "color": [colours[int(trial["unfreeze_depth"])] for trial in trials],
        },
        customdata=named(trials), showlegend=False, **HOVER,
    )  # fmt: skip
    tops = [best[depth]["accuracy"] for depth in depths]
    figure.add_scatter(
        x=list(range(len(depths))), y=tops, mode="lines+markers+text", text=[percent(top) for top in tops],
        textposition=["top left" if index == 0 and len(tops) > 1 and tops[1] > tops[0] else "top center" for index in range(len(tops))],
        line={"color": NEUTRAL, "width": 2},
        marker={"size": 11, "color": [colours[depth] for depth in depths], "line": {"width": 2, "color": "#fff"}},
        hoverinfo="skip", showlegend=False, cliponaxis=False,
    )  # fmt: skip
    figure.update_xaxes(
        title="unfreeze depth (groups)", tickvals=list(range(len(depths))), ticktext=[str(depth) for depth in depths],
        range=[-0.65, len(depths) - 0.45], showgrid=False,
    )  # fmt: skip
    figure.update_yaxes(title="val accuracy", tickformat=".0%", range=accuracy_window([t["accuracy"] for t in trials]))
    return finished(figure, height=340)


def by_dimension(search: Values) -> dict[str, Figure]:
    """A panel for each dimension besides depth and learning rate that varies: val accuracy by its value, coloured by depth."""
    trials, colours = sampled(usable(search), MOST_MARKS // 2), depth_colours(search)
    return {f"by-{name}": _panel(trials, name, colours) for name in varied(search) if trials}


def _panel(trials: Sequence[Values], name: str, colours: Mapping[int, str]) -> Figure:
    shown = [trial for trial in trials if trial.get(name) is not None]
    values = sorted({trial[name] for trial in shown}, key=lambda value: (str(type(value)), value))
    names = [_tick(value_of({name: value}, name)) for value in values]
    upright = len(names) > 2 and any("<br>" in one for one in names)  # side by side they would not all find room
    figure = go.Figure()
    if len(values) <= MOST_CATEGORIES or isinstance(values[0], str):
        places: list[Any] = [values.index(trial[name]) + 0.2 * spread(index) for index, trial in enumerate(shown)]
        figure.update_xaxes(
            tickvals=list(range(len(values))), ticktext=names, range=[-0.5, len(values) - 0.5], showgrid=False,
            tickangle=90 if upright else None,
        )  # fmt: skip
    else:
        places = [trial[name] for trial in shown]
        if min(values) > 0 and max(values) > 10 * min(values):
            figure.update_xaxes(type="log", **decade_ticks([float(value) for value in values], roomy=False))
    figure.add_scatter(
        x=places, y=[trial["accuracy"] for trial in shown], mode="markers", showlegend=False, customdata=named(shown), **HOVER,
        marker={"size": 7 if len(shown) <= 200 else 4, "opacity": 0.7, "color": [colours[int(trial["unfreeze_depth"])] for trial in shown]},
    )  # fmt: skip
    figure.update_xaxes(title=words_of(name))
    figure.update_yaxes(title="val accuracy", tickformat=".0%", nticks=5, range=accuracy_window([trial["accuracy"] for trial in shown]))
    return finished(figure, height=320 if upright else 240)


def _tick(value: str) -> str:
    """A long name on several lines, so that all of it can be read: timm's names often differ at their end alone."""
    lines = textwrap.wrap(re.sub(r"([_.])", r"\1 ", value), 16) if len(value) > 16 else [value]
    return "<br>".join(plot_text(line.replace(" ", "")) for line in lines)


def learning_curves(search: Values) -> Figure | None:
    """Val accuracy by epoch of every trial, coloured by depth; rungs are marked, and a stopped trial ends where it was stopped."""
    trials = sampled([trial for trial in search.get("trials_detail") or [] if points_of(trial)], MOST_CURVES)
    if not trials:
        return None
    best, figure = best_trial(search), go.Figure()
    for depth, colour in depth_colours(search).items():
        _add_curves(figure, [trial for trial in trials if int(trial["unfreeze_depth"]) == depth], depth, colour, len(trials))
    if best and points_of(best):
        xs, ys, names = joined_curves([best])
        figure.add_scatter(
            x=xs, y=ys, customdata=names, mode="lines+markers", name=f"best (depth {best['unfreeze_depth']})",
            line={"color": CHAMPION, "width": 3.5}, marker={"size": 6}, **CURVE_HOVER,
        )  # fmt: skip
    for rung in sorted({int(judged["rung"]) for judged in search.get("rungs") or []}):
        figure.add_vline(rung, line={"color": NEUTRAL, "width": 1, "dash": "dot"}, layer="below")
        figure.add_annotation(x=rung, xanchor="left", y=0, yref="paper", yanchor="bottom", text="rung", showarrow=False, textangle=-90)
    last = max(point[0] for trial in trials for point in points_of(trial))
    figure.update_xaxes(title="epoch", range=[0.6, last + 0.4] if last < 12 else None, **epoch_ticks(last))
    figure.update_yaxes(title="val accuracy", tickformat=".0%")
    return finished(figure, height=400)


def _add_curves(figure: Any, trials: Sequence[Values], depth: int, colour: str, count: int) -> None:
    """The curves of one depth, of `count` that are drawn in all, with a ring at the end of those that were stopped."""
    if not trials:
        return
    width, opacity = (1.8, 0.85) if count <= 24 else (1.0, 0.5) if count <= 80 else (0.8, 0.35)
    xs, ys, names = joined_curves(trials)
    figure.add_scatter(
        x=xs, y=ys, customdata=names, mode="lines+markers" if count <= 24 else "lines", legendgroup=str(depth), showlegend=False,
        line={"color": colour, "width": width}, marker={"size": 4}, opacity=opacity, **CURVE_HOVER,
    )  # fmt: skip
    figure.add_scatter(x=[None], y=[None], mode="lines", name=f"depth {depth}", legendgroup=str(depth), line={"color": colour, "width": 3})
    stopped = [trial for trial in trials if trial.get("status") == "stopped"]
    ends = [points_of(trial)[-1] for trial in stopped]
    figure.add_scatter(
        x=[end[0] for end in ends], y=[end[1] for end in ends], mode="markers", legendgroup=str(depth), showlegend=False,
        marker={"symbol": "circle-open", "size": 8 if count <= 80 else 5, "color": colour, "line": {"width": 1.5}},
        opacity=max(opacity, 0.5), customdata=named(stopped), **HOVER,
    )  # fmt: skip


def sampled(trials: Sequence[Values], most: int) -> list[Values]:
    """All trials; of very many, the best ones for half of the places and an even sample of the others."""
    if len(trials) <= most:
        return list(trials)
    ranked = sorted(trials, key=lambda trial: -(number(trial.get("accuracy")) or 0.0))
    best, rest, places = ranked[: most // 2], ranked[most // 2 :], most - most // 2
    return best + [rest[index * len(rest) // places] for index in range(places)]


def points_of(trial: Values) -> list[tuple[int, float]]:
    """(epoch, val accuracy) of a trial's curve where both are numbers."""
    points = [(epoch.get("epoch"), number(epoch.get("val_accuracy"))) for epoch in trial.get("curve") or []]
    return [(int(epoch), value) for epoch, value in points if epoch is not None and value is not None]


def joined_curves(trials: Sequence[Values]) -> tuple[list[int | None], list[float | None], list[str]]:
    """Many curves as one line with gaps, and the trial of each point: a thousand trials stay as quick to draw as one."""
    xs: list[int | None] = []
    ys: list[float | None] = []
    names: list[str] = []
    for trial, name in zip(trials, named(trials), strict=True):
        points = points_of(trial)
        xs += [*(epoch for epoch, _ in points), None]
        ys += [*(value for _, value in points), None]
        names += [name] * (len(points) + 1)
    return xs, ys, names


def named(trials: Sequence[Values]) -> list[str]:
    return [str(trial.get("trial_id", "?")) for trial in trials]


def descriptions(search: Values) -> dict[str, str]:
    """The hover text of every trial, by its name."""
    others = varied(search)
    trials = search.get("trials_detail") or []
    return dict(zip(named(trials), (describe_trial(trial, others) for trial in trials), strict=True))


def describe_trial(trial: Values, others: Sequence[str] = ()) -> str:
    """Everything about one trial, for the hover; `others` are the dimensions that vary besides depth and learning rate."""
    last = (trial.get("curve") or [{}])[-1]
    losses = [
        f"{words} {value:.3f}"
        for words, key in (("val loss", "val_loss"), ("train loss", "train_loss"))
        if (value := number(last.get(key))) is not None
    ]
    reason = plot_text(" ".join(str(trial.get("reason") or "").split()), 200)
    lines = [
        f"<b>trial {plot_text(trial.get('trial_id', '?'))}</b>: {STATUSES[known_status(trial)][0]}",
        f"val accuracy {percent(trial.get('accuracy'))}",
        f"unfreeze depth {trial.get('unfreeze_depth')}, learning rate {rate(trial.get('lr'))}",
        ", ".join(f"{words_of(name)} {plot_text(value_of(trial, name), 60)}" for name in others),
        f"{trial.get('epochs', '?')} epochs, {duration(trial.get('seconds'))}",
        ", ".join(losses),
        *textwrap.wrap(reason, 56, break_long_words="&" not in reason),  # never within an escape such as &lt;
    ]
    return "<br>".join(line for line in lines if line)


def known_status(trial: Values) -> str:
    return trial["status"] if trial.get("status") in STATUSES else "failed"


def depth_colours(search: Values) -> dict[int, str]:
    """One colour a depth, from dark (shallow) to light (deep)."""
    depths = sorted({int(trial["unfreeze_depth"]) for trial in search.get("trials_detail") or []})
    steps = [0.3 + 0.57 * index / max(1, len(depths) - 1) for index in range(len(depths))]
    return dict(zip(depths, sample_colorscale("Viridis", steps), strict=True)) if depths else {}


def colour_range(trials: Sequence[Values]) -> tuple[float, float]:
    """From the 10th percentile to the best: a few hopeless trials must not wash out the differences among the good ones."""
    values = sorted(value for trial in trials if (value := number(trial.get("accuracy"))) is not None)
    if not values:
        return 0.0, 1.0
    return min(values[len(values) // 10], values[-1] - 0.01), values[-1]


def decade_ticks(values: Sequence[float], *, roomy: bool = True, text: Callable[[float], str] = rate) -> dict[str, Any]:
    """Plain numbers at 1, 2, 5 of each decade (at 1 alone where there are many decades), and a range with room at both ends."""
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = max(0.12, 0.06 * (high - low))
    steps = (1, 2, 5) if high - low <= (2.2 if roomy else 0.9) else (1, 3) if high - low <= (3.5 if roomy else 1.6) else (1,)
    ticks = [step * 10.0**decade for decade in range(math.floor(low - margin), math.ceil(high + margin) + 1) for step in steps]
    inside = [tick for tick in ticks if low - margin <= math.log10(tick) <= high + margin]
    return {"tickvals": inside, "ticktext": [text(tick) for tick in inside], "range": [low - margin, high + margin], "tickangle": 0}


def spread(index: int) -> float:
    """A repeatable number in -1..1 that fills the interval evenly (golden ratio)."""
    return 2 * ((index * 0.6180339887498949) % 1.0) - 1
