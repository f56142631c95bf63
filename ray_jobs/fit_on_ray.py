"""The fit on Ray Train: one TorchTrainer whose workers each run `fit.train`; the result comes back over the object store.

Ray gets no checkpoint from us: ours are committed folders that we resume from ourselves (fit.py), so Ray's own storage holds
nothing that a worker reads, and a folder of the driver's machine is enough for it on any number of hosts.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from infra import ray_cluster, usage
from infra.errors import ServiceError, UnfreezeError
from infra.object_store import ObjectStore, join_uri, object_store
from infra.usage import Usage
from ray_jobs.fit_plan import Plan, plan_fit
from ray_jobs.light_timm import import_timm
from ray_jobs.room import fit_demand, require
from ray_jobs.spec import Spec
from ray_jobs.workers import close_lanes

POLL_S = 0.3
RESTARTS = 2  # of the worker group, when a worker or its host dies; each carries on from the last checkpoint
TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # paid at each report, that is, once an epoch; Ray's own default is 2 s
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # Ray's 60 s are too short for two torch imports on a busy machine
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}

OnProgress = Callable[[float, float], None]


def run_fit(
    spec: Spec, dataset: dict[str, Any], backbone: dict[str, Any], search: dict[str, Any], on_progress: OnProgress
) -> dict[str, Any]:
    """Train the search's winner and commit the result; a result that is already there is returned at once."""
    store = object_store()
    plan = plan_fit(spec, dataset, backbone, search)
    result = read_result(store, plan)
    if result is None:
        close_lanes()  # Ray Train starts processes of its own, which need the memory
        machines = ray_cluster.machines()
        demand = fit_demand(plan.num_workers, machines)
        require(demand, machines)
        loaders = int(demand.each["CPU"]) - 1 if "GPU" in demand.each else 0
        with usage.holding(demand.each, demand.count):
            _train_on_workers(replace(plan, started_at=time.time(), loader_processes=loaders), dict(demand.each), store, on_progress)
        result = read_result(store, plan)
        assert result is not None, f"the fit {plan.fit_id} ended without a result"
        usage.add(Usage(**json.loads(store.read(join_uri(plan.fit_uri, "used.json")))))
    on_progress(plan.max_epochs, plan.max_epochs)
    return result


def read_result(store: ObjectStore, plan: Plan) -> dict[str, Any] | None:
    """The committed result of the fit, or None where it is not finished (or its last write was cut off)."""
    try:
        result: dict[str, Any] = json.loads(store.read(join_uri(plan.fit_uri, "result.json")))
    except (FileNotFoundError, ValueError):
        return None
    return result


def _train_on_workers(plan: Plan, resources: dict[str, float], store: ObjectStore, on_progress: OnProgress) -> None:
    """Run the trainer in a thread, so that Ray leaves the process's Ctrl-C alone, and tell the progress from here."""
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            _trainer(plan, resources, folder).fit()
        except BaseException as error:
            failures.append(error)

    with tempfile.TemporaryDirectory(prefix="unfreeze-ray-train-") as folder, _environment(TRAIN_SETTINGS):
        thread = threading.Thread(target=fit, name="ray-train", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(POLL_S)
            on_progress(_epochs_done(store, plan), plan.max_epochs)
    if failures:
        raise _explained(failures[0], plan) from failures[0]


def _trainer(plan: Plan, resources: dict[str, float], folder: str) -> Any:
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig

    return TorchTrainer(
        _train_one_rank,
        train_loop_config=asdict(plan),
        scaling_config=ScalingConfig(num_workers=plan.num_workers, use_gpu="GPU" in resources, resources_per_worker=resources),
        run_config=RunConfig(  # type: ignore[arg-type]  # V2's, which is what the trainer checks for
            name=plan.fit_id,
            storage_path=folder,
            failure_config=FailureConfig(max_failures=RESTARTS),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _train_one_rank(config: dict[str, Any]) -> None:
    """Runs on each worker."""
    import_timm()
    import ray.train
    import torch
    from ray.train.torch import get_device

    from infra.settings import cache_dir
    from ray_jobs.fit import Rank, train

    context = ray.train.get_context()
    rank = Rank(context.get_world_rank(), context.get_world_size(), get_device())
    if rank.device.type == "cpu":
        torch.set_num_threads(1)  # one CPU is what this worker reserved
    train(Plan(**config), rank, store=object_store(), cache=cache_dir(), on_epoch=lambda row: ray.train.report(asdict(row)))


def _epochs_done(store: ObjectStore, plan: Plan) -> int:
    """How far the fit is, by its committed checkpoints; progress is a courtesy, so a store that does not answer is no failure."""
    from ray_jobs import checkpoint

    try:
        return max(checkpoint.epochs(store, join_uri(plan.fit_uri, "checkpoints")), default=0)
    except UnfreezeError as error:
        logging.getLogger(__name__).debug("no progress to tell: %s", error)
        return 0


def _explained(error: BaseException, plan: Plan) -> BaseException:
    """The first worker's own UserError or ServiceError where that is the cause; otherwise what Ray says."""
    causes: dict[int, BaseException] = getattr(error, "worker_failures", {})
    for cause in causes.values():
        original = getattr(cause, "cause", cause)
        if isinstance(original, UnfreezeError):
            return original
    if causes:
        rank, cause = min(causes.items())
        return ServiceError(
            f"The fit failed on worker {rank} of {plan.num_workers} after {RESTARTS} restarts: {cause}",
            "The same command carries on from the last checkpoint.",
        )
    return error


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
