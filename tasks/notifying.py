"""Telling a team's own systems of a decision: a signed POST to the webhook of the spec. It never undoes a promotion."""

from __future__ import annotations

from typing import Any

from prefect.utilities.urls import url_for

from infra import progress, settings, webhook


def send(url: str | None, model: str, settled: dict[str, Any]) -> str | None:
    """Send a decision where there is a `url`; a failure is told, and returned in words."""
    if url is None:
        return None
    problem = webhook.notify(url, decision(model, settled), settings.webhook_secret())
    if problem:
        progress.say(f"[yellow]note:[/] the webhook did not get the decision: {problem} The decision stands.")
    return problem


def decision(model: str, settled: dict[str, Any]) -> dict[str, Any]:
    """The body: the model, the status, who serves now, and the ledger's entry or the request for approval."""
    digest = (settled["entry"] or {}).get("digest") or (settled["request"] or {}).get("id")
    return {"model": model, "digest": digest, **{key: settled.get(key) for key in ("status", "serving", "entry", "request", "page")}}


def tell_of_failure(url: str | None, model: str, words: str, flow_run_id: str) -> None:
    """Tell of a scheduled retraining that has failed for good, where the team listens; what does not arrive is said."""
    if url is None:
        return
    told = {
        "model": model,
        "status": "failed",
        "reason": words,
        "flow_run_id": flow_run_id,
        "page": url_for("flow-run", obj_id=flow_run_id),
    }
    problem = webhook.notify(url, told, settings.webhook_secret())
    if problem:
        progress.say(f"[yellow]note:[/] nobody got the news of the failure: {problem}")
