"""Bootstrap and swaps of two classifiers on the same images, for what has no exact test: balanced accuracy, macro F1, calibration (pure).

Shapes: N images, D images whose answers differ, K classes, B resamples. Images are numbered in an order of the caller's; under one
seed image number i has the same weight in resample b whatever is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]
Metric = Literal["balanced_accuracy", "macro_f1"]

RESAMPLES = 2000  # the share of resamples beyond a 95 % bound is then known to half a percent
CHUNK = 2_000_000  # weights drawn at a time, which bounds the memory


def _chunks(images: int) -> Iterator[tuple[int, int]]:
    """Start and number of the resamples of each chunk."""
    size = max(1, min(RESAMPLES, CHUNK // max(images, 1)))
    yield from ((start, min(size, RESAMPLES - start)) for start in range(0, RESAMPLES, size))


@lru_cache(maxsize=1)  # the rules of one judgement, and judgements on one small holdout, share a chunk
def _drawn(images: int, start: int, size: int, seed: int) -> Floats:
    """How often each image was drawn (N x B)."""
    flat = np.random.default_rng([seed, start]).integers(0, images, (images, size), dtype=np.int32).astype(np.int64)
    flat *= size
    flat += np.arange(size)
    counts_NB = np.bincount(flat.ravel(), minlength=images * size).astype(np.float32).reshape(images, size)
    counts_NB.flags.writeable = False
    return counts_NB


def bootstrap(images: int, statistic: Callable[[Floats], Floats], seed: int) -> Floats:
    """`statistic` of each resample: called with how often each image was drawn (N x B), it answers with ... x B."""
    return np.concatenate([statistic(_drawn(images, start, size, seed)) for start, size in _chunks(images)], axis=-1)


def bounds(values_B: Floats, confidence: float) -> tuple[float, float]:
    """One-sided lower and upper bound, each at `confidence`: percentiles of the resamples."""
    low, high = np.quantile(values_B, [1 - confidence, confidence])
    return float(low), float(high)


@dataclass(frozen=True)
class _Groups:
    """Images by group number; -1 is in no group."""

    groups: int
    order_N: Ints
    starts: Ints
    present: Ints

    @classmethod
    def of(cls, codes_N: Ints, groups: int) -> _Groups:
        order_N = np.argsort(codes_N, kind="stable")
        order_N = order_N[np.searchsorted(codes_N[order_N], 0) :]
        present, starts = np.unique(codes_N[order_N], return_index=True)
        return cls(groups, order_N, starts, present)

    def sums(self, weights_NB: Floats) -> Floats:
        """The weights of each group (K x B)."""
        sums_KB = np.zeros((self.groups, weights_NB.shape[1]))
        if len(self.present):
            sums_KB[self.present] = np.add.reduceat(weights_NB[self.order_N], self.starts, axis=0)
        return sums_KB


@dataclass(frozen=True)
class _Hits:
    """What a metric needs of one model: images rightly answered by class, and answers by class."""

    right: _Groups
    answers: _Groups

    @classmethod
    def of(cls, answers_N: Ints, true_N: Ints, classes: int) -> _Hits:
        return cls(_Groups.of(np.where(answers_N == true_N, true_N, -1), classes), _Groups.of(answers_N, classes))


def score(metric: Metric, right_KB: Floats, answers_KB: Floats, images_KB: Floats) -> Floats:
    """The metric of each column, over the classes that have an image in it."""
    present_KB = images_KB > 0
    below_KB = images_KB if metric == "balanced_accuracy" else (answers_KB + images_KB) / 2
    each_KB = np.divide(right_KB, below_KB, out=np.zeros_like(right_KB, np.float64), where=present_KB)
    return np.asarray(each_KB.sum(0) / present_KB.sum(0))


@dataclass(frozen=True)
class Pair:
    """The answers of two models (-1: no class of the data) on images of known classes."""

    metric: Metric
    true_N: Ints
    mine_N: Ints
    theirs_N: Ints
    classes: int

    def scores(self) -> tuple[float, float]:
        """The metric of each."""
        mine_B, theirs_B = self._measure()(np.ones((len(self.true_N), 1)))
        return float(mine_B[0]), float(theirs_B[0])

    def gains(self, seed: int) -> Floats:
        """The first's metric less the second's, in each resample."""
        measure = self._measure()
        return bootstrap(len(self.true_N), lambda weights_NB: np.subtract(*measure(weights_NB)), seed)

    def _measure(self) -> Callable[[Floats], tuple[Floats, Floats]]:
        images = _Groups.of(self.true_N, self.classes)
        models = [_Hits.of(answers_N, self.true_N, self.classes) for answers_N in (self.mine_N, self.theirs_N)]

        def measure(weights_NB: Floats) -> tuple[Floats, Floats]:
            images_KB = images.sums(weights_NB)
            mine, theirs = (score(self.metric, hits.right.sums(weights_NB), hits.answers.sums(weights_NB), images_KB) for hits in models)
            return mine, theirs

        return measure

    def swapped(self, seed: int) -> Floats:
        """The gain with the two models' answers swapped on each image by a coin: what gains come from luck alone."""
        rng = np.random.default_rng(seed)
        differ_N = self.mine_N != self.theirs_N
        everywhere, true_D = np.ones((len(self.true_N), 1)), self.true_N[differ_N]
        images_K1 = _Groups.of(self.true_N, self.classes).sums(everywhere)
        both = (self.mine_N, self.theirs_N)
        (right_K1, answers_K1), (their_right_K1, their_answers_K1) = (
            (hits.right.sums(everywhere), hits.answers.sums(everywhere)) for hits in (_Hits.of(n, self.true_N, self.classes) for n in both)
        )
        mine, theirs = (_Hits.of(answers_N[differ_N], true_D, self.classes) for answers_N in both)
        found = []
        for _, size in _chunks(len(true_D)):
            flips_DB = rng.integers(0, 2, (len(true_D), size)).astype(np.float32)
            moved = theirs.right.sums(flips_DB) - mine.right.sums(flips_DB)
            answered = theirs.answers.sums(flips_DB) - mine.answers.sums(flips_DB)
            first = score(self.metric, right_K1 + moved, answers_K1 + answered, images_K1)
            second = score(self.metric, their_right_K1 - moved, their_answers_K1 - answered, images_K1)
            found.append(first - second)
        return np.concatenate(found)
