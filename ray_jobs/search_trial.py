"""Ray Tune's view of a search: one trial in a warm worker, and the thin adapters between Tune and the search engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from infra.progress import OnProgress
from ray_jobs.proposals import Pause
from ray_jobs.search import Epoch, status_of_error
from ray_jobs.search_engine import SearchEngine
from ray_jobs.search_space import TrialConfig
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
        self.point = TrialConfig(**config["point"])
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
        return {"epoch": self.training.epochs_done, **vars(measured), "done": done, **self._times()}

    def _epoch(self) -> Any:
        if self.training is None:
            worker = warm_worker(self.shared["work"])
            head = ray.get(self.shared["probe"][0])["head"] if self.point.unfreeze_depth else None
            self.training = worker.start(self.point, head)
        return self.training.epoch()

    def _failure(self, status: str, reason: str) -> dict[str, Any]:
        self.training = None
        return {"val_accuracy": 0.0, "status": status, "reason": reason[:500], "done": True, **self._times()}

    def _times(self) -> dict[str, Any]:
        return {"started_at": int(1000 * self.started_at), "elapsed": time.time() - self.started_at}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: a search's result is its record."""


class _StaysHere:
    """Tune pickles what it is given, to restore it one day; the engine is restored from its journal instead."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Proposals(_StaysHere, Searcher):
    """Tune asks here which trial comes next."""

    def __init__(self, engine: SearchEngine) -> None:
        super().__init__(metric="val_accuracy", mode="max")
        self.engine = engine

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        index = self.engine.next()
        if index is Pause.DONE:
            return Searcher.FINISHED  # type: ignore[return-value]  # a word that Tune knows
        if isinstance(index, Pause):
            return None
        return {"point": vars(self.engine.records[index].config), "index": index}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The scheduler has told the engine already."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal holds the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the journal holds the state."""


class Scheduler(_StaysHere, FIFOScheduler):
    """Tune tells here what each epoch measured, and learns whether the trial goes on."""

    def __init__(self, engine: SearchEngine, on_progress: OnProgress, expected: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.engine, self.on_progress, self.expected = engine, on_progress, expected

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        index = trial.config["index"]
        if "status" in result:
            self.engine.end(index, result["status"], result["reason"])
            over = True
        else:
            numbers = {key: result[key] for key in ("epoch", "val_accuracy", "val_loss", "train_loss", "seconds")}
            over = self.engine.report(index, Epoch(**numbers), started_at=result["started_at"], seconds=result["elapsed"])
        self._tell()
        return TrialScheduler.STOP if over else TrialScheduler.CONTINUE

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Tune sends the last result of a trial here alone."""
        self.on_trial_result(controller, trial, result)

    def on_trial_error(self, controller: Any, trial: Any) -> None:
        error = str(trial.get_pickled_error() or trial.get_error() or "the worker died")
        self.engine.end(trial.config["index"], status_of_error(error), error.strip()[-500:])
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
