"""The reaper: a flow run whose process was killed stays RUNNING in Prefect for ever; this says that it has crashed.

Of its own machine's processes it asks the process table. Of others it watches the heartbeat: who shows no new beat while it looks, for
a minute of its own looking, is dead. No clocks of two hosts are compared, and neither a clock that jumps, nor a laptop that slept, nor
a Prefect that was away for an hour kills a flow run that lives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.states import Crashed, Scheduled

from infra.lease import Holder, this_machine

FLOWS = ("retrain", "search", "promote", "nightly")
BEAT_S = 10.0
PATIENCE_S = 60.0
RESTARTS = 3
"""How often a flow run that a worker starts is started again; one that kills its own process each time must end."""
PAGE = 200
JOBS = "unfreeze.jobs"


@dataclass(frozen=True)
class Lost:
    """A flow run that is dead, and what became of it."""

    id: UUID
    name: str
    words: str
    starts_again: bool


@dataclass
class Watch:
    """Who shows which beat, and for how many seconds of looking already."""

    patience_s: float = PATIENCE_S
    longest_gap_s: float = 1.5 * BEAT_S
    """Between two looks no more than this counts: who did not look (a sleep, a Prefect that was away) has seen nothing."""
    clock: Callable[[], float] = time.monotonic
    _seen: dict[str, tuple[Holder, float, float]] = field(default_factory=dict)

    def is_dead(self, holder: Holder) -> bool:
        """Whether this process is known to be gone, or has shown no sign for the patience."""
        if holder.machine == this_machine():
            return holder.is_dead  # one that is merely stopped goes on some day
        now = self.clock()
        last, watched_s, at = self._seen.get(holder.token, (None, 0.0, now))
        watched_s = watched_s + min(now - at, self.longest_gap_s) if holder == last else 0.0
        self._seen[holder.token] = (holder, watched_s, now)
        return watched_s > self.patience_s


def reap(client: SyncPrefectClient, watch: Watch) -> list[Lost]:
    """Set every flow run of ours that is RUNNING and dead to Crashed; those that a worker starts are then started again."""
    return [lost for flow_run, holder in running(client) if watch.is_dead(holder) and (lost := crash(client, flow_run, holder))]


def running(client: SyncPrefectClient) -> Iterator[tuple[FlowRun, Holder]]:
    """The flow runs of ours that Prefect takes for RUNNING and that have a heartbeat."""
    for flow_run in in_states(client, StateType.RUNNING):
        holder = holder_of(flow_run)
        if holder is not None:
            yield flow_run, holder


def in_states(client: SyncPrefectClient, *states: StateType) -> Iterator[FlowRun]:
    """The flow runs of ours in any of these states."""
    state = FlowRunFilterState(type=FlowRunFilterStateType(any_=list(states)))
    ours, wanted = FlowFilter(name=FlowFilterName(any_=list(FLOWS))), FlowRunFilter(state=state)
    offset = 0
    while found := client.read_flow_runs(flow_filter=ours, flow_run_filter=wanted, limit=PAGE, offset=offset):
        yield from found
        if len(found) < PAGE:
            return
        offset += PAGE


def crash(client: SyncPrefectClient, flow_run: FlowRun, holder: Holder | None) -> Lost | None:
    """Say that it crashed, unless it has ended by itself meanwhile. Not by force: Prefect then frees its place among those at work."""
    words = f"Its process was ended: {holder or 'it'} shows no sign of life. The next start carries on where it was."
    if client.set_flow_run_state(flow_run.id, Crashed(message=words)).status != SetStateStatus.ACCEPT:
        return None
    again = flow_run.deployment_id is not None and flow_run.run_count <= RESTARTS
    if again:
        client.set_flow_run_state(flow_run.id, Scheduled(message="Its process was ended; it starts again."))
    return Lost(flow_run.id, flow_run.name, words, again)


def labels_of(holder: Holder, attempt: int, beat: int, job_ids: Collection[str] = ()) -> dict[str, str | int | float | bool]:
    """The heartbeat as Prefect keeps it, beside the flow run; `attempt` is the flow run's `run_count`, `job_ids` what it waits for."""
    return {
        JOBS: " ".join(sorted(job_ids)),
        "unfreeze.attempt": attempt,
        "unfreeze.machine": holder.machine,
        "unfreeze.host": holder.host,
        "unfreeze.pid": holder.pid,
        "unfreeze.started": holder.create_time,
        "unfreeze.beat": beat,
    }


def jobs_of(flow_run: FlowRun) -> set[str]:
    """The ids of the Ray jobs that it waits for."""
    return set(str((flow_run.labels or {}).get(JOBS, "")).split())


def holder_of(flow_run: FlowRun) -> Holder | None:
    """Whose process it is; None where it has not beaten yet (an earlier attempt's heartbeat is none), or what is there cannot be read."""
    labels = flow_run.labels or {}
    try:
        if int(labels["unfreeze.attempt"]) != flow_run.run_count:
            return None
        known = (str(labels["unfreeze.machine"]), str(labels["unfreeze.host"]), int(labels["unfreeze.pid"]))
        return Holder(str(flow_run.id), *known, float(labels["unfreeze.started"]), int(labels["unfreeze.beat"]))
    except (KeyError, ValueError):
        return None
