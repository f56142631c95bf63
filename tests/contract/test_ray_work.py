"""The contract of a step's work on Ray, in this process and as a job, on the embedded stack's real Ray with its token."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from infra import job_server, local_stack, usage
from infra.errors import ServiceError, UserError
from infra.job_server import JobServer
from infra.object_store import join_uri, object_store
from ray_jobs.watch import Watch
from tasks.ray_job import _Call
from tasks.ray_work import run_on_ray
from tests import ray_work_entries as entries
from tests.ray_work_caller import PACKAGES

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # Ray's own warnings are not ours
STORAGE = "s3://unfreeze"
do = partial(run_on_ray, storage=STORAGE, packages=PACKAGES)


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An embedded stack of S3 and a Ray of two CPUs, and the address of its job server."""
    outside = ("RAY_ADDRESS", job_server.JOB_SERVER, "AWS_ENDPOINT_URL")
    with pytest.MonkeyPatch.context() as patch:
        for name in outside:
            patch.delenv(name, raising=False)
        patch.setenv("UNFREEZE_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("UNFREEZE_NUM_CPUS", "2")
        with local_stack.session(["s3", "ray"], storage=STORAGE):
            yield local_stack.status()["ray"]["dashboard_url"]


@pytest.fixture(params=["in this process", "as a job"])
def place(request: pytest.FixtureRequest, dashboard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "as a job":
        monkeypatch.setenv(job_server.JOB_SERVER, dashboard)


@pytest.fixture
def server(dashboard: str, monkeypatch: pytest.MonkeyPatch) -> JobServer:
    """The job server, named so that work goes there."""
    monkeypatch.setenv(job_server.JOB_SERVER, dashboard)
    return JobServer(dashboard)


@pytest.mark.usefixtures("place")
def test_the_result_of_work_done_by_workers_comes_back() -> None:
    assert do(entries.doubled, {"numbers": [1, 2, 3]}, watch=Watch()) == {"doubled": [2, 4, 6]}


@pytest.mark.usefixtures("place")
def test_errors_of_ours_arrive_as_themselves_and_a_bug_as_a_bug() -> None:
    with pytest.raises(UserError) as mistake:
        do(entries.refuses, {"what": "The spec is wrong: ä."}, watch=Watch())
    assert (type(mistake.value), mistake.value.what, mistake.value.way_out) == (UserError, "The spec is wrong: ä.", "Mend it.")
    with pytest.raises(ServiceError, match="S3 is away"):
        do(entries.gives_up, {"what": "S3 is away."}, watch=Watch())
    with pytest.raises((KeyError, RuntimeError), match="an odd key"):
        do(entries.stumbles, {"what": "an odd key"}, watch=Watch())


@pytest.mark.usefixtures("place")
def test_every_line_is_said_once_and_in_order_and_progress_reaches_its_end() -> None:
    said: list[str] = []
    seen: list[tuple[float, float]] = []
    lines = ["first", "second", "third"]
    do(entries.tells, {"lines": lines}, watch=Watch(lambda done, total: seen.append((done, total)), said.append))
    assert said == lines
    assert all(total == 3 and 0 < done <= 3 for done, total in seen)


@pytest.mark.usefixtures("place")
def test_what_is_not_plain_is_refused_before_anything_starts() -> None:
    with pytest.raises(TypeError):
        do(entries.doubled, {"numbers": {1, 2}}, watch=Watch())


@pytest.mark.usefixtures("place")
def test_who_is_interrupted_leaves_nothing_that_goes_on_and_the_next_try_does_the_work() -> None:
    folder = _new_folder()

    def interrupt(_done: float, _total: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        do(entries.waits, {"folder": folder}, watch=Watch(interrupt))
    _go(folder)
    assert do(entries.waits, {"folder": folder}, watch=Watch()) == {"ended": True}
    assert (_count(folder, "started"), _count(folder, "ended")) == (2, 1)


@pytest.mark.usefixtures("place")
def test_who_waits_for_room_hears_what_for_and_who_holds_it() -> None:
    folder = _new_folder()
    told: list[str] = []

    def heard(what: str, seconds: float) -> None:
        told.append(what)
        if what:
            _go(folder)

    environment = {name: value for name, value in os.environ.items() if name != job_server.JOB_SERVER} | {"UNFREEZE_USER": "alice"}
    command = [sys.executable, "-m", "tests.ray_work_caller", "holds", folder]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], env=environment) as other:
        _until(lambda: _count(folder, "started") == 1 or other.poll() is not None)
        assert do(entries.doubled, {"numbers": [1]}, watch=Watch(waits=heard)) == {"doubled": [2]}
        assert other.wait(60) == 0
    assert "1 CPU (retrain pets of alice holds 2 CPUs)" in told


def test_what_a_job_used_is_counted_by_its_caller(server: JobServer) -> None:
    before = usage.so_far()
    do(entries.stores, {"folder": _new_folder(), "size": 4 * 10**6}, watch=Watch())
    assert (usage.so_far() - before).s3_written_bytes > 4 * 10**6


def test_who_is_killed_leaves_a_job_that_the_next_caller_takes_up(server: JobServer) -> None:
    folder = _new_folder()
    _start_and_kill(folder)
    assert do(entries.waits, {"folder": folder}, watch=Watch(lambda done, total: _go(folder))) == {"ended": True}
    assert (_count(folder, "started"), _count(folder, "ended")) == (1, 1)
    assert server.find(_name(folder, server) + "-2") is None


def test_a_job_that_ended_while_nobody_was_there_is_not_done_again(server: JobServer) -> None:
    folder = _new_folder()
    _start_and_kill(folder)
    _go(folder)
    job_id = _name(folder, server) + "-1"
    _until(lambda: getattr(server.find(job_id), "status", "") == "SUCCEEDED")
    assert do(entries.waits, {"folder": folder}, watch=Watch()) == {"ended": True}
    assert _count(folder, "started") == 1
    assert list(object_store().list(join_uri(STORAGE, "jobs", job_id))) == []  # read, so nothing is left
    assert do(entries.waits, {"folder": folder}, watch=Watch()) == {"ended": True}
    assert _count(folder, "started") == 2  # and asked once more, the work looks anew


def test_a_result_is_taken_while_the_process_that_left_it_still_leaves(server: JobServer) -> None:
    assert do(entries.lingers, {}, watch=Watch()) == {"done": True}
    (job,) = [job for job in server.unfinished() if "lingers" in job.id]
    server.stop(job.id)


def test_an_interrupted_caller_stops_its_job(server: JobServer) -> None:
    folder = _new_folder()

    def out_of_time(_done: float, _total: float) -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        do(entries.waits, {"folder": folder}, watch=Watch(out_of_time))
    _until(lambda: getattr(server.find(_name(folder, server) + "-1"), "status", "") == "STOPPED")


def test_a_job_that_dies_is_told_with_its_last_words_and_the_next_try_is_another_job(server: JobServer) -> None:
    for _ in range(2):
        with pytest.raises(ServiceError, match="these are its last words"):
            do(entries.dies, {}, watch=Watch())


def test_the_code_travels_and_no_secret_is_among_what_the_server_tells(server: JobServer) -> None:
    found = do(entries.sees, {}, watch=Watch())
    assert "runtime_resources" in found["code"]  # Ray's copy, not this checkout
    expected = {name: os.environ[name] for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL")}
    assert found["here"] == found["there"] == expected
    told = [job for job in server._client.list_jobs() if job.submission_id]  # not the connections of this process
    assert any("sees" in job.submission_id for job in told)
    assert expected["AWS_SECRET_ACCESS_KEY"] not in repr(told)


def test_a_job_server_that_does_not_answer_is_a_failed_service(dashboard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.ray_cluster.CONNECT_TIMEOUT_S", 0.5)
    with pytest.raises(ServiceError, match="No Ray job server answers"):
        JobServer("http://127.0.0.1:9")


def test_a_wrong_token_is_a_failed_service(dashboard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with pytest.raises(ServiceError, match="refused the token"):
        JobServer(dashboard)


def test_a_cluster_tells_where_its_job_server_is_and_on_its_head_the_loopback_will_do(
    dashboard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert JobServer(os.environ["RAY_ADDRESS"]).address == dashboard
    monkeypatch.setattr(job_server, "_is_of_this_machine", lambda host: False)
    with pytest.raises(ServiceError, match="listens on its own loopback only"):
        JobServer(os.environ["RAY_ADDRESS"])


def _new_folder() -> str:
    return join_uri(STORAGE, "tests", uuid.uuid4().hex)


def _go(folder: str) -> None:
    object_store().write(join_uri(folder, "go"), b"")


def _count(folder: str, kind: str) -> int:
    return len(list(object_store().list(join_uri(folder, kind))))


def _name(folder: str, server: JobServer) -> str:
    return _Call(f"{entries.__name__}:waits", {"folder": folder}, server, STORAGE, PACKAGES).name


def _start_and_kill(folder: str) -> None:
    """Another process begins the work, and is killed in the middle of it."""
    root = Path(__file__).parents[2]
    caller = subprocess.Popen([sys.executable, "-m", "tests.ray_work_caller", "waits", folder], cwd=root)
    try:
        _until(lambda: _count(folder, "started") == 1 or caller.poll() is not None)
        assert caller.poll() is None
    finally:
        caller.kill()
        caller.wait()


def _until(condition: Callable[[], Any]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come about")
