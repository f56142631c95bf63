"""A scheduled retraining in a real Prefect: each night computes what is new, overlaps nobody, stands for those missed, and dies aloud."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import psutil
import pytest
import yaml
from playwright.sync_api import sync_playwright
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolUpdate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from prefect.states import Running, Scheduled

from infra import local_stack, settings, stack_file
from infra.lease import Holder, this_machine
from infra.object_store import object_store
from tasks.deployments import POOL, prefect_client
from tasks.reaper import RESTARTS, Watch, labels_of, reap
from tasks.schedules import stand_for_the_others
from tests import nightly_stand_in
from tests.conftest import ROOT
from tests.small_data import CLASSES, draw, write_folder

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
UNFREEZE = Path(sys.executable).with_name("unfreeze")
ADDRESSES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "MLFLOW_TRACKING_URI", "PREFECT_API_URL", "RAY_ADDRESS")
PATIENCE_S = 1500.0
NEW_IMAGES = 2
KILLED_AT_WORK = """
import sys, time
from prefect import flow
from tasks.heartbeat import with_heartbeat

@flow(name="search", flow_run_name="killed", persist_result=False)
@with_heartbeat
def work():
    print("at work", flush=True)
    time.sleep(600)

work()
"""


class Site:
    """A stack that is up, with its worker, and the small data beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.images = write_folder(folder / "images")

    def deploy(self, name: str, *options: str, cron: str = "0 2 1 1 *") -> dict[str, Any]:
        content = {
            "name": name,
            "data": {"source": str(self.images), "image_size": 32, "val_fraction": 0.2, "holdout_fraction": 0.25},
            "backbone": {"name": "resnet18", "weights": "none"},
            "search": {"unfreeze_depth": [0, 1], "lr": [1e-3, 1e-2], "max_epochs": 2},
            "fit": {"num_workers": 1, "max_epochs": 2},
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        command = [str(UNFREEZE), "deploy", str(path), "--cron", cron, *options, "--json"]  # New Year's night: not while this runs
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    @contextmanager
    def client(self) -> Iterator[SyncPrefectClient]:
        with local_stack.session(["s3", "prefect"], storage=local_stack.DEFAULT_STORAGE):
            api_url = local_stack.status()["prefect"]["api_url"]
            with temporary_settings({PREFECT_API_URL: api_url, PREFECT_HOME: settings.home_dir() / "prefect"}), prefect_client() as client:
                yield client


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ADDRESSES:
            patch.delenv(name, raising=False)
        site = Site(tmp_path_factory.mktemp("nightly"))
        patch.setenv("UNFREEZE_HOME", str(site.home))
        patch.setenv("PYTHONPATH", str(ROOT))  # the worker finds the stand-in
        local_stack.up()
        yield site
        local_stack.down()


@pytest.fixture
def client(site: Site) -> Iterator[SyncPrefectClient]:
    with site.client() as client:
        yield client


def due(client: SyncPrefectClient, deployed: dict[str, Any], days_ago: int = 1, **values: Any) -> UUID:
    """A flow run of the deployment that should have started some days ago."""
    when = datetime.now(UTC) - timedelta(days=days_ago)
    return client.create_flow_run_from_deployment(UUID(deployed["id"]), state=Scheduled(scheduled_time=when), parameters=values or None).id


def eventually(client: SyncPrefectClient, flow_run_id: UUID, is_so: Callable[[FlowRun], bool]) -> FlowRun:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        flow_run = client.read_flow_run(flow_run_id)
        if is_so(flow_run):
            return flow_run
        time.sleep(0.5)
    raise TimeoutError(f"{client.read_flow_run(flow_run_id).state}\n{(settings.home_dir() / 'logs' / 'worker.log').read_text()[-6000:]}")


def ended(client: SyncPrefectClient, flow_run_id: UUID) -> tuple[StateType, str]:
    state = eventually(client, flow_run_id, lambda flow_run: flow_run.state is not None and flow_run.state.is_final()).state
    assert state is not None
    return state.type, state.message or ""


def nights(client: SyncPrefectClient, deployed: dict[str, Any]) -> list[datetime]:
    """When Prefect's scheduler, a part of its server that no request shows to be broken, is going to start the deployment."""
    mine = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[UUID(deployed["id"])]))
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        planned = [one.expected_start_time for one in client.read_flow_runs(flow_run_filter=mine) if one.auto_scheduled]
        times = sorted(when.astimezone(ZoneInfo(deployed["timezone"])) for when in planned if when is not None)
        if len(times) >= len(deployed["next"]):
            return times[: len(deployed["next"])]
        time.sleep(0.5)
    raise TimeoutError((settings.home_dir() / "logs" / "prefect.log").read_text()[-6000:])


def images_computed() -> list[int]:
    """The images of each batch of features on S3: one batch a pass over images that were missing."""
    counts = []
    for found in object_store().list("s3://unfreeze/features"):
        if found.uri.endswith("/index.safetensors"):
            data = object_store().read(found.uri)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            counts.append(max(row["shape"][0] for name, row in header.items() if name != "__metadata__"))
    return counts


def test_a_deployment_is_shown_with_its_nights_and_deploying_again_changes_it(site: Site, client: SyncPrefectClient) -> None:
    hour = (datetime.now(ZoneInfo("Europe/Berlin")).hour + 12) % 24
    hour = 6 if hour in (1, 2, 3) else hour  # no clock changes there, and none of these nights begins while this runs
    first = site.deploy("twice", "--timezone", "Europe/Berlin")
    again = site.deploy("twice", "--overlap", "queue", "--timezone", "Europe/Berlin", cron=f"0 {hour} * * *")
    assert again["id"] == first["id"]
    assert again["deployment"] == "nightly/twice"
    assert again["id"] in again["url"]
    assert again["worker"] == "running"
    assert [datetime.fromisoformat(time).hour for time in again["next"]] == [hour, hour, hour]
    found = client.read_deployment(UUID(again["id"]))
    assert len(found.schedules) == 1
    assert found.global_concurrency_limit is not None
    assert found.global_concurrency_limit.limit == 1
    assert found.concurrency_options is not None
    assert found.concurrency_options.collision_strategy == "ENQUEUE"
    assert found.parameters["spec"]["name"] == "twice"
    assert [night.isoformat() for night in nights(client, again)] == again["next"]
    client.delete_deployment(UUID(again["id"]))  # it must not start while this runs


def test_each_night_computes_what_is_new_and_a_start_that_overlaps_is_refused(site: Site, client: SyncPrefectClient) -> None:
    deployed = site.deploy("shapes")
    night = due(client, deployed, days_ago=3)
    eventually(client, night, lambda flow_run: flow_run.state_type == StateType.RUNNING)
    overlapping = due(client, deployed)
    assert ended(client, overlapping) == (StateType.CANCELLED, "Deployment concurrency limit reached.")
    kind, words = ended(client, night)
    assert kind == StateType.COMPLETED, words
    assert words.startswith("promoted: version 1, ")
    assert client.read_flow_run(night).labels["unfreeze.beat"] >= 0
    before = sorted(images_computed())

    assert ended(client, due(client, deployed)) == (StateType.COMPLETED, "skipped: nothing changed since version 1")
    assert sorted(images_computed()) == before

    for number, label in enumerate(CLASSES):
        for index in range(NEW_IMAGES):
            draw(label, 90_000 + 100 * number + index).save(site.images / label / f"new-{index}.png")
    kind, words = ended(client, due(client, deployed))
    assert kind == StateType.COMPLETED, words
    assert "version 2" in words
    new = sorted(images_computed())
    for count in before:
        new.remove(count)
    assert new
    assert max(new) <= NEW_IMAGES * len(CLASSES)


def test_a_mistake_ends_a_night_with_its_words_and_is_not_tried_again(site: Site, client: SyncPrefectClient) -> None:
    deployed = site.deploy("mistaken")
    spec = client.read_deployment(UUID(deployed["id"])).parameters["spec"]
    spec["data"] |= {"val_fraction": 0.5, "holdout_fraction": 0.5}  # the form lets it pass
    night = due(client, deployed, spec=spec)
    kind, words = ended(client, night)
    assert kind == StateType.FAILED
    assert "spec has 1 mistake:\n  data: val_fraction and holdout_fraction together" in words
    assert client.read_flow_run(night).run_count == 1


@pytest.mark.parametrize(
    ("name", "kind", "words", "attempts"),
    [
        ("shaky", StateType.COMPLETED, "skipped: nothing changed since version 7", 2),
        ("away", StateType.FAILED, "MLflow is away.", 2),
        ("bug", StateType.FAILED, "Unexpected KeyError: 'loss'", 1),
    ],
)
def test_a_service_that_fails_is_tried_again_and_nothing_else(
    site: Site, client: SyncPrefectClient, name: str, kind: StateType, words: str, attempts: int
) -> None:
    deployed = site.deploy(name)
    client.update_deployment(UUID(deployed["id"]), DeploymentUpdate(entrypoint=nightly_stand_in.ENTRYPOINT))
    night = due(client, deployed)
    found = ended(client, night)
    assert found[0] == kind
    assert words in found[1]
    assert client.read_flow_run(night).run_count == attempts


def test_a_killed_flow_run_is_set_to_crashed_by_whoever_looks_next(site: Site, client: SyncPrefectClient) -> None:
    api_url = local_stack.status()["prefect"]["api_url"]
    environment = {**os.environ, "PREFECT_API_URL": api_url, "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore"}
    process = subprocess.Popen([sys.executable, "-c", KILLED_AT_WORK], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    (flow_run,) = [one for one in client.read_flow_runs() if one.name == "killed"]
    eventually(client, flow_run.id, lambda flow_run: "unfreeze.beat" in (flow_run.labels or {}))
    assert reap(client, Watch()) == [], "it lives"
    process.kill()
    process.communicate()
    assert client.read_flow_run(flow_run.id).state_type == StateType.RUNNING
    (lost,) = reap(client, Watch())
    assert (lost.id, lost.starts_again) == (flow_run.id, False)
    kind, words = ended(client, flow_run.id)
    assert kind == StateType.CRASHED
    assert f"process {process.pid} shows no sign of life" in words
    assert reap(client, Watch()) == []


@contextmanager
def nobody_at_work(client: SyncPrefectClient) -> Iterator[None]:
    """No worker takes a flow run for the body."""
    client.update_work_pool(POOL, WorkPoolUpdate(is_paused=True))
    try:
        yield
    finally:
        client.update_work_pool(POOL, WorkPoolUpdate(is_paused=False))


def test_a_start_stands_for_those_that_are_due_with_the_same_values_and_for_no_other(site: Site, client: SyncPrefectClient) -> None:
    deployed = site.deploy("others")
    with nobody_at_work(client):
        spec = client.read_deployment(UUID(deployed["id"])).parameters["spec"]
        this, same = due(client, deployed), due(client, deployed, days_ago=3)
        other = due(client, deployed, spec={**spec, "name": "another"})
        coming = due(client, deployed, days_ago=-1)
        assert stand_for_the_others(str(this)) == [same]
        assert ended(client, same)[0] == StateType.CANCELLED
        assert {client.read_flow_run(one).state_type for one in (this, other, coming)} == {StateType.SCHEDULED}
        for one in (this, other, coming):
            client.delete_flow_run(one)


def test_a_killed_night_is_started_again_by_a_worker_but_not_for_ever(site: Site, client: SyncPrefectClient) -> None:
    deployed = site.deploy("reaped")
    ghost = Holder("", this_machine(), "here", pid=2**22 + 1, create_time=0.0)  # beyond the kernel's largest id
    with nobody_at_work(client):
        night = due(client, deployed)
        for attempt in range(1, RESTARTS + 2):
            client.set_flow_run_state(night, Running(), force=True)
            assert reap(client, Watch()) == [], "an earlier attempt's heartbeat says nothing of this one"
            client.update_flow_run_labels(night, labels_of(ghost, attempt, beat=3))
            (lost,) = reap(client, Watch())
            assert (lost.id, lost.starts_again) == (night, attempt <= RESTARTS)
        assert ended(client, night)[0] == StateType.CRASHED


@pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="needs Debian's chromium: apt-get install chromium")
def test_a_person_finds_the_spec_as_a_form(site: Site, client: SyncPrefectClient) -> None:
    deployed = site.deploy("form")
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser:
        tab = browser.new_page(viewport={"width": 1400, "height": 2400})
        tab.set_default_timeout(90_000)
        tab.goto(deployed["url"] + "/run")
        tab.get_by_text("Side of the square image").first.wait_for()
        for said in ("Any timm model name.", "Registered model, MLflow experiment and S3 prefix.", "Depths to try"):
            assert tab.get_by_text(said).count() > 0
        if folder := os.environ.get("UNFREEZE_SCREENSHOTS"):
            tab.screenshot(path=f"{folder}/form.png", full_page=True)


def test_one_night_stands_for_all_that_were_missed_whoever_was_away(site: Site) -> None:
    """The worker is killed in the middle of a night; some nights later everything is started again."""
    with site.client() as client:
        deployed = site.deploy("missed", "--overlap", "queue")
        client.update_deployment(UUID(deployed["id"]), DeploymentUpdate(entrypoint=nightly_stand_in.ENTRYPOINT))
        killed = due(client, deployed, days_ago=4)
        eventually(client, killed, lambda _: object_store().exists("s3://unfreeze/tried/missed"))
        worker = stack_file.read(site.home).worker
        assert worker is not None
        for member in (*psutil.Process(worker.pid).children(recursive=True), psutil.Process(worker.pid)):
            with suppress(psutil.NoSuchProcess):
                member.kill()
        missed = [due(client, deployed, days_ago=days_ago) for days_ago in (3, 2, 1)]
    with site.client() as client:
        kinds = [ended(client, flow_run_id)[0] for flow_run_id in (killed, *missed)]
        assert sorted(kinds) == [StateType.CANCELLED] * 3 + [StateType.COMPLETED]
