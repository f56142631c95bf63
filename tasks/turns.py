"""One command at a time for one spec. Two at once would do the same work twice, and write each of its runs to MLflow twice: the later one
waits, and finds everything done. The night that is still running when somebody starts the same by hand is such a case."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

from infra import lease, progress
from infra.object_store import join_uri, object_store
from ray_jobs.spec import Spec

FlowFunction = TypeVar("FlowFunction", bound=Callable[..., Any])


def with_turn(function: FlowFunction) -> FlowFunction:
    """Make a flow's function wait for its turn: between `@flow(...)` and `def`, above the account, which counts no waiting.

    Who is killed amid its turn keeps nobody waiting: a waiter on the same machine sees it at once, another in half a minute.
    """

    @functools.wraps(function)
    def in_turn(spec: Spec, *args: Any, **kwargs: Any) -> Any:
        with lease.hold(object_store(), join_uri(spec.storage, "leases", "specs", spec.name, spec.digest), _say):
            return function(spec, *args, **kwargs)

    return cast(FlowFunction, in_turn)


def _say(holder: lease.Holder) -> None:
    progress.say(f"Waiting since {time.strftime('%H:%M:%S')} for {holder}, which works on the same spec.")
