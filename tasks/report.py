"""The report: one self-contained HTML page that says what was found, what serves now, and why."""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image
from plotly.offline import get_plotlyjs

from ray_jobs import preprocessing
from tasks import report_figures, report_search_figures, report_words
from tasks.report_words import Values

TEMPLATE = "report.html.j2"
MOST_SAMPLES, MOST_MISTAKES, MOST_ROWS, MOST_TRIALS = 60, 48, 20, 50
MOST_PIXELS = 100_000_000
DATA_URI = re.compile(r"data:image/(?:png|jpeg|webp|gif);base64,[A-Za-z0-9+/=]+")
STEPS = ("prepare", "cache", "search", "fit", "evaluate", "publish")


@dataclass(frozen=True, kw_only=True)
class ReportContent:
    """Everything a report says, as plain values from the other steps."""

    name: str
    created_at: str
    spec: dict[str, Any]
    versions: dict[str, str]
    git_commit: str | None
    dataset: dict[str, Any]
    stats: dict[str, Any]
    samples: list[dict[str, Any]]
    search: dict[str, Any]
    fit: dict[str, Any]
    chosen: str
    chosen_reason: str
    evaluation: dict[str, Any]
    mistakes: list[dict[str, Any]]
    decision: dict[str, Any]
    seconds: dict[str, float]
    cost: dict[str, Any]


def render(content: ReportContent) -> str:
    """The whole page as text; nothing in it asks the network for anything."""
    classes = [str(label) for label in content.dataset["classes"]]
    figures = drawn(content, classes)
    page = _environment().get_template(TEMPLATE).render(
        content=content,
        classes=classes,
        figures=figures,
        figures_json=for_script(figures),
        key_figures=key_figures(content),
        models=models(content.evaluation),
        class_rows=class_rows(content.evaluation),
        trials=leaderboard(content.search),
        samples=with_images(some_samples(content.samples)),
        mistakes=with_images(content.mistakes)[:MOST_MISTAKES],
        spec_text=json.dumps(content.spec, indent=2, ensure_ascii=False),
        most_rows=MOST_ROWS,
        plotly_js=get_plotlyjs(),
    )  # fmt: skip
    return re.sub(r"[\ud800-\udfff\x00]", "\ufffd", page)  # labels from file names that are no UTF-8: the page must still be writable


def drawn(content: ReportContent, classes: Sequence[str]) -> dict[str, report_figures.Figure]:
    """Every figure that has something to show, by name."""
    search, evaluation = content.search, content.evaluation
    figures = {
        "comparison": report_figures.comparison(evaluation),
        "landscape": report_search_figures.landscape(search),
        "depths": report_search_figures.accuracy_by_depth(search),
        "curves": report_search_figures.learning_curves(search),
        "fit": report_figures.fit_curves(content.fit, search.get("probe") or {}),
        "confusion": report_figures.confusion_matrix(evaluation["challenger"], classes),
        "calibration": report_figures.calibration(evaluation),
        "counts": report_figures.class_counts(content.stats),
        "seconds": report_figures.step_seconds(in_order(content.seconds)),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def key_figures(content: ReportContent) -> list[tuple[str, str, str]]:
    """(name, value, remark) of the handful of numbers that a lead looks at first."""
    challenger, champion = content.evaluation["challenger"], content.evaluation.get("champion")
    low, high = report_words.wilson(report_words.number(challenger.get("accuracy")), int(challenger.get("images") or 0))
    percent, best = report_words.percent, content.search.get("best") or {}
    against = "champion" if champion else "probe"
    rival = champion or content.evaluation.get("probe") or {}
    gain = report_words.points(challenger.get("accuracy"), rival.get("accuracy"))
    return [
        ("Holdout accuracy", percent(challenger.get("accuracy")), f"95% interval {100 * low:.0f}–{100 * high:.0f}%"),
        (f"Against the {against}", gain.removesuffix(" points"), f"points; the {against} has {percent(rival.get('accuracy'))}"),
        ("Macro F1", percent(challenger.get("macro_f1")), f"over {report_words.counted(len(content.dataset['classes']), 'class')}"),
        ("Best depth", str(best.get("unfreeze_depth", "–")), f"learning rate {report_words.rate(best.get('lr'))}"),
        ("Trials", f"{int(content.search.get('trials') or 0):,}", f"in {report_words.duration(content.search.get('seconds'))}"),
        ("Whole job", report_words.duration(content.seconds.get("total")), f"{int(content.dataset.get('images') or 0):,} images"),
    ]  # fmt: skip


def models(evaluation: Values) -> list[dict[str, Any]]:
    """Challenger, champion and probe, those that exist, for the table."""
    return [{"kind": kind, **evaluation[kind]} for kind in report_figures.MODELS if evaluation.get(kind)]


def class_rows(evaluation: Values) -> list[dict[str, Any]]:
    """Per class: the challenger's scores with the champion's and the probe's F1, the weakest class first."""
    champion = (evaluation.get("champion") or {}).get("per_class") or {}
    probe = (evaluation.get("probe") or {}).get("per_class") or {}
    rows = []
    for label, scores in (evaluation["challenger"].get("per_class") or {}).items():
        f1 = report_words.number(scores.get("f1"))
        rows.append({
            "label": label, **scores, "f1": f1,
            "champion": gain(f1, champion.get(label)), "probe": gain(f1, probe.get(label)),
        })  # fmt: skip
    return sorted(rows, key=lambda row: (row["f1"] is None, row["f1"] or 0.0, row["label"]))


def gain(f1: float | None, other: Values | None) -> float | None:
    before = report_words.number((other or {}).get("f1"))
    return None if f1 is None or before is None else round(100 * (f1 - before), 1)


def leaderboard(search: Values) -> list[Values]:
    """The best trials first, those without a result last."""
    ranked = sorted(search.get("trials_detail") or [], key=lambda trial: -(report_words.number(trial.get("accuracy")) or -1.0))
    return ranked[:MOST_TRIALS]


def in_order(seconds: Mapping[str, float]) -> dict[str, float]:
    """Steps in the order in which they happen, unknown ones after them."""
    return {name: seconds[name] for name in (*STEPS, *(name for name in seconds if name not in STEPS)) if name in seconds}


def some_samples(samples: Sequence[Values]) -> list[Values]:
    """All samples; of very many, the first of each class before any second."""
    if len(samples) <= MOST_SAMPLES:
        return list(samples)
    seen: Counter[str] = Counter()
    by_turn: dict[int, list[Values]] = {}
    for sample in samples:
        label = str(sample.get("label"))
        by_turn.setdefault(seen[label], []).append(sample)
        seen[label] += 1
    return [sample for turn in sorted(by_turn) for sample in by_turn[turn]][:MOST_SAMPLES]


def with_images(pictures: Sequence[Values]) -> list[dict[str, Any]]:
    """Pictures whose address is a picture inside this page; any other address becomes empty, so that the page asks nobody for it."""
    return [{**one, "image": one["image"] if DATA_URI.fullmatch(str(one.get("image") or "")) else ""} for one in pictures]


def thumbnail(data: bytes, side: int = 96) -> str:
    """A small WebP of an image as a data URI; empty where the bytes are no image that can be read."""
    try:
        small = preprocessing.decode(data, MOST_PIXELS)
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        written = io.BytesIO()
        small.save(written, "WEBP", quality=82)
    except (preprocessing.BadImageError, OSError):  # a missing picture must not cost the report
        return ""
    return "data:image/webp;base64," + base64.b64encode(written.getvalue()).decode("ascii")


def for_script(values: Any) -> Markup:
    """JSON that is safe inside a <script> element, with NaN as null."""
    text = json.dumps(finite(values), separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, float):
        return (
            None if report_words.number(value) is None else float(f"{value:.5g}")
        )  # more digits than a screen shows only make the page heavier
    return value


def when(created_at: str) -> str:
    """An ISO time as a person reads it, in UTC."""
    try:
        moment = datetime.fromisoformat(created_at)
    except ValueError:
        return created_at
    return f"{moment.astimezone(UTC) if moment.tzinfo else moment:%-d %B %Y, %H:%M} UTC"


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "percent": report_words.percent, "rate": report_words.rate, "duration": report_words.duration, "plain": report_words.plain,
        "words": report_words.words_of, "counted": report_words.counted, "number": report_words.number, "when": when,
    }  # fmt: skip
    environment.globals |= {"words_about": report_words}
    return environment
