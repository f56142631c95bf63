"""The report's words: numbers as a person writes them, and the sentences that say what the figures show."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

Values = Mapping[str, Any]


def headline(name: str, decision: Values, chosen: str) -> str:
    """The lead's question in one line: was it promoted, and what serves now?"""
    version, champion = decision.get("version"), decision.get("champion_version")
    metric = words_of(decision.get("metric") or "accuracy")
    challenger, incumbent = number(decision.get("challenger")), number(decision.get("champion"))
    what = "the linear probe" if chosen == "probe" else f"version {version}"
    if decision.get("status") == "promoted":
        if incumbent is None or not champion:
            return f"{name} version {version} now serves, with {percent(challenger)} {metric} on the holdout. It is the first version."
        return (
            f"{name} version {version} was promoted and now serves: {percent(challenger)} {metric} on the holdout, "
            f"{apart(challenger, incumbent)} version {champion}."
        )
    serving = f"version {champion} keeps serving" if champion else "no version serves yet"
    if challenger is None or incumbent is None:
        return f"{name} {serving}: {what} was not promoted."
    if challenger > incumbent + (number(decision.get("min_gain")) or 0.0):  # the gate asked for more than the metric
        return f"{name} {serving}: {what} reached {percent(challenger)} {metric} against its {percent(incumbent)}, but was not promoted."
    by = f" by more than {100 * decision['min_gain']:g} points" if number(decision.get("min_gain")) else ""
    return f"{name} {serving}: {what} reached {percent(challenger)} {metric} and does not beat its {percent(incumbent)}{by}."


def worst_classes(model: Values) -> str:
    """The classes with the lowest F1, in words."""
    scored = [(number(row.get("f1")), label) for label, row in (model.get("per_class") or {}).items()]
    ranked = sorted((f1, label) for f1, label in scored if f1 is not None)
    if len(ranked) < 2:
        return ""
    named = " and ".join(f"{short(label, 40)} (F1 {percent(f1, 0)})" for f1, label in ranked[: 2 if len(ranked) > 3 else 1])
    return f"Weakest: {named}. Strongest: {short(ranked[-1][1], 40)} ({percent(ranked[-1][0], 0)})."


def confusions(model: Values, classes: Sequence[str], most: int = 8) -> list[dict[str, Any]]:
    """The most frequent mistakes: true class, predicted class, images and share of the true class."""
    counts = model.get("confusion") or []
    wrong = [(row[j], i, j) for i, row in enumerate(counts) for j in range(len(row)) if i != j and row[j]]
    ranked = sorted(wrong, key=lambda one: (-one[0], one[1], one[2]))[:most]
    return [{"true": classes[i], "predicted": classes[j], "images": n, "share": n / sum(counts[i])} for n, i, j in ranked]


def calibration_said(model: Values) -> str:
    """Whether the probabilities can be taken at their word."""
    ece, bins = number(model.get("ece")), model.get("reliability") or []
    if ece is None:
        return ""
    images = sum(one["count"] for one in bins) or 1
    lean = sum(one["count"] * (one["confidence"] - one["accuracy"]) for one in bins if number(one.get("accuracy")) is not None) / images
    leaning = "about right on the whole" if abs(lean) < 0.01 else "too sure of itself" if lean > 0 else "too modest"
    return f"The challenger's probabilities are off by {100 * ece:.1f} points on average (ECE) and it is {leaning}."


def plain(value: Any, *, seconds: bool = False) -> str:
    """Any plain value for a person: durations, large numbers in short, the rest as it is."""
    figure = number(value)
    if figure is None:
        return "–" if value is None or isinstance(value, float) else str(value)
    if seconds:
        return duration(figure)
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(figure) >= size:
            return f"{figure / size:.3g} {prefix}"
    return f"{figure:,.0f}" if figure == int(figure) else f"{figure:,.3g}"


def wilson(share: float | None, images: int) -> tuple[float, float]:
    """95 % interval of a share measured on so many images."""
    if share is None or images <= 0:
        return (share or 0.0, share or 0.0)
    z = 1.96
    middle = (share + z * z / (2 * images)) / (1 + z * z / images)
    half = z / (1 + z * z / images) * math.sqrt(share * (1 - share) / images + z * z / (4 * images * images))
    return middle - half, middle + half


def number(value: Any) -> float | None:
    """A finite number, or None: NaN and a missing value are the same to a reader."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def percent(value: Any, digits: int = 1) -> str:
    return "–" if number(value) is None else f"{100 * value:.{digits}f}%"


def rate(value: Any) -> str:
    """A learning rate in two digits, without leading zeros of an exponent."""
    return "–" if number(value) is None else re.sub(r"e([+-])0+", r"e\1", f"{value:.2g}")


def duration(value: Any) -> str:
    if number(value) is None:
        return "–"
    seconds = float(value)
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds >= 0.1 or seconds == 0 else "< 0.1 s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def when(created_at: str) -> str:
    """An ISO time as a person reads it, in UTC."""
    try:
        moment = datetime.fromisoformat(created_at)
    except ValueError:
        return created_at
    return f"{moment.astimezone(UTC) if moment.tzinfo else moment:%-d %B %Y, %H:%M} UTC"


def plot_text(value: object, most: int = 22) -> str:
    """A label as plotly text: shortened, on one line, and with nothing that plotly would take for markup."""
    text = printable(str(value))
    short = text if len(text) <= most else text[: most - 1] + "…"
    return short.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def printable(text: str) -> str:
    """Text that can be written as UTF-8: lone surrogates (file names that are no UTF-8) and control characters become �."""
    return re.sub(r"[\ud800-\udfff\x00-\x1f\x7f-\x9f]", "\ufffd", text)


def points(value: Any, against: Any) -> str:
    """A difference of two shares in percentage points, signed."""
    if number(value) is None or number(against) is None:
        return "–"
    difference = round(100 * (value - against), 1)
    return f"{'+' if difference > 0 else '−' if difference < 0 else '±'}{abs(difference):.1f} points"


def apart(value: Any, against: Any) -> str:
    """The same difference in words: "1.2 points above"."""
    said = points(value, against)
    return {"+": f"{said[1:]} above", "−": f"{said[1:]} below", "±": "level with"}.get(said[0], "not comparable with")


def counted(count: Any, noun: str) -> str:
    plural = "es" if noun.endswith("s") else "s"
    return f"{int(count):,} {noun}" + ("" if int(count) == 1 else plural)


def words_of(key: str) -> str:
    """A JSON key as words: macro_f1 is macro F1."""
    return key.replace("_", " ").replace("f1", "F1").replace("ece", "ECE")


def short(text: object, most: int) -> str:
    return str(text) if len(str(text)) <= most else str(text)[: most - 1] + "…"
