"""Prefect's policy for every step: retries, timeout, and a result kept on S3 under a key made of content."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar, cast

from prefect import Task, task
from prefect._internal.result_records import ResultRecord
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import ObjectAlreadyExists
from prefect.filesystems import WritableFileSystem
from prefect.results import ResultStore
from prefect.serializers import JSONSerializer

from infra.committed_folder import MANIFEST
from infra.errors import UserError, room_on_disk
from infra.object_store import join_uri, object_store
from ray_jobs.spec import Spec, digest_of
from tasks import accounts

CODE_VERSION = 1
"""Raise it when a step computes something else from the same inputs."""

RETRY_DELAYS_S = [2.0, 10.0]

Step = TypeVar("Step", bound=Callable[..., Any])


class StepResults(WritableFileSystem):
    """Prefect's result storage on the object store: where the work lies, its record lies too, for any machine."""

    _block_type_name = "Unfreeze step results"
    basepath: str

    def read_path(self, path: str, *, _sync: bool = True) -> bytes:  # type: ignore[override]
        try:
            return object_store().read(join_uri(self.basepath, path))
        except FileNotFoundError as error:
            raise ValueError(str(error)) from None

    def write_path(self, path: str, content: bytes, *, _sync: bool = True) -> None:  # type: ignore[override]
        object_store().write(join_uri(self.basepath, path), content)


def step(*, name: str, key: Callable[..., Any], timeout_s: float) -> Callable[[Step], Step]:
    """Make a plain function a step that is not computed twice for the same `key(**arguments)`, and is retried unless the user must act.

    `key` returns plain values that name the step's inputs by content. A kept result counts only while what it points to
    (its "uri" or "uris") is still committed, so that whoever empties a bucket gets the work done again.
    """

    def decorate(function: Step) -> Step:
        policy = _policy(name, timeout_s) | {
            "persist_result": True,
            "result_serializer": JSONSerializer(),
            "cache_key_fn": _key_of(name, key),
            "on_completion": [_note_if_kept],
        }
        return cast(Step, task(**policy)(_accounted(name, room_on_disk()(function), tells=True)))

    return decorate


def effect(*, name: str, timeout_s: float, tells: bool = False) -> Callable[[Step], Step]:
    """Make a plain function a step that is harmless to repeat and looks for itself whether its effect is there already.

    `tells`: its result, a dict, says the seconds that it took and what it used, as every `step`'s does.
    """

    def decorate(function: Step) -> Step:
        policy = _policy(name, timeout_s) | {"persist_result": False, "cache_policy": NO_CACHE}
        return cast(Step, task(**policy)(_accounted(name, room_on_disk()(function), tells=tells)))

    return decorate


def _policy(name: str, timeout_s: float) -> dict[str, Any]:
    retry = {"retries": len(RETRY_DELAYS_S), "retry_delay_seconds": RETRY_DELAYS_S, "retry_condition_fn": _is_worth_a_retry}
    return {"name": name, "timeout_seconds": timeout_s, **retry}


def keep_results(flow: Any, spec: Spec) -> Any:
    """The flow with its steps' results kept below the spec's storage."""
    return flow.with_options(result_storage=_result_storage(spec))


@contextmanager
def results_kept(spec: Spec) -> Iterator[None]:
    """The same for a flow that runs already, whose storage was not known when it began."""
    this = FlowRunContext.get()
    assert this is not None, "only within a flow"
    with this.model_copy(update={"result_store": ResultStore(result_storage=_result_storage(spec))}):
        yield


def _result_storage(spec: Spec) -> StepResults:
    block = StepResults(basepath=join_uri(spec.storage, "steps"))
    save = partial(block.save, f"unfreeze-{digest_of(spec.storage)[:12]}", overwrite=True)
    try:
        save()
    except ObjectAlreadyExists:  # another first command registered the block's type at the same moment
        save()
    return block


def _accounted(name: str, function: Callable[..., Any], *, tells: bool) -> Callable[..., Any]:
    """The function, part of its run's account; where it `tells`, so does its result (a kept one tells what its making took)."""

    @functools.wraps(function)
    def accounted(*args: Any, **kwargs: Any) -> Any:
        with accounts.of_step(name) as account:
            result = function(*args, **kwargs)
        return {**result, "seconds": round(account.latest_s, 3), "used": account.latest.plain()} if tells else result

    return accounted


def _note_if_kept(step: Task[Any, Any], _run: TaskRun, state: State[Any]) -> None:
    """Prefect's hook: a step that is complete without its function having been called."""
    if state.name == "Cached":
        accounts.kept(step.name)


def _key_of(name: str, key: Callable[..., Any]) -> Callable[[TaskRunContext, dict[str, Any]], str]:
    def cache_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
        content = f"{name.replace(' ', '-')}-{digest_of([CODE_VERSION, key(**parameters)])}"
        spec: Spec = parameters["spec"]
        _forget_if_gone(join_uri(spec.storage, "steps", content))
        return content

    return cache_key


def _forget_if_gone(record_uri: str) -> None:
    store = object_store()
    try:
        kept: Any = ResultRecord.deserialize(store.read(record_uri)).result
    except FileNotFoundError:
        return
    uris = kept.get("uris", [kept["uri"]] if "uri" in kept else []) if isinstance(kept, dict) else []
    if not all(store.exists(join_uri(uri, MANIFEST)) for uri in uris):
        store.delete([record_uri])


def _is_worth_a_retry(_task: Task[Any, Any], _run: TaskRun, state: State[Any]) -> bool:
    """A user's mistake stays one however often it is tried."""
    return not isinstance(state.data, UserError) and not isinstance(getattr(state.data, "value", None), UserError)
