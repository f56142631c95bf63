"""The doctor on real services: what is dead is found and mended, and what lives beside it is never touched."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from prefect.states import Completed, Running

from infra import job_server, local_stack, processes, registry, settings, tracking
from infra.committed_folder import MANIFEST, commit
from infra.job_server import JobServer
from infra.lease import Holder, this_machine
from infra.object_store import join_uri, object_store
from infra.tracking import IDENTITY_TAG
from ray_jobs import job_environment
from ray_jobs.spec import Spec
from tasks import approval_page, doctor_models, doctor_storage, doctor_work, finding, serving, stale_pages
from tasks.deployments import prefect_client
from tasks.doctor import diagnose
from tasks.finding import Finding
from tasks.left_behind import DAY_S, clock_of
from tasks.ray_job import FLOW_RUN
from tasks.reaper import labels_of
from tests import promotion_worlds as worlds

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # Ray's own warnings are not ours
ADDRESSES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "MLFLOW_TRACKING_URI", "PREFECT_API_URL", "RAY_ADDRESS", job_server.JOB_SERVER)
NOBODY = 2**22 + 1
"""Beyond the kernel's largest process id."""
FAR = "another machine"


@flow(name="search")
def a_flow() -> None:
    """Never run: flow runs of it are made as a killed process leaves them."""


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The whole stack, for as long as this file runs; the address of Ray's job server."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ADDRESSES:
            patch.delenv(name, raising=False)
        patch.setenv("UNFREEZE_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("UNFREEZE_NUM_CPUS", "2")
        with local_stack.session(settings.SERVICES, storage=local_stack.DEFAULT_STORAGE):
            tracking.client.cache_clear()
            yield local_stack.status()["ray"]["dashboard_url"]
        tracking.client.cache_clear()


@pytest.fixture
def client(dashboard: str) -> Iterator[SyncPrefectClient]:
    """Prefect's client; whatever a test left at work has ended before the next one looks."""
    known = {PREFECT_API_URL: local_stack.status()["prefect"]["api_url"], PREFECT_HOME: settings.home_dir() / "prefect"}
    with temporary_settings(known), prefect_client() as client:
        yield client
        for flow_run in client.read_flow_runs():
            if flow_run.state is None or not flow_run.state.is_final():
                client.set_flow_run_state(flow_run.id, Completed(), force=True)


@pytest.fixture
def storage() -> str:
    return f"s3://unfreeze/{secrets.token_hex(4)}"


def at_work(client: SyncPrefectClient, holder: Holder | None, job_ids: tuple[str, ...] = ()) -> UUID:
    """A flow run that Prefect takes for RUNNING, with this heartbeat."""
    made = client.create_flow_run(a_flow, name=secrets.token_hex(4))
    client.set_flow_run_state(made.id, Running(), force=True)
    if holder is not None:
        attempt = client.read_flow_run(made.id).run_count
        client.update_flow_run_labels(made.id, labels_of(holder, attempt, holder.beat, job_ids))
    return made.id


def living() -> Holder:
    me = processes.record_self("test")
    return Holder("", this_machine(), "here", me.pid, me.create_time)


def killed() -> Holder:
    return Holder("", this_machine(), "here", NOBODY, 0.0)


def elsewhere(beat: int = 3) -> Holder:
    return Holder("", FAR, "far.example", 7, 1.5, beat)


def state_of(client: SyncPrefectClient, flow_run: UUID) -> StateType:
    state = client.read_flow_run(flow_run).state
    assert state is not None
    return state.type


def name_of(client: SyncPrefectClient, flow_run: UUID) -> str:
    return client.read_flow_run(flow_run).name


def mended(found: list[Finding]) -> dict[str, str]:
    """What became of each that can be mended, by what it is about."""
    return {one.what: one.mend() for one in found if one.mend is not None}


@pytest.fixture
def between_looks(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], Any]]:
    """What happens while the doctor waits for its next look; it waits no longer than that takes."""
    happens: list[Callable[[], Any]] = []

    class Clock:
        @staticmethod
        def sleep(_seconds: float) -> None:
            for act in happens:
                act()

    monkeypatch.setattr(finding, "time", Clock)
    return happens


def test_a_flow_run_whose_process_was_killed_is_ended_and_the_one_at_work_goes_on(client: SyncPrefectClient) -> None:
    dead, alive = at_work(client, killed()), at_work(client, living())
    found = list(doctor_work.flow_runs())
    assert {one.what: one.state for one in found} == {
        f"flow run {name_of(client, dead)}": "wrong", f"flow run {name_of(client, alive)}": "ok",
    }  # fmt: skip
    assert mended(found) == {f"flow run {name_of(client, dead)}": "set to Crashed"}
    assert (state_of(client, dead), state_of(client, alive)) == (StateType.CRASHED, StateType.RUNNING)


def test_elsewhere_a_flow_run_is_ended_only_where_it_shows_no_sign_while_it_is_watched(
    client: SyncPrefectClient, between_looks: list[Callable[[], Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_work, "PATIENCE_S", -1.0)  # each has been silent for long, by the clock
    silent, beating, without, begins = (at_work(client, holder) for holder in (elsewhere(), elsewhere(), None, None))
    beat = iter(range(4, 1000))
    attempt = client.read_flow_run(beating).run_count
    between_looks += [
        lambda: client.update_flow_run_labels(beating, labels_of(elsewhere(), attempt, next(beat))),
        lambda: client.update_flow_run_labels(begins, labels_of(elsewhere(), attempt, next(beat))),
    ]
    outcomes = mended(list(doctor_work.flow_runs()))
    assert {name: outcomes[f"flow run {name_of(client, one)}"] for name, one in
            (("silent", silent), ("beating", beating), ("without", without), ("begins", begins))} == {
        "silent": "set to Crashed", "beating": "it has shown a sign of life, or ended: left alone",
        "without": "set to Crashed", "begins": "it has shown a sign of life, or ended: left alone",
    }  # fmt: skip
    assert (state_of(client, beating), state_of(client, begins)) == (StateType.RUNNING, StateType.RUNNING)


def test_a_half_written_mlflow_run_goes_with_its_flow_run_and_one_that_is_being_written_stays(client: SyncPrefectClient) -> None:
    experiment = tracking.experiment_id("doctor")
    over = at_work(client, living())
    client.set_flow_run_state(over, Completed(), force=True)
    writers = {"dead": at_work(client, killed()), "over": over, "alive": at_work(client, living()), "unknown": UUID(int=7)}
    runs = {
        name: tracking.client().create_run(experiment, tags={IDENTITY_TAG: name, FLOW_RUN: str(flow_run)}, run_name=name).info.run_id
        for name, flow_run in writers.items()
    }
    tracking.client().create_run(experiment, run_name="not ours")
    found = list(doctor_work.mlflow_runs())
    assert {one.what.removeprefix("MLflow run "): one.state for one in found} == {
        "dead": "wrong", "over": "wrong", "alive": "ok", "unknown": "note",
    }  # fmt: skip
    assert set(mended(found).values()) == {"deleted"}
    assert {name for name, run in runs.items() if tracking.is_unfinished(run)} == {"alive", "unknown"}


def test_a_ray_job_that_nobody_waits_for_is_stopped_and_one_that_is_waited_for_goes_on(
    client: SyncPrefectClient, dashboard: str, between_looks: list[Callable[[], Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(job_server.JOB_SERVER, dashboard)
    server = JobServer(dashboard)
    gone = at_work(client, killed(), ("unfreeze-alone-1",))
    watching = at_work(client, living(), ("unfreeze-watched-1",))
    told = {
        "unfreeze-alone-1": str(gone),
        "unfreeze-watched-1": str(gone),
        "unfreeze-taken-1": str(gone),
        "unfreeze-strange-1": str(UUID(int=7)),
    }
    for job_id, submitter in told.items():
        (tmp_path / job_id).mkdir()
        given = {"folder": tmp_path / job_id, "variables": {}, "hook": job_environment.HOOK, "metadata": {FLOW_RUN: submitter}}
        server.submit(job_id, "sleep 600", **given)
    found = {one.what.removeprefix("Ray job "): one for one in doctor_work.ray_jobs()}
    assert {job_id: found[job_id].state for job_id in told} == {
        "unfreeze-alone-1": "wrong", "unfreeze-watched-1": "ok", "unfreeze-taken-1": "wrong", "unfreeze-strange-1": "note",
    }  # fmt: skip
    attempt = client.read_flow_run(watching).run_count
    waits = ("unfreeze-watched-1", "unfreeze-taken-1")
    between_looks.append(lambda: client.update_flow_run_labels(watching, labels_of(living(), attempt, 9, waits)))
    outcomes = {job_id: one.mend() for job_id, one in found.items() if one.mend}
    assert outcomes == {"unfreeze-alone-1": "stopped", "unfreeze-taken-1": "it has ended, or somebody waits for it: left alone"}
    assert {job.id for job in server.unfinished()} - {"unfreeze-alone-1"} == set(told) - {"unfreeze-alone-1"}
    for job_id in told:
        server.stop(job_id)


def test_a_flow_run_that_waits_for_a_job_which_is_gone_is_told(
    client: SyncPrefectClient, dashboard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(job_server.JOB_SERVER, dashboard)
    at_work(client, living(), ("unfreeze-gone-1",))
    assert any("waits for the Ray job unfreeze-gone-1, which" in one.words for one in doctor_work.ray_jobs())


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch, storage: str) -> Callable[[], None]:
    """Two days pass."""

    def pass_by() -> None:
        monkeypatch.setattr(doctor_storage, "clock_of", lambda store, where: clock_of(store, where) + 2 * DAY_S)
        monkeypatch.setattr("infra.s3_upload._age_s", lambda upload: 2 * DAY_S)

    return pass_by


@pytest.fixture
def litter(client: SyncPrefectClient, storage: str) -> dict[str, str]:
    """What killed processes leave, by what it is, and one committed folder."""
    store = object_store()
    places = {
        "models": "models/pets/9/model.safetensors",
        "features": "features/set-batch/00000-000.safetensors",
        "datasets": "datasets/pets/abc/part.tar",
        "fits": "fits/f/checkpoints/epoch-0003/state.json",
        "jobs": "jobs/unfreeze-fit-1/outcome.json",
        "searches": "searches/s/00000000-a.jsonl",
    }
    for place in places.values():
        store.write(join_uri(storage, place), b"half")
    commit(store, join_uri(storage, "models", "pets", "8"), {"model.safetensors": b"whole"})
    bucket, _, prefix = storage.removeprefix("s3://").partition("/")
    store.client.create_multipart_upload(Bucket=bucket, Key=f"{prefix}/models/pets/9/model.onnx")
    return {kind: join_uri(storage, place) for kind, place in places.items()}


def test_what_killed_processes_left_on_s3_is_thrown_away_after_a_day_and_nothing_else(
    litter: dict[str, str], storage: str, later: Callable[[], None]
) -> None:
    assert list(doctor_storage.left_behind(storage)) == []  # younger than a day
    later()
    found = list(doctor_storage.left_behind(storage))
    assert {one.what: one.state for one in found} == {
        **dict.fromkeys(("models", "features", "datasets", "fits", "jobs", "uploads"), "wrong"), "searches": "note",
    }  # fmt: skip
    outcomes = mended(found)
    assert outcomes.pop("uploads") == "1 ended"
    assert set(outcomes.values()) == {"deleted: 1 objects, 4 bytes"}
    store = object_store()
    assert [kind for kind, uri in litter.items() if store.exists(uri)] == ["searches"]
    assert store.exists(join_uri(storage, "models", "pets", "8", MANIFEST))
    assert [one.what for one in doctor_storage.left_behind(storage)] == ["searches"]


def test_nothing_is_thrown_away_while_a_flow_run_is_at_work_or_somebody_holds_a_lease(
    client: SyncPrefectClient, litter: dict[str, str], storage: str, later: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    later()
    before = list(doctor_storage.left_behind(storage))
    flow_run = at_work(client, living())
    assert all(outcome.startswith("left alone: ") for outcome in mended(before).values())  # it began after the dry run
    during = list(doctor_storage.left_behind(storage))
    assert mended(during) == {}
    assert any(f"{name_of(client, flow_run)} may be using it" in (one.fix or "") for one in during)
    client.set_flow_run_state(flow_run, Completed(), force=True)
    object_store().write(join_uri(storage, "leases", "features", "x"), b"{}")
    assert doctor_storage.look_at(storage).in_use is None  # two days old by now: nobody renews it
    monkeypatch.setattr(doctor_storage, "clock_of", clock_of)
    assert doctor_storage.look_at(storage).in_use == "somebody holds a lease"


def test_a_folder_to_which_somebody_writes_after_the_dry_run_stays(litter: dict[str, str], storage: str, later: Callable[[], None]) -> None:
    later()
    found = list(doctor_storage.left_behind(storage))
    store = object_store()
    commit(store, join_uri(storage, "models", "pets", "9"), {"model.safetensors": b"whole now"})
    assert mended(found)["models"] == "left alone: somebody has written there since"
    assert store.exists(litter["models"])


def test_the_page_of_a_request_that_went_stale_is_ended_and_one_that_waits_stays(client: SyncPrefectClient, storage: str) -> None:
    spec: Spec = worlds.spec_of(f"model-{secrets.token_hex(4)}", storage)
    asks = worlds.spec_of(spec.name, storage, approval="manual")
    first = worlds.register(spec, 0.6, 0)
    assert worlds.promote(spec, first)["status"] == "promoted"
    stale = worlds.promote(asks, worlds.register(spec, 0.75, 1))["request"]
    old_page = UUID(approval_page.ask(stale)["flow_run_id"])
    assert list(doctor_models.pages()) == []
    assert worlds.promote(spec, worlds.register(spec, 0.85, 2))["status"] == "promoted"
    waits = worlds.promote(asks, worlds.register(spec, 0.97, 3))["request"]
    page = UUID(approval_page.ask(waits)["flow_run_id"])
    found = list(doctor_models.pages())
    assert [stale["id"] in one.words for one in found] == [True]
    assert set(mended(found).values()) == {"ended"}
    assert (state_of(client, old_page), state_of(client, page)) == (StateType.CANCELLED, StateType.PAUSED)
    serving.roll_back(spec.name, None, "broke", "ada")
    stale_pages.end_all(spec.name)  # as whoever settles the next verdict does
    assert state_of(client, page) == StateType.CANCELLED


def test_everything_is_looked_at_in_one_go_and_a_fix_leaves_nothing_wrong(
    client: SyncPrefectClient, storage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = worlds.spec_of(f"model-{secrets.token_hex(4)}", storage)
    first, second = (worlds.register(spec, skill, seed) for seed, skill in enumerate((0.6, 0.85)))
    for version in (first, second):
        assert worlds.promote(spec, version)["status"] == "promoted"
    registry.set_alias(spec.name, registry.CHAMPION, first)
    at_work(client, killed())
    found = diagnose(storage, fix=False)
    assert not found["healthy"]
    assert {"s3", "mlflow", "prefect", "ray", "settings", "store"} <= {row["what"] for row in found["findings"]}
    assert registry.champion(spec.name).version == first  # type: ignore[union-attr]
    capsys.readouterr()
    answer = diagnose(storage, fix=True)
    said = capsys.readouterr().err
    assert said.index("can be mended:") < said.index("1/")
    assert answer["healthy"], [row for row in answer["findings"] if row["state"] == "wrong"]
    assert registry.champion(spec.name).version == second  # type: ignore[union-attr]
    assert diagnose(storage, fix=False)["healthy"]
    assert serving.alterations(spec.name, second, None) == []
