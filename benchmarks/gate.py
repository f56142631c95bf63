"""How often the gate errs, by simulation: python benchmarks/gate.py [--small] [--judgements 1000]

Each judgement draws two models with known true rates on new images, with all default rules on: how often equal ones are promoted,
better ones kept, and harm in one class, to the calibration or against the probe let through. No data, no server; some minutes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from bench import Figure, options, report, seconds

ACCURACY = 0.8  # of the champion
LOST_CLASS = "class 00"
Rates = tuple[float, float]  # of images that only the challenger, only the champion answers rightly


@dataclass(frozen=True)
class World:
    """Two models' true rates: of a class named in `special`, else `rates`. `skew`: the smallest class by the largest."""

    images: int
    rates: Rates
    classes: int = 10
    special: Mapping[int, Rates] = field(default_factory=dict)
    probe_gain: float = -0.03  # over the challenger
    sharpen: float = 1.0  # the challenger's odds to this power: above 1 it is too sure of itself
    skew: float = 1.0
    even: bool = False  # as many images in each class
    counted: bool = False  # the rates of the special classes are met exactly, not on average


EQUAL: Rates = (0.05, 0.05)
BETTER: Rates = (0.065, 0.035)
OTHERS: Rates = (0.05 + 0.025 / 1.8, 0.05 - 0.025 / 1.8)  # with one class of ten 15 points down, 1 point up in all
OTHERS_OF_100: Rates = (0.05 + 0.0115 / 1.98, 0.05 - 0.0115 / 1.98)
BROKEN: Rates = (0.05, 0.20)
FALSE_PROMOTIONS, POWER = 0.05, 0.8
AVERAGES = ("balanced_accuracy", "macro_f1")


def draw(world: World, rng: np.random.Generator) -> Any:
    """Evidence of one holdout."""
    from tasks.gate import Evidence, Scores

    shares = np.geomspace(1, world.skew, world.classes)
    true_N = rng.choice(world.classes, world.images, p=shares / shares.sum())
    if world.even:
        true_N = np.arange(world.images) % world.classes
    rates_NR = np.array([world.special.get(k, world.rates) for k in range(world.classes)])[true_N]
    u_N = rng.random(world.images)
    for k in world.special if world.counted else ():
        inside_N = true_N == k
        u_N[inside_N] = (rng.permutation(inside_N.sum()) + 0.5) / inside_N.sum()
    only_mine_N, only_theirs_N = u_N < rates_NR[:, 0], u_N > 1 - rates_NR[:, 1]
    both_N = ~only_mine_N & ~only_theirs_N & (rng.random(world.images) < (ACCURACY - rates_NR[:, 1]) / (1 - rates_NR.sum(1)))
    mine_N = only_mine_N | both_N
    hurt = max(0.0, world.probe_gain)
    flip_N = rng.random(world.images)
    probe_N = np.where(mine_N, flip_N >= 0.03 + max(0.0, -world.probe_gain), flip_N < (0.03 + hurt) / (1 - ACCURACY))
    models = [probabilities(right_N, true_N, world.classes, rng) for right_N in (mine_N, only_theirs_N | both_N, probe_N)]
    models[0] = models[0] ** world.sharpen / (models[0] ** world.sharpen).sum(1, keepdims=True)
    return Evidence([f"class {k:02}" for k in range(world.classes)], true_N, *(Scores(model) for model in models))


def probabilities(right_N: Any, true_N: Any, classes: int, rng: np.random.Generator) -> Any:
    """Those of a well-calibrated model that is right on 80 % and has these right answers: confidences from Beta(4, 1)."""
    n = len(true_N)
    sure_N = np.clip(np.where(right_N, rng.beta(5, 1, n), rng.beta(4, 2, n)), 1.5 / classes, 1 - 1e-6)
    answer_N = np.where(right_N, true_N, (true_N + rng.integers(1, classes, n)) % classes)
    found_NK = np.repeat((1 - sure_N)[:, None] / (classes - 1), classes, axis=1)
    found_NK[np.arange(n), answer_N] = sure_N
    return found_NK


def simulate(world: World, judgements: int, seed: int, **rules: Any) -> dict[str, float]:
    """Shares of the judgements: promoted, refused by each rule, and with the lost class named in the reason."""
    from ray_jobs.promotion_spec import PromotionSpec
    from tasks.gate import judge

    rng, promotion = np.random.default_rng(seed), PromotionSpec(**rules)
    counts: dict[str, int] = {"promoted": 0, "named": 0, "refused and named": 0, "floors": 0}
    for _ in range(judgements):
        found = judge(draw(world, rng), promotion)
        counts["promoted"] += found.status == "promoted"
        counts["named"] += found.status == "kept" and LOST_CLASS in found.reason
        refused = [rule.name for rule in found.rules if not rule.passed]
        for name in refused:
            counts[name] = counts.get(name, 0) + 1
        counts["floors"] += any(name != "gain" for name in refused)
        lost = [figure.what for rule in found.rules if rule.name == "classes" for figure in rule.figures if figure.outcome == "refused"]
        counts["refused and named"] += LOST_CLASS in lost
    return {name: count / judgements for name, count in counts.items()}


def equal_models(judgements: int, seed: int, detail: dict[str, Any]) -> list[Figure]:
    """False promotions: images, metric, how often the models disagree, how skewed the classes are."""
    cases: Sequence[tuple[str, World, dict[str, Any]]] = [
        *((f"{n} images", World(n, EQUAL), {}) for n in (20, 100, 1000)),
        *((f"{n} images, unrelated mistakes", World(n, (0.16, 0.16)), {}) for n in (20, 1000)),
        *((f"{n} images, {metric}", World(n, EQUAL), {"metric": metric, "probe": "off"}) for metric in AVERAGES for n in (20, 1000)),
        ("1000 images, macro_f1, skewed 1:50", World(1000, EQUAL, skew=0.02), {"metric": "macro_f1", "probe": "off"}),
        ("1000 images, 2 points asked for, 2 gained", World(1000, (0.06, 0.04)), {"min_gain": 0.02}),
    ]  # fmt: skip
    figures = []
    for what, world, rules in cases:
        found = detail[what] = simulate(world, judgements, seed, **rules)
        figures.append(Figure(f"no gain over what is asked: promoted, {what}", found["promoted"], "", FALSE_PROMOTIONS, higher=False))
        print(f"{what}: {found}", flush=True)
    figures.append(Figure("  of equal models, 1000 images: refused by a floor", detail["1000 images"]["floors"]))
    return figures


def harm_and_gain(judgements: int, seed: int, detail: dict[str, Any]) -> list[Figure]:
    """Power, and what the floors hold back."""
    worlds = {
        "better": World(1000, BETTER),
        "one class": World(1000, OTHERS, special={0: BROKEN}, even=True),
        "one class, counted": World(1000, OTHERS, special={0: BROKEN}, even=True, counted=True),
        "one class of 100": World(10_000, OTHERS_OF_100, classes=100, special={0: BROKEN}, even=True),
        "negative transfer": World(1000, BETTER, probe_gain=0.05),
        "too sure": World(1000, BETTER, sharpen=4.0),
    }
    for name, world in worlds.items():
        detail[name] = simulate(world, max(1, judgements // 5) if world.images > 1000 else judgements, seed)
        print(f"{name}: {detail[name]}", flush=True)
    lost = "15 points lost in one class of 100 images, 1 gained in all"
    return [
        Figure("3 points gained, 1000 images, 10 % disagree: promoted", detail["better"]["promoted"], "", POWER),
        Figure("  refused by another rule than the gain's", detail["better"]["floors"], "", 0.05, higher=False),
        Figure(f"{lost}, as counted, 10 classes: refused for that class", detail["one class, counted"]["refused and named"], "", 0.99),
        Figure("  the same as true rates, images drawn: refused for that class", detail["one class"]["refused and named"]),
        Figure("  kept, with that class named", detail["one class"]["named"], "", POWER),
        Figure("  promoted", detail["one class"]["promoted"]),
        Figure(f"{lost}, true rates, 100 classes: refused for that class", detail["one class of 100"]["refused and named"]),
        Figure("3 points gained, but 5 lost to its own probe: kept for that", detail["negative transfer"]["probe"], "", 0.95),
        Figure("3 points gained, but four times too sure: kept for that", detail["too sure"]["calibration"], "", 0.95),
    ]


def duration(seed: int) -> Figure:
    """One decision on 10,000 images of 100 classes, by the metric that takes longest."""
    from ray_jobs.promotion_spec import PromotionSpec
    from tasks.gate import judge

    evidence = draw(World(10_000, BETTER, classes=100), np.random.default_rng(seed))
    slowest_s = max(seconds(functools.partial(judge, evidence, PromotionSpec(metric=metric))) for metric in ("accuracy", *AVERAGES))
    return Figure("one decision, 10,000 images, 100 classes", slowest_s, " s", 2.0, higher=False)


def main() -> None:
    chosen = options(__doc__, judgements=(1000, 100, "simulated judgements a row"))
    judgements: int = chosen.more.judgements
    detail: dict[str, Any] = {"judgements": judgements}
    figures = [*equal_models(judgements, chosen.seed, detail), *harm_and_gain(judgements, chosen.seed, detail), duration(chosen.seed)]
    report("The gate's errors, by simulation", figures, chosen, **detail)


if __name__ == "__main__":
    main()
