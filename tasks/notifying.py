"""Telling a team's own systems of a decision: a signed POST to the webhook of the spec. It never undoes a promotion."""

from __future__ import annotations

from typing import Any

from infra import progress, settings, webhook


def send(url: str | None, model: str, settled: dict[str, Any]) -> str | None:
    """Send a decision where there is a `url`; a failure is told, and returned in words."""
    if url is None:
        return None
    problem = webhook.notify(url, decision(model, settled), settings.webhook_secret())
    if problem:
        progress.say(f"[yellow]note:[/] the webhook did not get the decision: {problem}. The decision stands.")
    return problem


def decision(model: str, settled: dict[str, Any]) -> dict[str, Any]:
    """The body: the model, the status, who serves now, and the ledger's entry or the request for approval."""
    digest = (settled["entry"] or {}).get("digest") or (settled["request"] or {}).get("id")
    return {"model": model, "digest": digest, **{key: settled.get(key) for key in ("status", "serving", "entry", "request", "page")}}
