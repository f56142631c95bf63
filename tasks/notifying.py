"""The step that tells a team's own systems of a decision: a signed POST to the webhook of the spec. It never undoes a promotion."""

from __future__ import annotations

from typing import Any

from infra import progress, settings, webhook
from ray_jobs.spec import Spec
from tasks.policies import effect


@effect(name="notify", timeout_s=120)
def notify(spec: Spec, settled: dict[str, Any]) -> str | None:
    """Send what was settled to `promotion.webhook`, if there is one; why it did not arrive, or None."""
    return send(spec.promotion.webhook, spec.name, settled)


def send(url: str | None, model: str, settled: dict[str, Any]) -> str | None:
    """Send a decision; a failure is told, and returned in words."""
    if url is None:
        return None
    problem = webhook.notify(url, decision(model, settled), settings.webhook_secret())
    if problem:
        progress.say(f"[yellow]note:[/] the webhook {url} did not get the decision: {problem}. The decision stands.")
    return problem


def decision(model: str, settled: dict[str, Any]) -> dict[str, Any]:
    """The body: the model, the status, who serves now, and the ledger's entry or the request for approval."""
    digest = (settled["entry"] or {}).get("digest") or (settled["request"] or {}).get("id")
    return {"model": model, "digest": digest, **{key: settled.get(key) for key in ("status", "serving", "entry", "request", "page")}}
