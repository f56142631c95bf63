"""The step that judges a version against the champion: it gathers the evidence, asks the gate, and keeps both for good.

What is kept: `evidence/NAME/DIGEST/` (judgement.json), whose digest goes into the ledger, with that of the evaluation it rests on.
"""

from __future__ import annotations

import json
import secrets
from typing import Any

from infra import progress, settings
from infra.committed_folder import commit
from infra.object_store import ObjectStore, join_uri, object_store
from ray_jobs.spec import Spec, digest_of
from tasks.lineage import JUDGEMENT, manifest_digest, weights_digest
from tasks.policies import effect


def asked_by_retraining(spec: Spec, dataset: dict[str, Any], fit: dict[str, Any]) -> dict[str, Any]:
    """The question whether a retraining's model is to serve: asked once, however often the same retraining is started."""
    return {"request": digest_of([spec.digest, dataset["version"], fit["fit_id"]]), "by": settings.user(), "reason": ""}


def asked_by_person(reason: str) -> dict[str, Any]:
    """The question of a person who wants a version judged: a new one each time."""
    return {"request": secrets.token_hex(16), "by": settings.user(), "reason": reason}


def candidate_of(model: dict[str, Any], fit: dict[str, Any], lineage: dict[str, Any]) -> dict[str, Any]:
    """A version that was registered just now, as `judge_version` takes it."""
    return {**model, "model_uri": fit["model_uri"], "trained_on": lineage["trained_on"], "code": lineage["code"]}


def roles(model_uri: str, probe_uri: str | None, champion: dict[str, Any]) -> dict[str, str]:
    """The model folders to score together, by role."""
    given = {"challenger": model_uri, "probe": probe_uri, "champion": champion["artifact_uri"]}
    return {role: uri for role, uri in given.items() if uri}


@effect(name="judge", timeout_s=1800)
def judge_version(
    spec: Spec, dataset: dict[str, Any], evaluation: dict[str, Any], model: dict[str, Any], champion: dict[str, Any], asked: dict[str, Any]
) -> dict[str, Any]:
    """The verdict on a version, with everything that the page, the ledger and an approver need to know.

    `model`: its name, version, `model_uri` (where its weights lie), `trained_on` and `code`. `asked`: the question's `request`, `by` whom
    and `reason`.
    """
    from tasks.evidence import gather  # these load scikit-learn and scipy, 3 s that no command's start is to wait for
    from tasks.gate import judge, plain_judgement

    store, is_champion = object_store(), champion["version"] == model["version"]
    with progress.step("Judging"):
        lineages = {"challenger": model["trained_on"], "champion": champion["trained_on"]}
        gathered = gather(spec, dataset, evaluation, lineages, is_champion=is_champion)
        judgement = plain_judgement(judge(gathered.evidence, spec.promotion))
        found = {
            "version": model["version"],
            "champion_version": champion["version"],
            "judgement": judgement,
            "holdout": gathered.holdout,
            "overlap": gathered.overlap,
            "unchecked": gathered.unchecked,
            "evaluation": {"uri": evaluation["uri"], "digest": manifest_digest(store, evaluation["uri"])},
            "promotion": spec.promotion.shown,
        }
        evidence_uri = keep_evidence(store, spec, found)
    digests = {
        "data": dataset["version"],
        "holdout": gathered.holdout["digest"],
        "spec": spec.digest,
        "code": model["code"],
        "weights": weights_digest(store, model["model_uri"]),
        "evidence": manifest_digest(store, evidence_uri),
        "request": asked["request"],
    }
    return {
        **found,
        "status": status_of(spec, judgement, is_champion=is_champion),
        "is_champion": is_champion,
        "scores": evaluation["evaluation"],
        "rows": gathered.rows,
        "evidence_uri": evidence_uri,
        "digests": digests,
        "asked": asked,
    }


def status_of(spec: Spec, judgement: dict[str, Any], *, is_champion: bool) -> str:
    asks = judgement["status"] == "promoted" and spec.promotion.approval == "manual" and not is_champion
    return "awaiting_approval" if asks else str(judgement["status"])


def keep_evidence(store: ObjectStore, spec: Spec, found: dict[str, Any]) -> str:
    """Commit the evidence under a name made of its content; what is there already is left as it is."""
    data = json.dumps(found, indent=1, sort_keys=True).encode()
    uri = join_uri(spec.storage, "evidence", spec.name, digest_of(found))
    commit(store, uri, {JUDGEMENT: data})
    return uri
