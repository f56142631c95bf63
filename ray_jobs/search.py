"""What a search decides, on plain values: which trials to run, how each ended, which one is best. No Ray, no torch."""

from __future__ import annotations

import io
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import UserError
from ray_jobs.spec import LrRange, SearchSpec, Spec, digest_of

SEARCH_CODE_VERSION = 1
"""Raise it when the same spec would give other trials or other results: a stored search is then not taken for it."""

Status = Literal["finished", "stopped", "diverged", "out_of_memory", "failed"]
FAILURES: tuple[Status, ...] = ("diverged", "out_of_memory", "failed")


@dataclass(frozen=True)
class TrialConfig:
    """One point of the search space."""

    unfreeze_depth: int
    lr: float


@dataclass(frozen=True)
class Epoch:
    """What one epoch of a trial measured; epochs count from 1."""

    epoch: int
    val_accuracy: float
    val_loss: float
    train_loss: float
    seconds: float


@dataclass
class TrialRecord:
    """One trial, as far as it came."""

    trial_id: str
    config: TrialConfig
    started_at: int = 0
    seconds: float = 0.0
    curve: list[Epoch] = field(default_factory=list)
    status: Status | None = None
    reason: str = ""

    @property
    def best_epoch(self) -> Epoch | None:
        """The epoch of highest val accuracy; among equals the one of lowest val loss."""
        return max(self.curve, key=lambda e: (e.val_accuracy, -e.val_loss), default=None)

    @property
    def accuracy(self) -> float | None:
        return self.best_epoch.val_accuracy if self.best_epoch else None


def search_id(spec: Spec, *, backbone_digest: str, dataset_version: str) -> str:
    """The key of a search's results: equal for equal work, wherever it ran."""
    return digest_of({
        "search": spec.search.model_dump(mode="json"), "image_size": spec.data.image_size, "backbone": backbone_digest,
        "dataset": dataset_version, "code": SEARCH_CODE_VERSION,
    })  # fmt: skip


def trial_configs(search: SearchSpec) -> list[TrialConfig]:
    """The trials of a grid or random search, the same for the same spec; cheap depths first, so that early stopping has evidence
    before it pays for deep ones.

    A random search is stratified: depths get equal shares, and the learning rates of a depth fall one into each of equal parts
    of the range, so that few trials still cover the plane.
    """
    depths = sorted(search.unfreeze_depth)
    if search.resolved_searcher == "grid":
        assert not isinstance(search.lr, LrRange), "the spec refuses a grid over a range"
        return [TrialConfig(depth, lr) for depth, lr in itertools.product(depths, search.lr)]
    rng = random.Random(search.seed)
    shares = _shares(search.num_trials, depths, rng)
    return [TrialConfig(depth, lr) for depth in depths for lr in _learning_rates(search.lr, shares[depth], rng)]


def _shares(num_trials: int, depths: Sequence[int], rng: random.Random) -> dict[int, int]:
    each, left = divmod(num_trials, len(depths))
    lucky = set(rng.sample(depths, left))
    return {depth: each + (depth in lucky) for depth in depths}


def _learning_rates(lr: LrRange | tuple[float, ...], count: int, rng: random.Random) -> list[float]:
    if isinstance(lr, tuple):
        rounds = math.ceil(count / len(lr))
        return [value for _ in range(rounds) for value in rng.sample(lr, len(lr))][:count]
    shares = [(part + rng.random()) / count for part in range(count)]
    rng.shuffle(shares)
    return [lr_at(lr, share) for share in shares]


def lr_at(lr: LrRange, share: float) -> float:
    """The learning rate `share` of the way from low to high, on the range's own scale."""
    if lr.scale == "log":
        return float(lr.low * (lr.high / lr.low) ** share)
    return lr.low + (lr.high - lr.low) * share


def probe_learning_rates(lr: LrRange | tuple[float, ...]) -> list[float]:
    """The learning rates of the linear probes that run before the search.

    A head alone bears a higher rate than the layers below it, so the grid over a range is shifted up; see docs/LOG.md for the measurement.
    """
    if isinstance(lr, tuple):
        return sorted(lr)
    low, high = min(lr.low * PROBE_SHIFT, PROBE_LR_CAP), min(lr.high * PROBE_SHIFT, PROBE_LR_CAP)
    shifted = [low * (high / low) ** (i / (PROBE_POINTS - 1)) for i in range(PROBE_POINTS)]
    return sorted(set(shifted))


PROBE_SHIFT = 3.0
PROBE_LR_CAP = 0.1
PROBE_POINTS = 4


def ended(record: TrialRecord, max_epochs: int) -> Status:
    """How a trial ended: its failure where it has one, else whether the scheduler cut it short."""
    if record.status is not None:
        return record.status
    return "finished" if len(record.curve) >= max_epochs else "stopped"


def status_of_error(error: str) -> Status:
    """The status of a trial whose worker died or raised, from the text of the error."""
    signs = ("OutOfMemoryError", "MemoryError", "out of memory", "SIGKILL", "low memory", "can't allocate memory")
    return "out_of_memory" if any(sign in error for sign in signs) else "failed"


def ranked(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Best first: val accuracy, then lower val loss, then shallower depth, then lower learning rate; failed trials last."""
    return sorted(records, key=_rank)


def _rank(record: TrialRecord) -> tuple[float, ...]:
    epoch, config = record.best_epoch, record.config
    if epoch is None or record.status in FAILURES:
        return (1, 0, 0, config.unfreeze_depth, config.lr)
    return (0, -epoch.val_accuracy, epoch.val_loss, config.unfreeze_depth, config.lr)


def best_trial(records: Sequence[TrialRecord]) -> TrialRecord:
    """The winner. Raises UserError, with the reasons, where no trial came through."""
    usable = [r for r in records if r.best_epoch and r.status not in FAILURES]
    if usable:
        return ranked(usable)[0]
    reasons = sorted({f"{r.status}: {r.reason}" for r in records})
    raise UserError(
        f"All {len(records)} trials of the search failed. " + " | ".join(reasons)[:2000],
        "Diverged: lower search.lr. Out of memory: lower search.batch_size or data.image_size, or leave the deepest depths out.",
    )


def trial_detail(record: TrialRecord, max_epochs: int) -> dict[str, Any]:
    """One trial as the plain values that `search --json` prints."""
    return {
        "trial_id": record.trial_id, "unfreeze_depth": record.config.unfreeze_depth, "lr": record.config.lr, "accuracy": record.accuracy,
        "epochs": len(record.curve), "status": ended(record, max_epochs), "seconds": round(record.seconds, 4),
        "started_at": record.started_at, "curve": [asdict(epoch) for epoch in record.curve],
    }  # fmt: skip


def best_of(record: TrialRecord) -> dict[str, Any]:
    return {
        "unfreeze_depth": record.config.unfreeze_depth, "lr": record.config.lr, "accuracy": record.accuracy, "trial_id": record.trial_id,
    }  # fmt: skip


def epochs_table(details: Sequence[Mapping[str, Any]]) -> bytes:
    """trials.parquet: a row per trial and epoch."""
    schema = pa.schema([
        ("trial_id", pa.string()), ("unfreeze_depth", pa.int32()), ("lr", pa.float64()), ("epoch", pa.int32()),
        ("val_accuracy", pa.float64()), ("val_loss", pa.float64()), ("train_loss", pa.float64()), ("seconds", pa.float64()),
    ])  # fmt: skip
    rows = [{**{key: d[key] for key in ("trial_id", "unfreeze_depth", "lr")}, **epoch} for d in details for epoch in d["curve"]]
    return _parquet(rows, schema)


def leaderboard_table(details: Sequence[Mapping[str, Any]]) -> bytes:
    """leaderboard.parquet: a row per trial, in the order given (best first)."""
    schema = pa.schema([
        ("rank", pa.int32()), ("trial_id", pa.string()), ("unfreeze_depth", pa.int32()), ("lr", pa.float64()), ("accuracy", pa.float64()),
        ("epochs", pa.int32()), ("status", pa.string()), ("seconds", pa.float64()), ("started_at", pa.int64()),
    ])  # fmt: skip
    return _parquet([{"rank": i, **d} for i, d in enumerate(details, 1)], schema)


def _parquet(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> bytes:
    sink = io.BytesIO()
    columns = [pa.array([row[name] for row in rows], type=kind) for name, kind in zip(schema.names, schema.types, strict=True)]
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), sink)
    return sink.getvalue()


def flops_counted(details: Sequence[Mapping[str, Any]], *, suffix: Mapping[int, int], whole: int, train: int, val: int) -> tuple[int, int]:
    """FLOPs of the search with the prefix shared, and of the same epochs where every trial runs the whole backbone.

    `suffix` and `whole` are forward FLOPs of one image; a trained layer costs three forwards, a frozen one costs one.
    """
    shared = (train + val) * max(whole - suffix[d] for d in suffix)
    unshared = 0
    for detail in details:
        own, epochs = suffix[detail["unfreeze_depth"]], detail["epochs"]
        shared += epochs * (3 * train + val) * own
        unshared += epochs * ((3 * train + val) * own + (train + val) * (whole - own))
    return shared, unshared
