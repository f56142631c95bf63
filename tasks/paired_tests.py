"""Exact and score statistics of two classifiers on the same images: wins, losses, and what they prove (pure).

A win is an image that only the first model answers rightly, a loss one that only the second does. Everything works on arrays.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64] | int

BISECTIONS = 50  # of an interval of length 2: to 2e-15


def mcnemar(wins: Counts, losses: Counts) -> Floats:
    """Chance of at least so many wins among the disagreements if either side were as likely: exact, one-sided."""
    tail: Floats = np.asarray(special.bdtrc(np.asarray(wins) - 1.0, np.asarray(wins) + losses, 0.5))
    return np.asarray(np.where(np.asarray(wins) == 0, 1.0, tail), np.float64)


def mcnemar_mid(wins: Counts, losses: Counts) -> Floats:
    """The same with half the chance of the very outcome: nearer to the nominal rate, at times a little above it.

    Fagerland, Lydersen, Laake, The McNemar test for binary matched-pairs data, BMC Med Res Methodol 2013.
    """
    wins = np.asarray(wins, np.int64)
    beyond = np.where(np.asarray(losses) == 0, 0.0, special.bdtrc(np.asarray(wins, np.float64), wins + losses, 0.5))
    return np.asarray((mcnemar(wins, losses) + beyond) / 2, np.float64)


def lowest_gain(wins: Counts, losses: Counts, images: Counts, confidence: float) -> Floats:
    """Lower bound of (wins - losses) / images: Tango's score interval, one-sided, 0 where there is no image.

    It holds with few disagreements, and with none at all, where a Wald interval or a bootstrap has no width.
    Tango, Equivalence test and confidence interval for the difference in proportions for the paired-sample design, 1998.
    """
    w, x, n = np.broadcast_arrays(*(np.asarray(value, np.float64) for value in (wins, losses, images)))
    z = NormalDist().inv_cdf(confidence)
    low, high = np.full(n.shape, -1.0), (w - x) / np.maximum(n, 1)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        refuted = (w - x - n * middle) >= z * np.sqrt(n * _variance(middle, w, x, n))
        low, high = np.where(refuted, middle, low), np.where(refuted, high, middle)
    return np.where(n > 0, low, 0.0)


def _variance(gain: Floats, wins: Floats, losses: Floats, images: Floats) -> Floats:
    """Of one image's outcome, at the likeliest rates of wins and losses that have this gain."""
    a = 2 * np.maximum(images, 1)
    b = -wins - losses + (2 * images - wins + losses) * gain
    c = -losses * gain * (1 - gain)
    rate = (np.sqrt(np.maximum(b * b - 4 * a * c, 0)) - b) / (2 * a)
    return np.asarray(np.maximum(2 * rate + gain * (1 - gain), 0), np.float64)


def highest_gain(wins: Counts, losses: Counts, images: Counts, confidence: float) -> Floats:
    """Upper bound, likewise."""
    return -lowest_gain(losses, wins, images, confidence)


def power(images: int, disagreeing: float, gain: float, asked: float, confidence: float) -> float:
    """How often `images` show more than `asked` where `gain` is true and a share `disagreeing` of the images tells the models apart."""
    noise, spread = _spreads(disagreeing, gain, asked)
    z = (math.sqrt(images) * (gain - asked) - NormalDist().inv_cdf(confidence) * noise) / max(spread, 1e-9)
    return NormalDist().cdf(z)


def images_needed(wanted: float, disagreeing: float, gain: float, asked: float, confidence: float) -> int:
    """The images that it takes for a power of `wanted`. Connor, Sample size for testing differences in paired proportions, 1987."""
    noise, spread = _spreads(disagreeing, gain, asked)
    reach = NormalDist().inv_cdf(confidence) * noise + NormalDist().inv_cdf(wanted) * spread
    return max(1, math.ceil((reach / (gain - asked)) ** 2))


def _spreads(disagreeing: float, gain: float, asked: float) -> tuple[float, float]:
    assert gain > asked
    share = min(1.0, max(disagreeing, abs(gain), abs(asked)))  # models that differ by the gain disagree at least so often
    return math.sqrt(share - asked**2), math.sqrt(share - gain**2)


def tested(images_K: npt.NDArray[np.int64], error: float) -> tuple[npt.NDArray[np.bool_], float]:
    """Which of several groups of images can be tested at all, and the error that each may make so that together they make `error`.

    Bonferroni, but only over the groups with images enough for the smallest chance to count (Tarone 1990). It looks at sizes alone,
    so that no answer in one group changes the verdict on another.
    """
    smallest_K = 0.5 ** (images_K + 1.0)  # of the mid-p value, all images lost
    groups: Any = next(m for m in range(1, len(images_K) + 2) if (smallest_K <= error / m).sum() <= m)
    return smallest_K <= error / groups, error / groups
