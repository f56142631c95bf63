"""A lead at the command line and on Prefect's page: request, look, approve, roll back, history; each in one command."""

from __future__ import annotations

import json
import time
import urllib.request
from typing import Any

import pytest

from tests.site import Site

pytestmark = pytest.mark.slow
ENTRY = {"number", "at", "by", "verdict", "from", "to", "reason", "evidence_uri", "approver", "previous_digest", "digest"}
LENIENT = {"promotion": {"min_gain": -1.0, "class_floor": 1.0, "ece_floor": 1.0, "log_loss_floor": 35.0, "probe": "off"}}
"""Rules that every model passes: these tests are about what follows."""
MANUAL = {"promotion": {**LENIENT["promotion"], "approval": "manual", "approver_differs": True}}
ANSWER_WITHIN_S = 600


@pytest.fixture(scope="module")
def first(site: Site) -> dict[str, Any]:
    return site.json("retrain", site.spec("lead", LENIENT))


def history(site: Site, *more: str) -> dict[str, Any]:
    return site.json("history", "lead", *more)


def test_the_first_promotion_is_entry_one_and_the_history_verifies(site: Site, first: dict[str, Any]) -> None:
    assert first["status"] == "promoted"
    answer = history(site, "--verify")
    assert (answer["model"], answer["verified"]) == ("lead", True)
    (entry,) = answer["entries"]
    assert entry.keys() >= ENTRY
    assert (entry["number"], entry["verdict"], entry["from"], entry["to"], entry["approver"]) == (1, "promoted", None, "1", None)
    assert history(site)["verified"] is None
    assert "promoted" in site.run("history", "lead").stdout


def test_a_request_is_approved_by_another_person_and_the_champion_follows(site: Site, first: dict[str, Any]) -> None:
    asked = site.json("retrain", site.spec("lead", MANUAL, search__seed=1), UNFREEZE_USER="ada")
    assert (asked["status"], asked["model"]["version"], asked["model"]["champion_version"]) == ("awaiting_approval", "2", "1")
    request_id = asked["request"]["id"]
    page = urllib.request.urlopen(_artifact(site, asked["page"]), timeout=30).read().decode()
    assert f"unfreeze promote lead --approve {request_id}" in page
    refused = site.run("promote", "lead", "--approve", request_id, expect=2, UNFREEZE_USER="ada")
    assert "another must approve" in refused.stderr
    entry = site.json("promote", "lead", "--approve", request_id, "--reason", "looked at it", UNFREEZE_USER="grace")
    assert entry.keys() >= ENTRY
    assert (entry["verdict"], entry["by"], entry["approver"], entry["from"], entry["to"]) == ("promoted", "ada", "grace", "1", "2")
    assert _states(site, "lead version 2?") == ["COMPLETED"]
    assert _champion(site) == "2"


def test_a_rollback_is_one_command_and_promoting_again_judges_again(site: Site, first: dict[str, Any]) -> None:
    assert "needs a reason" in site.run("rollback", "lead", "--reason", " ", expect=2).stderr
    entry = site.json("rollback", "lead", "--reason", "broke in production")
    assert (entry["verdict"], entry["from"], entry["to"], entry["reason"]) == ("rolled_back", "2", "1", "broke in production")
    assert _champion(site) == "1"
    again = site.json("promote", "lead", "--version", "2", "--reason", "it was the camera")
    assert (again["status"], again["reason"].startswith("it was the camera: ")) == ("awaiting_approval", True)
    rejected = site.json("promote", "lead", "--reject", again["id"], "--reason", "not today", UNFREEZE_USER="grace")
    assert (rejected["verdict"], rejected["to"], rejected["approver"]) == ("rejected", "2", "grace")
    assert _champion(site) == "1"
    assert [row["verdict"] for row in history(site, "--verify")["entries"]] == ["promoted", "promoted", "rolled_back", "rejected"]


def test_an_answer_on_prefects_page_is_carried_out_by_the_worker(site: Site, first: dict[str, Any]) -> None:
    site.json("promote", "lead", "--version", "2", UNFREEZE_USER="ada")
    waiting = next(run for run in _flow_runs(site) if run["name"] == "lead version 2?" and run["state"]["type"] == "PAUSED")
    answer = {"run_input": {"answer": "approve", "by": "grace", "reason": "from the page"}}
    _post(site, f"flow_runs/{waiting['id']}/resume", answer)
    deadline = time.monotonic() + ANSWER_WITHIN_S
    while _champion(site) != "2":
        assert time.monotonic() < deadline
        time.sleep(1)
    assert history(site)["entries"][-1]["approver"] == "grace"


def test_an_alias_moved_by_hand_is_found_by_the_doctor_and_put_back(site: Site, first: dict[str, Any]) -> None:
    from mlflow.tracking import MlflowClient

    MlflowClient(site.status["mlflow"]["uri"]).set_registered_model_alias("lead", "champion", "1")
    found = json.loads(site.run("doctor", "--json", expect=2).stdout)
    assert [row["fixable"] for row in found["findings"] if row["state"] == "wrong"] == [True]
    assert _champion(site) == "1"
    mended = site.json("doctor", "--fix")
    assert mended["healthy"]
    assert _champion(site) == "2"
    MlflowClient(site.status["mlflow"]["uri"]).set_registered_model_alias("lead", "champion", "1")
    predicted = site.run("predict", "lead", site.images / "circle" / "000.png")
    assert "moved by hand" in " ".join(predicted.stderr.split())
    assert _champion(site) == "2"


def test_three_stupid_things_get_one_clear_message_each(site: Site, first: dict[str, Any]) -> None:
    for arguments, words in (
        (("promote", "nothing"), "There is no model 'nothing'"),
        (("promote", "lead", "--approve", "12"), "There is no request '12'"),
        (("promote", "lead", "--version", "99"), "There is no version 99"),
        (("promote", "lead", "--approve", "1", "--version", "2"), "exclude one another"),
        (("rollback", "lead", "--to", "77", "--reason", "x"), "was never champion"),
    ):
        done = site.run(*arguments, expect=2)
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_a_version_that_was_altered_on_s3_neither_serves_again_nor_goes_unnoticed(site: Site, first: dict[str, Any]) -> None:
    bucket, key = site.status["s3"]["bucket"], "models/lead/1/model.safetensors"
    weights = site.s3().get_object(Bucket=bucket, Key=key)["Body"].read()
    site.s3().put_object(Bucket=bucket, Key=key, Body=weights[:-1] + bytes([weights[-1] ^ 1]))
    assert "model.safetensors is altered" in site.run("rollback", "lead", "--to", "1", "--reason", "?", expect=2).stderr
    assert "model.safetensors is altered" in site.run("promote", "lead", "--version", "1", expect=2).stderr
    problems = json.loads(site.run("history", "lead", "--verify", "--json", expect=2).stdout)["problems"]
    assert any("model.safetensors" in problem for problem in problems)
    assert _champion(site) == "2"


def _champion(site: Site) -> str:
    from mlflow.tracking import MlflowClient

    return str(MlflowClient(site.status["mlflow"]["uri"]).get_model_version_by_alias("lead", "champion").version)


def _artifact(site: Site, link: str) -> str:
    """The bytes behind a link to MLflow's page."""
    run_id, _, name = link.partition("/runs/")[2].partition("/artifacts/")
    return f"{site.status['mlflow']['uri']}/get-artifact?path={name}&run_uuid={run_id}"


def _states(site: Site, name: str) -> list[str]:
    return [run["state"]["type"] for run in _flow_runs(site) if run["name"] == name]


def _flow_runs(site: Site) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = _post(site, "flow_runs/filter", {})
    return found


def _post(site: Site, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{site.status['prefect']['api_url']}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())
