"""The report's figures but the search's: plain results to plotly figures as plain JSON, None where there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from tasks.report_words import Values, duration, number, percent, plot_text, wilson

Figure = dict[str, Any]

FONT = '"Inter", "Segoe UI", "Helvetica Neue", Helvetica, Arial, sans-serif'
CHALLENGER, CHAMPION, PROBE = (
    "#2b7bba",
    "#e07b16",
    "#8a8f98",
)  # blue, orange, grey: apart for every kind of colour vision, on light and dark
MODELS = {"challenger": (CHALLENGER, "circle"), "champion": (CHAMPION, "diamond"), "probe": (PROBE, "square")}
SPLITS = {"train": "#2b7bba", "val": "#7fb3dc", "holdout": "#e07b16"}
NEUTRAL, GRID = "#8a8f98", "rgba(138,143,152,0.22)"
SHARE_SCALE = ["#d6e6f4", "#abcfe5", "#6caed6", "#3787c0", "#1460a8", "#08387a"]
SHARE_SCALE_IN_THE_DARK = ["#1c3148", "#1f4e79", "#2d72a8", "#5299cf", "#8cc0ea", "#cfe6fb"]
MOST_CONFUSED = 60
MOST_LABELLED = 40


def comparison(evaluation: Values) -> Figure | None:
    """Accuracy, balanced accuracy and macro F1 of each model, as dots on one scale."""
    metrics = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1"}
    figure = go.Figure()
    for offset, (kind, (colour, symbol)) in zip((0.2, 0.0, -0.2), MODELS.items(), strict=True):
        model = evaluation.get(kind)
        if not model:
            continue
        low, high = wilson(number(model.get("accuracy")), int(model.get("images") or 0))
        accuracy = number(model.get("accuracy")) or 0.0
        figure.add_scatter(
            x=[number(model.get(name)) for name in metrics], y=[2 + offset, 1 + offset, offset], mode="markers", name=kind,
            marker={"color": colour, "symbol": symbol, "size": 12},
            error_x={"type": "data", "array": [high - accuracy, 0, 0], "arrayminus": [accuracy - low, 0, 0], "color": colour,
                     "thickness": 1.5, "width": 0},
            text=[percent(model.get(name)) for name in metrics], hovertemplate=f"{kind} %{{text}}<extra></extra>", cliponaxis=False,
        )  # fmt: skip
    figure.update_yaxes(tickvals=[2, 1, 0], ticktext=list(metrics.values()), range=[-0.5, 2.5], showgrid=True, tickfont={"size": 13})
    figure.update_xaxes(title="score on the holdout", tickformat=".0%")
    return finished(figure, height=270)


def fit_curves(fit: Values, probe: Values) -> Figure | None:
    """Val accuracy (above) and losses (below) of the fit by epoch, with the probe as the line to beat."""
    curve = [epoch for epoch in fit.get("curve") or [] if number(epoch.get("epoch")) is not None]
    if not curve:
        return None
    epochs = [epoch["epoch"] for epoch in curve]
    figure = go.Figure()
    for name, key, axis, colour, dash in (
        ("val accuracy", "val_accuracy", "y", CHALLENGER, "solid"),
        ("val loss", "val_loss", "y2", CHALLENGER, "solid"),
        ("train loss", "train_loss", "y2", NEUTRAL, "dash"),
    ):
        values = [number(epoch.get(key)) for epoch in curve]
        template = f"epoch %{{x}}: {name} %{{y:{'.1%' if axis == 'y' else '.3f'}}}<extra></extra>"
        figure.add_scatter(
            x=epochs, y=values, yaxis=axis, name=name, mode="lines+markers", marker={"size": 6}, hovertemplate=template,
            line={"color": colour, "width": 2.5, "dash": dash}, showlegend=axis == "y2",
        )  # fmt: skip
    accuracy = number(probe.get("accuracy"))
    if accuracy is not None:
        figure.add_hline(accuracy, line={"color": PROBE, "dash": "dot", "width": 2}, yref="y")
        figure.add_annotation(
            x=0.5,
            xref="paper",
            xanchor="center",
            y=accuracy,
            yref="y",
            yanchor="bottom",
            text=f"probe {percent(accuracy)}",
            showarrow=False,
        )
    if fit.get("best_epoch") is not None:
        figure.add_vline(fit["best_epoch"], line={"color": NEUTRAL, "width": 1})
        side = "right" if 2 * fit["best_epoch"] > min(epochs) + max(epochs) else "left"
        figure.add_annotation(x=fit["best_epoch"], xanchor=side, y=1, yref="paper", yanchor="bottom", text="kept epoch", showarrow=False)
    figure.update_xaxes(title="epoch", anchor="y2", range=[min(epochs) - 0.3, max(epochs) + 0.3], **epoch_ticks(max(epochs)))
    low_to_high = accuracy_window(
        [value for epoch in curve if (value := number(epoch.get("val_accuracy"))) is not None] + [accuracy or 1.0]
    )
    figure.update_layout(
        yaxis={"domain": [0.5, 1.0], "title": "val accuracy", "tickformat": ".0%", "range": low_to_high, "nticks": 5},
        yaxis2={"domain": [0.0, 0.4], "title": "loss (nats)", "nticks": 5, "rangemode": "tozero"},
        legend={"y": 0.41, "yanchor": "bottom", "x": 1, "xanchor": "right"},
    )
    return finished(figure, height=400)


def confusion_matrix(model: Values, classes: Sequence[str]) -> Figure | None:
    """True class by predicted class: colour is the share of the row, the number is images. Of very many classes, the most confused."""
    counts = model.get("confusion")
    if not counts:
        return None
    shown = confused_classes(counts)
    shares: list[list[float | None]] = []
    texts = []
    for i in shown:
        total = sum(counts[i]) or 1
        shares.append([counts[i][j] / total if counts[i][j] else None for j in shown])  # no image, no ink
        texts.append([str(counts[i][j]) if counts[i][j] else "" for j in shown])
    few, labels = len(shown) <= 20, [plot_text(classes[i], 22 if len(shown) <= MOST_LABELLED else 60) for i in shown]
    bar = {"title": {"text": "share<br>of row", "font": {"size": 13}}, "tickformat": ".0%", "thickness": 10, "outlinewidth": 0, "nticks": 5}
    figure = go.Figure(
        go.Heatmap(
            z=shares, text=texts, texttemplate="%{text}" if few else "", textfont={"size": 13 if len(shown) <= 10 else 10},
            zmin=0, zmax=1, colorscale=SHARE_SCALE, xgap=1 if few else 0, ygap=1 if few else 0,
            hovertemplate="true <b>%{y}</b><br>predicted <b>%{x}</b><br>images: %{text} (%{z:.1%} of the row)<extra></extra>",
            showscale=not few, colorbar=bar, hoverongaps=False,
        )
    )  # fmt: skip
    ticks = {"tickvals": list(range(len(shown))), "ticktext": labels, "showticklabels": len(shown) <= MOST_LABELLED, "showgrid": False}
    edge = [-0.5, len(shown) - 0.5]
    figure.update_xaxes(title="predicted class", range=edge, tickangle=-45 if len(shown) > 3 else 0, **ticks)
    figure.update_yaxes(title="true class", range=edge[::-1], **ticks)
    if len(shown) > MOST_LABELLED or not few:
        figure.add_shape(type="line", x0=-0.5, y0=-0.5, x1=edge[1], y1=edge[1], line={"color": GRID, "width": 1}, layer="below")
    drawn = finished(figure, height=max(300, min(680, 180 + 46 * len(shown))), aspect=1.0)
    return {**drawn, "scales": {"light": plain_scale(SHARE_SCALE), "dark": plain_scale(SHARE_SCALE_IN_THE_DARK)}}


def calibration(evaluation: Values) -> Figure | None:
    """Accuracy by confidence of each model; on the diagonal a probability means what it says."""
    figure = go.Figure()
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", line={"color": NEUTRAL, "width": 1, "dash": "dot"}, showlegend=False, hoverinfo="skip"
    )
    for kind, (colour, symbol) in reversed(MODELS.items()):  # the challenger last, so that it lies on top
        bins = [
            one
            for one in (evaluation.get(kind) or {}).get("reliability") or []
            if number(one.get("accuracy")) is not None and one.get("count")
        ]
        if not bins:
            continue
        most, ece = max(one["count"] for one in bins), number(evaluation[kind].get("ece"))
        figure.add_scatter(
            x=[one["confidence"] for one in bins], y=[one["accuracy"] for one in bins], mode="lines+markers",
            name=kind if ece is None else f"{kind} (ECE {percent(ece)})",
            line={"color": colour, "width": 2.5 if kind == "challenger" else 1.5}, legendrank=list(MODELS).index(kind),
            marker={"symbol": symbol, "size": [6 + 14 * math.sqrt(one["count"] / most) for one in bins], "opacity": 0.85},
            text=[f"{one['count']} images" for one in bins],
            hovertemplate=f"{kind}: confident %{{x:.0%}}, right %{{y:.0%}}<br>%{{text}}<extra></extra>", cliponaxis=False,
        )  # fmt: skip
    if len(figure.data) == 1:
        return None
    figure.update_xaxes(
        title="mean confidence of the prediction", tickformat=".0%", range=[-0.02, 1.04], tickvals=[0, 0.2, 0.4, 0.6, 0.8, 1]
    )
    figure.update_yaxes(title="share that is right", tickformat=".0%", range=[-0.02, 1.04], tickvals=[0, 0.2, 0.4, 0.6, 0.8, 1])
    return finished(figure, height=420, aspect=1.05)


def class_counts(stats: Values) -> Figure | None:
    """Images by class and split, the largest class first."""
    counts = stats.get("counts") or {}
    if not counts:
        return None
    labels = sorted(counts, key=lambda label: -sum(counts[label].values()))
    places, labelled = list(range(len(labels))), len(labels) <= MOST_LABELLED
    figure = go.Figure()
    for split, colour in SPLITS.items():
        images = [counts[label].get(split, 0) for label in labels]
        axes = {"y": places, "x": images, "orientation": "h"} if labelled else {"x": places, "y": images}
        figure.add_bar(
            **axes, name=split, marker={"color": colour, "line": {"width": 0}},
            customdata=[f"<b>{plot_text(label, 60)}</b><br>{images[i]:,} of {sum(counts[label].values()):,} images in {split}"
                        for i, label in enumerate(labels)],
            hovertemplate="%{customdata}<extra></extra>",
        )  # fmt: skip
    if labelled:
        figure.update_yaxes(tickvals=places, ticktext=[plot_text(label) for label in labels], autorange="reversed", showgrid=False)
        figure.update_xaxes(title="images", tickformat=",d")
    else:
        figure.update_xaxes(title=f"{len(labels):,} classes, largest first", showticklabels=False, showgrid=False)
        figure.update_yaxes(title="images", tickformat=",d")
    figure.update_layout(barmode="stack", bargap=0.25 if labelled else 0.0, legend={"traceorder": "normal"})
    return finished(figure, height=min(900, 110 + 26 * len(labels)) if labelled else 340)


def step_seconds(seconds: Mapping[str, float]) -> Figure | None:
    """Wall time of each step, in the order they happen."""
    steps = {name: value for name, value in seconds.items() if name != "total" and number(value) is not None}
    if not steps:
        return None
    most = max(steps.values()) or 1.0
    figure = go.Figure()
    figure.add_bar(
        y=list(range(len(steps))), x=list(steps.values()), orientation="h", marker={"color": CHALLENGER},
        text=[duration(value) for value in steps.values()],
        textposition="outside", cliponaxis=False, hoverinfo="skip", showlegend=False,
    )  # fmt: skip
    figure.update_yaxes(
        tickvals=list(range(len(steps))), ticktext=[plot_text(name) for name in steps], autorange="reversed", showgrid=False
    )
    figure.update_xaxes(title="wall time (s)", range=[0, most * 1.35], nticks=6)
    figure.update_layout(bargap=0.4)
    return finished(figure, height=90 + 34 * len(steps))


def finished(figure: Any, *, height: int, aspect: float | None = None, narrow: Figure | None = None) -> Figure:
    """The house style on a figure, as plain values; `aspect` bounds the height by the width, `narrow` is other axes for a phone."""
    figure.update_layout(
        template=None, height=height, autosize=True, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 8, "r": 8, "t": 28, "b": 8},
        font={"family": FONT, "size": 13, "color": "#2b3440"}, hovermode="closest",
        hoverlabel={"bgcolor": "#1d2733", "bordercolor": "#1d2733", "align": "left", "font": {"family": FONT, "size": 13, "color": "#fff"}},
    )  # fmt: skip
    if figure.layout.legend.y is None:
        figure.update_layout(legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "xanchor": "left"})
    figure.update_layout(legend={"orientation": "h", "bgcolor": "rgba(0,0,0,0)"})
    quiet = {
        "zeroline": False,
        "gridcolor": GRID,
        "automargin": True,
        "ticks": "outside",
        "ticklen": 5,
        "tickcolor": "rgba(0,0,0,0)",
        "title_standoff": 10,
        "title_font_size": 13,
    }
    figure.update_xaxes(**quiet)
    figure.update_yaxes(**quiet)
    plain: Figure = figure.to_plotly_json()
    return {**plain, "aspect": aspect, "narrow": narrow or {}}


def confused_classes(counts: Sequence[Sequence[int]]) -> list[int]:
    """Indices of the classes to draw: all, or of more than 120 the ones with most mistakes."""
    if len(counts) <= 2 * MOST_CONFUSED:
        return list(range(len(counts)))
    columns = [sum(column) for column in zip(*counts, strict=True)]
    wrong = {i: sum(row) + columns[i] - 2 * row[i] for i, row in enumerate(counts)}
    return sorted(sorted(wrong, key=lambda i: -wrong[i])[:MOST_CONFUSED])


def plain_scale(colours: Sequence[str]) -> list[list[Any]]:
    return [[index / (len(colours) - 1), colour] for index, colour in enumerate(colours)]


def accuracy_window(values: Sequence[float]) -> list[float]:
    """An axis range around the values with room for labels; hopeless outliers fall outside it."""
    ranked = sorted(values)
    low, high = ranked[len(ranked) // 20], ranked[-1]
    margin = max(0.02, 0.15 * (high - low))
    return [max(0.0, low - margin), high + 1.4 * margin]


def epoch_ticks(last: float) -> dict[str, Any]:
    return {"dtick": max(1, math.ceil(last / 12)), "tick0": 0}
