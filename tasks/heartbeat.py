"""A flow run's heartbeat: while its process lives, a number on its row in Prefect rises. Beside its own, it watches the others'.

It lies in Prefect and not on S3, because who judges it asks Prefect anyway: one service decides whether a flow run that Prefect
takes for RUNNING is at work. The thread is also the reaper (`tasks/reaper.py`): watching takes a minute, and no command waits for it.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, cast
from uuid import UUID

from prefect.runtime import flow_run

from infra import processes
from infra.errors import ServiceError
from infra.lease import Holder, this_machine
from tasks.deployments import prefect_client
from tasks.ray_job import ThisProcess
from tasks.reaper import BEAT_S, Watch, labels_of, reap

REQUEST_S = 5.0
END_S = 10.0
"""A beat that is on its way when the flow run ends is waited for no longer than this."""

FlowFunction = TypeVar("FlowFunction", bound=Callable[..., Any])


def with_heartbeat(function: FlowFunction) -> FlowFunction:
    """Make a flow's function beat while it works: between `@flow(...)` and `def`. Outside a flow run it is the plain function."""

    @functools.wraps(function)
    def beating(*args: Any, **kwargs: Any) -> Any:
        with heartbeat(flow_run.get_id()):
            return function(*args, **kwargs)

    # Prefect reads annotations by the globals of what it is given, which here are this module's
    beating.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
    return cast(FlowFunction, beating)


@contextmanager
def heartbeat(flow_run_id: str | None, beat_s: float = BEAT_S) -> Iterator[None]:
    """Beat for the body. A Prefect that fails for a while ends no work: the next beat is tried as if nothing had been."""
    if flow_run_id is None or flow_run_id in _Beating.ids:  # a flow within a flow run that beats already
        yield
        return
    me = processes.record_self("flow run")
    mine = Holder(flow_run_id, this_machine(), socket.gethostname(), me.pid, me.create_time)
    done = threading.Event()
    work = contextvars.copy_context()  # Prefect's address may be a setting of this context alone
    thread = threading.Thread(target=work.run, args=(_beat, mine, done, beat_s), name="heartbeat", daemon=True)
    _Beating.ids.add(flow_run_id)
    ThisProcess.flow_run_id = flow_run_id
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(END_S)
        _Beating.ids.discard(flow_run_id)


class _Beating:
    """The flow runs of this process that beat."""

    ids: set[str] = set()  # noqa: RUF012 - of the process, on purpose


def _beat(mine: Holder, done: threading.Event, beat_s: float) -> None:
    watch, beat, attempt, me = Watch(), 0, 0, UUID(mine.token)
    while True:
        with suppress(ServiceError), prefect_client(timeout_s=REQUEST_S) as client:
            attempt = attempt or client.read_flow_run(me).run_count
            client.update_flow_run_labels(me, labels_of(mine, attempt, beat, ThisProcess.waits_for))
            if not done.is_set():
                reap(client, watch)
        beat += 1
        if done.wait(beat_s):
            return
