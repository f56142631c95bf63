"""A request for a promotion that waits in a real Prefect: shown with its form, answered on its page, closed from elsewhere, never lost."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psutil
import pytest
from playwright.sync_api import sync_playwright
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from prefect.states import Running

from infra import local_stack, processes, settings, stack_file
from infra.object_store import join_uri, object_store
from infra.settings import ServiceName
from tasks.approval_page import FORM, ask, close
from tasks.deployments import deploy, prefect_client
from tests import approval_stand_in
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
STORAGE = "s3://unfreeze"
WANTED: tuple[ServiceName, ...] = ("s3", "mlflow", "prefect")
ADDRESSES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "MLFLOW_TRACKING_URI", "PREFECT_API_URL", "RAY_ADDRESS")
PATIENCE_S = 400.0
YES = {"answer": "approve", "by": "ben", "reason": "better on every class"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A stack that is up, with its worker."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ADDRESSES:
            patch.delenv(name, raising=False)
        home = tmp_path_factory.mktemp("approval") / "home"
        patch.setenv("UNFREEZE_HOME", str(home))
        patch.setenv("PYTHONPATH", str(ROOT))  # the worker finds the stand-in
        local_stack.up(STORAGE, WANTED)
        yield home
        worker = stack_file.read(home).worker
        local_stack.down()
        assert worker is not None
        assert not processes.is_alive(worker)


@contextmanager
def stack() -> Iterator[SyncPrefectClient]:
    """A command's use of the stack; Prefect's client."""
    with local_stack.session(WANTED, storage=STORAGE):
        api_url = local_stack.status()["prefect"]["api_url"]
        with temporary_settings({PREFECT_API_URL: api_url, PREFECT_HOME: settings.home_dir() / "prefect"}), prefect_client() as client:
            yield client


@pytest.fixture
def client(home: Path) -> Iterator[SyncPrefectClient]:
    with stack() as client:
        yield client


def a_request(**changed: Any) -> dict[str, Any]:
    now = datetime.now(UTC)
    known = {"model": "emoji", "version": "3", "champion_version": "2", "by": "ann", "reason": "accuracy +3.1 points, at least +1.2"}
    where = {"evidence_uri": "s3://unfreeze/evidence/1", "storage": STORAGE, "page": "s3://unfreeze/models/emoji/3/report.html"}
    times = {"at": now.isoformat(), "expires_at": (now + timedelta(hours=1)).isoformat()}
    return {"id": uuid4().hex[:12], **known, **where, **times, **changed}


def asked(client: SyncPrefectClient, request: dict[str, Any]) -> UUID:
    """The request's page, answers to which the stand-in carries out."""
    page = ask(request)
    deploy(client, "approval", "approval", entrypoint=approval_stand_in.ENTRYPOINT, parameters={"type": "object"}, description="")
    assert page["flow_run_id"] in page["url"]
    return UUID(page["flow_run_id"])


def state_of(client: SyncPrefectClient, page: UUID) -> tuple[StateType, str]:
    state = client.read_flow_run(page).state
    assert state is not None
    return state.type, state.message or ""


def ended(client: SyncPrefectClient, page: UUID) -> tuple[StateType, str]:
    """The last state of a flow run that somebody is to carry out."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        flow_run: FlowRun = client.read_flow_run(page)
        if flow_run.state is not None and flow_run.state.is_final():
            return state_of(client, page)
        time.sleep(0.5)
    log = (settings.home_dir() / "logs" / "worker.log").read_text()
    raise TimeoutError(f"{state_of(client, page)}\n{log}")


def carried_out(request: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(object_store().read(join_uri(STORAGE, "answers", request["id"]))))


def test_a_request_waits_with_what_one_must_know_and_the_form_of_the_answer(client: SyncPrefectClient) -> None:
    request = a_request()
    page = asked(client, request)
    kind, words = state_of(client, page)
    assert (kind, words) == (StateType.PAUSED, "ann asks for version 3 of emoji: press Resume to answer.")
    schema = json.loads(client.read_flow_run_input(page, FORM["schema"]))
    assert schema["properties"]["answer"]["enum"] == ["approve", "reject"]
    assert schema["required"] == ["answer", "by"]
    told = json.loads(client.read_flow_run_input(page, FORM["description"]))
    assert "accuracy +3.1 points" in told
    assert request["id"] in told


def test_asking_again_finds_the_page_that_waits(client: SyncPrefectClient) -> None:
    request = a_request()
    assert asked(client, request) == asked(client, request)


def test_prefect_refuses_an_answer_that_is_none(client: SyncPrefectClient) -> None:
    page = asked(client, a_request())
    for wrong in ({"answer": "perhaps", "by": "ben"}, {"answer": "approve", "by": ""}, {"answer": "approve"}, {}):
        assert client.resume_flow_run(page, wrong).status == SetStateStatus.REJECT
    assert state_of(client, page)[0] == StateType.PAUSED


def test_an_answer_on_the_page_is_carried_out_without_a_command(client: SyncPrefectClient) -> None:
    request = a_request()
    page = asked(client, request)
    assert client.resume_flow_run(page, YES).status == SetStateStatus.ACCEPT
    assert ended(client, page) == (StateType.COMPLETED, "approved by ben: better on every class")
    assert carried_out(request) == {"model": "emoji", "approve": True, "by": "ben", "reason": "better on every class", "mlflow": True}


@pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="needs Debian's chromium: apt-get install chromium")
def test_a_person_answers_in_a_browser(client: SyncPrefectClient) -> None:
    request = a_request()
    page = asked(client, request)
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser:
        tab = browser.new_page()
        tab.set_default_timeout(60_000)
        tab.goto(ask(request)["url"])
        tab.get_by_role("button", name="Resume").click()
        form = tab.get_by_role("dialog")
        form.get_by_text("accuracy +3.1 points").wait_for()
        form.locator(".p-select-button__control").click()
        tab.keyboard.press("ArrowDown")  # a click alone leaves the list closed here
        tab.get_by_text("reject", exact=True).click()
        form.locator("textarea").first.fill("ben")
        form.locator("textarea").last.fill("not yet")
        form.get_by_role("button", name="Submit").click()
        assert ended(client, page) == (StateType.COMPLETED, "rejected by ben: not yet")


def test_a_persons_mistake_is_told_on_the_page_and_the_request_can_be_asked_anew(client: SyncPrefectClient) -> None:
    request = a_request()
    page = asked(client, request)
    client.resume_flow_run(page, {**YES, "by": "ann"})
    assert ended(client, page) == (StateType.FAILED, "ann has asked for it herself.\nSomebody else answers.")
    another = asked(client, request)
    assert another != page
    assert asked(client, request) == another
    client.resume_flow_run(another, {"answer": "reject", "by": "ben"})
    assert ended(client, another) == (StateType.COMPLETED, "rejected by ben")


def test_an_answer_is_tried_again_where_a_service_fails(client: SyncPrefectClient) -> None:
    request = a_request()
    page = asked(client, request)
    client.resume_flow_run(page, {**YES, "by": "cleo"})
    assert ended(client, page) == (StateType.COMPLETED, "approved by cleo: better on every class")
    assert carried_out(request)["by"] == "cleo"


@pytest.mark.parametrize(("approved", "kind"), [(True, StateType.COMPLETED), (False, StateType.CANCELLED)])
def test_an_answer_from_elsewhere_closes_the_page(client: SyncPrefectClient, approved: bool, kind: StateType) -> None:
    request = a_request()
    page = asked(client, request)
    assert close(request["id"], "answered by ben on the command line", approved=approved)
    assert state_of(client, page) == (kind, "answered by ben on the command line")
    assert client.resume_flow_run(page, YES).status == SetStateStatus.ABORT
    assert not close(request["id"], "once more", approved=approved)


def test_a_request_outlives_a_restart_of_everything(home: Path) -> None:
    request = a_request()
    with stack() as client:
        page = asked(client, request)
    local_stack.down()
    local_stack.up(STORAGE, WANTED)
    with stack() as client:
        assert state_of(client, page)[0] == StateType.PAUSED
        client.resume_flow_run(page, YES)
        assert ended(client, page)[0] == StateType.COMPLETED
    with stack():
        assert carried_out(request)["approve"]


def test_an_answer_whose_worker_was_killed_at_work_is_carried_out_by_the_next(home: Path) -> None:
    request = a_request()
    with stack() as client:
        page = asked(client, request)
        first = stack_file.read(home).worker
        assert first is not None
        for member in (psutil.Process(first.pid), *psutil.Process(first.pid).children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                member.kill()
        client.resume_flow_run(page, YES)
        client.set_flow_run_state(page, Running(), force=True)  # as a killed process leaves it
    with stack() as client:
        second = stack_file.read(home).worker
        assert second is not None
        assert second.pid != first.pid
        assert ended(client, page)[0] == StateType.COMPLETED
        assert carried_out(request)["approve"]
