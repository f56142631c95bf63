"""One trial as Ray Tune sees it, in a warm worker; and the driver's record of all of them."""

from __future__ import annotations

import logging
import time
from typing import Any

import ray
from ray import tune

from infra.progress import OnProgress
from ray_jobs.search import Epoch, TrialConfig, TrialRecord, status_of_error
from ray_jobs.spec import SearchSpec
from ray_jobs.warm_worker import warm_worker


class SearchTrial(tune.Trainable):
    """A training on cached features; the process, its model and its features outlive the trial."""

    def setup(self, config: dict[str, Any], shared: dict[str, Any]) -> None:  # type: ignore[override]  # with_parameters adds it
        logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it warns of a slow start, with advice already taken
        self.shared = shared
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self.point = config.get("point", config)
        self.training: Any = None
        self.started_at = time.time()

    def step(self) -> dict[str, Any]:
        """One epoch. A trial that diverges or finds no memory ends by itself and leaves its worker warm."""
        import torch

        from ray_jobs.train_loop import Diverged

        try:
            measured = self._epoch()
        except Diverged as error:
            return self._failure("diverged", str(error))
        except (MemoryError, torch.OutOfMemoryError) as error:
            return self._failure("out_of_memory", str(error) or type(error).__name__)
        except RuntimeError as error:
            if status_of_error(str(error)) != "out_of_memory":  # torch's CPU allocator raises a plain RuntimeError
                raise
            return self._failure("out_of_memory", str(error))
        done = self.training.epochs_done >= self.shared["work"].max_epochs
        return {**vars(measured), "done": done, **self._times()}

    def _epoch(self) -> Any:
        if self.training is None:
            worker = warm_worker(self.shared["work"])
            depth = self.point["unfreeze_depth"]
            head = ray.get(self.shared["probe"][0])["head"] if depth else None
            self.training = worker.start(depth, self.point["lr"], head)
        return self.training.epoch()

    def _failure(self, status: str, reason: str) -> dict[str, Any]:
        self.training = None
        return {"val_accuracy": 0.0, "status": status, "reason": reason[:500], "done": True, **self._times()}

    def _times(self) -> dict[str, Any]:
        return {"started_at": int(1000 * self.started_at), "elapsed": time.time() - self.started_at}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: a search's result is its record."""


class Progress(tune.Callback):
    """Keeps a record of every trial, and tells how far the search has come, in epochs; a stopped trial counts as all of its own."""

    def __init__(self, search: SearchSpec, on_progress: OnProgress) -> None:
        self.search, self.on_progress = search, on_progress
        self.by_trial: dict[str, TrialRecord] = {}

    @property
    def records(self) -> list[TrialRecord]:
        return sorted(self.by_trial.values(), key=lambda r: r.trial_id)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._record(trial)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        record = self._record(trial)
        record.started_at, record.seconds = result["started_at"], result["elapsed"]
        if "status" in result:
            record.status, record.reason = result["status"], result["reason"]
        else:
            numbers = {key: result[key] for key in ("val_accuracy", "val_loss", "train_loss", "seconds")}
            record.curve.append(Epoch(epoch=len(record.curve) + 1, **numbers))
        self._tell(trials)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell(trials)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self._record(trial)
        error = str(trial.get_pickled_error() or trial.get_error() or "the worker died")
        record.status, record.reason = status_of_error(error), error.strip()[-500:]
        self._tell(trials)

    def _record(self, trial: Any) -> TrialRecord:
        if trial.trial_id not in self.by_trial:
            point = trial.config.get("point", trial.config)
            number = point.get("index", len(self.by_trial))
            self.by_trial[trial.trial_id] = TrialRecord(
                f"{number:05d}", TrialConfig(point["unfreeze_depth"], point["lr"]), started_at=int(1000 * time.time()),
            )  # fmt: skip
        return self.by_trial[trial.trial_id]

    def _tell(self, trials: list[Any]) -> None:
        longest, total = self.search.max_epochs, max(len(trials), self.search.num_trials) * self.search.max_epochs
        ended = sum(longest for trial in trials if trial.is_finished())
        under_way = sum(len(self._record(trial).curve) for trial in trials if not trial.is_finished() and trial.trial_id in self.by_trial)
        self.on_progress(ended + under_way, total)
