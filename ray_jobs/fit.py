"""The training of one rank: the winner of the search, from original images, augmented afresh each epoch.

Every random choice is a function of (seed, epoch, step or image, share), so a fit that was stopped and resumed from a checkpoint
equals one that was not, and one on fewer workers trains on the same batches (fit_plan.py has the shares). Works in one bare process
(world size 1) and under torch.distributed.
Shapes: N images, B images of one rank's step, K classes, C channels, H height, W width.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load as from_safetensors
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from infra import usage
from infra.committed_folder import fetch
from infra.object_store import ObjectStore, join_uri
from ray_jobs import augment, backbone, checkpoint, images, model_folder
from ray_jobs.checkpoint import Checkpoint, CheckpointWriter, Tensors
from ray_jobs.dataset import open_dataset
from ray_jobs.fit_attempts import CALLED_AWAY, DONE, ROOM, End
from ray_jobs.fit_choice import choose
from ray_jobs.fit_plan import EpochRow, Plan, batches_of_share, is_better, lr_at, part_of, rows_of_shares, steps_per_epoch
from ray_jobs.images import Images, Range
from ray_jobs.model_folder import Preprocessing
from ray_jobs.share_buffers import ShareBuffers, summed
from ray_jobs.train_loop import class_weights

log = logging.getLogger(__name__)
USED = "used.json"

EVAL_BATCH = 128
STEPS_BETWEEN_LOOKS = 4
"""To ask whether this machine is being taken away costs some milliseconds; who takes it away gives half a minute or more."""

OnEpoch = Callable[[EpochRow], None]
Ask = Callable[[], bool]


def never() -> bool:
    """For whom nobody disturbs."""
    return False


@dataclass(frozen=True)
class Rank:
    """Which of the workers this is, and what it computes on."""

    number: int
    world: int
    device: torch.device


@dataclass(frozen=True)
class Asks:
    """What a fit asks while it trains; every rank asks at the same moments, and must get the same answer."""

    is_called_away: Ask = never
    """Whether a machine of this fit is about to be taken away. Asked every few steps."""
    has_room: Ask = never
    """Whether there is room for more workers. Asked when an epoch has ended."""


class Training:
    """One rank of a fit."""

    def __init__(self, plan: Plan, rank: Rank, store: ObjectStore, cache: Path) -> None:
        self.plan, self.rank, self.store, self.cache = plan, rank, store, cache
        self.dataset = open_dataset(plan.dataset_uri, store, cache / "datasets")
        self.train_labels_N = images.labels_of(self.dataset, "train")
        self.val_labels_N = images.labels_of(self.dataset, "val")
        self.shares = part_of(plan.num_workers, rank.number, rank.world)
        self.train_rows = rows_of_shares(len(self.train_labels_N), self.shares, plan.num_workers)
        self.val_rows = part_of(len(self.val_labels_N), rank.number, rank.world)
        self.model = new_model(plan, store, cache).to(rank.device).to(memory_format=torch.channels_last)  # a quarter faster on CPUs
        backbone.freeze(self.model, plan.unfreeze_depth)
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self.optimizer = self._new_optimizer()
        self.forward = _distributed(self.model, rank)
        backbone.set_mode(self.model, plan.unfreeze_depth, True)
        self.buffers = ShareBuffers(self.model, self.shares, plan.num_workers)
        self.history: list[EpochRow] = []
        self.step = 0
        self.loss_S = torch.zeros(plan.num_workers, dtype=torch.float64, device=rank.device)
        self.best: EpochRow | None = None
        self.best_tensors: Tensors = {}
        self.weights_K = self._class_weights()
        self.train_images = self._train_images()
        self.val_pixels_NHWC = self._val_pixels()

    def _new_optimizer(self) -> torch.optim.Optimizer:
        """Norms' scales and biases have no reason to be small, so they do not decay."""
        plan, by_name = self.plan, backbone.lr_scales(self.model, self.plan.layer_decay)
        alike: dict[tuple[float, bool], list[Tensor]] = {}
        for parameter, name in self.names.items():
            alike.setdefault((by_name[name], parameter.ndim > 1), []).append(parameter)
        groups = [
            {"params": parameters, "weight_decay": plan.weight_decay if decays else 0.0, "lr_scale": scale}
            for (scale, decays), parameters in alike.items()
        ]
        if plan.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=plan.lr, momentum=0.9, nesterov=True)
        return torch.optim.AdamW(groups, lr=plan.lr, fused=True)

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to train: all epochs, no gain for `patience` epochs, or diverged."""
        if not self.history:
            return False
        since_best = len(self.history) - (self.best.epoch if self.best else 0)
        diverged = self.history[-1].train_loss is None
        return diverged or len(self.history) >= self.plan.max_epochs or since_best >= self.plan.patience

    def epoch(self, is_called_away: Ask = never) -> EpochRow | None:
        """Train one epoch (or the rest of it), judge it on val, and remember the best; None where it was called away amid."""
        started = time.perf_counter()
        number = len(self.history) + 1
        train_loss = self._train(number, is_called_away)
        if train_loss is None:
            return None
        self.buffers.merge()
        val_accuracy, val_loss = self._judge()
        losses = [loss if math.isfinite(loss) else None for loss in (train_loss, val_loss)]
        row = EpochRow(number, losses[0], val_accuracy, losses[1], time.perf_counter() - started)
        self.history.append(row)
        self.step = 0
        self.loss_S.zero_()
        if is_better(row, self.best):
            self.best, self.best_tensors = row, checkpoint.trainable_tensors(self.model)
        return row

    def snapshot(self) -> Checkpoint:
        """Everything to resume from, copied, so that training may go on while it is written. Each rank must call it."""
        is_best = self.best is not None and self.best.epoch == len(self.history) and not self.step
        trainable = self.best_tensors if is_best else checkpoint.trainable_tensors(self.model)
        state = {"history": [asdict(row) for row in self.history], "best_epoch": self.best.epoch if self.best else None}
        optimizer = checkpoint.optimizer_tensors(self.optimizer, self.names)
        best, shares = self.best_tensors or trainable, {}
        if self.step:
            state["losses"], shares = summed(self.loss_S.clone()).tolist(), self.buffers.gathered()
        return Checkpoint(len(self.history), trainable, best, optimizer, state, self.step, shares)

    def restore(self, saved: Checkpoint) -> None:
        """Be what was when the snapshot was taken, by whatever number of ranks."""
        checkpoint.load_trainable(self.model, saved.trainable)
        checkpoint.load_optimizer(self.optimizer, self.names, saved.optimizer)
        self.history = [EpochRow(**row) for row in saved.state["history"]]
        best_epoch = saved.state["best_epoch"]
        self.best = self.history[best_epoch - 1] if best_epoch else None
        self.best_tensors = saved.best if best_epoch else {}
        self.step = saved.step
        if saved.step:
            own = slice(self.shares.start, self.shares.stop)
            self.loss_S[own] = torch.tensor(saved.state["losses"], dtype=torch.float64)[own].to(self.loss_S)
            self.buffers.scatter(saved.shares)
        else:
            self.buffers.spread()

    def _train(self, epoch: int, is_called_away: Ask) -> float | None:
        """Train from `step` to the end of the epoch, and return its mean loss; None where it was called away before."""
        plan, rank = self.plan, self.rank
        backbone.set_mode(self.model, plan.unfreeze_depth, True)
        weight_of_step = self._weight_of_step(epoch)
        steps, batches = len(weight_of_step), self._batches(epoch)
        while self.step < steps:
            if self.step % STEPS_BETWEEN_LOOKS == 0 and is_called_away():
                return None
            at = (epoch - 1) * steps + self.step
            for group in self.optimizer.param_groups:
                group["lr"] = lr_at(at, plan.max_epochs * steps, plan.lr) * group["lr_scale"]
            for share in self.shares:
                self.buffers.switch(share)
                torch.manual_seed(augment.seed_of(plan.seed, -at - 1, share))  # dropout and drop path
                with self._unshared(until=share == self.shares[-1]):
                    loss = self._loss(*next(batches))
                    # DDP averages over ranks; divided by the whole step's weight instead, so that the split over ranks changes nothing
                    (loss * (rank.world / weight_of_step[self.step])).backward()
                self.loss_S[share] += loss.detach()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
        return float(summed(self.loss_S.clone()).sum()) / float(weight_of_step.sum())

    def _unshared(self, *, until: bool) -> AbstractContextManager[None]:
        """Gradients of a rank's shares add up here; the last one's pass sends the sum to the other ranks."""
        return nullcontext() if until or not isinstance(self.forward, DistributedDataParallel) else self.forward.no_sync()

    def _loss(self, pixels_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        device = self.rank.device
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits_BK = self.forward(normalised(pixels_BCHW.to(device), self.plan))
        return cross_entropy(
            logits_BK.float(), labels_B.to(device), weight=self.weights_K, label_smoothing=self.plan.label_smoothing, reduction="sum"
        )

    @torch.inference_mode()
    def _judge(self) -> tuple[float, float]:
        backbone.set_mode(self.model, self.plan.unfreeze_depth, False)
        labels_N = torch.from_numpy(self.val_labels_N[self.val_rows.start : self.val_rows.stop])
        sums = torch.zeros(2, dtype=torch.float64, device=self.rank.device)
        for start in range(0, len(labels_N), EVAL_BATCH):
            labels_B = labels_N[start : start + EVAL_BATCH].to(self.rank.device)
            logits_BK = self._val_logits(start)
            sums[0] += (logits_BK.argmax(1) == labels_B).sum()
            sums[1] += cross_entropy(logits_BK, labels_B, reduction="sum")
        hits, loss = summed(sums).tolist()
        return hits / len(self.val_labels_N), loss / len(self.val_labels_N)

    def _val_logits(self, start: int) -> Tensor:
        pixels_BCHW = self.val_pixels_NHWC[start : start + EVAL_BATCH].permute(0, 3, 1, 2)
        logits_BK: Tensor = self.model(normalised(pixels_BCHW.to(self.rank.device), self.plan))
        return logits_BK.float()

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What is left of the epoch: a batch for each step and share, in this order."""
        total, of = len(self.train_labels_N), self.plan.num_workers
        first = [part_of(total, share, of).start - self.train_rows.start for share in self.shares]
        of_share = [self._positions(epoch, share)[self.step :] for share in self.shares]
        batches = [(start + batch).tolist() for step in zip(*of_share, strict=True) for start, batch in zip(first, step, strict=True)]
        augmented = Augmented(self.train_images, self.train_labels_N, self.train_rows, self.plan, epoch)
        return iter(DataLoader(augmented, batch_sampler=batches, num_workers=self.plan.loader_processes))

    def _positions(self, epoch: int, share: int) -> list[npt.NDArray[np.int64]]:
        plan = self.plan
        total = len(self.train_labels_N)
        return batches_of_share(total, share, plan.num_workers, batch_size=plan.batch_size, seed=plan.seed, epoch=epoch)

    def _weight_of_step(self, epoch: int) -> npt.NDArray[np.float64]:
        """The sum of class weights of each step over all shares: each rank can tell the others' batches, so nothing is sent."""
        plan, total = self.plan, len(self.train_labels_N)
        weights_K = np.ones(len(plan.classes)) if self.weights_K is None else self.weights_K.double().cpu().numpy()
        sums = np.zeros(steps_per_epoch(total, plan.num_workers, plan.batch_size))
        for share in range(plan.num_workers):
            first = part_of(total, share, plan.num_workers).start
            sums += [weights_K[self.train_labels_N[first + batch]].sum() for batch in self._positions(epoch, share)]
        return sums

    def _class_weights(self) -> Tensor | None:
        counts = np.bincount(self.train_labels_N, minlength=len(self.plan.classes)).tolist()
        weights = class_weights(counts, self.plan.class_weights)
        return None if weights is None else torch.tensor(weights, device=self.rank.device)

    def _train_images(self) -> Images:
        plan, rows = self.plan, Range(self.dataset, "train", self.train_rows.start, self.train_rows.stop)
        spool = self.cache / "spool" / f"{plan.fit_id}-{self.rank.number}"
        return images.keep(rows, image_size=plan.image_size, max_pixels=plan.max_pixels, budget_bytes=plan.memory_budget_bytes, spool=spool)

    def _val_pixels(self) -> Tensor:
        rows = Range(self.dataset, "val", self.val_rows.start, self.val_rows.stop)
        return images.squares(rows, image_size=self.plan.image_size, max_pixels=self.plan.max_pixels)


class Augmented(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """One rank's training images as one epoch sees them."""

    def __init__(self, kept: Images, labels_N: npt.NDArray[np.int64], rows: range, plan: Plan, epoch: int) -> None:
        self.kept, self.labels_N, self.rows, self.plan, self.epoch = kept, labels_N, rows, plan, epoch
        self.augmented, self.plain = (augment.build(preset, plan.image_size) for preset in (plan.augmentation, "none"))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.rows[index]  # of the whole train split: what an image is turned into does not depend on the rank that has it
        seed = augment.seed_of(self.plan.seed, self.epoch, row)
        transform = self.augmented if augment.is_augmented(seed, self.plan.augmentation_strength) else self.plain
        return augment.seeded(transform, self.kept[index], seed), int(self.labels_N[row])


def train(plan: Plan, rank: Rank, *, store: ObjectStore, cache: Path, on_epoch: OnEpoch = lambda row: None, asks: Asks = Asks()) -> End:
    """Train to the end, from the last checkpoint where there is one; rank 0 writes the checkpoints and the result.

    Called away, or where there is room for more workers, it returns early, with a checkpoint of where it is.
    Crash order: checkpoints as epochs end; then the fit's and the probe's model folders; result.json last, as the commit.
    """
    training = Training(plan, rank, store, cache)
    checkpoints_uri = join_uri(plan.fit_uri, "checkpoints")
    saved = _agreed_checkpoint(store, checkpoints_uri, rank)
    if saved:
        log.info("resuming the fit after epoch %d and %d steps", saved.epoch, saved.step)
        training.restore(saved)
    with CheckpointWriter(store, checkpoints_uri) as writer:
        while not training.is_over:
            resumed_at = training.step
            row = training.epoch(asks.is_called_away)
            if row or training.step > resumed_at:
                snapshot = training.snapshot()
                if rank.number == 0:
                    writer.write(snapshot, best_epoch=training.best.epoch if training.best else None)
            if row is None:
                return CALLED_AWAY
            on_epoch(row)
            if not training.is_over and asks.has_room():
                return ROOM
    if rank.number == 0:
        _publish(training)
    return DONE


def normalised(pixels_BCHW: Tensor, plan: Plan) -> Tensor:
    """uint8 pixels as the backbone's input, by the same arithmetic as preprocessing.normalise."""
    mean_C11 = torch.tensor(plan.mean, device=pixels_BCHW.device).view(-1, 1, 1)
    std_C11 = torch.tensor(plan.std, device=pixels_BCHW.device).view(-1, 1, 1)
    images_BCHW = pixels_BCHW.to(torch.float32, memory_format=torch.channels_last)
    return images_BCHW.div_(255).sub_(mean_C11).div_(std_C11)


def new_model(plan: Plan, store: ObjectStore, cache: Path) -> nn.Module:
    """The backbone with the best linear probe's head: a new head's large gradients would spoil the backbone first (LP-FT,
    Kumar et al. 2022, arXiv:2202.10054)."""
    folder = fetch(store, plan.backbone_uri, cache / "backbones")
    model = backbone.load(folder, num_classes=len(plan.classes), seed=plan.seed)
    head = from_safetensors(store.read(plan.probe_uri))
    unexpected = model.load_state_dict(head, strict=False).unexpected_keys
    if unexpected or not head.keys() >= backbone.head_names(model):
        raise ValueError(f"{plan.probe_uri} is not the head of {plan.backbone_name}: {sorted(head)}")
    return model


def _distributed(model: nn.Module, rank: Rank) -> nn.Module:
    if rank.world == 1:
        return model
    devices = [rank.device] if rank.device.type == "cuda" else None
    # buffers are merged once an epoch (share_buffers.py): a training step does not read them
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)


def _agreed_checkpoint(store: ObjectStore, root_uri: str, rank: Rank) -> Checkpoint | None:
    """The last whole checkpoint; rank 0 decides which, so that no two ranks resume from different epochs."""
    saved = checkpoint.latest(store, root_uri) if rank.number == 0 else None
    position = [saved.epoch, saved.step] if saved else [0, 0]
    epoch, step = summed(torch.tensor(position, device=rank.device)).tolist()
    return saved if rank.number == 0 or (epoch, step) == (0, 0) else checkpoint.load(store, checkpoint.uri_of(root_uri, epoch, step))


def _publish(training: Training) -> None:
    """Write both model folders, then result.json."""
    plan, store = training.plan, training.store
    uris = {kind: join_uri(plan.fit_uri, kind) for kind in ("fit", "probe")}
    _write_model(training, uris["probe"], "probe", new_model(plan, store, training.cache))
    if training.best:
        checkpoint.load_trainable(training.model, training.best_tensors)
        _write_model(training, uris["fit"], "fit", training.model)
    chosen, reason = choose(training.best, plan)
    best, checkpoints_uri = training.best, join_uri(plan.fit_uri, "checkpoints")
    written = checkpoint.epochs(store, checkpoints_uri)
    result = {
        "fit_id": plan.fit_id, "uri": plan.fit_uri, "workers": plan.num_workers, "epochs": len(training.history),
        "accuracy": best.val_accuracy if best else None, "val_loss": best.val_loss if best else None,
        "best_epoch": best.epoch if best else None, "stopped_early": len(training.history) < plan.max_epochs,
        "unfreeze_depth": plan.unfreeze_depth, "lr": plan.lr,
        "checkpoint_uri": checkpoint.uri_of(checkpoints_uri, written[-1]) if written else None,
        "curve": [asdict(row) for row in training.history], "chosen": chosen, "chosen_reason": reason,
        "model_uri": uris[chosen], "fit_model_uri": uris["fit"] if best else None, "probe_model_uri": uris["probe"],
        "seconds": round(time.time() - plan.started_at, 2),
    }  # fmt: skip
    # of this process; what the other ranks read is not known here. Apart from the result, which is the same whatever it cost
    store.write(join_uri(plan.fit_uri, USED), json.dumps(usage.so_far().plain()).encode())
    store.write(join_uri(plan.fit_uri, "result.json"), json.dumps(result, indent=1).encode())


def _write_model(training: Training, uri: str, kind: str, model: nn.Module) -> None:
    plan = training.plan
    depth, lr = (plan.unfreeze_depth, plan.lr) if kind == "fit" else (0, plan.probe_lr)
    config = {
        "backbone": plan.backbone_name, "num_classes": len(plan.classes), "image_size": plan.image_size,
        "unfreeze_depth": depth, "lr": lr, "kind": kind,
    }  # fmt: skip
    preprocessing = Preprocessing(plan.image_size, plan.mean, plan.std, plan.max_pixels)
    model_folder.write(training.store, uri, model, config=config, labels=plan.classes, preprocessing=preprocessing)
