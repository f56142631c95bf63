"""The embedded stack with its real servers: shared, ended, found again after a kill, and closed to everyone else."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
from botocore.exceptions import ClientError

from infra import local_stack, processes, ray_cluster, services, stack_file
from infra.errors import ServiceError, UserError
from infra.settings import SERVICES

pytestmark = pytest.mark.slow

ADDRESSES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "MLFLOW_TRACKING_URI", "PREFECT_API_URL", "RAY_ADDRESS")
HOLD = """
import os, sys, time
from pathlib import Path
from infra import local_stack, services
with local_stack.session({services}, storage="s3://unfreeze"):
    try:
        print(os.environ.get("AWS_ENDPOINT_URL"), flush=True)
        sys.stdin.read()
    except KeyboardInterrupt:
        print("interrupted", local_stack.status()["s3"]["state"], flush=True)
"""
RUN_A_TASK = """
import json, os, psutil, ray
from infra import local_stack, ray_cluster
def listening():
    return [connection.laddr.ip for connection in psutil.Process().net_connections() if connection.status == "LISTEN"]
@ray.remote
def where():
    from infra.settings import cache_dir
    return {"listening": listening(), "seen": [os.environ["AWS_ENDPOINT_URL"], str(cache_dir())]}
with local_stack.session(["s3", "ray"], storage="s3://unfreeze"), ray_cluster.connect() as cluster:
    print(json.dumps({"worker": ray.get(where.remote()), "driver": listening(), "cpus": cluster.cpus}))
"""
LANES = """
import json, os, sys
from functools import partial
import ray
from infra import local_stack, ray_cluster
from ray_jobs.workers import lanes
from tasks.warming import warm_up
with local_stack.session(["s3", "ray"], storage="s3://unfreeze") as stack:
    with ray_cluster.one_connection(partial(warm_up, claim=stack.claim)), ray_cluster.connect():
        print(json.dumps(ray.get([lane.run.remote(os.getpid) for lane in lanes()])), flush=True)
        sys.stdin.read()
"""
WAIT_FOR_RAY = """
import sys
from infra import local_stack, ray_cluster
from infra.errors import ServiceError
import ray
@ray.remote(num_cpus=64)
def never():
    pass
with local_stack.session(["s3", "ray"], storage="s3://unfreeze"):
    try:
        with ray_cluster.one_connection(lambda cluster: None), ray_cluster.connect():
            print("connected", flush=True)
            ray.get(never.remote())
    except ServiceError as error:
        print(error.what, flush=True)
"""
KEEP_RESULTS = """
import sys
from types import SimpleNamespace
from infra import local_stack
with local_stack.session(["prefect"], storage="s3://unfreeze"):
    from tasks.policies import _result_storage
    print("ready", flush=True)
    sys.stdin.readline()
    print(_result_storage(SimpleNamespace(storage="s3://unfreeze/{number}")).basepath, flush=True)
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(autouse=True)
def no_servers_of_the_team(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ADDRESSES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("UNFREEZE_HOME", str(tmp_path / "home"))
    yield tmp_path / "home"
    for name in ADDRESSES:
        monkeypatch.delenv(name, raising=False)
    local_stack.down()


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a command in a process of its own, reading its first line from stdout."""
    children: list[subprocess.Popen[str]] = []

    def start_one(code: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        children.append(child)
        return child

    yield start_one
    for child in children:
        if child.poll() is None:
            child.kill()
        child.communicate()


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """All four services, up for long; the home's path is too long for a socket on purpose."""
    home = tmp_path_factory.mktemp("a-working-directory-with-a-long-name-" + "x" * 60) / ".unfreeze"
    with pytest.MonkeyPatch.context() as patch:
        for name in ADDRESSES:
            patch.delenv(name, raising=False)
        patch.setenv("UNFREEZE_HOME", str(home))
        yield {**local_stack.up(), "home": home}
        records = _everything(home)
        local_stack.down()
        assert not [record for record in records if processes.is_alive(record)]
        assert {part["state"] for part in local_stack.status().values()} == {"stopped"}


def test_an_outside_client_reads_s3_with_what_status_prints(standing: dict[str, Any]) -> None:
    s3 = standing["s3"]
    assert (s3["state"], s3["bucket"], s3["prefix"]) == ("running", "unfreeze", "")
    _client(s3).put_object(Bucket="unfreeze", Key="a/b", Body=b"c")
    assert _client(s3).list_objects_v2(Bucket="unfreeze", Prefix="a/")["KeyCount"] == 1
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        _client(s3, secret_key="wrong").list_buckets()


def test_warm_workers_of_a_stack_that_stays_serve_one_command_after_another_but_never_two_at_once(
    standing: dict[str, Any], start: Start
) -> None:
    first = start(LANES)
    found = json.loads(first.stdout.readline()) if first.stdout else []
    beside = start(LANES)
    others = json.loads(beside.stdout.readline()) if beside.stdout else []
    assert found
    assert len(found) == len(others)
    assert not {*found} & {*others}
    beside.communicate()
    first.kill()  # what it had claimed is free again
    first.communicate()
    after = start(LANES)
    assert after.stdout
    assert json.loads(after.stdout.readline()) == found
    after.communicate()
    assert not [pid for pid in others if psutil.pid_exists(pid)], "those that were not kept end with their command"


def test_a_ray_whose_raylet_has_died_is_started_anew(home: Path) -> None:
    local_stack.up()
    first = stack_file.read(home).servers["ray"]
    _of_ray(home, "raylet").kill()
    assert local_stack.status()["ray"]["state"] == "stopped"
    with local_stack.session(["ray"], storage="s3://unfreeze"), ray_cluster.connect() as cluster:
        assert cluster.cpus >= 1
    assert stack_file.read(home).servers["ray"].leader != first.leader


def _of_ray(home: Path, called: str) -> psutil.Process:
    """The one of Ray's processes with this name or title."""
    family = psutil.Process(stack_file.read(home).servers["ray"].leader.pid).children(recursive=True)
    return next(process for process in family if called in (_told(process.name), *_told(process.cmdline)[:1]))


def _told(ask: Callable[[], Any]) -> Any:
    """What a process says of itself; nothing where it has ended meanwhile."""
    try:
        return ask()
    except psutil.NoSuchProcess:
        return ""


@pytest.mark.parametrize("victim", ["raylet", "ray::DashboardAgent"])
def test_a_command_that_waits_for_a_ray_that_has_died_ends_with_its_name_and_in_order(home: Path, start: Start, victim: str) -> None:
    child = start(WAIT_FOR_RAY)
    assert child.stdout is not None
    assert child.stdout.readline() == "connected\n"
    address = local_stack.status()["ray"]["address"]
    _of_ray(home, victim).kill()
    said, _ = child.communicate()
    assert said.endswith(f"Ray at {address} is gone.\n")
    assert child.returncode == 0
    assert {found["state"] for found in local_stack.status().values()} == {"stopped"}


def test_mlflow_keeps_artifacts_on_the_embedded_s3(standing: dict[str, Any]) -> None:
    uri = standing["mlflow"]["uri"]
    request = urllib.request.Request(f"{uri}/api/2.0/mlflow-artifacts/artifacts/note.txt", data=b"kept", method="PUT")
    _open(request)
    assert _client(standing["s3"]).get_object(Bucket="unfreeze", Key="mlflow/note.txt")["Body"].read() == b"kept"
    assert "experiments" in json.loads(_open(urllib.request.Request(f"{uri}/api/2.0/mlflow/experiments/search?max_results=5")))
    assert b"<html" in _open(urllib.request.Request(uri))


def test_the_pages_of_prefect_and_ray_are_there(standing: dict[str, Any]) -> None:
    assert _open(urllib.request.Request(standing["prefect"]["api_url"] + "/health")) == b"true"
    assert b"<html" in _open(urllib.request.Request(standing["prefect"]["ui_url"]))
    settings = json.loads(_open(urllib.request.Request(standing["prefect"]["ui_url"] + "/ui-settings")))
    assert settings["api_url"] == standing["prefect"]["api_url"]
    assert b"<html" in _open(urllib.request.Request(standing["ray"]["dashboard_url"]))


def test_nothing_listens_beyond_loopback_even_while_ray_works(standing: dict[str, Any], start: Start) -> None:
    output, _ = start(RUN_A_TASK).communicate()
    said = json.loads(output)
    assert said["cpus"] >= 1
    assert said["worker"]["seen"] == [standing["s3"]["endpoint"], str(standing["home"] / "cache")]
    listening = [(record.what, ip) for record in _everything(standing["home"]) for ip in _listening(record.pid)]
    assert {what for what, _ in listening} == set(SERVICES)
    everyone = [*(ip for _, ip in listening), *said["driver"], *said["worker"]["listening"]]
    found = {ip.removeprefix("::ffff:") for ip in everyone}
    assert found == {"127.0.0.1"}


def test_ray_refuses_a_driver_without_the_token_and_says_so_at_once(standing: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        **standing["ray"]["environment"],
        "RAY_ADDRESS": standing["ray"]["address"],
        "RAY_AUTH_TOKEN": "wrong" * 10,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    with pytest.raises(ServiceError, match="refused the token"), ray_cluster.connect():
        pass


def test_no_secret_is_in_the_process_list(standing: dict[str, Any]) -> None:
    of_stack = {record.pid for record in _everything(standing["home"])}
    lines = [" ".join(_told(process.cmdline)) for process in psutil.process_iter() if process.pid in of_stack]
    assert any("rclone" in line for line in lines)
    for secret in (standing["s3"]["secret_key"], standing["s3"]["access_key"], standing["ray"]["token"]):
        assert len(secret) >= 16
        assert not [line for line in lines if secret in line]


def test_what_is_written_is_for_the_owner_alone(standing: dict[str, Any]) -> None:
    home: Path = standing["home"]
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    for name in ("stack.json", "stack.lock", "ray-token", "mlflow.db", "logs/s3.log", "logs/ray.log"):
        assert stat.S_IMODE((home / name).stat().st_mode) == 0o600, name


def test_a_second_up_changes_nothing(standing: dict[str, Any]) -> None:
    before = _everything(standing["home"])
    again = local_stack.up()
    assert again == {service: standing[service] for service in SERVICES}
    assert {record.pid for record in before} <= {record.pid for record in _everything(standing["home"])}


def test_a_command_shares_a_standing_stack_and_leaves_it_standing(standing: dict[str, Any]) -> None:
    with local_stack.session(SERVICES, storage="s3://other/prefix") as stack:
        stack.wait("ray")
        assert os.environ["AWS_ENDPOINT_URL"] == standing["s3"]["endpoint"]
        assert os.environ["RAY_ADDRESS"] == standing["ray"]["address"]
        _client(standing["s3"]).head_bucket(Bucket="other")
    assert not set(ADDRESSES) & set(os.environ)
    assert {part["state"] for part in local_stack.status().values()} == {"running"}


def test_a_server_that_is_only_slow_is_not_taken_for_stopped(standing: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    server, ask, answers = psutil.Process(stack_file.read(standing["home"]).servers["s3"].leader.pid), services.is_healthy, []

    def asked(service: Any, site: services.Site) -> bool:
        if service == "s3":
            answers.append(ask(service, site))
            server.resume()  # once it was asked in vain
            return answers[-1]
        return ask(service, site)

    monkeypatch.setattr(services, "is_healthy", asked)
    server.suspend()
    assert not local_stack.is_stopped("s3")
    assert local_stack.status()["s3"]["state"] == "running"
    assert not answers[0]


def test_commands_that_make_one_bucket_at_once_all_find_it(standing: dict[str, Any]) -> None:
    site = local_stack._site(standing["home"], stack_file.read(standing["home"]))
    with ThreadPoolExecutor(8) as pool:
        for number in range(5):
            made = [pool.submit(services.ensure_buckets, site, [f"race-{number}"]) for _ in range(8)]
            assert all(future.result() for future in made)
            _client(standing["s3"]).head_bucket(Bucket=f"race-{number}")


def test_commands_that_are_the_first_of_a_prefect_all_keep_their_results_there(standing: dict[str, Any], start: Start) -> None:
    commands = [start(KEEP_RESULTS.format(number=number)) for number in range(4)]
    assert {_line(command) for command in commands} == {"ready"}
    for command in commands:
        command.stdin.write("\n")
        command.stdin.flush()
    assert [_line(command) for command in commands] == [f"s3://unfreeze/{number}/steps" for number in range(4)]


def test_two_commands_at_once_share_one_stack_that_ends_with_the_last(home: Path, start: Start) -> None:
    first, second = start(HOLD.format(services=["s3"])), start(HOLD.format(services=["s3"]))
    endpoints = {_line(first), _line(second)}
    assert len(endpoints) == 1
    leaders = _everything(home)
    assert len(leaders) == 1
    first.communicate("")
    assert processes.is_alive(leaders[0])
    second.communicate("")
    assert not processes.is_alive(leaders[0])
    assert stack_file.read(home).servers == {}


def test_what_a_killed_command_left_is_ended_by_the_next_start(home: Path, start: Start) -> None:
    command = start(HOLD.format(services=["s3", "ray"]))
    endpoint = _line(command)
    left = _everything(home)
    scratch = [server.scratch for server in stack_file.read(home).servers.values()]
    assert len(left) > 4
    command.kill()
    command.wait()
    ray_leader = next(record for record in left if record.what == "ray")
    os.kill(ray_leader.pid, signal.SIGKILL)  # its children have no parent left to be found by
    assert [record for record in left if processes.is_alive(record)]
    with local_stack.session(["s3"], storage="s3://unfreeze"):
        assert os.environ["AWS_ENDPOINT_URL"] == endpoint  # the port is remembered
        assert not [record for record in left if processes.is_alive(record)]
        assert not [folder for folder in scratch if folder.exists()]


def test_ctrl_c_leaves_the_servers_to_the_commands_own_clean_up(home: Path, start: Start) -> None:
    command = start(HOLD.format(services=["s3"]))
    _line(command)
    leader = _everything(home)[0]
    os.killpg(command.pid, signal.SIGINT)
    assert _line(command) == "interrupted running"
    command.communicate()
    assert not processes.is_alive(leader)


def test_down_leaves_a_stack_in_use_to_its_last_command(home: Path, start: Start) -> None:
    command = start(HOLD.format(services=["s3"]))
    _line(command)
    leader = _everything(home)[0]
    assert local_stack.down() == 1
    assert processes.is_alive(leader)
    command.communicate("")
    assert not processes.is_alive(leader)
    assert local_stack.down() == 0


def test_the_teams_own_services_are_used_and_never_started(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("MLFLOW_TRACKING_URI", "http://mlflow.test"),
        ("PREFECT_API_URL", "http://prefect.test/api"),
        ("RAY_ADDRESS", "ray.test:6379"),
    ):
        monkeypatch.setenv(name, value)
    with local_stack.session(["mlflow", "prefect", "ray"], storage="s3://unfreeze"):
        assert os.environ["MLFLOW_TRACKING_URI"] == "http://mlflow.test"
        assert stack_file.read(home).servers == {}
        status = local_stack.status()
    assert [status[service]["state"] for service in SERVICES] == ["stopped", "external", "external", "external"]
    assert status["prefect"]["ui_url"] == "http://prefect.test"


def test_a_missing_bucket_of_the_teams_own_s3_is_the_users_mistake(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with local_stack.session(["s3"], storage="s3://theirs"):
        monkeypatch.setenv("UNFREEZE_HOME", str(tmp_path / "another"))
        with local_stack.session(["s3"], storage="s3://theirs/prefix"):
            assert local_stack.status()["s3"]["state"] == "external"
        with pytest.raises(UserError, match="The bucket 'absent' does not exist"), local_stack.session(["s3"], storage="s3://absent"):
            pass
        monkeypatch.setenv("UNFREEZE_HOME", str(home))


def test_a_server_that_dies_or_does_not_answer_is_named_with_its_log(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with local_stack.session(["prefect"], storage="s3://unfreeze", background=["prefect"]) as stack:
        os.kill(_everything(home)[0].pid, signal.SIGKILL)
        with pytest.raises(ServiceError, match=r"prefect server ended before it answered.*logs/prefect\.log"):
            stack.wait("prefect")
    monkeypatch.setenv("UNFREEZE_START_TIMEOUT_S", "0.01")
    with pytest.raises(ServiceError, match=r"mlflow server does not answer"), local_stack.session(["mlflow"], storage="s3://unfreeze"):
        pass
    assert stack_file.read(home).servers == {}
    assert "MLFLOW_TRACKING_URI" not in os.environ


def _everything(home: Path) -> list[processes.ProcessRecord]:
    """Every living process of the stack, leaders first."""
    return processes.family([server.leader for server in stack_file.read(home).servers.values()])


def _listening(pid: int) -> set[str]:
    try:
        return {connection.laddr.ip for connection in psutil.Process(pid).net_connections() if connection.status == psutil.CONN_LISTEN}
    except psutil.NoSuchProcess:
        return set()


def _line(command: subprocess.Popen[str]) -> str:
    assert command.stdout is not None
    return command.stdout.readline().strip()


def _open(request: urllib.request.Request) -> bytes:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as answer:
        return bytes(answer.read())


def _client(s3: dict[str, Any], secret_key: str | None = None) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=s3["endpoint"],
        aws_access_key_id=s3["access_key"],
        aws_secret_access_key=secret_key or s3["secret_key"],
        region_name="us-east-1",
    )
