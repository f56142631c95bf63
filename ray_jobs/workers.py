"""Where the work of a step runs: in warm lanes on this machine's own cluster, or as plain Ray tasks on any other.

A lane is an actor that loads torch once and serves every step of a command: data, backbone, features, probes and trials. Ray gives
a new process to every actor, also to those of Tune, and a process that loads torch costs 5 s of CPU: a third of a small search.
Lanes reserve nothing, so two commands at once share the machine instead of waiting for each other. On a stack that is up for long
they outlive the command that opened them, and the next one claims them: it finds torch loaded.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import ray
from ray.util import list_named_actors

from infra import usage
from infra.object_store import object_store
from infra.ray_cluster import runtime_environment
from infra.usage import Usage
from ray_jobs.light_timm import import_timm

if TYPE_CHECKING:
    from infra.local_stack import Claim

RETRIES = 3
"""Work is repeated where its worker died; all of it is harmless to repeat."""
NAMESPACE = "unfreeze-lanes"


class Lane:
    """One warm process; does one thing at a time."""

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    def metered(self, function: Callable[..., Any], *arguments: Any) -> tuple[Any, Usage]:
        """The result, and what it used; one CPU by design."""
        return usage.metered(function, {"cpu": 1}, *arguments)


class _Open:
    """The lanes of this process's connection, and what each still has to do."""

    lanes: ClassVar[list[Any]] = []
    waiting: ClassVar[list[list[Any]]] = []
    loading: ClassVar[list[Any]] = []
    used: ClassVar[list[Any]] = []
    """What ended work used, or will have used."""


def open_lanes(count: int, address: str, claim: Claim) -> None:
    """Start lanes, or take those that earlier commands left, and let them load what every step needs; nobody waits for it.

    One after the other: the first is ready sooner, and does the first steps, which have little to share out, while the others load.
    """
    names = [f"{_version(address)}-{number}" for number in range(count)]
    kept = claim(names)
    if kept:
        _end_older(set(names), claim)
    _Open.lanes = [_lane(name if name in kept else None) for name in names]
    loaded = None
    _Open.loading = [loaded := lane.run.remote(load, loaded) for lane in _Open.lanes]
    _Open.waiting = [[reference] for reference in _Open.loading]


def _lane(name: str | None) -> Any:
    """A lane that ends with this command; with a name, the one of this name, which outlives it."""
    lasting = {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True} if name else {}
    make: Any = ray.remote(Lane).options(num_cpus=0, max_restarts=-1, max_task_retries=RETRIES, **lasting)
    return make.remote()


def await_lanes() -> None:
    """Return when every lane has loaded."""
    ray.get(_Open.loading)


def _version(address: str) -> str:
    """What must be equal for a lane of one command to serve another: our code and the worker's environment."""
    folder = Path(__file__).parents[1]
    files = [(str(path), path.stat().st_mtime_ns) for part in ("ray_jobs", "infra") for path in sorted((folder / part).glob("*.py"))]
    return hashlib.sha256(json.dumps([files, runtime_environment(address)], sort_keys=True).encode()).hexdigest()[:16]


def _end_older(current: set[str], claim: Claim) -> None:
    """End what is left of another version of the code or another environment, where nobody uses it."""
    there = {actor["name"] for actor in list_named_actors(all_namespaces=True) if actor["namespace"] == NAMESPACE} - current
    for name in claim(there):
        ray.kill(ray.get_actor(name, NAMESPACE))


def close_lanes() -> None:
    """Give their memory back. What they still do is cancelled first, or Ray would say on the terminal that it will be done again."""
    for reference in itertools.chain.from_iterable(_Open.waiting):
        ray.cancel(reference)
    for lane in _Open.lanes:
        ray.kill(lane)
    _Open.lanes, _Open.waiting, _Open.loading = [], [], []


def lanes() -> list[Any]:
    """The open lanes; none on a cluster elsewhere."""
    return list(_Open.lanes)


def submit(function: Callable[..., Any], *arguments: Any, name: str, resources: Mapping[str, float] | None = None) -> Any:
    """Start `function(*arguments)` in the lane with the least to do, or as a task with these resources; the reference to its result."""
    if not _Open.lanes:
        options = {f"num_{kind}s": amount for kind, amount in (resources or {"cpu": 1}).items()}
        task: Any = ray.remote(usage.metered).options(name=name, max_retries=RETRIES, num_returns=2, **options)
        reference, used = task.remote(function, dict(resources or {"cpu": 1}), *arguments)
        _Open.used.append(used)
        return reference
    for references in _Open.waiting:
        references[:] = ray.wait(references, num_returns=len(references), timeout=0)[1] if references else []
    busy = [i if _Open.loading[i] in _Open.waiting[i] else 0 for i in range(len(_Open.lanes))]  # the first is loaded first
    place = min(range(len(_Open.lanes)), key=lambda i: (busy[i], len(_Open.waiting[i])))
    return _in_lane(place, function, *arguments)


def submit_to_each_lane(function: Callable[..., Any], *arguments: Any) -> None:
    """Let every lane do the same; nobody waits for it."""
    for place in range(len(_Open.lanes)):
        _in_lane(place, function, *arguments)


def _in_lane(place: int, function: Callable[..., Any], *arguments: Any) -> Any:
    reference, used = _Open.lanes[place].metered.options(num_returns=2).remote(function, *arguments)
    _Open.waiting[place].append(reference)
    _Open.used.append(used)
    return reference


def take_usage() -> None:
    """Add to this process's counts what the work that has ended used; what is still under way is left for the next time."""
    if not _Open.used:
        return
    ready, _Open.used = ray.wait(_Open.used, num_returns=len(_Open.used), timeout=0)
    for reference in ready:
        with suppress(ray.exceptions.RayError):  # its work failed, which whoever waits for it will see
            usage.add(ray.get(reference))


def load(_after: object) -> None:
    """Load torch, timm, boto3 and our own modules, once the argument is there; a lane that an earlier command left has them."""
    _load_once()


@functools.cache
def _load_once() -> None:
    gc.disable()  # a third of the time would go into looking for garbage among what is being loaded
    import_timm()
    import torch

    from ray_jobs import backbone, cuts, dataset, feature_cache, features, trial  # noqa: F401

    torch.set_num_threads(1)
    object_store()  # boto3, and its model of S3, take most of a second
    gc.freeze()
    gc.enable()
