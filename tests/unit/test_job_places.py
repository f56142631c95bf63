"""Which address sends a step's work to a cluster as a job, and what of this process goes with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import job_server, settings
from infra.errors import LedgerConflict, ServiceError, UserError
from infra.object_store import S3ObjectStore, object_store
from ray_jobs import job_environment
from ray_jobs.job_objects import JobError, JobObjects, Progress, error_of
from tasks.ray_job import _require_reachable_store

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", job_server.JOB_SERVER):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("address", [None, "", "auto", "local", "127.0.0.1:6379", "localhost:6379"])
def test_on_this_machine_the_process_connects_itself(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert job_server.named() is None


@pytest.mark.parametrize("address", ["http://head:8265", "https://ray.example.com", "http://127.0.0.1:8265", "head:6379", "10.0.0.5:6379"])
def test_a_job_server_or_a_cluster_elsewhere_gets_jobs(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert job_server.named() == address


def test_the_loopback_of_this_machine_is_told_from_that_of_another() -> None:
    assert job_server._is_of_this_machine("127.0.0.1")
    assert not job_server._is_of_this_machine("198.51.100.7")
    assert not job_server._is_of_this_machine("no.such.host.invalid")


def test_rays_own_variable_for_the_job_server_goes_first_and_makes_ray_the_teams_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(job_server.JOB_SERVER, "http://head:8265/")
    assert job_server.named() == "http://head:8265"
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert job_server.named() == "http://head:8265"
    assert settings.load().external("ray") == "http://head:8265/"


def test_rays_client_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(UserError, match="http://HOST:8265"):
        job_server.named()


class _Server:
    """Where a job server is."""

    def __init__(self, address: str) -> None:
        self.address, self.is_on_loopback = address, "127.0.0.1" in address


def test_a_cluster_elsewhere_is_not_sent_to_an_s3_of_this_machine() -> None:
    here = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9000"}
    with pytest.raises(UserError, match="cannot reach the S3 at"):
        _require_reachable_store(_Server("http://head:8265"), here)  # type: ignore[arg-type]
    _require_reachable_store(_Server("http://127.0.0.1:8265"), here)  # type: ignore[arg-type]
    _require_reachable_store(_Server("http://head:8265"), {"AWS_ENDPOINT_URL": "https://s3.example.com"})  # type: ignore[arg-type]
    _require_reachable_store(_Server("http://head:8265"), {})  # type: ignore[arg-type]


def test_keys_travel_and_files_of_this_machine_do_not() -> None:
    environment = {"AWS_ACCESS_KEY_ID": "K", "AWS_CA_BUNDLE": "/a", "AWS_PROFILE": "me", "UNFREEZE_CACHE_DIR": "/scratch", "PATH": "/bin"}
    assert job_environment.given(environment) == {"AWS_ACCESS_KEY_ID": "K", "UNFREEZE_CACHE_DIR": "/scratch"}


def test_a_process_of_a_job_takes_the_callers_keys_and_none_of_the_machines_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / job_environment.FILE).write_text(json.dumps({"AWS_ACCESS_KEY_ID": "K", "AWS_SECRET_ACCESS_KEY": "S"}))
    monkeypatch.setattr(job_environment, "__file__", str(tmp_path / "ray_jobs" / "job_environment.py"))
    environment = {"AWS_SESSION_TOKEN": "the machine's", "AWS_CA_BUNDLE": "/its/own", "HOME": str(tmp_path)}
    monkeypatch.setattr(job_environment.os, "environ", environment)
    job_environment.take()
    assert environment == {
        "AWS_ACCESS_KEY_ID": "K", "AWS_SECRET_ACCESS_KEY": "S", "AWS_CA_BUNDLE": "/its/own", "HOME": str(tmp_path),
        "UNFREEZE_CACHE_DIR": str(tmp_path / ".cache" / "unfreeze"), job_environment.PYTHON: sys.executable,
    }  # fmt: skip


@pytest.fixture(scope="module")
def store(s3_server: dict[str, str]) -> S3ObjectStore:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.items():
            patch.setenv(name, value)
        object_store.cache_clear()
        found = object_store()
    object_store.cache_clear()
    return found


@hypothesis.settings(max_examples=25)  # each speaks to a server
@given(st.dictionaries(st.text(), JSON), st.lists(st.text()))
def test_what_a_job_is_asked_and_answers_arrives_as_it_was(store: S3ObjectStore, values: dict[str, object], lines: list[str]) -> None:
    objects = JobObjects(store, "s3://unfreeze/jobs/one")
    objects.ask("module:name", values)
    assert objects.request() == ("module:name", values)
    assert (objects.told(), objects.outcome()) == (Progress(), None)  # nothing of the example before is left
    objects.tell(Progress(1, 2, lines))
    objects.succeed(values, lines, {"cpu_s": 1.5})
    answered = {"result": values, "said": lines, "used": {"cpu_s": 1.5}}
    assert (objects.told(), objects.outcome()) == (Progress(1, 2, lines), answered)
    objects.delete()
    assert list(store.list("s3://unfreeze/jobs/one")) == []


@pytest.mark.parametrize("error", [UserError("a", "b"), ServiceError("ä", ""), LedgerConflict("c", "d")])
def test_an_error_of_ours_arrives_as_itself(store: S3ObjectStore, error: UserError) -> None:
    objects = JobObjects(store, "s3://unfreeze/jobs/two")
    objects.fail(error, [])
    outcome = objects.outcome()
    assert outcome is not None
    found = error_of(outcome["error"])
    assert (type(found), found.args) == (type(error), error.args)


def test_a_bug_arrives_with_its_traceback(store: S3ObjectStore) -> None:
    objects = JobObjects(store, "s3://unfreeze/jobs/three")
    try:
        {}["missing"]
    except KeyError as error:
        objects.fail(error, [])
    outcome = objects.outcome()
    assert outcome is not None
    found = error_of(outcome["error"])
    assert isinstance(found, JobError)
    assert "test_job_places.py" in str(found)
    assert "KeyError: 'missing'" in str(found)
