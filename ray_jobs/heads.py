"""All linear heads of a search at once: one GEMM a step over the cached pre-logits, each head with its own rates. Torch only.

Each head trains exactly as train_loop.SuffixTraining would train it alone under the same seed: same first weights, same order
of rows, same schedule and optimizer. Shapes: N rows, B rows of a batch, D features, H heads, K classes, C = H x K.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from ray_jobs.cuts import Suffix
from ray_jobs.products import product
from ray_jobs.tracing import MODE_DEPENDENT, is_impure
from ray_jobs.train_loop import EVAL_BATCH, Diverged, EpochResult, Prepare, Recipe, Rows, SuffixTraining, draw_views, one_cycle

HEADS_A_CHUNK = 64
"""Heads trained together: enough for a full GEMM, few enough that weights and moments stay in a core's cache (docs/LOG.md)."""
KNN_TEMPERATURE = 0.07
KNN_ROWS = 1024


@dataclass(frozen=True)
class HeadRows:
    """The classifier's input for every stored row, as Rows has them, and dropout's share before it."""

    features_ND: Tensor
    labels_N: Tensor
    train: int
    dropout: float = 0.0
    views: int = 1


@dataclass
class HeadResult:
    """One head's training: its curve (index 0 is epoch 1), how it ended, and its tensors at the best epoch, under timm's names.

    The best epoch has the highest val accuracy, among equals the lowest val loss; 0 and no tensors where even the first diverged.
    """

    recipe: Recipe
    curve: list[EpochResult] = field(default_factory=list)
    status: Literal["finished", "stopped", "diverged"] = "finished"
    reason: str = ""
    best_epoch: int = 0
    head: dict[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def best(self) -> EpochResult:
        return self.curve[self.best_epoch - 1]

    def note(self, measured: EpochResult, patience: int | None, head: Callable[[], dict[str, NDArray[Any]]]) -> None:
        """Take an epoch down: keep the head if it is the best one yet, and end here if it diverged or has not improved for long."""
        epoch = len(self.curve) + 1
        for loss in (measured.train_loss, measured.val_loss):
            if not math.isfinite(loss):
                self.status, self.reason = "diverged", str(Diverged(epoch, loss))
                return
        self.curve.append(measured)
        if not self.best_epoch or _goodness(measured) > _goodness(self.best):
            self.best_epoch, self.head = epoch, head()
        elif patience and epoch - self.best_epoch >= patience and epoch < self.recipe.max_epochs:
            self.status, self.reason = "stopped", f"no epoch better than the {self.best_epoch}. since"


def head_rows(suffix: Suffix, rows: Rows, prepare: Prepare = tuple) -> HeadRows | None:
    """What the classifier sees of each row; None where it is not one linear layer on [B, D] at the very end of a depth-0 suffix."""
    found = _classifier(suffix)
    if found is None:
        return None
    before, dropout = found
    device, dtype = next(suffix.parameters()).device, next(suffix.parameters()).dtype
    with torch.no_grad():
        parts = [before(*prepare(rows.batch(stored_B, device, dtype))) for stored_B in torch.split(torch.arange(rows.stored), EVAL_BATCH)]
    features_ND = torch.cat(parts)
    if features_ND.ndim != 2:
        return None
    return HeadRows(features_ND, rows.labels_N.to(device), rows.train, dropout, rows.views)


def train_heads(
    rows: HeadRows, classifier: Mapping[str, Tensor], recipes: Sequence[Recipe], *, patience: int | None = None, chunk: int = HEADS_A_CHUNK
) -> list[HeadResult]:
    """One head a recipe, each from the classifier's tensors (weight [K, D] and, if any, bias [K], by name); results in that order.

    A head stops after `patience` epochs without a better one. One whose loss is no number is marked and leaves the others alone.
    """
    results = [HeadResult(recipe) for recipe in recipes]
    for _, alike in groupby(sorted(results, key=_shared), key=_shared):
        group = list(alike)
        for start in range(0, len(group), chunk):
            _Chunk(rows, classifier, group[start : start + chunk], patience).train()
    return results


def train_alone(training: SuffixTraining, patience: int | None, head: Callable[[], dict[str, NDArray[Any]]]) -> HeadResult:
    """The same for a classifier that is no linear layer: one training, epoch by epoch."""
    result = HeadResult(training.recipe)
    while result.status == "finished" and training.epochs_done < training.recipe.max_epochs:
        try:
            measured = training.epoch()
        except Diverged as error:
            measured = EpochResult(error.loss, error.loss, 0.0, 0.0)
        result.note(measured, patience, head)
    return result


def _shared(result: HeadResult) -> tuple[int, int, int, float]:
    """What heads of one chunk have in common: the order of the rows, the steps, the schedule's shape, the views that are drawn."""
    recipe = result.recipe
    return recipe.seed, recipe.batch_size, recipe.max_epochs, recipe.augmentation_strength


class _Chunk:
    """Heads that step together. Those that end leave the tensors, so that the rest go faster."""

    def __init__(self, rows: HeadRows, classifier: Mapping[str, Tensor], results: Sequence[HeadResult], patience: int | None) -> None:
        self.rows, self.results, self.patience = rows, list(results), patience
        self.recipe = results[0].recipe
        self.steps = self.recipe.max_epochs * math.ceil(rows.train / self.recipe.batch_size)
        self.counts: Tensor = torch.zeros((), device=rows.features_ND.device)
        heads = len(self.results)
        self.names = sorted(classifier, key=lambda name: -classifier[name].ndim)  # the weight first
        weight_KD = classifier[self.names[0]].detach()
        bias_K = classifier[self.names[1]].detach() if len(self.names) > 1 else torch.zeros_like(weight_KD[:, 0])
        self.weight_HKD, self.bias_HK = weight_KD.repeat(heads, 1, 1), bias_K.repeat(heads, 1)
        tensors = (self.weight_HKD, self.bias_HK)
        self.moments = [[torch.zeros_like(tensor) for tensor in tensors] for _ in range(2)]
        self._settle()

    def train(self) -> None:
        """Every epoch of every head, until each has ended."""
        order = torch.Generator().manual_seed(self.recipe.seed)
        devices = [self.counts.device] if self.counts.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.recipe.seed)  # dropout draws from the global generator, one mask a step for all heads
            for _ in range(self.recipe.max_epochs):
                if self.results:
                    self._epoch(order)

    @torch.no_grad()
    def _epoch(self, order: torch.Generator) -> None:
        started = time.perf_counter()
        train_H = self._train(order)
        val_loss_H, hits_H = self._judge()
        seconds = (time.perf_counter() - started) / len(self.results)
        val = len(self.rows.labels_N) - self.rows.train
        measured = zip(train_H.tolist(), val_loss_H.tolist(), (hits_H.double() / val).tolist(), strict=True)
        for index, (result, numbers) in enumerate(zip(self.results, measured, strict=True)):
            result.note(EpochResult(*numbers, seconds), self.patience, functools.partial(self._head, index))
        self._drop_ended()

    def _train(self, order: torch.Generator) -> Tensor:
        rows, total_H = self.rows, torch.zeros(len(self.results), device=self.counts.device)
        order_N = torch.randperm(rows.train, generator=order)
        strength = self.recipe.augmentation_strength
        drawn_N = draw_views(order_N, rows.views, rows.train, len(rows.labels_N), order, strength=strength)
        features_ND, labels_N = rows.features_ND[drawn_N.to(self.counts.device)], rows.labels_N[order_N.to(self.counts.device)]
        for features_BD, labels_B in zip(
            torch.split(features_ND, self.recipe.batch_size), torch.split(labels_N, self.recipe.batch_size), strict=True
        ):
            dropped_BD = nn.functional.dropout(features_BD, rows.dropout) if rows.dropout else features_BD
            total_H += self._step(dropped_BD, labels_B) * len(labels_B)
        return total_H / rows.train

    def _step(self, features_BD: Tensor, labels_B: Tensor) -> Tensor:
        """Forward, the gradient in closed form, and one step of AdamW; gives the loss of each head."""
        logp_HKB = torch.log_softmax(self._logits(features_BD), 1)
        target_HKB = self._targets(labels_B)
        loss_H = -(target_HKB * logp_HKB).sum((1, 2))
        gradient_HKB = logp_HKB.exp_().mul_(target_HKB.sum(1, keepdim=True)).sub_(target_HKB)
        weight_grad_HKD = product(gradient_HKB.flatten(0, 1), features_BD.t()).view_as(self.weight_HKD)
        self._adamw(weight_grad_HKD, gradient_HKB.sum(2))
        return loss_H

    def _logits(self, features_BD: Tensor) -> Tensor:
        """logits_HKB: rows last, where softmax over the classes is vectorised."""
        logits_CB = product(self.weight_HKD.flatten(0, 1), features_BD)
        return logits_CB.view(*self.bias_HK.shape, -1).add_(self.bias_HK.unsqueeze(2))

    def _targets(self, labels_B: Tensor) -> Tensor:
        """The weight of each log probability in cross_entropy's mean: smoothed one-hot labels times the class weights."""
        hot_KB = nn.functional.one_hot(labels_B, self.bias_HK.shape[1]).t()
        shares_HKB = hot_KB * (1 - self.smoothing_H11) + self.smoothing_H11 / len(hot_KB)
        # cross_entropy weighs a smoothed class by its own weight, and divides by the sum of the labels' weights
        sums_H = self.class_weights_HK[:, labels_B].sum(1)
        return shares_HKB.mul_((self.class_weights_HK / sums_H[:, None]).unsqueeze(2))

    def _adamw(self, weight_grad_HKD: Tensor, bias_grad_HK: Tensor) -> None:
        """torch's own fused kernel, head by head, as their rates differ; a head's state is small enough for the cache."""
        shape, beta1 = one_cycle(int(self.counts), self.steps, 1.0)
        self.counts += 1
        gradients = zip(weight_grad_HKD.unbind(), bias_grad_HK.unbind(), strict=True)
        for result, (tensors, first, second), gradient in zip(self.results, self.parts, gradients, strict=True):
            torch._fused_adamw_(
                tensors, gradient[: len(tensors)], first, second, [], [self.counts] * len(tensors), lr=result.recipe.lr * shape,
                beta1=beta1, beta2=0.999, weight_decay=result.recipe.weight_decay, eps=1e-8, amsgrad=False, maximize=False,
            )  # fmt: skip

    def _judge(self) -> tuple[Tensor, Tensor]:
        rows, device = self.rows, self.counts.device
        loss_H, hits_H = torch.zeros(len(self.results), device=device), torch.zeros(len(self.results), dtype=torch.long, device=device)
        val = slice(rows.train, len(rows.labels_N))
        for features_BD, labels_B in zip(
            torch.split(rows.features_ND[val], EVAL_BATCH), torch.split(rows.labels_N[val], EVAL_BATCH), strict=True
        ):
            logits_HKB = self._logits(features_BD)
            loss_H -= torch.log_softmax(logits_HKB, 1).gather(1, labels_B.expand(len(logits_HKB), 1, -1)).sum((1, 2))
            hits_H += (logits_HKB.argmax(1) == labels_B).sum(1)
        return loss_H / (len(rows.labels_N) - rows.train), hits_H

    def _head(self, index: int) -> dict[str, NDArray[Any]]:
        return {name: tensor.cpu().numpy().copy() for name, tensor in zip(self.names, self.parts[index][0], strict=True)}

    def _drop_ended(self) -> None:
        going = [index for index, result in enumerate(self.results) if result.status == "finished"]
        if len(going) < len(self.results):
            self.results = [self.results[index] for index in going]
            self.weight_HKD, self.bias_HK = self.weight_HKD[going], self.bias_HK[going]
            self.moments = [[moment[going] for moment in pair] for pair in self.moments]
            self._settle()

    def _settle(self) -> None:
        """What follows from the heads that are left: constants, and each head's own parts."""
        like = self.bias_HK
        recipes = [result.recipe for result in self.results]
        self.smoothing_H11 = like.new_tensor([recipe.label_smoothing for recipe in recipes])[:, None, None]
        plain_K = (1.0,) * like.shape[1]
        self.class_weights_HK = like.new_tensor([recipe.class_weights or plain_K for recipe in recipes]).view(-1, len(plain_K))
        stacks = ((self.weight_HKD, self.bias_HK), *self.moments)
        self.parts = [[[tensor[index] for tensor in stack[: len(self.names)]] for stack in stacks] for index in range(len(recipes))]


def knn_accuracy(train_ND: Tensor, train_labels: Tensor, val_ND: Tensor, val_labels: Tensor, k: int = 20) -> float:
    """The share of val rows that their k nearest train rows name rightly: cosine, votes weighted by exp(similarity / 0.07).

    As Caron et al. (2021, arXiv:2104.14294) judge features; no training, so a check on the features and not on the heads.
    """
    train_ND = nn.functional.normalize(train_ND.float(), dim=1)
    hot_NK = nn.functional.one_hot(train_labels.long()).float()
    hits = 0
    for val_BD, labels_B in zip(torch.split(val_ND.float(), KNN_ROWS), torch.split(val_labels, KNN_ROWS), strict=True):
        similarity_BN = nn.functional.normalize(val_BD, dim=1) @ train_ND.t()
        nearest_Bk, rows_Bk = similarity_BN.topk(min(k, len(train_ND)), dim=1)
        votes_BK = ((nearest_Bk / KNN_TEMPERATURE).exp().unsqueeze(2) * hot_NK[rows_Bk]).sum(1)
        hits += int((votes_BK.argmax(1) == labels_B).sum())
    return hits / len(val_labels)


def _goodness(measured: EpochResult) -> tuple[float, float]:
    return measured.val_accuracy, -measured.val_loss


def _classifier(suffix: Suffix) -> tuple[fx.GraphModule, float] | None:
    """The part before the classifier, and the dropout between them."""
    (last,) = next(node for node in reversed(suffix.graph.nodes) if node.op == "output").args
    if not isinstance(last, fx.Node) or last.op != "call_module" or not _is_the_classifier(suffix, str(last.target)):
        return None
    source, dropout = last.args[0], 0.0
    live = {id(module) for module in suffix.live}
    while isinstance(source, fx.Node) and source.op == "call_module" and isinstance(module := _at(suffix, source), nn.Dropout):
        if dropout and id(module) in live:
            return None
        dropout = module.p if id(module) in live else dropout
        source = source.args[0]
    if not isinstance(source, fx.Node):
        return None
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in suffix.graph.nodes:
        if node is last:
            break
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[source])
    graph.eliminate_dead_code(is_impure_node=lambda node: is_impure(node, suffix))
    modules = [_at(suffix, node) for node in graph.nodes if node.op == "call_module"]
    if any(id(part) in live and isinstance(part, MODE_DEPENDENT) for module in modules for part in module.modules()):
        return None
    return fx.GraphModule(suffix, graph).eval(), dropout


def _is_the_classifier(suffix: Suffix, name: str) -> bool:
    """Whether it is a plain linear layer and holds all that trains."""
    module = suffix.get_submodule(name)
    own = {f"{name}.{part}" for part, _ in module.named_parameters()}
    return type(module) is nn.Linear and {key for key, _ in suffix.named_parameters()} == own


def _at(suffix: nn.Module, node: fx.Node) -> nn.Module:
    return suffix.get_submodule(str(node.target))
