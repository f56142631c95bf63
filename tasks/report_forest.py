"""Changes with their intervals as a table with a drawing in each row: the gate's figures as places in percent of the column's width.

It needs no JavaScript: the templates draw it as SVG, so that it prints, scales with a phone, and takes the colours of the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.report_words import Values, number, percent

STEPS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1.0)
MOST_TICKS = 6
WIDEST = 2.5
"""How many times the spread of the changes the axis may show of their intervals: a class of two images must not squeeze the rest."""
BADNESS = {"refused": 0, "warned": 1}


@dataclass(frozen=True)
class Row:
    """One change. Places are percent of the width; `cut_low` and `cut_high`: the interval goes on beyond the axis."""

    label: str
    images: int | None
    before: str
    after: str
    change: str
    interval: str
    direction: str
    outcome: str
    at: float
    low: float | None
    high: float | None
    cut_low: bool
    cut_high: bool


@dataclass(frozen=True)
class Forest:
    """The rows, and the axis that they share: (place, label, whether a phone shows it) of each tick, the places of zero and the limit."""

    rows: tuple[Row, ...]
    ticks: tuple[tuple[float, str, bool], ...]
    zero: float
    limit: float | None
    limit_said: str


def worst_first(figures: Iterable[Values]) -> list[Values]:
    """Figures that have a change: what refused, what warned, then by change, the largest loss first."""
    counted = [figure for figure in figures if number(figure.get("value")) is not None and figure.get("outcome") != "skipped"]
    return sorted(counted, key=lambda one: (BADNESS.get(str(one.get("outcome")), 2), one["value"], str(one.get("what"))))


def forest(figures: Sequence[Values], *, limit: float | None) -> Forest | None:
    """The figures in their order, on one axis that shows each change, no change and the limit; None where there is nothing to draw."""
    drawn = [figure for figure in figures if number(figure.get("value")) is not None]
    if not drawn:
        return None
    marks = [0.0, *(one["value"] for one in drawn), *([] if limit is None else [limit])]
    ends = [end for one in drawn for end in (number(one.get("low")), number(one.get("high"))) if end is not None]
    low, high = _axis(marks, ends)

    def place(value: float) -> float:
        return round(100 * (min(max(value, low), high) - low) / (high - low), 2)

    return Forest(
        tuple(_row(one, place, low, high) for one in drawn),
        tuple((place(tick), points(tick), always) for tick, always in _ticks(low, high)),
        place(0.0),
        None if limit is None else place(limit),
        "" if limit is None else points(limit),
    )


def points(value: Any, digits: int | None = None) -> str:
    """A change of a share in points, signed, with a real minus; without `digits` as many as it needs."""
    if number(value) is None:
        return "–"
    hundredfold = round(100 * value, 2 if digits is None else digits)
    said = f"{abs(hundredfold):g}" if digits is None else f"{abs(hundredfold):.{digits}f}"
    return ("+" if hundredfold > 0 else "−" if hundredfold < 0 else "") + said


def between(figure: Values) -> str:
    """The interval of a change in words, or nothing."""
    if number(figure.get("low")) is None or number(figure.get("high")) is None:
        return ""
    return f"{points(figure['low'], 1)} to {points(figure['high'], 1)}"


def _row(figure: Values, place: Any, lowest: float, highest: float) -> Row:
    low, high, value = number(figure.get("low")), number(figure.get("high")), figure["value"]
    images = number(figure.get("images"))
    rounded = round(100 * value, 1)
    return Row(
        label=str(figure.get("what")),
        images=None if images is None else int(images),
        before=percent(figure.get("other")),
        after=percent(figure.get("challenger")),
        change=points(value, 1),
        interval=between(figure),
        direction="up" if rounded > 0 else "down" if rounded < 0 else "soft",
        outcome=str(figure.get("outcome") or "passed"),
        at=place(value),
        low=None if low is None else place(low),
        high=None if high is None else place(high),
        cut_low=low is not None and low < lowest,
        cut_high=high is not None and high > highest,
    )


def _axis(marks: Sequence[float], ends: Sequence[float]) -> tuple[float, float]:
    """From the lowest to the highest of marks and interval ends, but no wider than WIDEST times the marks; a little air around."""
    low, high = min(marks), max(marks)
    spare = max((WIDEST - 1) * (high - low) / 2, 0.05)
    wide_low, wide_high = max(min([low, *ends]), low - spare), min(max([high, *ends]), high + spare)
    air = 0.05 * max(wide_high - wide_low, 0.002)
    return wide_low - air, wide_high + air


def _ticks(low: float, high: float) -> list[tuple[float, bool]]:
    """Round numbers that are not too many, and whether each is still one of few if every other is left out."""
    step = next((step for step in STEPS if (high - low) / step <= MOST_TICKS), STEPS[-1])
    places = range(math.ceil(low / step), math.floor(high / step) + 1)
    return [(number * step, len(places) <= 3 or number % 2 == 0) for number in places]
