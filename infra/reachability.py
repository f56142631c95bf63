"""Whether each service answers, in which version and how fast; nothing is started, and a service that does not answer is an answer too."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import httpx

from infra.errors import UnfreezeError
from infra.s3_client import new_client
from infra.settings import ServiceName

TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Answer:
    """What a service said: its version where it tells one, the milliseconds of a second request, or why there was no answer."""

    version: str | None = None
    latency_ms: float | None = None
    problem: str | None = None


def ask(service: ServiceName, status: dict[str, Any]) -> Answer:
    """Ask a service; `status` is its part of `unfreeze status`."""
    try:
        version = _request(service, status)
        started = time.perf_counter()
        _request(service, status)
        return Answer(version, 1000 * (time.perf_counter() - started))
    except (httpx.HTTPError, UnfreezeError, ValueError, OSError) as error:
        return Answer(problem=str(error) or type(error).__name__)


def _request(service: ServiceName, status: dict[str, Any]) -> str | None:
    if service == "s3":
        _list_a_bucket(status)
        return None
    if service == "mlflow":
        return _get(f"{status['uri'].rstrip('/')}/version").strip()
    if service == "prefect":
        return str(json.loads(_get(f"{status['api_url'].rstrip('/')}/admin/version")))
    if status.get("dashboard_url"):
        headers = {"Authorization": f"Bearer {status['token']}"} if status.get("token") else {}
        return str(json.loads(_get(f"{status['dashboard_url']}/api/version", headers))["ray_version"])
    return None


def _get(url: str, headers: dict[str, str] | None = None) -> str:
    answer = httpx.get(url, timeout=TIMEOUT_S, headers=headers or {}, follow_redirects=False)
    answer.raise_for_status()
    return answer.text


def _list_a_bucket(status: dict[str, Any]) -> None:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        new_client().list_objects_v2(Bucket=status["bucket"] or "unfreeze", MaxKeys=1)
    except (BotoCoreError, ClientError) as error:
        raise OSError(str(error)) from error
