"""What a worker keeps between trials (model, cuts, mapped features) and the training that one trial runs on it. No Ray.

A trial costs no import, no model build and no copy of features: only the parameters are put back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from infra.committed_folder import fetch
from infra.object_store import ObjectStore
from ray_jobs import backbone
from ray_jobs.cuts import Cuts
from ray_jobs.fast_suffix import speed_up
from ray_jobs.feature_cache import Features, open_features
from ray_jobs.groups import head_names, lr_scales
from ray_jobs.heads import HeadResult, HeadRows, head_rows, knn_accuracy, train_alone, train_heads
from ray_jobs.light_timm import without_compiler
from ray_jobs.products import multiplies_bfloat16
from ray_jobs.search_space import TrialConfig
from ray_jobs.train_loop import Recipe, Rows, SuffixTraining, class_weights
from ray_jobs.work import Work

Head = Mapping[str, np.ndarray[Any, Any]]
"""The classifier's tensors under timm's names."""


def recipe_of(work: Work, config: TrialConfig, labels: np.ndarray[Any, Any]) -> Recipe:
    """How a trial trains on these train labels."""
    counts = np.bincount(labels, minlength=work.num_classes).tolist()
    weights = class_weights(counts, work.class_weights)
    return Recipe(
        lr=config.lr, max_epochs=work.max_epochs, batch_size=config.batch_size, weight_decay=config.weight_decay,
        label_smoothing=config.label_smoothing, class_weights=tuple(weights) if weights else None, seed=work.seed,
        optimizer=config.optimizer, augmentation_strength=config.augmentation_strength,
    )  # fmt: skip


class WarmWorker:
    """One process's model and features; one training at a time."""

    def __init__(self, work: Work, store: ObjectStore, cache_folder: Path) -> None:
        self.work, self.store, self.cache_folder = work, store, cache_folder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        folder = fetch(store, work.backbone_uri, cache_folder / "backbones")
        self.model = backbone.load(folder, num_classes=work.num_classes, seed=work.seed).to(self.device)
        self.model.to(memory_format=torch.channels_last)
        self.cuts = Cuts(self.model, sorted({*work.feature_uris, *dict(work.sources)}), work.image_size)
        self._features: dict[int, Features] = {}

    def source(self, depth: int) -> int:
        """The cut from whose values a trial of this depth starts."""
        return dict(self.work.sources).get(depth, depth)

    def features(self, depth: int) -> Features:
        if depth not in self._features:
            self._features[depth] = open_features(self.work.feature_uris[depth], self.store, self.cache_folder)
        return self._features[depth]

    def start(self, config: TrialConfig, head: Head | None) -> SuffixTraining:
        """A training from the backbone's own weights, with `head` as its first classifier where one is given.

        A deep trial starts from the best linear probe's head: a random one would first distort the pretrained features
        (LP-FT: Kumar et al. 2022, arXiv:2202.10054).
        """
        depth = config.unfreeze_depth
        source = self.source(depth)
        features = self.features(source)
        self.cuts.reset(self.work.seed)
        suffix = speed_up(self.cuts.suffix(depth, source), mixed=self.work.precision != "float32" and multiplies_bfloat16())
        if head is not None:
            put_head(self.model, head)
        recipe = recipe_of(self.work, config, features.labels[: features.train])
        by_name = lr_scales(self.model, config.layer_decay)
        scales = [by_name[name] for name, _ in suffix.named_parameters()]
        return SuffixTraining(suffix, rows_of(features), recipe, set_mode=suffix.train, prepare=self._prepare(source), scales=scales)

    def heads(self, configs: Sequence[TrialConfig], patience: int | None = None) -> list[HeadResult]:
        """Every head of depth 0 at once, in the order of `configs`."""
        together = [config for config in configs if config.optimizer == "adamw"]
        found = self._head_rows() if together else None
        if found is None:
            return [train_alone(self.start(config, None), patience, self.head) for config in configs]
        self.cuts.reset(self.work.seed)
        classifier = {name: self.model.get_parameter(name).detach().clone() for name in head_names(self.model)}
        labels = found.labels_N[: found.train].numpy(force=True)
        recipes = [recipe_of(self.work, config, labels) for config in together]
        results = iter(train_heads(found, classifier, recipes, patience=patience))
        return [
            next(results) if config.optimizer == "adamw" else train_alone(self.start(config, None), patience, self.head)
            for config in configs
        ]

    def _head_rows(self) -> HeadRows | None:
        source = self.source(0)
        return head_rows(self.cuts.suffix(0, source), rows_of(self.features(source)), self._prepare(source))

    def knn_accuracy(self) -> float | None:
        """Of the features themselves, before any training; None where the classifier does not see plain vectors."""
        found = self._head_rows()
        if found is None:
            return None
        features_ND, labels_N, train = found.features_ND[: len(found.labels_N)], found.labels_N, found.train
        return knn_accuracy(features_ND[:train], labels_N[:train], features_ND[train:], labels_N[train:])

    def head(self) -> dict[str, np.ndarray[Any, Any]]:
        """The classifier as it is now."""
        return {name: self.model.get_parameter(name).detach().cpu().numpy().copy() for name in sorted(head_names(self.model))}

    def _prepare(self, depth: int) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
        if depth < self.work.num_groups:
            return channels_last
        return functools.partial(normalised, mean=self.work.mean, std=self.work.std)

    def forward_flops(self) -> dict[int, int]:
        """FLOPs of one image through the suffix of each depth; under -1 through the whole backbone."""
        counted: dict[int, int] = {}
        size = self.work.image_size
        images_BCHW = torch.zeros(2, 3, size, size, device=self.device)
        with without_compiler(), torch.inference_mode():
            from torch.utils.flop_counter import FlopCounterMode

            with FlopCounterMode(display=False) as whole:
                self.model.eval()(images_BCHW)
            for depth in self.cuts.depths:
                values = [torch.zeros(2, *v.shape, dtype=v.dtype, device=self.device) for v in self.cuts.values(depth)]
                with FlopCounterMode(display=False) as counter:
                    self.cuts.suffix(depth)(*values)
                counted[depth] = counter.get_total_flops() // 2
        return {**counted, -1: whole.get_total_flops() // 2}


def rows_of(features: Features) -> Rows:
    return Rows(features.tensors(), torch.from_numpy(features.labels), features.train, features.views)


def put_head(model: nn.Module, head: Head) -> None:
    """Replace the classifier's tensors."""
    with torch.no_grad():
        for name, value in head.items():
            model.get_parameter(name).copy_(torch.tensor(value))  # a copy: arrays from Ray's object store are read-only


def channels_last(values: Sequence[Tensor]) -> Sequence[Tensor]:
    """Feature maps in the memory order in which convolutions train 1.7x faster on a CPU; see docs/LOG.md."""
    return [value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value for value in values]


def normalised(values: Sequence[Tensor], mean: Sequence[float], std: Sequence[float]) -> Sequence[Tensor]:
    """images_BCHW from stored pixels_BHWC, as preprocessing.normalise makes them."""
    (pixels_BHWC,) = values
    device = pixels_BHWC.device
    scaled = (pixels_BHWC.float() / 255 - torch.tensor(mean, device=device)) / torch.tensor(std, device=device)
    return (scaled.permute(0, 3, 1, 2),)  # channels last already
