"""One epoch of one trial in this process, which keeps model, features and the trial's training between calls. No Ray."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray_jobs.light_timm import import_timm
from ray_jobs.search import status_of_error
from ray_jobs.search_space import TrialConfig
from ray_jobs.warm_worker import warm_worker
from ray_jobs.work import Work

if TYPE_CHECKING:
    from ray_jobs.train_loop import SuffixTraining


class LostTrialError(RuntimeError):
    """The process that had this trial under way is gone; it has to start again."""


class _Current:
    """The training of the one trial that this process runs."""

    key: str = ""
    training: SuffixTraining | None = None
    started_at: float = 0.0
    ahead: tuple[tuple[Work, TrialConfig, str], dict[str, Any]] | None = None
    """A first epoch that nobody has asked for yet: of which trial, and its result."""


def run_ahead(work: Work, point: TrialConfig, head: Mapping[str, Any] | None, key: str) -> None:
    """Train the first epoch of the trial `key` before it is asked for; `trial_epoch` then finds it done."""
    _Current.ahead = (work, point, key), trial_epoch(work, point, head, key, 1)


def trial_epoch(work: Work, point: TrialConfig, head: Mapping[str, Any] | None, key: str, epoch: int) -> dict[str, Any]:
    """Train epoch `epoch` (from 1) of the trial `key`, and measure. A trial that diverges or finds no memory says so in its result.

    Raises LostTrialError where an epoch before it was trained in another process.
    """
    ahead, _Current.ahead = _Current.ahead, None
    if epoch == 1 and ahead and ahead[0] == (work, point, key):
        return ahead[1]
    import_timm()
    import torch

    from ray_jobs.train_loop import Diverged

    try:
        measured = _epoch(work, point, head, key, epoch)
    except Diverged as error:
        return _failure("diverged", str(error))
    except (MemoryError, torch.OutOfMemoryError) as error:
        return _failure("out_of_memory", str(error) or type(error).__name__)
    except RuntimeError as error:
        if status_of_error(str(error)) != "out_of_memory":  # torch's CPU allocator raises a plain RuntimeError
            raise
        return _failure("out_of_memory", str(error))
    return {"epoch": epoch, **vars(measured), "done": epoch >= work.max_epochs, **_times()}


def _epoch(work: Work, point: TrialConfig, head: Mapping[str, Any] | None, key: str, epoch: int) -> Any:
    if epoch == 1:
        _Current.training, _Current.key, _Current.started_at = None, "", time.time()  # free the last one's memory first
        _Current.training = warm_worker(work).start(point, head)
        _Current.key = key
    if _Current.training is None or _Current.key != key or _Current.training.epochs_done != epoch - 1:
        raise LostTrialError(f"the worker of trial {key} has started anew")
    return _Current.training.epoch()


def _failure(status: str, reason: str) -> dict[str, Any]:
    _Current.training = None
    return {"val_accuracy": 0.0, "status": status, "reason": reason[:500], "done": True, **_times()}


def _times() -> dict[str, Any]:
    return {"started_at": int(1000 * _Current.started_at), "elapsed": time.time() - _Current.started_at}
