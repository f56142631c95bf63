"""What a search decides, on plain values: which trials to run, how each ended, which one is best. No Ray, no torch."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import UserError
from ray_jobs.search_space import TrialConfig
from ray_jobs.spec import Spec, digest_of, named_by

SEARCH_CODE_VERSION = 2
"""Raise it when the same spec would give other trials or other results: a stored search is then not taken for it."""

Status = Literal["finished", "stopped", "diverged", "out_of_memory", "failed"]
FAILURES: tuple[Status, ...] = ("diverged", "out_of_memory", "failed")


@dataclass(frozen=True)
class Epoch:
    """What one epoch of a trial measured; epochs count from 1."""

    epoch: int
    val_accuracy: float
    val_loss: float
    train_loss: float
    seconds: float


@dataclass(frozen=True)
class TrainedHead:
    """One linear probe as a trial of the search: its curve, and why it failed if it did. (Here, as the driver, without torch, reads it.)"""

    curve: list[Epoch]
    status: Status | None
    reason: str
    started_at: int
    seconds: float


@dataclass
class TrialRecord:
    """One trial, as far as it came. `stopped_after` is the epoch at which a scheduler or the budget cut it, and its curve ends there."""

    trial_id: str
    config: TrialConfig
    started_at: int = 0
    seconds: float = 0.0
    curve: list[Epoch] = field(default_factory=list)
    stopped_after: int | None = None
    status: Status | None = None
    reason: str = ""

    @property
    def counted(self) -> list[Epoch]:
        """The epochs that count: a late judgement cuts those after it."""
        return self.curve if self.stopped_after is None else self.curve[: self.stopped_after]

    @property
    def best_epoch(self) -> Epoch | None:
        """The epoch of highest val accuracy; among equals the one of lowest val loss."""
        return max(self.counted, key=lambda e: (e.val_accuracy, -e.val_loss), default=None)

    @property
    def accuracy(self) -> float | None:
        return self.best_epoch.val_accuracy if self.best_epoch else None

    @property
    def failed(self) -> bool:
        return self.status in FAILURES

    def is_over(self, max_epochs: int) -> bool:
        """No further epoch of it will count."""
        return self.status is not None or self.stopped_after is not None or len(self.curve) >= max_epochs

    def is_out_before(self, rung: int) -> bool:
        """It ended without coming to this rung."""
        if self.stopped_after is not None:
            return self.stopped_after < rung
        return self.status is not None and len(self.curve) < rung


def search_id(spec: Spec, *, backbone_digests: Sequence[str], dataset_version: str, warm: Sequence[TrialConfig] = ()) -> str:
    """The key of a search's results: equal for equal work, wherever it ran. `backbone_digests`: the spec's own first."""
    search = {name: value for name, value in spec.search.content.items() if name != "backbone"}  # the digests tell
    return digest_of({
        "search": search, "image_size": spec.data.image_size,
        "backbone": backbone_digests[0] if len(backbone_digests) == 1 else list(backbone_digests),
        "augmentation": spec.fit.augmentation if spec.search.views > 1 else None,
        "dataset": dataset_version, "warm": [named_by(asdict(config)) for config in warm], "code": SEARCH_CODE_VERSION,
    })  # fmt: skip


def ended(record: TrialRecord, max_epochs: int) -> Status:
    """How a trial ended: its failure where it has one, else whether the scheduler cut it short."""
    if record.status is not None:
        return record.status
    return "finished" if len(record.counted) >= max_epochs else "stopped"


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


def trial_detail(record: TrialRecord, max_epochs: int, own_backbone: str = "") -> dict[str, Any]:
    """One trial as the plain values that `search --json` prints."""
    return {
        "trial_id": record.trial_id, **_point(record, own_backbone), "accuracy": record.accuracy,
        "last_accuracy": record.counted[-1].val_accuracy if record.counted else None, "epochs": len(record.counted),
        "epochs_run": len(record.curve), "status": ended(record, max_epochs), "reason": record.reason,
        "seconds": round(record.seconds, 4), "started_at": record.started_at, "curve": [asdict(epoch) for epoch in record.counted],
    }  # fmt: skip


def best_of(record: TrialRecord, own_backbone: str = "") -> dict[str, Any]:
    return {**_point(record, own_backbone), "accuracy": record.accuracy, "trial_id": record.trial_id}


def _point(record: TrialRecord, own_backbone: str) -> dict[str, Any]:
    """The trial's point for a reader, who wants every backbone by its name."""
    return {**asdict(record.config), "backbone": record.config.backbone or own_backbone}


def percent(share: float) -> str:
    return f"{share:.1%}"


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
        ("backbone", pa.string()),
    ])  # fmt: skip
    return _parquet([{"rank": i, **d} for i, d in enumerate(details, 1)], schema)


def rungs_table(rungs: Sequence[Mapping[str, Any]]) -> bytes:
    """rungs.parquet: a row per judgement of a trial at a rung, in the order in which they were made."""
    schema = pa.schema([
        ("trial_id", pa.string()), ("rung", pa.int32()), ("accuracy", pa.float64()), ("cutoff", pa.float64()), ("stopped", pa.bool_()),
    ])  # fmt: skip
    return _parquet(rungs, schema)


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
