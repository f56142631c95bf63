"""The report's part about the search, and the page of a search without a retraining, which holds little else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tasks import report_cost_figures, report_search_figures, report_search_words, report_words
from tasks.report_figures import Figure
from tasks.report_page import KeyFigure, render_page
from tasks.report_words import Values, duration, number, percent, points, rate

MOST_TRIALS = 50


@dataclass(frozen=True, kw_only=True)
class SearchContent:
    """Everything the page of a search says, as plain values from the other steps."""

    name: str
    spec: dict[str, Any]
    versions: dict[str, str]
    git_commit: str | None
    dataset: dict[str, Any]
    search: dict[str, Any]
    features: dict[str, Any]

    @property
    def created_at(self) -> str:
        """When the last trial ended, ISO 8601 UTC."""
        trials = self.search.get("trials_detail") or []
        ends = [(number(t.get("started_at")) or 0.0) / 1000 + (number(t.get("seconds")) or 0.0) for t in trials]
        return datetime.fromtimestamp(max(ends, default=0.0), UTC).isoformat(timespec="seconds")


def render(content: SearchContent) -> str:
    """The whole page as text, the same for the same content."""
    return render_page(
        "report_of_search.html.j2",
        spec=content.spec,
        figures=figures(content.search),
        content=content,
        key_figures=key_figures(content),
        **section(content.search, content.spec, content.dataset, content.features),
    )


def section(search: Values, spec: Values, dataset: Values, features: Values) -> dict[str, Any]:
    """What the template of the search's part shows besides the figures."""
    max_epochs = number((spec.get("search") or {}).get("max_epochs"))
    return {
        "search": search,
        "hovers": report_search_figures.descriptions(search),
        "trials": leaderboard(search),
        "varied": report_search_words.varied(search),
        "front": report_cost_figures.named_front(search),
        "judgements": report_search_words.judgements(search),
        "failures": report_search_words.failures(search),
        "stopping_said": report_search_words.how_it_was_stopped(search, int(max_epochs) if max_epochs else None),
        "sharing_said": report_search_words.sharing_said(search, features, dataset),
    }


def figures(search: Values) -> Mapping[str, Figure | None]:
    """The search's figures by name."""
    return {
        "landscape": report_search_figures.landscape(search),
        "depths": report_search_figures.accuracy_by_depth(search),
        "curves": report_search_figures.learning_curves(search),
        **report_search_figures.by_dimension(search),
        "front": report_cost_figures.cost_against_accuracy(search),
        "ended": report_cost_figures.how_trials_ended(search),
        "estimate": report_cost_figures.estimate(search),
        "flops": report_cost_figures.flops_saved(search),
    }


def key_figures(content: SearchContent) -> list[KeyFigure]:
    """The handful of numbers that a researcher looks at first."""
    search = content.search
    best, probe, cost = search.get("best") or {}, search.get("probe") or {}, search.get("cost") or {}
    accuracy, images = number(best.get("accuracy")), int(number(content.dataset.get("val")) or 0)
    low, high = report_words.wilson(accuracy, images)
    shared, without = number(cost.get("flops")), number(cost.get("flops_without_sharing"))
    gained = points(accuracy, probe.get("accuracy")).removesuffix(" points")
    return [
        ("Best val accuracy", percent(accuracy), f"95% interval {100 * low:.0f}–{100 * high:.0f}%"),
        ("Best depth", str(best.get("unfreeze_depth", "–")), f"learning rate {rate(best.get('lr'))}"),
        ("Against the probe", gained, f"points; the probe has {percent(probe.get('accuracy'))}"),
        ("k-NN", percent(probe.get("knn_accuracy")), "the features without training"),
        ("Trials", f"{int(search.get('trials') or 0):,}", f"in {duration(search.get('seconds'))}"),
        ("Saved by sharing", f"{without / shared:.1f} ×" if shared and without else "–", "fewer FLOPs by one prefix pass"),
    ]


def leaderboard(search: Values) -> list[Values]:
    """The best trials first, those without a result last."""
    ranked = sorted(search.get("trials_detail") or [], key=lambda trial: -(number(trial.get("accuracy")) or -1.0))
    return ranked[:MOST_TRIALS]
