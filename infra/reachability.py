"""Whether each service answers, in which version and how fast; nothing is started, and a service that does not answer is an answer too."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from infra import addresses, ray_cluster
from infra.errors import ServiceError, UnfreezeError
from infra.patience import GaveUp, Notice, keep_trying
from infra.s3_client import new_client
from infra.settings import ServiceName

TIMEOUT_S = 10.0
ANSWERS_WITHIN_S = 30.0
NEEDED: dict[ServiceName, tuple[str, str]] = {"mlflow": ("MLflow", "MLFLOW_TRACKING_URI"), "prefect": ("Prefect", "PREFECT_API_URL")}
"""Services whose own clients notice late that nobody answers, by name and variable."""


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


def require_answers(named: Mapping[ServiceName, str | None]) -> None:
    """Return when each of these servers answers anything at all: a search takes hours, and MLflow is needed at its end.

    Raises ServiceError naming one that has not answered for half a minute.
    """
    for service, address in named.items():
        if address and address.startswith("http"):
            _require_answer(*NEEDED[service], address)


def _require_answer(name: str, variable: str, address: str) -> None:
    where = f"{name} at {addresses.shown(address)}"

    def attempt() -> None:
        httpx.get(address, timeout=TIMEOUT_S, verify=False)

    try:
        keep_trying(
            attempt, passes_by=lambda error: isinstance(error, httpx.TransportError), deadline_s=ANSWERS_WITHIN_S, notice=Notice(where)
        )
    except GaveUp as error:
        raise ServiceError(
            f"{where} does not answer: {error.__cause__}", f"Check {variable} and that the server is up."
        ) from error.__cause__


def _request(service: ServiceName, status: dict[str, Any]) -> str | None:
    if service == "s3":
        _list_a_bucket(status)
        return None
    if service == "mlflow":
        if not status["uri"].startswith("http"):
            return None  # a database or a folder, which MLflow opens itself
        return _get(f"{status['uri'].rstrip('/')}/version", auth=_mlflow_auth()).strip()
    if service == "prefect":
        return str(json.loads(_get(f"{status['api_url'].rstrip('/')}/admin/version", _prefect_headers(), auth=_prefect_auth())))
    return _ask_ray(status)


def _ask_ray(status: dict[str, Any]) -> str | None:
    """An embedded Ray by its dashboard, another one by its job server or by its head."""
    page = status.get("dashboard_url") or status["address"]
    if not page.startswith("http"):
        ray_cluster.see_todays_variables()
        ray_cluster.require_answer(page)
        return None
    token = status.get("token") or os.environ.get("RAY_AUTH_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return str(json.loads(_get(f"{page.rstrip('/')}/api/version", headers))["ray_version"])


def _mlflow_auth() -> tuple[str, str] | None:
    user, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
    return (user, password) if user and password else None


def _prefect_auth() -> tuple[str, str] | None:
    user, colon, password = os.environ.get("PREFECT_API_AUTH_STRING", "").partition(":")
    return (user, password) if colon else None


def _prefect_headers() -> dict[str, str]:
    key = os.environ.get("PREFECT_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _get(url: str, headers: dict[str, str] | None = None, *, auth: tuple[str, str] | None = None) -> str:
    answer = httpx.get(url, timeout=TIMEOUT_S, headers=headers or {}, auth=auth, follow_redirects=False)
    answer.raise_for_status()
    return answer.text


def _list_a_bucket(status: dict[str, Any]) -> None:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        new_client().list_objects_v2(Bucket=status["bucket"] or "unfreeze", MaxKeys=1)
    except (BotoCoreError, ClientError) as error:
        raise OSError(str(error)) from error
