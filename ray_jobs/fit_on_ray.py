"""The fit on Ray Train: attempts of one TorchTrainer each, whose workers run `fit.train`; the result comes back over the object store.

Ray gets no checkpoint from us: ours are committed folders that we resume from ourselves (fit.py), so Ray's own storage holds
nothing that a worker reads, and a folder of the driver's machine is enough for it on any number of hosts. An attempt has the workers
that there is room for when it starts; docs/adr/0020 says why it is not Ray Train that changes their number.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from infra import ray_cluster, usage
from infra.errors import ServiceError, UnfreezeError, UserError
from infra.object_store import ObjectStore, join_uri, object_store
from infra.usage import Usage
from ray_jobs.fit_attempts import DONE, End, Outcome, after
from ray_jobs.fit_choice import best_of, falls_short, reached
from ray_jobs.fit_plan import Plan, plan_fit
from ray_jobs.light_timm import import_timm
from ray_jobs.room import Demand, demand_now, fit_demand, require
from ray_jobs.spec import Spec
from ray_jobs.watch import Watch
from ray_jobs.workers import close_lanes

if TYPE_CHECKING:
    from ray_jobs.checkpoint import Position

POLL_S = 0.3
SETTLE_S = 20.0
"""Ray takes about 15 s to see that a machine is gone; until then it would start the next attempt's workers there, and wait for them."""
TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # paid at each report, that is, once an epoch; Ray's own default is 2 s
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # Ray's 60 s are too short for two torch imports on a busy machine
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # Ray's own default is 5 s
}
WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
"""One more process; for nothing where there is but one machine, since then there is no other to go on with."""

log = logging.getLogger(__name__)


def run_fit(spec: Spec, dataset: dict[str, Any], backbone: dict[str, Any], search: dict[str, Any], watch: Watch) -> dict[str, Any]:
    """Train the search's winner, a second time without augmentation where the first fit falls short of what its trial has shown."""
    fits = [_fit(spec, dataset, backbone, search, watch)]
    if spec.fit.augmentation != "none" and falls_short(fits[0], search, dataset["val"]):
        watch.say(
            f"The fit with augmentation {spec.fit.augmentation} falls short of its trial in the search "
            f"({reached(fits[0])} against {search['best']['accuracy']:.3f} on val): fitting once more without."
        )
        plain = spec.model_copy(update={"fit": spec.fit.model_copy(update={"augmentation": "none"})})
        second = replace(watch, on_progress=lambda done, total: watch.on_progress(total + done, 2 * total))
        fits.append(_fit(plain, dataset, backbone, search, second))
    return best_of(fits, search, dataset["val"])


def _fit(spec: Spec, dataset: dict[str, Any], backbone: dict[str, Any], search: dict[str, Any], watch: Watch) -> dict[str, Any]:
    """Train and commit the result; a result that is already there is returned at once."""
    store = object_store()
    plan = plan_fit(spec, dataset, backbone, search)
    result = read_result(store, plan)
    if result is None:
        close_lanes()  # Ray Train starts processes of its own, which need the memory
        machines = ray_cluster.machines()
        has_begun = _position(store, plan) > (0, 0)
        demand = fit_demand(spec.fit.workers_to_go_on if has_begun else spec.fit.workers_to_begin, machines)
        require(demand, machines)
        _train(replace(plan, started_at=time.time()), demand, spec.fit.workers_to_go_on, store, watch)
        result = read_result(store, plan)
        assert result is not None, f"the fit {plan.fit_id} ended without a result"
        usage.add(Usage(**json.loads(store.read(join_uri(plan.fit_uri, "used.json")))))
    watch.on_progress(plan.max_epochs, plan.max_epochs)
    return {**result, "augmentation": plan.augmentation}


def read_result(store: ObjectStore, plan: Plan) -> dict[str, Any] | None:
    """The committed result of the fit, or None where it is not finished (or its last write was cut off)."""
    try:
        result: dict[str, Any] = json.loads(store.read(join_uri(plan.fit_uri, "result.json")))
    except (FileNotFoundError, ValueError):
        return None
    return result


def _train(plan: Plan, begun: Demand, least: int, store: ObjectStore, watch: Watch) -> None:
    """One attempt after the other, each on the workers that there is room for, until the result is written or it has to be given up."""
    failures = 0
    while True:
        there = ray_cluster.living()
        demand = demand_now(begun, plan.num_workers, least, list(there.values()))
        started_at = _position(store, plan)
        with usage.holding(demand.each, demand.count):
            end, error = _attempt(plan, demand, store, watch, is_watched=len(there) > 1)
        position = _position(store, plan)
        outcome = Outcome(
            end=end, is_mistake=isinstance(_own_error(error), UserError), had_no_room=_had_no_room(error),
            was_preempted=_was_preempted(error), machines_gone=0 if end else _machines_gone(there, error, demand.count),
            progressed=position > started_at,
        )  # fmt: skip
        decision = after(outcome, failures)
        if end == DONE:
            return
        if not decision.again:
            assert error
            raise _explained(error, plan, failures) from error
        failures += decision.is_failure
        log.warning("the fit goes on from epoch %d, step %d: %s; %s", *position, decision.reason, error or "no error")
        watch.say(f"The fit goes on after {_words(position)}: {decision.reason}.")


def _attempt(plan: Plan, demand: Demand, store: ObjectStore, watch: Watch, *, is_watched: bool) -> tuple[End | None, BaseException | None]:
    """How one attempt ended, or what it failed of. In a thread, so that Ray leaves the process's Ctrl-C alone."""
    ended: list[End] = []
    failures: list[BaseException] = []
    plan = replace(plan, loader_processes=int(demand.each["CPU"]) - 1 if "GPU" in demand.each else 0)

    def fit() -> None:
        try:
            ended.append(_trainer(plan, demand, folder, is_watched).fit().return_value)
        except BaseException as error:
            failures.append(error)

    settings = {**TRAIN_SETTINGS, WATCHER: str(int(is_watched))}
    with tempfile.TemporaryDirectory(prefix="unfreeze-ray-train-") as folder, _environment(settings), _no_places_left():
        thread = threading.Thread(target=fit, name="ray-train", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(POLL_S)
            watch.on_progress(_position(store, plan)[0], plan.max_epochs)
    return (ended[0], None) if ended else (None, failures[0])


def _trainer(plan: Plan, demand: Demand, folder: str, is_watched: bool) -> Any:
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig

    resources = dict(demand.each)
    return TorchTrainer(
        _train_one_rank,  # type: ignore[arg-type]  # what rank 0 returns is the result's return_value
        train_loop_config={"plan": asdict(plan), "resources": resources, "is_watched": is_watched},
        scaling_config=ScalingConfig(num_workers=demand.count, use_gpu="GPU" in resources, resources_per_worker=resources),
        run_config=RunConfig(  # type: ignore[arg-type]  # V2's, which is what the trainer checks for
            name=plan.fit_id,
            storage_path=folder,
            # _train decides. Ray itself would try without end to start a group again whose first try still has the places
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _train_one_rank(config: dict[str, Any]) -> End:
    """Runs on each worker."""
    import_timm()
    import ray.train
    import torch
    from ray.train.collective import broadcast_from_rank_zero
    from ray.train.torch import get_device

    from infra.settings import cache_dir
    from ray_jobs.fit import Asks, Rank, never, train

    plan, context = Plan(**config["plan"]), ray.train.get_context()
    rank = Rank(context.get_world_rank(), context.get_world_size(), get_device())
    if rank.device.type == "cpu":
        torch.set_num_threads(1)  # one CPU is what this worker reserved
    with _queue(plan.num_workers - rank.world if rank.number == 0 else 0, config["resources"]) as is_free:
        asks = Asks(
            is_called_away=(lambda: ray.train.get_preemption_info() is not None) if config["is_watched"] else never,
            has_room=(lambda: broadcast_from_rank_zero(is_free())) if rank.world < plan.num_workers else never,
        )
        return train(plan, rank, store=object_store(), cache=cache_dir(), on_epoch=lambda row: ray.train.report(asdict(row)), asks=asks)


@contextmanager
def _no_places_left() -> Iterator[None]:
    """Take back the places that the body's workers had. Ray Train keeps those of a group that failed to start until this process ends."""
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    before = _places()
    yield
    for place in _places() - before:
        log.info("Ray Train left the placement group %s", place)
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(place))))


def _places() -> set[str]:
    """The placement groups of this process's Ray job, in hex; their last four bytes are the job."""
    import ray
    from ray.util.placement_group import placement_group_table

    job = ray.get_runtime_context().get_job_id()
    return {place for place, row in placement_group_table().items() if place.endswith(job) and row["state"] != "REMOVED"}


@contextmanager
def _queue(missing: int, resources: dict[str, float]) -> Iterator[Callable[[], bool]]:
    """Stand in Ray's queue for each missing worker, and say whether one has got its place.

    The cluster's autoscaler sees the queue too. Ray takes the places back when this worker dies.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    places = [placement_group([resources]) for _ in range(missing)]
    try:
        yield lambda: any(place.wait(0) for place in places)
    finally:
        for place in places:
            remove_placement_group(place)


def _position(store: ObjectStore, plan: Plan) -> Position:
    """How far the fit is, by its committed checkpoints; (0, 0) too where the store does not answer: that alone is no failure."""
    from ray_jobs import checkpoint

    try:
        return max(checkpoint.positions(store, join_uri(plan.fit_uri, "checkpoints")), default=(0, 0))
    except UnfreezeError as error:
        log.debug("no progress to tell: %s", error)
        return 0, 0


def _words(position: Position) -> str:
    epochs, steps = position
    return f"epoch {epochs}" + (f" and {steps} steps" if steps else "")


def _machines_gone(there: Mapping[str, object], error: BaseException | None, workers: int) -> int:
    """How many of those machines are gone or about to be. Where only a peer noticed, Ray is given the time to see why."""
    deadline = time.monotonic() + (0.0 if _says_why(error, workers) else SETTLE_S)
    while True:
        gone = len(there.keys() - ray_cluster.living().keys())
        if gone or time.monotonic() >= deadline:
            return gone
        time.sleep(POLL_S)


def _causes(error: BaseException | None) -> dict[int, BaseException]:
    """What each worker died of, by rank."""
    found: dict[int, BaseException] = getattr(error, "worker_failures", {})
    return {rank: getattr(cause, "health_check_failure", cause) for rank, cause in found.items()}


def _had_no_room(error: BaseException | None) -> bool:
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError)


def _was_preempted(error: BaseException | None) -> bool:
    from ray.train.v2.api.exceptions import PreemptionError

    return isinstance(error, PreemptionError) or any(getattr(cause, "preempted", False) for cause in _causes(error).values())


def _says_why(error: BaseException | None, workers: int) -> bool:
    """Whether a worker's death itself is among the causes, not only that its peers lost it, or that it does not answer."""
    from ray.exceptions import ActorUnavailableError, RayActorError

    causes = [cause for cause in _causes(error).values() if not isinstance(cause, ActorUnavailableError)]
    return len(causes) == workers or _own_error(error) is not None or any(isinstance(cause, RayActorError) for cause in causes)


def _own_error(error: BaseException | None) -> UnfreezeError | None:
    """The first worker's own UserError or ServiceError."""
    found = (getattr(cause, "cause", cause) for cause in _causes(error).values())
    return next((cause for cause in found if isinstance(cause, UnfreezeError)), None)


def _explained(error: BaseException, plan: Plan, restarts: int) -> BaseException:
    """The first worker's own error where that is the cause; otherwise what Ray says."""
    own, causes = _own_error(error), _causes(error)
    if own or not causes:
        return own or error
    rank, cause = min(causes.items())
    return ServiceError(
        f"The fit failed on worker {rank} of {plan.num_workers} after {restarts} restarts: {cause}",
        "The same command carries on from the last checkpoint.",
    )


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Ray Train takes its settings from the driver's variables only, and hands them to its processes."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: os.environ.get(name) or value for name, value in values.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
