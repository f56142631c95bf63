"""The report of a retraining: one self-contained HTML page that says what was found, what serves now, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks import report_figures, report_promotion, report_search, report_words
from tasks.report_page import KeyFigure, render_page
from tasks.report_pictures import DATA_URI, thumbnail, with_images
from tasks.report_promotion_content import PromotionContent
from tasks.report_words import Values

__all__ = ["DATA_URI", "ReportContent", "render", "thumbnail"]

MOST_SAMPLES, MOST_MISTAKES, MOST_ROWS = 60, 48, 20
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
    features: dict[str, Any]
    promotion: dict[str, Any] | None = None  # the values of a PromotionContent by name


def render(content: ReportContent) -> str:
    """The whole page as text."""
    promotion = PromotionContent(**content.promotion) if content.promotion else None
    return render_page(
        "report.html.j2",
        spec=content.spec,
        figures=figures(content) | (report_promotion.figures(promotion) if promotion else {}),
        promotion=report_promotion.section(promotion) if promotion else None,
        content=content,
        classes=[str(label) for label in content.dataset["classes"]],
        key_figures=key_figures(content),
        models=report_promotion.models(content.evaluation),
        class_rows=class_rows(content.evaluation),
        samples=with_images(some_samples(content.samples)),
        mistakes=with_images(content.mistakes)[:MOST_MISTAKES],
        most_rows=MOST_ROWS,
        **report_search.section(content.search, content.spec, content.dataset, content.features),
    )


def figures(content: ReportContent) -> dict[str, report_figures.Figure | None]:
    """Every figure by name, the search's among them."""
    evaluation = content.evaluation
    return {
        "comparison": report_figures.comparison(evaluation),
        **report_search.figures(content.search),
        "fit": report_figures.fit_curves(content.fit, content.search.get("probe") or {}),
        "confusion": report_figures.confusion_matrix(evaluation["challenger"], [str(label) for label in content.dataset["classes"]]),
        "calibration": report_figures.calibration(evaluation),
        "counts": report_figures.class_counts(content.stats),
        "seconds": report_figures.step_seconds(in_order(content.seconds)),
    }


def key_figures(content: ReportContent) -> list[KeyFigure]:
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
