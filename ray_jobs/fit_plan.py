"""What a fit is, in plain values and pure functions: its plan, whose rows and which batches, its schedule, which epoch is best.

No torch here, so the driver can plan a fit without loading it. Everything is a function of (seed, epoch, share), never of what ran before.
A fit has as many shares as `fit.num_workers`. A share is what one worker trains where all of them are there; where fewer are, some train
several, one after the other within each step. So the images of a step, and what each of them is turned into, are always the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from infra.errors import UserError
from infra.object_store import join_uri
from ray_jobs.search_space import point_of
from ray_jobs.spec import Augmentation, Spec, digest_of, named_by

FIT_CODE_VERSION = 1
"""Raise it whenever the same plan would give other weights: a stored fit is then not taken for it."""

WARMUP_SHARE = 0.15
FIRST_LR_SHARE, LAST_LR_SHARE = 0.04, 0.001
LEAST_IMAGES = 8
"""Batch norm takes its statistics from one worker's images of a step; of fewer than these they are poor."""
MEMORY_BUDGET_BYTES = 4 * 1024**3

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """All that a fit is made from, in plain values; `fit_uri` is where its results go."""

    fit_id: str
    fit_uri: str
    dataset_uri: str
    classes: tuple[str, ...]
    backbone_uri: str
    backbone_name: str
    probe_uri: str
    probe_lr: float
    probe_accuracy: float
    probe_val_loss: float
    unfreeze_depth: int
    lr: float
    max_epochs: int
    patience: int
    batch_size: int
    weight_decay: float
    label_smoothing: float
    layer_decay: float
    optimizer: str
    class_weights: str
    augmentation: Augmentation
    augmentation_strength: float
    seed: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    max_pixels: int
    num_workers: int
    started_at: float = 0.0
    loader_processes: int = 0
    memory_budget_bytes: int = MEMORY_BUDGET_BYTES


@dataclass(frozen=True)
class EpochRow:
    """What one epoch measured, over all ranks; a loss of None was no number."""

    epoch: int
    train_loss: float | None
    val_accuracy: float
    val_loss: float | None
    seconds: float


def part_of(total: int, number: int, parts: int) -> range:
    """One of `parts` consecutive pieces of `total` things: each thing in exactly one, sizes that differ by one at most.

    Used for rows over shares, so that a machine fetches only its shards (rows are ordered by content hash, so they are as mixed as
    any), and for shares over ranks.
    """
    size, rest = divmod(total, parts)
    start = number * size + min(number, rest)
    return range(start, start + size + (number < rest))


def rows_of_shares(total: int, shares: range, of: int) -> range:
    """The rows of consecutive shares."""
    return range(part_of(total, shares[0], of).start, part_of(total, shares[-1], of).stop)


def share_of_batch(batch_size: int, workers: int) -> int:
    """Images a step on each worker: together a batch of the trial that found the learning rate, unless that leaves a worker too few."""
    return max(LEAST_IMAGES, math.ceil(batch_size / workers))


def steps_per_epoch(total: int, shares: int, batch_size: int) -> int:
    """Steps of one epoch, the same for each share."""
    return math.ceil(math.ceil(total / shares) / batch_size)


def batches_of_share(total: int, share: int, shares: int, *, batch_size: int, seed: int, epoch: int) -> list[Ints]:
    """Positions among the share's own rows, a batch a step: each exactly once, batch sizes that differ by one at most.

    Equal batches instead of a short last one: batch norm cannot train on a single image, and every step weighs the same.
    """
    own = len(part_of(total, share, shares))
    order = np.random.default_rng([seed, epoch, share]).permutation(own)
    return np.array_split(order, steps_per_epoch(total, shares, batch_size))


def lr_at(step: int, total_steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to nearly nothing (Loshchilov & Hutter 2017, arXiv:1608.03983)."""
    warmup = max(1, round(WARMUP_SHARE * total_steps))
    if step < warmup:
        return peak * (FIRST_LR_SHARE + (1 - FIRST_LR_SHARE) * step / warmup)
    done = (step - warmup) / max(1, total_steps - warmup)
    return peak * (LAST_LR_SHARE + (1 - LAST_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def is_better(row: EpochRow, best: EpochRow | None) -> bool:
    """Higher val accuracy, and among equals lower val loss; an epoch whose loss was no number is never better."""
    if row.val_loss is None:
        return False
    return best is None or best.val_loss is None or (row.val_accuracy, -row.val_loss) > (best.val_accuracy, -best.val_loss)


def plan_fit(spec: Spec, dataset: Mapping[str, Any], backbone: Mapping[str, Any], search: Mapping[str, Any]) -> Plan:
    """The plan of a fit; its `fit_id` changes with everything that changes its result, and with nothing else."""
    best, probe = point_of(search["best"]), search["probe"]
    matters: dict[str, Any] = {
        "classes": tuple(dataset["classes"]), "backbone_name": backbone["name"],
        "probe_lr": probe["lr"], "probe_accuracy": probe["accuracy"], "probe_val_loss": probe["val_loss"],
        "unfreeze_depth": best.unfreeze_depth, "lr": best.lr,
        "max_epochs": spec.fit_max_epochs, "patience": spec.fit.patience,
        "batch_size": spec.fit.batch_size_per_worker or share_of_batch(best.batch_size, spec.fit.num_workers),
        "weight_decay": best.weight_decay, "label_smoothing": best.label_smoothing, "layer_decay": best.layer_decay,
        "optimizer": best.optimizer, "augmentation_strength": best.augmentation_strength,
        "class_weights": spec.search.class_weights, "augmentation": spec.fit.augmentation, "seed": spec.search.seed,
        "image_size": spec.data.image_size, "mean": tuple(backbone["mean"]), "std": tuple(backbone["std"]),
        "max_pixels": int(spec.data.max_megapixels * 1e6), "num_workers": spec.fit.num_workers,
    }  # fmt: skip
    _require_enough(spec, dataset)
    sources = {"dataset": dataset["version"], "backbone": backbone["digest"], "search": search["search_id"], "code": FIT_CODE_VERSION}
    fit_id = digest_of({**named_by(matters), **sources})
    return Plan(
        fit_id=fit_id, fit_uri=join_uri(spec.storage, "fits", fit_id), dataset_uri=dataset["uri"], backbone_uri=backbone["uri"],
        probe_uri=probe["uri"], **matters,
    )  # fmt: skip


def _require_enough(spec: Spec, dataset: Mapping[str, Any]) -> None:
    if dataset["train"] < 2 * spec.fit.num_workers:
        raise UserError(
            f"{dataset['train']} training images are too few for fit.num_workers: {spec.fit.num_workers}.",
            "Lower fit.num_workers, so that each worker has at least two images.",
        )
