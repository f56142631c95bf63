"""Linear probes on cached features: one for each learning rate, all at once; the best head starts every deeper trial. No Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from infra.errors import UserError
from ray_jobs.train_loop import EpochResult
from ray_jobs.trial import WarmWorker


@dataclass(frozen=True)
class Probe:
    """A head at its best epoch, and how it was trained."""

    lr: float
    epochs: int
    result: EpochResult
    head: dict[str, np.ndarray[Any, Any]]

    @property
    def summary(self) -> dict[str, float | int]:
        return {"lr": self.lr, "accuracy": self.result.val_accuracy, "val_loss": self.result.val_loss, "epochs": self.epochs}


def best_probe(worker: WarmWorker, lrs: Sequence[float]) -> Probe:
    """The best head over all learning rates and epochs, by val accuracy, then val loss. Raises UserError where all diverge."""
    found = [result for result in worker.heads([{"lr": lr} for lr in lrs]) if result.best_epoch]
    if not found:
        raise UserError(f"Every linear probe diverged (learning rates {', '.join(f'{lr:g}' for lr in lrs)}).", "Lower search.lr.")
    best = max(found, key=lambda result: (result.best.val_accuracy, -result.best.val_loss))
    return Probe(best.recipe.lr, best.best_epoch, best.best, best.head)
