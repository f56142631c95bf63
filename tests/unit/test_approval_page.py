"""What a person reads on the page of a request, and the worker's environment: no server runs here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import services, stack_worker
from infra.settings import SERVICES
from tasks.approval_page import Answer, page_text

REQUEST: dict[str, Any] = {
    "id": "ab12",
    "model": "emoji",
    "version": "3",
    "champion_version": "2",
    "by": "ann",
    "at": "2026-11-21T22:07:38.353238+00:00",
    "expires_at": "2026-11-28T23:07:38+01:00",
    "reason": "accuracy +3.1 points",
    "evidence_uri": "s3://unfreeze/evidence/1",
    "storage": "s3://unfreeze",
    "page": "https://team.example/report.html",
}


def test_the_page_says_who_asks_for_what_and_why_and_where_to_read_more() -> None:
    assert (
        page_text(REQUEST)
        == """### Should version 3 of emoji serve?

- **asked by** ann, 2026-11-21 22:07 UTC; expires 2026-11-28 22:07 UTC
- **serves now:** version 2
- **verdict of the gate:** accuracy +3.1 points
- **report:** [the report](https://team.example/report.html)
- **evidence:** `s3://unfreeze/evidence/1`

Answer here (**Resume**), or run `unfreeze promote emoji --approve ab12` (or `--reject`).
"""
    )


def test_a_first_version_and_a_report_that_no_browser_opens_are_said_so() -> None:
    told = page_text(REQUEST | {"champion_version": None, "page": "s3://unfreeze/report.html"})
    assert "**serves now:** nothing" in told
    assert "**report:** `s3://unfreeze/report.html`" in told


@given(st.text(), st.sampled_from(["by", "reason", "page"]))
def test_a_persons_text_makes_no_line_and_no_link_of_its_own(text: str, where: str) -> None:
    told = page_text(REQUEST | {where: "x" + text + "[a](http://b) <script> **c**"})
    assert len(told.splitlines()) == len(page_text(REQUEST).splitlines())
    assert "[a](http://b)" not in told.replace("`", "\n") or where == "page"
    assert "<script>" not in told or where == "page"


def test_the_form_asks_for_a_choice_and_a_name() -> None:
    schema = Answer.model_json_schema()
    assert schema["properties"]["answer"]["enum"] == ["approve", "reject"]
    assert schema["required"] == ["answer", "by"]


def test_the_worker_gets_the_teams_services_but_no_address_of_the_embedded_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = services.Site(tmp_path, "key", "secret", {"s3": 1, "mlflow": 2, "prefect": 3}, "")
    for service in ("s3", "mlflow", "prefect"):
        for name, value in services.client_environment(service, site).items():
            monkeypatch.setenv(name, value or "")
    monkeypatch.setenv("RAY_ADDRESS", "team:6379")
    monkeypatch.setenv("UNFREEZE_WEBHOOK_SECRET", "theirs")
    monkeypatch.setenv("UNFREEZE_HOME", str(tmp_path))
    monkeypatch.setenv("UNFREEZE_CACHE_DIR", "cache")
    monkeypatch.chdir(tmp_path)
    given = stack_worker.environment(site, [service for service in SERVICES if service != "ray"])
    assert not {"AWS_ENDPOINT_URL", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_URI"} & {*given}
    assert given["PREFECT_API_URL"] == "http://127.0.0.1:3/api"
    assert (given["RAY_ADDRESS"], given["UNFREEZE_WEBHOOK_SECRET"]) == ("team:6379", "theirs")
    assert (given["UNFREEZE_HOME"], given["UNFREEZE_CACHE_DIR"]) == (str(tmp_path), str(tmp_path / "cache"))
