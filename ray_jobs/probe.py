"""Linear probes on cached features: one for each learning rate; the best head starts every deeper trial. No Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from infra.errors import UserError
from ray_jobs.train_loop import Diverged, EpochResult
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
    probes = [probe for lr in lrs for probe in _probes(worker, lr)]
    if not probes:
        raise UserError(f"Every linear probe diverged (learning rates {', '.join(f'{lr:g}' for lr in lrs)}).", "Lower search.lr.")
    return max(probes, key=lambda probe: (probe.result.val_accuracy, -probe.result.val_loss))


def _probes(worker: WarmWorker, lr: float) -> list[Probe]:
    """The head after each epoch of one training, until it diverges."""
    training = worker.start(0, lr, None)
    found = []
    for epoch in range(1, worker.work.max_epochs + 1):
        try:
            result = training.epoch()
        except Diverged:
            break
        found.append(Probe(lr, epoch, result, worker.head()))
    return found
