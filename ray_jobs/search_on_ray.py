"""Run a search on a Ray cluster: linear probes first, then Ray Tune over unfreeze depth and learning rate in warm workers.

The folder searches/SEARCH_ID is committed at the end; a search that is already there is not run again.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ray

from infra.committed_folder import commit, read_manifest
from infra.object_store import ObjectStore, join_uri, object_store
from infra.progress import OnProgress
from ray_jobs.features_on_ray import num_groups_of, result_of
from ray_jobs.light_timm import import_timm
from ray_jobs.search import (
    TrialRecord,
    best_of,
    best_trial,
    epochs_table,
    flops_counted,
    leaderboard_table,
    probe_learning_rates,
    ranked,
    search_id,
    trial_configs,
    trial_detail,
)
from ray_jobs.spec import LrRange, SearchSpec, Spec
from ray_jobs.warm_worker import warm_worker

if TYPE_CHECKING:
    from ray_jobs.trial import Work

RESULT = "result.json"
TRIALS_A_GPU = 4
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON or TensorBoard files: they cost more than a linear probe's epoch
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "100000",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is the caller's
    "TUNE_WARN_THRESHOLD_S": "100000",
}


def run_search(
    spec: Spec, dataset: dict[str, Any], backbone: dict[str, Any], features: dict[str, str], on_progress: OnProgress,
) -> dict[str, Any]:  # fmt: skip
    """Run the search, or give the stored result of an equal one. Raises UserError where every trial failed."""
    store, started = object_store(), time.perf_counter()
    found_id = search_id(spec, backbone_digest=backbone["digest"], dataset_version=dataset["version"])
    uri = join_uri(spec.storage, "searches", found_id)
    if read_manifest(store, uri):
        return dict(json.loads(store.read(join_uri(uri, RESULT))))
    work = work_of(spec, dataset, backbone, features)
    probe_reference = _start_probe(work, probe_learning_rates(spec.search.lr))
    trials_started = time.perf_counter()
    records = _run_trials(spec.search, work, probe_reference, on_progress)
    trials_s = time.perf_counter() - trials_started
    probe = result_of(probe_reference)
    best = best_trial(records)
    details = [trial_detail(record, spec.search.max_epochs) for record in ranked(records)]
    forward = {"suffix": probe["suffix_flops"], "whole": probe["whole_flops"]}
    flops, unshared = flops_counted(details, **forward, train=dataset["train"], val=dataset["val"])
    seconds = time.perf_counter() - started
    result = {
        "search_id": found_id, "uri": uri, "leaderboard_uri": join_uri(uri, "leaderboard.parquet"), "trials": len(details),
        "best": best_of(best), "probe": {**probe["summary"], "uri": join_uri(uri, "probe", "probe.safetensors")},
        "seconds": seconds, "trials_detail": details,
        "cost": {"estimated_s": None, "measured_s": seconds, "prefix_s": None, "trials_s": trials_s, "flops": flops,
                 "flops_without_sharing": unshared},
    }  # fmt: skip
    _write(store, uri, result, probe)
    return result


def work_of(spec: Spec, dataset: dict[str, Any], backbone: dict[str, Any], features: dict[str, str]) -> Work:
    """What all trials share, from the results of the steps before."""
    import_timm()
    from ray_jobs.trial import Work

    search = spec.search
    return Work(
        backbone_uri=backbone["uri"], mean=tuple(backbone["mean"]), std=tuple(backbone["std"]), image_size=spec.data.image_size,
        num_classes=len(dataset["classes"]), num_groups=num_groups_of(backbone),
        features=tuple(sorted((int(depth), uri) for depth, uri in features.items())), max_epochs=search.max_epochs,
        batch_size=search.batch_size, weight_decay=search.weight_decay, label_smoothing=search.label_smoothing,
        class_weights=search.class_weights, seed=search.seed,
    )  # fmt: skip


def _start_probe(work: Work, lrs: list[float]) -> Any:
    """Start the linear probes beside the trials' workers, which load torch meanwhile; 0 CPUs, so that no trial waits for it."""
    task: Any = ray.remote(_probe).options(num_cpus=0, name="probe")
    return task.remote(work, lrs)


def _probe(work: Work, lrs: list[float]) -> dict[str, Any]:
    """Train a linear probe per learning rate; the head of the best, at its best epoch, and what each suffix costs."""
    worker = warm_worker(work)

    from ray_jobs.probe import best_probe  # torch is loaded only now, and without its compiler

    found = best_probe(worker, lrs)
    flops = worker.forward_flops()
    return {"head": found.head, "summary": found.summary, "whole_flops": flops.pop(-1), "suffix_flops": flops}


def _run_trials(search: SearchSpec, work: Work, probe: Any, on_progress: OnProgress) -> list[TrialRecord]:
    """Drive Ray Tune; the records of all trials, in the order in which they were made."""
    with _quiet(), tempfile.TemporaryDirectory(prefix="unfreeze-tune-") as scratch:
        from ray import tune

        from ray_jobs.search_trial import Progress, SearchTrial

        progress = Progress(search, on_progress)
        concurrent, resources = _slots(search)
        space, searcher = _space(search)
        trainable = tune.with_resources(tune.with_parameters(SearchTrial, shared={"work": work, "probe": [probe]}), resources)
        tuner = tune.Tuner(
            trainable, param_space=space,
            tune_config=tune.TuneConfig(
                metric="val_accuracy", mode="max", search_alg=searcher, scheduler=_scheduler(search), reuse_actors=True,
                max_concurrent_trials=concurrent, num_samples=search.num_trials if searcher else 1,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="search", storage_path=scratch, verbose=0, callbacks=[progress],
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        )  # fmt: skip
        tuner.fit()
    return progress.records


def _slots(search: SearchSpec) -> tuple[int, dict[str, float]]:
    """Trials at a time, and what one of them occupies."""
    have = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus, gpus = max(1, int(have.get("CPU", 1))), int(have.get("GPU", 0))
    if gpus:
        return min(cpus, gpus * TRIALS_A_GPU), {"cpu": 1, "gpu": 1 / TRIALS_A_GPU}
    return cpus, {"cpu": 1}


def _space(search: SearchSpec) -> tuple[dict[str, Any], Any]:
    """Tune's search space and searcher: our own points for grid and random, distributions for Optuna."""
    from ray import tune

    if search.resolved_searcher != "optuna":
        points = [{"unfreeze_depth": config.unfreeze_depth, "lr": config.lr, "index": i} for i, config in enumerate(trial_configs(search))]
        return {"point": tune.grid_search(points)}, None
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    lr = search.lr
    rates: Any = (
        optuna.distributions.FloatDistribution(lr.low, lr.high, log=lr.scale == "log") if isinstance(lr, LrRange)
        else optuna.distributions.CategoricalDistribution(lr)
    )  # fmt: skip
    space = {"unfreeze_depth": optuna.distributions.CategoricalDistribution(search.unfreeze_depth), "lr": rates}
    sampler = optuna.samplers.TPESampler(seed=search.seed, n_startup_trials=max(4, 2 * len(search.unfreeze_depth)))
    return {}, OptunaSearch(space=space, metric="val_accuracy", mode="max", sampler=sampler)


def _scheduler(search: SearchSpec) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    if search.scheduler == "fifo" or search.max_epochs == 1:
        return FIFOScheduler()  # type: ignore[no-untyped-call]
    # not after one epoch: what has just been unfrozen first falls behind, while BatchNorm's statistics move to the new data
    grace = min(2, search.max_epochs - 1)
    return ASHAScheduler(time_attr="training_iteration", max_t=search.max_epochs, grace_period=grace, reduction_factor=3)


@contextmanager
def _quiet() -> Iterator[None]:
    """Tune's environment and loggers, for as long as it runs."""
    before = {key: os.environ.get(key) for key in QUIET}
    os.environ.update(QUIET)
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for key, value in before.items():
            os.environ.pop(key, None) if value is None else os.environ.update({key: value})


def _write(store: ObjectStore, uri: str, result: dict[str, Any], probe: dict[str, Any]) -> None:
    from safetensors.numpy import save

    files = {
        "trials.parquet": epochs_table(result["trials_detail"]), "leaderboard.parquet": leaderboard_table(result["trials_detail"]),
        "probe/probe.safetensors": save(probe["head"]), "probe/probe.json": json.dumps(probe["summary"], indent=1).encode(),
        RESULT: json.dumps(result, indent=1).encode(),
    }  # fmt: skip
    commit(store, uri, files)
