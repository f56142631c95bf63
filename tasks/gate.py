"""The gate: from the evidence on challenger and champion to a decision with reasons (pure).

Not by itself a step: a caller makes the evidence and carries the decision out. Why the rules are as they are: docs/adr/0010.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ray_jobs.promotion_spec import PromotionSpec
from tasks import gate_rules as rules
from tasks.gate_evidence import Evidence, Facts, Scores, facts
from tasks.gate_rules import Figure, RuleResult

__all__ = ["Evidence", "Figure", "Judgement", "RuleResult", "Scores", "judge", "plain_judgement"]

NEEDS_A_CHAMPION = {"size", "overlap", "probe"}
"""Rules that only warn about a first version: nothing serves that it could be worse than."""


@dataclass(frozen=True)
class Judgement:
    """Promote or keep, in one sentence, with what each rule said."""

    status: Literal["promoted", "kept"]
    reason: str
    metric: str
    challenger: float | None
    champion: float | None
    min_gain: float
    rules: tuple[RuleResult, ...] = ()


def judge(evidence: Evidence, promotion: PromotionSpec, *, seed: int = 0) -> Judgement:
    """Whether the challenger is to replace the champion: it is where no rule refuses.

    The answer depends on nothing but the arguments, and not on the order of images and classes. A first version is promoted
    if it answers every image with numbers; what else speaks against it is a warning.
    """
    if evidence.is_champion:
        return Judgement("kept", "this very model already is the champion", promotion.metric, None, None, promotion.min_gain)
    found = facts(evidence)
    results = _results(found, promotion, seed)
    refused = any(not result.passed for result in results)
    challenger, champion = (rules.metric_of(found, model, promotion.metric) for model in (found.challenger, found.champion))
    return Judgement(
        "kept" if refused else "promoted", _reason(found, results), promotion.metric, challenger, champion, promotion.min_gain, results
    )


def _results(found: Facts, promotion: PromotionSpec, seed: int) -> tuple[RuleResult, ...]:
    enough = rules.size(found, promotion)
    if not found.images:
        return (enough,)  # of nothing there is nothing to say; not even a first version has shown that it works
    results = (
        rules.numbers(found),
        enough,
        rules.overlap(found, promotion),
        rules.gain(found, promotion, seed),
        rules.classes(found, promotion),
        rules.calibration(found, promotion, seed),
        rules.slices(found, promotion),
        rules.probe(found, promotion, seed),
    )
    if found.champion is not None:
        return results
    return tuple(replace(r, outcome="warned") if r.name in NEEDS_A_CHAMPION and not r.passed else r for r in results)


def _reason(found: Facts, results: tuple[RuleResult, ...]) -> str:
    """What refused, or why it is promoted; then what is only a warning."""
    refused = [result.words for result in results if not result.passed]
    warned = [result.words for result in results if result.outcome == "warned"]
    promoted = "the first version of this model"
    if found.champion is not None:
        promoted = "".join(result.words for result in results if result.name == "gain")
    return "; ".join([*(refused or [promoted]), *(f"warning: {words}" for words in warned)])


def plain_judgement(judgement: Judgement) -> dict[str, Any]:
    """The judgement as plain values, each rule with whether it passed."""
    content = asdict(judgement)
    content["rules"] = [row | {"passed": rule.passed} for row, rule in zip(content["rules"], judgement.rules, strict=True)]
    return content
