"""The decision whether the challenger becomes champion (pure), and the steps that ask for and move the champion alias."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from infra import registry
from infra.committed_folder import read_manifest
from infra.errors import UserError
from infra.object_store import object_store
from ray_jobs.promotion_spec import PromotionSpec
from ray_jobs.spec import Spec
from tasks.policies import effect


@dataclass(frozen=True)
class Decision:
    """Promote or keep, with the figures that decided."""

    status: Literal["promoted", "kept"]
    reason: str
    metric: str
    challenger: float | None
    champion: float | None
    min_gain: float


def decide(promotion: PromotionSpec, challenger: dict[str, Any], champion: dict[str, Any] | None, *, is_champion: bool = False) -> Decision:
    """Judge the challenger's holdout metrics against the champion's.

    The first version is promoted; a later one where it beats the champion by more than `min_gain`. A metric that is
    missing or NaN promotes nothing. `is_champion`: the challenger is the very model that serves.
    """
    metric, min_gain = promotion.metric, promotion.min_gain
    mine, theirs = _finite(challenger.get(metric)), _finite(champion.get(metric)) if champion else None

    def answer(status: Literal["promoted", "kept"], reason: str) -> Decision:
        return Decision(status, reason, metric, mine, theirs, min_gain)

    if is_champion:
        return answer("kept", "this very model already is the champion")
    if mine is None:
        return answer("kept", f"the challenger's {metric} is not a number")
    if champion is None:
        return answer("promoted", "the first version of this model")
    if theirs is None:
        return answer("promoted", f"the champion's {metric} is not a number on this holdout")
    gain = mine - theirs
    words = f"{metric} {mine:.4f} against the champion's {theirs:.4f} ({gain:+.4f}; more than {min_gain:+.4f} is asked for)"
    return answer("promoted" if gain > min_gain else "kept", words)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def plain_decision(decision: Decision) -> dict[str, Any]:
    """The decision as plain values."""
    return asdict(decision)


@effect(name="find champion", timeout_s=300)
def find_champion(spec: Spec) -> dict[str, Any] | None:
    """The version that serves now and the URI of its model folder, or None."""
    found = registry.champion(spec.name)
    if found is None:
        return None
    uri = found.tags.get("unfreeze.artifact_uri", "")
    if not uri or read_manifest(object_store(), uri) is None:
        raise UserError(
            f"The champion, version {found.version} of {spec.name}, has no published model folder ({uri or 'no tag names it'}).",
            "It cannot be judged against: publish it again, or move the alias `champion` to another version.",
        )
    return {"version": found.version, "artifact_uri": uri, "identity": found.tags.get("unfreeze.identity")}


@effect(name="promote", timeout_s=300)
def promote(spec: Spec, version: str, decision: dict[str, Any], believed_champion: str | None) -> str | None:
    """Let the alias challenger name the new version, and champion too where it was promoted; the version that serves.

    Raises UserError where another champion came in between: the decision was made against one that no longer serves.
    """
    current = registry.champion(spec.name)
    current_version = current.version if current else None
    registry.set_alias(spec.name, registry.CHALLENGER, version)
    if decision["status"] != "promoted" or current_version == version:
        return current_version
    if current_version != believed_champion:
        raise UserError(
            f"Version {current_version} of {spec.name} became champion while version {version} was judged against {believed_champion}.",
            "Run the same command again: it judges against the new champion, and computes nothing twice.",
        )
    registry.set_alias(spec.name, registry.CHAMPION, version)
    return version
