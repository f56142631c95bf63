"""Ray Tune's view of a search: one trial in a warm worker, the thin adapters between Tune and the search engine, and Tune's run itself."""

from __future__ import annotations

import logging
import os
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import ray
from ray import tune
from ray.experimental import internal_kv
from ray.tune.execution import class_cache
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from infra import usage
from infra.progress import OnProgress
from infra.usage import Usage
from ray_jobs.proposals import Pause
from ray_jobs.search import Epoch, status_of_error
from ray_jobs.search_engine import SearchEngine
from ray_jobs.search_space import TrialConfig
from ray_jobs.trial_epoch import run_ahead, trial_epoch

MEETING_S = 3.0
MAX_WORKER_DEATHS = 2
"""A trial whose worker died starts again this many times; an eviction or a kill then changes nothing in the outcome."""

QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON or TensorBoard files: they cost more than a linear probe's epoch
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "100000",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is the caller's
    "TUNE_WARN_THRESHOLD_S": "100000",
}


class SearchTrial(tune.Trainable):
    """A training on cached features: in a warm lane where there are any, else in this process, which then outlives the trial."""

    def setup(self, config: dict[str, Any], shared: dict[str, Any]) -> None:  # type: ignore[override]  # with_parameters adds it
        logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it warns of a slow start, with advice already taken
        self.shared = shared
        self.reset_config(config)
        self.met = False

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.point, self.key, self.epoch = TrialConfig(**new_config["point"]), str(new_config["index"]), 0
        self.lane = self.shared["lanes"][new_config["lane"]] if self.shared["lanes"] else None
        return True

    def step(self) -> dict[str, Any]:
        """One epoch."""
        if not self.met:
            self._meet()
        self.epoch += 1
        name = self.point.backbone
        head = ray.get(self.shared["heads"][name]) if self.point.unfreeze_depth and self.epoch == 1 else None
        arguments = (self.shared["works"][name], self.point, head, self.key, self.epoch)
        if self.lane:
            result: dict[str, Any] = ray.get(self.lane.run.remote(trial_epoch, *arguments))
            return result
        result, used = usage.metered(trial_epoch, {}, *arguments)  # this process fetches features and backbone itself
        return {**result, "used": asdict(used)}

    def _meet(self) -> None:
        """Before their first epochs the first actors wait for each other, but not for long, as there may be room for fewer of them.

        Tune gives an actor that is free to a trial whose own is still starting, and gives that one up: where trials are shorter than
        the start of a process, one actor would do them all, and the others would be started and killed for ever.
        """
        self.met = True
        meeting, until = self.shared["meeting"], time.monotonic() + self.shared["meeting_s"]
        internal_kv._internal_kv_put(f"{meeting}{self.key}", b"here")
        while len(internal_kv._internal_kv_list(meeting)) < self.shared["actors"] and time.monotonic() < until:
            time.sleep(0.01)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: a search's result is its record."""


class _StaysHere:
    """Tune pickles what it is given, to restore it one day; the engine is restored from its journal instead."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class FreeLanes:
    """Which lane runs which trial; a trial keeps its lane until it is over."""

    def __init__(self, count: int) -> None:
        self.left = list(range(count))
        self.taken: dict[int, int] = {}

    def take(self, index: int) -> int:
        self.taken[index] = self.left.pop(0)
        return self.taken[index]

    def give_back(self, index: int) -> None:
        if index in self.taken:
            self.left.append(self.taken.pop(index))


class Proposals(_StaysHere, Searcher):
    """Tune asks here which trial comes next."""

    def __init__(self, engine: SearchEngine, lanes: FreeLanes) -> None:
        super().__init__(metric="val_accuracy", mode="max")
        self.engine, self.lanes = engine, lanes
        self.ahead: list[dict[str, Any]] = []

    def start_ahead(self, shared: Mapping[str, Any]) -> None:
        """Take each lane's first trial, and let it train the first epoch of it while Tune starts its actors, which takes seconds."""
        while isinstance(first := self._next(), dict):
            self.ahead.append(first)
            if not shared["lanes"]:
                continue
            point = TrialConfig(**first["point"])
            head = shared["heads"][point.backbone] if point.unfreeze_depth else None
            shared["lanes"][first["lane"]].run.remote(run_ahead, shared["works"][point.backbone], point, head, str(first["index"]))

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        return self.ahead.pop(0) if self.ahead else self._next()

    def _next(self) -> dict[str, Any] | None:
        if not self.lanes.left:
            return None
        index = self.engine.next()
        if index is Pause.DONE and self.lanes.taken:
            return None  # a trial that still runs may have to start again
        if index is Pause.DONE:
            return Searcher.FINISHED  # type: ignore[return-value]  # a word that Tune knows
        if isinstance(index, Pause):
            return None
        return {"point": vars(self.engine.records[index].config), "index": index, "lane": self.lanes.take(index)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The scheduler has told the engine already."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal holds the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the journal holds the state."""


class Scheduler(_StaysHere, FIFOScheduler):
    """Tune tells here what each epoch measured, and learns whether the trial goes on."""

    def __init__(self, engine: SearchEngine, lanes: FreeLanes, on_progress: OnProgress, expected: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.engine, self.lanes, self.on_progress, self.expected = engine, lanes, on_progress, expected
        self.deaths: Counter[int] = Counter()
        self.started = False

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        """Let Tune keep every actor between two trials: by itself it keeps one, and ends the others where a depth of the ladder ends."""
        if not self.started:
            controller._actor_cache.increase_max(trial.placement_group_factory, len(self.lanes.left) + len(self.lanes.taken))
        self.started = True

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        index = trial.config["index"]
        usage.add(Usage(**result.get("used", {})))
        if "status" in result:
            self.engine.end(index, result["status"], result["reason"])
            over = True
        else:
            numbers = {key: result[key] for key in ("epoch", "val_accuracy", "val_loss", "train_loss", "seconds")}
            over = self.engine.report(index, Epoch(**numbers), started_at=result["started_at"], seconds=result["elapsed"])
        if over:
            self.lanes.give_back(index)
        self._tell()
        return TrialScheduler.STOP if over else TrialScheduler.CONTINUE

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Tune sends the last result of a trial here alone."""
        self.on_trial_result(controller, trial, result)

    def on_trial_error(self, controller: Any, trial: Any) -> None:
        """Its worker died, or raised. Tune would start only those again that ran already, so all go back to the engine here."""
        index = trial.config["index"]
        self.lanes.give_back(index)
        self.deaths[index] += 1
        if self.deaths[index] <= MAX_WORKER_DEATHS:
            self.engine.again(index)
        else:
            error = str(trial.get_pickled_error() or trial.get_error() or "the worker died")
            self.engine.end(index, status_of_error(error), error.strip()[-500:])
        self._tell()

    def _tell(self) -> None:
        longest, records = self.engine.max_epochs, self.engine.records
        done = sum(longest if record.is_over(longest) else len(record.curve) for record in records)
        self.on_progress(done, max(len(records), self.expected) * longest)


class EachStep(_StaysHere, tune.Stopper):
    """Tune asks here at each turn of its loop whether to stop everything; it never does, but something is to be looked at each time.

    (A tune.Callback could do it too, but Ray imports MLflow, Comet and others when it is given one.)
    """

    def __init__(self, look: Callable[[], None]) -> None:
        self.look = look

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        self.look()
        return False


def drive_tune(
    engine: SearchEngine, shared: Mapping[str, Any], lanes: int, slot: Mapping[str, float], *, look: Callable[[], None],
    on_progress: OnProgress, expected: int,
) -> None:  # fmt: skip
    """Let Ray Tune run trials, `lanes` at a time and each on the resources of `slot`, until the engine has nothing more to run.

    `shared` is what every trial gets: works and heads by backbone, and the lanes. `look` is called at each turn.
    """
    free = FreeLanes(lanes)
    proposals = Proposals(engine, free)
    _keep_keys_apart()
    with _quiet(lanes), tempfile.TemporaryDirectory(prefix="unfreeze-tune-") as scratch:
        proposals.start_ahead(shared)
        given = {**shared, "meeting": f"unfreeze-meeting-{uuid.uuid4().hex}-", "meeting_s": MEETING_S, "actors": len(proposals.ahead)}
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(SearchTrial, shared=given), dict(slot)),
            tune_config=tune.TuneConfig(
                metric="val_accuracy", mode="max", search_alg=proposals, scheduler=Scheduler(engine, free, on_progress, expected),
                reuse_actors=True, num_samples=-1, trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="search", storage_path=scratch, verbose=0, stop=EachStep(look),
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        )  # fmt: skip
        try:
            tuner.fit()
        finally:
            internal_kv._internal_kv_del(given["meeting"], del_by_prefix=True)


def _keep_keys_apart() -> None:
    """Tune would give the driver's S3 keys to each trial's process by its command line; ours have them already, from a file."""
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if not name.startswith("AWS_")}


@contextmanager
def _quiet(lanes: int) -> Iterator[None]:
    """Tune's environment and loggers, for as long as it runs."""
    settings = QUIET | {"TUNE_MAX_PENDING_TRIALS_PG": str(lanes)}
    before = {key: os.environ.get(key) for key in settings}
    os.environ.update(settings)
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for key, value in before.items():
            os.environ.pop(key, None) if value is None else os.environ.update({key: value})
