"""Linear probes on cached features, all at once: those of the search's depth 0, and those whose best head starts deeper trials. No Ray."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from infra.errors import UserError
from ray_jobs.heads import HeadResult
from ray_jobs.search import Epoch, Status, TrainedHead
from ray_jobs.search_space import TrialConfig
from ray_jobs.trial import WarmWorker


@dataclass(frozen=True)
class Probes:
    """The best head, how it was trained, and every head that the search asked for, in order."""

    summary: dict[str, float | None]
    head: dict[str, np.ndarray[Any, Any]]
    trials: list[TrainedHead]


def train_probes(worker: WarmWorker, trials: Sequence[TrialConfig], probes: Sequence[TrialConfig]) -> Probes:
    """Train the heads of `trials` and `probes` together; the best is chosen over all heads and epochs, by val accuracy, then val loss.

    Raises UserError where all diverge.
    """
    started_at, started = time.time(), time.perf_counter()
    configs = list(dict.fromkeys([*trials, *probes]))
    results = dict(zip(configs, worker.heads(configs), strict=True))
    each = (time.perf_counter() - started) / len(configs)
    found = [result for result in results.values() if result.best_epoch]
    if not found:
        rates = ", ".join(f"{lr:g}" for lr in sorted({config.lr for config in configs}))
        raise UserError(f"Every linear probe diverged ({worker.work.backbone}, learning rates {rates}).", "Lower search.lr.")
    best = max(found, key=lambda result: (result.best.val_accuracy, -result.best.val_loss))
    summary = {
        "lr": best.recipe.lr, "accuracy": best.best.val_accuracy, "val_loss": best.best.val_loss, "epochs": best.best_epoch,
        "knn_accuracy": worker.knn_accuracy(),
    }  # fmt: skip
    return Probes(summary, best.head, [_trained(results[config], int(1000 * started_at), each) for config in trials])


def _trained(result: HeadResult, started_at: int, seconds: float) -> TrainedHead:
    curve = [Epoch(epoch=number, **vars(measured)) for number, measured in enumerate(result.curve, 1)]
    failed: Status | None = "diverged" if result.status == "diverged" else None
    return TrainedHead(curve, failed, result.reason if failed else "", started_at, seconds)
