"""Train one suffix on cached features, an epoch at a time.

Shapes: N rows, B rows of a batch, K classes. `values` are the tensors that cross the cut, one row an image.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.adamw import adamw

from ray_jobs.spec import Optimizer

EVAL_BATCH = 128
IMBALANCED_ABOVE = 2.0


class Diverged(Exception):  # noqa: N818 - the status that it leads to
    """A loss that is not a number any more: the learning rate was too high for this depth."""

    def __init__(self, epoch: int, loss: float) -> None:
        super().__init__(epoch, loss)
        self.epoch, self.loss = epoch, loss

    def __str__(self) -> str:
        return f"the loss became {self.loss} in epoch {self.epoch}"


@dataclass(frozen=True)
class EpochResult:
    """What one epoch measured."""

    train_loss: float
    val_loss: float
    val_accuracy: float
    seconds: float


@dataclass(frozen=True)
class Recipe:
    """How to train; the same words as in the spec."""

    lr: float
    max_epochs: int
    batch_size: int
    weight_decay: float
    label_smoothing: float
    class_weights: tuple[float, ...] | None
    seed: int
    optimizer: Optimizer = "adamw"
    augmentation_strength: float = 1.0


@dataclass(frozen=True)
class Rows:
    """The cached rows of one cut: the first `train` of them train, the rest judge; after them the train rows of further views."""

    values: Sequence[Tensor]
    labels_N: Tensor
    train: int
    views: int = 1

    @property
    def stored(self) -> int:
        """How many rows are stored, all views together."""
        return len(self.labels_N) + (self.views - 1) * self.train

    def batch(self, stored_B: Tensor, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """The values of some stored rows. 16-bit floats are how features are stored, not how they are computed with."""
        values = [value.index_select(0, stored_B).to(device, non_blocking=True) for value in self.values]
        return [value.to(dtype) if value.dtype in (torch.float16, torch.bfloat16) else value for value in values]


Prepare = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def draw_views(rows_N: Tensor, views: int, train: int, judged: int, generator: torch.Generator, *, strength: float = 1.0) -> Tensor:
    """For each train row the stored row of one of its views, drawn anew; nothing is drawn where there is but one.

    `judged` is the number of train and val rows together, behind which the further views lie. `strength` is how much of the
    augmentation is used: at 1 all views are equally likely, at 0 only view 0 is drawn, the image as val sees it, and between the
    augmented views share `strength` times their chance at 1. It acts on what is drawn, not on the views: they stay as they are
    cached, so a search over it computes no further features.
    """
    if views == 1:
        return rows_N
    if strength == 1.0:
        view_N = torch.randint(views, rows_N.shape, generator=generator)
    else:
        is_augmented_N = torch.rand(rows_N.shape, generator=generator) < strength * (views - 1) / views
        view_N = torch.randint(1, views, rows_N.shape, generator=generator) * is_augmented_N
    return torch.where(view_N > 0, rows_N + judged + (view_N - 1) * train, rows_N)


def class_weights(counts: Sequence[int], mode: str) -> list[float] | None:
    """Loss weights that lift rare classes, mean 1, or None where the classes are balanced enough (or mode is none).

    Inverse square root of the frequency: the middle way between none and the full inverse, as Mikolov et al. (2013,
    arXiv:1310.4546) subsample and Mahajan et al. (2018, arXiv:1805.00932) resample long tails. An empty class gets the
    weight of a class of one image.
    """
    present = [max(count, 1) for count in counts]
    if mode == "none" or max(present) <= IMBALANCED_ABOVE * min(present):
        return None
    raw = [1 / math.sqrt(count) for count in present]
    return [weight * len(raw) / sum(raw) for weight in raw]


class OneCycle:
    """torch's AdamW, or SGD with Nesterov momentum, under torch's OneCycleLR, number for number, without the classes around them.

    Those load torch's compiler at the first step (4 s of CPU time in each worker) and cost more Python than a linear
    probe's whole step. The arithmetic is torch's own fused kernel. `scales` are factors on the learning rate, one a parameter.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], *, peak_lr: float, weight_decay: float, steps: int, kind: Optimizer = "adamw",
        scales: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        self.parameters, self.peak_lr, self.weight_decay, self.steps, self.kind = list(parameters), peak_lr, weight_decay, steps, kind
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) if kind == "adamw" else p.new_empty(0) for p in self.parameters]
        self.counts = [torch.zeros((), device=p.device) for p in self.parameters]
        self.steps_done = 0
        self.alike: dict[float, list[int]] = {}
        for index, scale in enumerate(scales or [1.0] * len(self.parameters)):
            self.alike.setdefault(scale, []).append(index)

    @torch.no_grad()
    def step(self) -> None:
        """One step along the gradients, which are then dropped. A parameter without a gradient stays as it is."""
        lr, momentum = one_cycle(self.steps_done, self.steps, self.peak_lr)
        for scale, indices in self.alike.items():
            self._step([i for i in indices if self.parameters[i].grad is not None], lr * scale, momentum)
        for parameter in self.parameters:
            parameter.grad = None
        self.steps_done += 1

    def _step(self, indices: Sequence[int], lr: float, momentum: float) -> None:
        parameters: list[Tensor] = [self.parameters[i] for i in indices]
        gradients = [gradient for i in indices if (gradient := self.parameters[i].grad) is not None]
        first = [self.first[i] for i in indices]
        if self.kind == "sgd":
            torch._fused_sgd_(
                parameters, gradients, first, weight_decay=self.weight_decay, momentum=momentum, lr=lr, dampening=0.0, nesterov=True,
                maximize=False, is_first_step=self.steps_done == 0,
            )  # fmt: skip
            return
        adamw(
            parameters, gradients, first, [self.second[i] for i in indices], [], [self.counts[i] for i in indices], fused=True,
            amsgrad=False, beta1=momentum, beta2=0.999, lr=lr, weight_decay=self.weight_decay, eps=1e-8, maximize=False,
        )  # fmt: skip


def one_cycle(step: int, steps: int, peak_lr: float) -> tuple[float, float]:
    """Learning rate and Adam's beta1 at a step, as torch's OneCycleLR has them by default: up for 30 % of the steps, then down."""
    turn, last = 0.3 * steps - 1, steps - 1
    start, end = peak_lr / 25, peak_lr / 25e4
    if step <= turn or turn >= last:
        share = step / turn if turn else 1.0
        return _cosine(start, peak_lr, share), _cosine(0.95, 0.85, share)
    share = (step - turn) / (last - turn)
    return _cosine(peak_lr, end, share), _cosine(0.85, 0.95, share)


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (math.cos(math.pi * share) + 1)


class SuffixTraining:
    """One trial's training: a module from cached values to logits, its optimizer and its schedule.

    `set_mode(training)` puts the parts that train in train or eval mode; frozen parts are the caller's and stay in eval
    mode. `prepare` turns a batch of stored values into the module's inputs. `scales` are factors on the learning rate, by parameter.
    """

    def __init__(
        self, module: nn.Module, rows: Rows, recipe: Recipe, *, set_mode: Callable[[bool], object],
        prepare: Prepare = tuple, scales: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        self.module, self.rows, self.recipe, self.set_mode, self.prepare = module, rows, recipe, set_mode, prepare
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        weights = recipe.class_weights
        self.weights_K = torch.tensor(weights, device=self.device, dtype=self.parameters[0].dtype) if weights else None
        steps = recipe.max_epochs * math.ceil(rows.train / recipe.batch_size)
        self.optimizer = OneCycle(
            self.parameters, peak_lr=recipe.lr, weight_decay=recipe.weight_decay, steps=steps, kind=recipe.optimizer, scales=scales,
        )  # fmt: skip
        self.order = torch.Generator().manual_seed(recipe.seed)
        torch.manual_seed(recipe.seed)  # drop path and dropout draw from the global generator
        self.epochs_done = 0

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    def epoch(self) -> EpochResult:
        """Train one epoch, then judge on the val rows. Raises Diverged where a loss is no number."""
        started = time.perf_counter()
        train_loss = self._train()
        val_loss, val_accuracy = self._judge()
        self.epochs_done += 1
        return EpochResult(train_loss, val_loss, val_accuracy, time.perf_counter() - started)

    def _train(self) -> float:
        self.set_mode(True)
        order_N = torch.randperm(self.rows.train, generator=self.order)
        total = torch.zeros((), device=self.device)
        strength = self.recipe.augmentation_strength
        drawn_N = draw_views(order_N, self.rows.views, self.rows.train, len(self.rows.labels_N), self.order, strength=strength)
        size = self.recipe.batch_size
        for rows_B, drawn_B in zip(torch.split(order_N, size), torch.split(drawn_N, size), strict=True):
            logits_BK, labels_B = self._forward(rows_B, drawn_B)
            loss = cross_entropy(logits_BK, labels_B, weight=self.weights_K, label_smoothing=self.recipe.label_smoothing)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += loss.detach() * len(rows_B)
        return self._finite(float(total) / self.rows.train)

    @torch.inference_mode()
    def _judge(self) -> tuple[float, float]:
        self.set_mode(False)
        val_N = torch.arange(self.rows.train, len(self.rows.labels_N))
        loss, hits = torch.zeros((), device=self.device), torch.zeros((), dtype=torch.long, device=self.device)
        for rows_B in torch.split(val_N, EVAL_BATCH):
            logits_BK, labels_B = self._forward(rows_B, rows_B)
            loss += cross_entropy(logits_BK, labels_B, reduction="sum")
            hits += (logits_BK.argmax(1) == labels_B).sum()
        return self._finite(float(loss) / len(val_N)), int(hits) / len(val_N)

    def _forward(self, rows_B: Tensor, drawn_B: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the stored rows `drawn_B`, which are views of `rows_B`, and their labels."""
        values = self.rows.batch(drawn_B, self.device, self.parameters[0].dtype)
        labels_B = self.rows.labels_N.index_select(0, rows_B).to(self.device, non_blocking=True)
        return self.module(*self.prepare(values)), labels_B

    def _finite(self, loss: float) -> float:
        if not math.isfinite(loss):
            raise Diverged(self.epochs_done + 1, loss)
        return loss
