"""A run's account: each step with what it took, whatever became of it, and the rest as orchestration."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.context import FlowRunContext

from infra import logs, newest, usage
from infra.errors import ServiceError
from infra.object_store import object_store
from infra.usage import Usage
from ray_jobs.spec import Spec
from ray_jobs.spec_file import parse_spec
from tasks import accounts
from tasks.accounts import of_run, of_step, with_account
from tasks.policies import _accounted

CONTENT = {"name": "shapes", "data": {"source": "images"}, "backbone": {"name": "resnet18"}}
SPEC = parse_spec(CONTENT)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: Any) -> Path:
    monkeypatch.setenv("UNFREEZE_HOME", str(tmp_path))
    return tmp_path


def metrics(home: Path, run_id: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((home / "runs" / f"{run_id}.json").read_text())
    assert json.loads(object_store().read(f"s3://unfreeze/runs/shapes/{run_id}/metrics.json")) == found
    return found


def work(size: int, *, fails: bool = False) -> dict[str, Any]:
    usage.add(Usage(s3_read_bytes=size, gpu_s=1.5))
    if fails:
        raise ServiceError("S3 is away.")
    return {"size": size}


def test_a_run_tells_each_step_and_what_none_of_them_took(home: Path) -> None:
    with of_run("retrain", SPEC, "r1") as run:
        with of_step("prepare data"):
            work(10)
        accounts.kept("search")
        with pytest.raises(ServiceError), of_step("fit"):
            work(1, fails=True)
        with of_step("fit"):
            work(2)
        run.status = "promoted"
    found = metrics(home, "r1")
    steps = {step["step"]: step for step in found["steps"]}
    assert [step["step"] for step in found["steps"]] == ["prepare data", "search", "fit"]
    assert {name: step["state"] for name, step in steps.items()} == {"prepare data": "computed", "search": "kept", "fit": "computed"}
    assert {name: step["s3_read_bytes"] for name, step in steps.items()} == {"prepare data": 10, "search": 0, "fit": 3}
    assert (steps["fit"]["retries"], steps["fit"]["gpu_s"]) == (1, 3.0)
    assert found["status"] == "promoted"
    orchestration = found["orchestration"]
    assert orchestration["seconds"] == pytest.approx(found["seconds"] - found["in_steps_s"], abs=0.002)
    parts = ("start_s", "services_s", "flow_s", "between_steps_s")
    assert sum(orchestration[part] for part in parts) == pytest.approx(orchestration["seconds"], abs=0.01)


def test_a_run_that_fails_leaves_its_metrics_and_its_log(home: Path) -> None:
    with logs.to_file(home / "command.jsonl"), pytest.raises(ServiceError), of_run("retrain", SPEC, "r2"), of_step("fit"):
        work(1, fails=True)
    assert (metrics(home, "r2")["status"], metrics(home, "r2")["steps"][0]["state"]) == ("failed", "failed")
    lines = [json.loads(line) for line in object_store().read("s3://unfreeze/runs/shapes/r2/log.jsonl").splitlines()]
    assert {line["flow_run_id"] for line in lines} == {"r2"}
    failed = next(line for line in lines if line["what"].startswith("step failed"))
    assert (failed["step"], failed["error"]) == ("fit", "ServiceError")


def test_the_home_keeps_the_accounts_of_the_last_runs(home: Path) -> None:
    (home / "runs").mkdir()
    for number in range(newest.KEPT):
        (home / "runs" / f"old-{number}.json").touch()
        os.utime(home / "runs" / f"old-{number}.json", (number, number))
    with of_run("retrain", SPEC, "r3"):
        pass
    kept = {path.name for path in (home / "runs").iterdir()}
    assert (len(kept), "old-0.json" in kept, "r3.json" in kept) == (newest.KEPT, False, True)


def test_a_store_that_is_away_takes_nothing_from_the_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "KEEP_S", 0.2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    object_store.cache_clear()
    with of_run("retrain", SPEC, "r3"):
        pass
    object_store.cache_clear()
    assert json.loads((home / "runs" / "r3.json").read_text())["flow_run_id"] == "r3"


def test_a_step_that_tells_says_what_this_attempt_took() -> None:
    told = _accounted("fit", work, tells=True)(5)
    assert (told["size"], told["used"]["s3_read_bytes"], told["used"]["gpu_s"]) == (5, 5, 1.5)
    assert told["seconds"] >= 0
    assert {metric.name: metric.value for metric in accounts.metrics_of(told)}["s3_read_bytes"] == 5.0
    assert accounts.metrics_of({"seconds": 1.0}) == []
    assert _accounted("note", work, tells=False)(5) == {"size": 5}


def plain(spec: Spec) -> dict[str, Any]:
    """A flow's function."""
    return {"status": "kept", "name": spec.name}


def test_an_accounted_flow_has_the_parameters_of_its_function_and_outside_a_run_is_the_function() -> None:
    accounted = with_account(plain)
    assert flow(accounted).validate_parameters({"spec": CONTENT}) == {"spec": SPEC}
    assert FlowRunContext.get() is None
    assert accounted(SPEC) == {"status": "kept", "name": "shapes"}
