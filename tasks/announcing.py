"""The steps that show a result on Prefect's page: a summary, the leaderboard, a link to the report."""

from __future__ import annotations

from typing import Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from ray_jobs.spec import Spec
from tasks.notifying import send
from tasks.policies import effect

MOST_ROWS = 100


@effect(name="announce", timeout_s=120)
def announce(name: str, outcome: dict[str, Any], trials: list[dict[str, Any]], report_link: str) -> None:
    """Create the flow run's artifacts."""
    create_markdown_artifact(summary(outcome), key=_key(name, "summary"), description=f"What the retraining of {name} found")
    _leaderboard(name, trials)
    create_link_artifact(
        report_link, link_text="The report", key=_key(name, "report"), description="Search, learning curves, evaluation, mistakes"
    )


@effect(name="notify", timeout_s=120)
def notify(spec: Spec, settled: dict[str, Any]) -> str | None:
    """Send what was settled to `promotion.webhook`, if there is one; why it did not arrive, or None."""
    return send(spec.promotion.webhook, spec.name, settled)


@effect(name="announce search", timeout_s=120)
def announce_search(name: str, trials: list[dict[str, Any]], report_link: str) -> None:
    """Create the artifacts of a search's flow run."""
    _leaderboard(name, trials)
    said = "Landscape, learning curves, cost against accuracy, what was stopped and why"
    create_link_artifact(report_link, link_text="The report", key=_key(name, "search-report"), description=said)


def _leaderboard(name: str, trials: list[dict[str, Any]]) -> None:
    rows = sorted(trials, key=lambda trial: -(trial["accuracy"] or 0.0))[:MOST_ROWS]
    columns = ("unfreeze_depth", "lr", "accuracy", "epochs", "status", "seconds")
    table = [{column: row[column] for column in columns} for row in rows]
    create_table_artifact(table, key=_key(name, "leaderboard"), description="Trials, best first")


def _key(name: str, what: str) -> str:
    """An artifact's key: lower case letters, digits and dashes."""
    return "".join(character if character.isalnum() else "-" for character in name.lower()).strip("-") + f"-{what}"


def summary(outcome: dict[str, Any]) -> str:
    """A few lines of Markdown."""
    model, best, scores = outcome["model"], outcome["search"]["best"], outcome["evaluation"]["challenger"]
    backbone = f"{best['backbone']}, " if "backbone" in best else ""
    return f"""## {model["name"]} version {model["version"]}: {outcome["status"]}

- serving: version {model["champion_version"]}
- holdout accuracy **{scores["accuracy"]:.1%}**, macro F1 {scores["macro_f1"]:.3f}, ECE {scores["ece"]:.3f}
- best of {outcome["search"]["trials"]} trials: {backbone}unfreeze depth {best["unfreeze_depth"]}, learning rate {best["lr"]:.2g}
- published: `{outcome["publish"]["uri"]}`
- report: `{outcome["report"]}`
"""
