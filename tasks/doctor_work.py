"""Where Prefect, Ray and MLflow disagree on who is at work: flow runs without a process, MLflow's runs and Ray's jobs without a flow run.

Nothing is taken for dead by a clock: on this machine the process table says it, of other machines a minute without a sign.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound

from infra import job_server, local_stack, tracking
from infra.errors import ServiceError, UnfreezeError
from infra.job_server import Job, JobServer
from infra.lease import Holder, this_machine
from infra.tracking import Unfinished
from tasks.deployments import prefect_client
from tasks.finding import Finding, lasts
from tasks.ray_job import FLOW_RUN, NAMED
from tasks.reaper import PATIENCE_S, Watch, crash, holder_of, in_states, jobs_of

WATCHED = "It is watched for a minute, and set to Crashed if it shows no sign; flow runs that are at work do that too."


def at_work() -> list[str] | None:
    """The names of the flow runs that may be at work, all but those known to be dead; None where Prefect cannot be asked."""
    if local_stack.is_stopped("prefect"):
        return []  # whoever works on an embedded stack keeps its Prefect up
    with suppress(UnfreezeError), prefect_client() as client:
        return [flow_run.name for flow_run in _living(client)]
    return None


def flow_runs() -> Iterator[Finding]:
    """Those that Prefect takes for RUNNING, where it can be asked; what is wrong with Prefect itself was said already."""
    if local_stack.is_stopped("prefect"):
        return
    with suppress(UnfreezeError), prefect_client() as client:
        for flow_run in list(in_states(client, StateType.RUNNING)):
            yield _flow_run(flow_run, holder_of(flow_run))


def mlflow_runs() -> Iterator[Finding]:
    """Those of ours that are RUNNING: each is written in one go by one process, so most often none is."""
    for run in tracking.unfinished():
        yield _mlflow_run(run, _state_of(run.tags.get(FLOW_RUN, "")))


def ray_jobs() -> Iterator[Finding]:
    """Jobs that nobody waits for, and flow runs that wait for a job which is gone; where work goes to a cluster as jobs."""
    with suppress(UnfreezeError):
        address = job_server.named()
        if address is None:
            return
        server = JobServer(address)
        with prefect_client() as client:
            living = list(_living(client))
        for job in server.unfinished():
            if job.id.startswith(NAMED):
                yield _ray_job(server, job, [flow_run.name for flow_run in living if job.id in jobs_of(flow_run)])
        for flow_run in living:
            for job_id in sorted(jobs_of(flow_run)):
                if server.find(job_id) is None:
                    words = f"it waits for the Ray job {job_id}, which {address} does not know"
                    yield Finding(f"flow run {flow_run.name}", "note", words, "It notices by itself, fails, and is tried again.")


def _living(client: SyncPrefectClient) -> Iterator[FlowRun]:
    for flow_run in in_states(client, StateType.PENDING, StateType.RUNNING, StateType.CANCELLING):
        holder = holder_of(flow_run)
        if holder is None or not Watch().is_dead(holder):
            yield flow_run


def _flow_run(flow_run: FlowRun, holder: Holder | None) -> Finding:
    what = f"flow run {flow_run.name}"
    if holder is not None and Watch().is_dead(holder):
        words = f"RUNNING in Prefect, but its process ({holder}) was ended"
        return Finding(what, "wrong", words, "It is set to Crashed; the next start does it by itself.", partial(_reap, flow_run.id))
    since = flow_run.updated.astimezone(UTC) if flow_run.updated else None
    if since is None or (datetime.now(UTC) - since).total_seconds() < PATIENCE_S:
        return Finding(what, "ok", f"at work: {holder or 'it has just begun'}")
    if holder is not None and holder.machine == this_machine():
        return Finding(what, "note", f"{holder} is there, but has told Prefect nothing since {since:%H:%M:%S} UTC", "It may be stopped.")
    who = f"{holder}, whose last sign of life" if holder else "nobody has told whose process it is, and the last change"
    words = f"RUNNING in Prefect: {who} came at {since:%Y-%m-%d %H:%M:%S} UTC"
    return Finding(what, "wrong", words, WATCHED, partial(_reap_if_silent, flow_run.id, holder))


def _reap(flow_run_id: UUID) -> str:
    with prefect_client() as client:
        flow_run = client.read_flow_run(flow_run_id)
        holder = holder_of(flow_run)
        if not _runs(flow_run) or holder is None or not Watch().is_dead(holder):
            return "it has ended by itself, or was started again: left alone"
        return _crash(client, flow_run, holder)


def _reap_if_silent(flow_run_id: UUID, seen: Holder | None) -> str:
    def is_silent() -> bool:
        with prefect_client() as client:
            flow_run = client.read_flow_run(flow_run_id)
            return _runs(flow_run) and holder_of(flow_run) == seen

    if not lasts(is_silent):
        return "it has shown a sign of life, or ended: left alone"
    with prefect_client() as client:
        return _crash(client, client.read_flow_run(flow_run_id), seen)


def _crash(client: SyncPrefectClient, flow_run: FlowRun, holder: Holder | None) -> str:
    lost = crash(client, flow_run, holder)
    if lost is None:
        return "it has ended by itself"
    return "set to Crashed" + ("; it starts again" if lost.starts_again else "")


def _runs(flow_run: FlowRun) -> bool:
    return flow_run.state is not None and flow_run.state.is_running()


def _state_of(flow_run_id: str) -> FlowRun | None:
    """The flow run; None where this Prefect does not know it, or cannot be asked."""
    if not flow_run_id or local_stack.is_stopped("prefect"):
        return None
    with suppress(ServiceError, ValueError), prefect_client() as client:
        try:
            return client.read_flow_run(UUID(flow_run_id))
        except ObjectNotFound:
            return None
    return None


def _is_over(flow_run: FlowRun) -> bool:
    holder = holder_of(flow_run)
    is_dead = _runs(flow_run) and holder is not None and Watch().is_dead(holder)
    return is_dead or (flow_run.state is not None and flow_run.state.is_final())


def _mlflow_run(run: Unfinished, flow_run: FlowRun | None) -> Finding:
    what = f"MLflow run {run.name}"
    where = f"RUNNING in the experiment {run.experiment}"
    if flow_run is None:
        words = f"{where}, written by no flow run that this Prefect knows"
        return Finding(what, "note", words, "The command that began it writes it anew; else delete it on MLflow's page.")
    if not _is_over(flow_run):
        return Finding(what, "ok", f"{where}: the flow run {flow_run.name} is writing it")
    words = f"{where}, but the flow run {flow_run.name}, which wrote it, is over: it is half-written"
    fix = "It is deleted (MLflow can restore it); the same command writes it anew."
    return Finding(what, "wrong", words, fix, partial(_delete_run, run.run_id, str(flow_run.id)))


def _delete_run(run_id: str, flow_run_id: str) -> str:
    flow_run = _state_of(flow_run_id)
    if flow_run is None or not _is_over(flow_run) or not tracking.is_unfinished(run_id):
        return "it is being written, or was: left alone"
    tracking.delete(run_id)
    return "deleted"


def _ray_job(server: JobServer, job: Job, waiting: list[str]) -> Finding:
    what = f"Ray job {job.id}"
    if waiting:
        return Finding(what, "ok", f"{job.status}: the flow run {', '.join(waiting)} waits for it")
    if _state_of(job.metadata.get(FLOW_RUN, "")) is None:
        return Finding(
            what, "note", f"{job.status}, and submitted by no flow run that this Prefect knows", "Ask whoever shares the cluster."
        )
    fix = "The same command takes it up again; else it is watched for a minute, and stopped if nobody has."
    return Finding(what, "wrong", f"{job.status}, but no flow run waits for it", fix, partial(_stop_job, server, job.id))


def _stop_job(server: JobServer, job_id: str) -> str:
    def is_alone() -> bool:
        job = server.find(job_id)
        with prefect_client() as client:
            return job is not None and not job.is_over and not any(job_id in jobs_of(flow_run) for flow_run in _living(client))

    if not lasts(is_alone):
        return "it has ended, or somebody waits for it: left alone"
    server.stop(job_id)
    return "stopped"
