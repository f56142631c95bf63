"""The rules of the gate: each looks at the facts and says passed, warned, refused or skipped, with its figures (pure).

A floor refuses where a loss is larger than its limit and noise does not explain it. Among many classes or slices one loses much
by chance: a loss that would refuse if that class were the only one, but not among so many, is a warning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from ray_jobs.metrics import ECE_BINS
from ray_jobs.promotion_spec import PromotionSpec
from tasks import paired_tests as tests
from tasks.gate_evidence import Answers, Facts, Floats, Ints
from tasks.paired_resampling import Metric, Pair, bootstrap, bounds

Outcome = Literal["passed", "warned", "refused", "skipped"]
EPSILON = 1e-12  # equal figures, summed in another order


@dataclass(frozen=True)
class Figure:
    """One number of a rule: challenger less the other where two models are compared, with one-sided bounds."""

    what: str
    value: float
    low: float | None = None
    high: float | None = None
    challenger: float | None = None
    other: float | None = None
    images: int | None = None
    outcome: Outcome = "passed"


@dataclass(frozen=True)
class RuleResult:
    """What a rule says. `confidence` is that of each bound of its figures."""

    name: str
    outcome: Outcome
    words: str
    figures: tuple[Figure, ...] = ()
    limit: float | None = None
    confidence: float | None = None

    @property
    def passed(self) -> bool:
        return self.outcome != "refused"


@dataclass(frozen=True)
class Comparison:
    """The challenger's metric against another model's; the chances that luck alone gains, or loses, as much."""

    figure: Figure
    luck_gains: float
    luck_loses: float


def metric_of(facts: Facts, model: Answers | None, metric: str) -> float | None:
    """The metric of one model; None where there is no model or no image."""
    if model is None or not facts.images:
        return None
    if metric == "accuracy":
        return float(model.right_N.mean())
    return Pair(cast(Metric, metric), facts.true_N, model.class_N, model.class_N, len(facts.classes)).scores()[0]


def numbers(facts: Facts) -> RuleResult:
    """A challenger that answers an image with NaN or infinity would do so when it serves."""
    bad = int((~facts.challenger.finite_N).sum())
    words = f"the challenger's probabilities are not numbers on {bad} of {facts.images} images" if bad else "all probabilities are numbers"
    return RuleResult("numbers", "refused" if bad else "passed", words, (Figure("images without numbers", bad, images=facts.images),), 0.0)


def size(facts: Facts, asked: PromotionSpec) -> RuleResult:
    """Enough images to judge on at all; and what it would take to show the gain that one cares about."""
    images, gain = facts.images, min(1.0, asked.min_gain + asked.detectable_gain)
    figures = [Figure("images", images)]
    words = f"{_images(images)} to judge on" + (f", and {asked.min_images} are the least" if images < asked.min_images else "")
    if facts.champion is not None and images and gain > asked.min_gain:
        differ = float((facts.challenger.right_N != facts.champion.right_N).mean())
        shown = tests.power(images, differ, gain, asked.min_gain, asked.confidence)
        needed = tests.images_needed(asked.power, differ, gain, asked.min_gain, asked.confidence)
        figures += [Figure(f"chance to show a gain of {gain:g}", shown), Figure(f"images to show it in {asked.power:.0%} of cases", needed)]
        words += f"; they show a gain of {_points(gain)} in {shown:.0%} of cases, {needed} images would in {asked.power:.0%}"
    return RuleResult("size", "refused" if images < asked.min_images else "passed", words, tuple(figures), float(asked.min_images))


def overlap(facts: Facts, asked: PromotionSpec) -> RuleResult:
    """Images that a model has seen in training are gone; where they were many, the rest is no fair sample."""
    before = facts.images + facts.removed
    share = facts.removed / before if before else 0.0
    words = (
        f"{facts.removed} of {before} holdout images ({share:.1%}) were seen in training and removed; {asked.max_overlap:.1%} are allowed"
    )
    outcome: Outcome = "refused" if share > asked.max_overlap + EPSILON else "passed"
    return RuleResult("overlap", outcome, words, (Figure("removed share", share, images=before),), asked.max_overlap)


def compare(facts: Facts, other: Answers, asked: PromotionSpec, confidence: float, seed: int) -> Comparison:
    """The metric of the spec: accuracy by exact test and score interval, the others by swaps and bootstrap."""
    mine = facts.challenger
    if asked.metric == "accuracy":
        wins, losses = int((mine.right_N & ~other.right_N).sum()), int((other.right_N & ~mine.right_N).sum())
        low, high = (float(bound(wins, losses, facts.images, confidence)) for bound in (tests.lowest_gain, tests.highest_gain))
        scores = float(mine.right_N.mean()), float(other.right_N.mean())
        figure = Figure("accuracy", (wins - losses) / facts.images, low, high, *scores, facts.images)
        return Comparison(figure, float(tests.mcnemar(wins, losses)), float(tests.mcnemar_mid(losses, wins)))
    pair = Pair(asked.metric, facts.true_N, mine.class_N, other.class_N, len(facts.classes))
    scores = pair.scores()
    gain = scores[0] - scores[1]
    low, high = bounds(pair.gains(seed), confidence)
    luck_B = pair.swapped(seed)
    more, less = ((1 + int(beyond.sum())) / (1 + len(luck_B)) for beyond in (luck_B >= gain - EPSILON, luck_B <= gain + EPSILON))
    return Comparison(Figure(asked.metric, gain, low, high, *scores, facts.images), more, less)


def gain(facts: Facts, asked: PromotionSpec, seed: int) -> RuleResult:
    """The challenger is better than the champion by more than asked for, and luck does not explain it.

    Two things must hold: the lower bound is above min_gain, and, where a gain is asked for, so many wins are rare between
    equal models. The second is exact however few images tell the models apart; below 0, a tie may be enough.
    """
    if facts.champion is None:
        return _skipped("gain", "there is no champion to beat")
    found = compare(facts, facts.champion, asked, asked.confidence, seed)
    figure = found.figure
    assert figure.low is not None
    lucky = asked.min_gain >= 0 and found.luck_gains > 1 - asked.confidence
    outcome: Outcome = "passed" if figure.low > asked.min_gain and not lucky else "refused"
    bound = f"{figure.value:+.4f}, at least {figure.low:+.4f} with {asked.confidence:.0%} confidence"
    against = f"{asked.metric} {figure.challenger:.4f} against the champion's {figure.other:.4f}"
    words = f"{against} ({bound}; more than {asked.min_gain:+.4f} is asked for)"
    if lucky and figure.low > asked.min_gain:
        words += f"; equal models come as far in {found.luck_gains:.0%} of cases"
    return RuleResult("gain", outcome, words, (figure,), asked.min_gain, asked.confidence)


def classes(facts: Facts, asked: PromotionSpec) -> RuleResult:
    """No class loses more recall than the floor."""
    if facts.champion is None:
        return _skipped("classes", "there is no champion to compare with")
    return _floor("classes", "class", facts, facts.true_N, facts.classes, asked)


def slices(facts: Facts, asked: PromotionSpec) -> RuleResult:
    """No value of a manifest column loses more accuracy than the floor. A column that the evidence lacks refuses."""
    if facts.champion is None:
        return _skipped("slices", "there is no champion to compare with")
    if not asked.slices:
        return _skipped("slices", "no column is named in promotion.slices")
    missing = [column for column in asked.slices if column not in facts.slices]
    if missing:
        return RuleResult("slices", "refused", f"the holdout has no column {', '.join(map(repr, missing))}", (), asked.class_floor)
    names: list[str] = []
    codes = []
    for column in asked.slices:
        values, codes_N = np.unique(facts.slices[column], return_inverse=True)
        codes.append(codes_N + len(names))
        names += [f"{column} = {value}" for value in values]
    return _floor("slices", "slice", facts, np.stack(codes), names, asked)


def _floor(rule: str, noun: str, facts: Facts, group_N: Ints, names: Sequence[str], asked: PromotionSpec) -> RuleResult:
    """Wins and losses of each group of images (`group_N`, or several columns of it), tested all together."""
    assert facts.champion is not None
    mine_N, theirs_N = (np.broadcast_to(model.right_N, group_N.shape).ravel() for model in (facts.challenger, facts.champion))
    flat = group_N.ravel()
    wins_K, losses_K, images_K = (
        np.bincount(flat[chosen], minlength=len(names)) for chosen in (mine_N & ~theirs_N, theirs_N & ~mine_N, np.ones(len(flat), bool))
    )
    mine_K, theirs_K = (np.bincount(flat[right], minlength=len(names)) / np.maximum(images_K, 1) for right in (mine_N, theirs_N))
    tested_K, error = tests.tested(images_K, 1 - asked.floor_confidence)
    change_K = (wins_K - losses_K) / np.maximum(images_K, 1)
    over_K = change_K < -asked.class_floor - EPSILON
    luck_K = tests.mcnemar_mid(losses_K, wins_K)
    refused_K, warned_K = over_K & tested_K & (luck_K <= error), over_K & (luck_K <= 1 - asked.floor_confidence)
    low_K, high_K = (bound(wins_K, losses_K, images_K, 1 - error) for bound in (tests.lowest_gain, tests.highest_gain))
    figures = tuple(
        Figure(
            names[k], float(change_K[k]), float(low_K[k]), float(high_K[k]), float(mine_K[k]), float(theirs_K[k]), int(images_K[k]),
            "refused" if refused_K[k] else "warned" if warned_K[k] else "passed" if images_K[k] else "skipped",
        )
        for k in range(len(names))
    )  # fmt: skip
    return RuleResult(rule, _worst(figures), _floor_words(noun, figures, asked), figures, asked.class_floor, 1 - error)


def _floor_words(noun: str, figures: Sequence[Figure], asked: PromotionSpec) -> str:
    by_loss = sorted((figure for figure in figures if figure.images), key=lambda figure: (figure.value, figure.what))
    for outcome, more in (("refused", ""), ("warned", f", as one of {len(by_loss)} may by chance")):
        over = [figure for figure in by_loss if figure.outcome == outcome]
        if over:
            lost = ", ".join(f"{figure.what!r} lost {_points(-figure.value)} of {_images(figure.images or 0)}" for figure in over[:5])
            others = f" and {len(over) - 5} others lost" if len(over) > 5 else ""
            return f"{noun} {lost}{others}: more than {_points(asked.class_floor)}{more}"
    least = f"{by_loss[0].what!r} changed by {100 * by_loss[0].value:+.1f} points"
    return f"no {noun} lost more than {_points(asked.class_floor)} beyond its noise; the lowest: {least}"


def calibration(facts: Facts, asked: PromotionSpec, seed: int) -> RuleResult:
    """Neither the calibration error nor the log loss rises by more than its limit."""
    if facts.champion is None:
        return _skipped("calibration", "there is no champion to compare with")
    mine, theirs = _calibration(facts.challenger), _calibration(facts.champion)
    rows_MN = np.concatenate([mine, theirs]).astype(np.float32)

    def rises(weights_NB: Floats) -> Floats:
        return _rises((rows_MN @ weights_NB) / facts.images)

    rises_2B = bootstrap(facts.images, rises, seed)
    ours, others = (_calibration_values(model.mean(1, keepdims=True))[:, 0].tolist() for model in (mine, theirs))
    limits = {"ece": asked.ece_floor, "log_loss": asked.log_loss_floor}
    figures = []
    for row, (what, limit) in enumerate(limits.items()):
        low, high = bounds(rises_2B[row], asked.floor_confidence)
        over = ours[row] - others[row] > limit + EPSILON
        outcome: Outcome = "refused" if over and low > 0 else "passed"
        figures.append(Figure(what, ours[row] - others[row], low, high, ours[row], others[row], facts.images, outcome))
    words = " and ".join(_calibration_words(figure, limits[figure.what]) for figure in figures)
    return RuleResult("calibration", _worst(figures), words, tuple(figures), None, asked.floor_confidence)


def _calibration(model: Answers) -> Floats:
    """Rows whose means over the images give the figures: the gap of right answers and confidence by bin, and the loss."""
    bin_N = np.clip(np.ceil(model.confidence_N * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)
    gaps = np.where(np.arange(ECE_BINS)[:, None] == bin_N, model.right_N - model.confidence_N, 0.0)
    return np.vstack([gaps, model.loss_N])


def _calibration_values(means_MB: Floats) -> Floats:
    """Calibration error and log loss (2 x B) from the means of one model's rows."""
    return np.stack([np.abs(means_MB[:ECE_BINS]).sum(0), means_MB[ECE_BINS]])


def _rises(means_MB: Floats) -> Floats:
    return _calibration_values(means_MB[: ECE_BINS + 1]) - _calibration_values(means_MB[ECE_BINS + 1 :])


def _calibration_words(figure: Figure, limit: float) -> str:
    over = f", a rise of more than {limit:g}" if figure.outcome == "refused" else ""
    return f"{figure.what.replace('_', ' ')} {figure.challenger:.4f} against {figure.other:.4f}{over}"


def probe(facts: Facts, asked: PromotionSpec, seed: int) -> RuleResult:
    """Fine-tuning has not made the backbone worse than a linear layer on top of it as it came (negative transfer)."""
    if asked.probe == "off":
        return _skipped("probe", "promotion.probe is off")
    if facts.probe is None:
        return _skipped("probe", "the challenger has no linear probe to compare with")
    found = compare(facts, facts.probe, asked, asked.floor_confidence, seed)
    figure = found.figure
    words = f"{asked.metric} {figure.challenger:.4f} against {figure.other:.4f} of its own linear probe ({figure.value:+.4f})"
    if figure.value >= -EPSILON:
        return RuleResult("probe", "passed", words, (figure,), 0.0, asked.floor_confidence)
    if found.luck_loses > 1 - asked.floor_confidence:
        return RuleResult("probe", "passed", f"{words}, which noise can explain", (figure,), 0.0, asked.floor_confidence)
    outcome: Outcome = "refused" if asked.probe == "refuse" else "warned"
    return RuleResult("probe", outcome, f"{words}: fine-tuning hurts (negative transfer)", (figure,), 0.0, asked.floor_confidence)


def _skipped(name: str, words: str) -> RuleResult:
    return RuleResult(name, "skipped", words)


def _worst(figures: Sequence[Figure]) -> Outcome:
    outcomes = {figure.outcome for figure in figures}
    return "refused" if "refused" in outcomes else "warned" if "warned" in outcomes else "passed"


def _points(share: float) -> str:
    return f"{100 * share:.3g} point{'' if abs(share - 0.01) < EPSILON else 's'}"


def _images(images: int) -> str:
    return "1 image" if images == 1 else f"{images or 'no'} images"
