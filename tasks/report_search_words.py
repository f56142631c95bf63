"""The search in words: what was found, what was stopped and why, what it cost and what sharing the prefix saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tasks.report_words import Values, apart, counted, duration, number, percent, plain, points, rate, short

ENDINGS = {
    "finished": "ran to the end",
    "stopped": "stopped early",
    "diverged": "diverged",
    "out_of_memory": "ran out of memory",
    "failed": "failed",
}
OTHER_DIMENSIONS = ("weight_decay", "label_smoothing", "layer_decay", "optimizer", "batch_size", "augmentation_strength", "backbone")
NOTEWORTHY = 0.005
"""Half a point: less is within the noise of such a val split."""


def headline(name: str, search: Values) -> str:
    """The researcher's question in one line: which trial was best?"""
    best = search.get("best") or {}
    if number(best.get("accuracy")) is None:
        return f"{name}: {finding(search, {})}"
    trials = counted(search.get("trials") or 0, "trial")
    return f"{name}: {where(best, varied(search))} is the best of {trials}, with {percent(best['accuracy'])} on val."


def where(trial: Values, others: Sequence[str] = ()) -> str:
    """The place of a trial in the search space, by the two dimensions that every search has, and the backbone where it varies."""
    backbone = f"{trial.get('backbone')} with " if "backbone" in others else ""
    depth = "the linear probe (unfreeze depth 0)" if trial.get("unfreeze_depth") == 0 else f"unfreeze depth {trial.get('unfreeze_depth')}"
    return f"{backbone}{depth} {'and' if backbone else 'with'} learning rate {rate(trial.get('lr'))}"


def finding(search: Values, fit: Values) -> str:
    """What the search found, in one sentence."""
    best, trials = search.get("best") or {}, int(search.get("trials") or 0)
    if number(best.get("accuracy")) is None:
        return f"None of {counted(trials, 'trial')} gave a usable model."
    found = f"Of {counted(trials, 'trial')}, {where(best, varied(search))} was best ({percent(best['accuracy'])} on val)"
    trained = f"; trained again on {counted(fit.get('workers') or 1, 'worker')} it reaches {percent(fit.get('accuracy'))}"
    return found + (trained if number(fit.get("accuracy")) is not None else "") + "."


def does_deeper_pay(search: Values) -> str:
    """Where going deeper stops paying, and what an epoch costs there."""
    best = best_by_depth(search)
    if len(best) < 2:
        return "Only one depth gave results, so there is nothing to compare."
    depths = list(best)
    top = max(best[depth]["accuracy"] for depth in depths)
    enough = next(depth for depth in depths if best[depth]["accuracy"] >= top - NOTEWORTHY)
    shallow, deepest = best[depths[0]], depths[-1]
    reached = f"{percent(best[enough]['accuracy'])}, {apart(best[enough]['accuracy'], shallow['accuracy'])} depth {depths[0]}"
    if enough == depths[0]:
        said = f"Deeper does not pay here: depth {enough} already reaches {percent(best[enough]['accuracy'])}"
    elif enough == deepest:
        said = f"It pays to the end: depth {enough} reaches {reached}, and no shallower one comes within half a point"
    else:
        said = f"Depth {enough} is enough: it reaches {reached}"
    if enough != deepest:
        said += f"; depth {deepest} reaches {percent(best[deepest]['accuracy'])}"
    per_epoch = epoch_seconds_by_depth(search)
    if enough != deepest and per_epoch.get(enough) and per_epoch.get(deepest):
        said += f" at {per_epoch[deepest] / per_epoch[enough]:.1f} times the time of an epoch"
    return said + "."


def epoch_seconds_by_depth(search: Values) -> dict[int, float]:
    """Mean seconds of an epoch of the trials of each depth."""
    spent: dict[int, list[float]] = {}
    for trial in search.get("trials_detail") or []:
        seconds, epochs = number(trial.get("seconds")), number(trial.get("epochs_run")) or number(trial.get("epochs"))
        if seconds and epochs:
            sums = spent.setdefault(int(trial["unfreeze_depth"]), [0.0, 0.0])
            sums[0], sums[1] = sums[0] + seconds, sums[1] + epochs
    return {depth: seconds / epochs for depth, (seconds, epochs) in spent.items()}


def how_trials_ended(search: Values) -> str:
    """How many trials ended in which way."""
    statuses = [trial.get("status") if trial.get("status") in ENDINGS else "failed" for trial in search.get("trials_detail") or []]
    return ", ".join(f"{statuses.count(status):,} {said}" for status, said in ENDINGS.items() if status in statuses)


def usable(search: Values) -> list[Values]:
    """The trials that gave a model: a diverged one may have been good before it diverged, but cannot be chosen."""
    trials = search.get("trials_detail") or []
    return [trial for trial in trials if trial.get("status") in ("finished", "stopped") and number(trial.get("accuracy")) is not None]


def best_trial(search: Values) -> Values | None:
    """The trial that the search chose, else the most accurate one."""
    trials, best = usable(search), search.get("best") or {}
    chosen = [trial for trial in trials if best.get("trial_id") is not None and trial.get("trial_id") == best["trial_id"]]
    return max(chosen or trials, key=lambda trial: float(trial["accuracy"]), default=None)


def best_by_depth(search: Values) -> dict[int, Values]:
    """The most accurate trial of each depth, shallow first."""
    ranked = sorted(usable(search), key=lambda trial: (int(trial["unfreeze_depth"]), float(trial["accuracy"])))
    return {int(trial["unfreeze_depth"]): trial for trial in ranked}


def varied(search: Values) -> list[str]:
    """The dimensions besides depth and learning rate in which the trials differ."""
    trials = search.get("trials_detail") or []
    return [name for name in OTHER_DIMENSIONS if len({trial[name] for trial in trials if trial.get(name) is not None}) > 1]


def value_of(trial: Values, name: str) -> str:
    """A dimension's value as a person writes it."""
    value = trial.get(name)
    return rate(value) if isinstance(value, float) else "–" if value is None else str(value)


def how_it_was_stopped(search: Values, max_epochs: int | None) -> str:
    """What stopping early spared, in epochs; empty where every trial was to run to its end."""
    trials = search.get("trials_detail") or []
    if not max_epochs or not any(trial.get("status") == "stopped" for trial in trials):
        return ""
    wanted, trained = len(trials) * max_epochs, sum(int(number(trial.get("epochs")) or 0) for trial in trials)
    late = sum(int(number(trial.get("epochs_run")) or 0) for trial in trials) - trained
    said = f"{trained:,} of {wanted:,} epochs were trained ({percent(trained / wanted, 0)})"
    if late > 0:
        said += f", and {late:,} more that a later judgement discarded"
    return said + "."


def judgements(search: Values) -> list[dict[str, Any]]:
    """A row a rung and depth: how many trials were judged there and stopped, the cutoffs, and the best that came to it."""
    depth_of = {trial.get("trial_id"): int(trial["unfreeze_depth"]) for trial in search.get("trials_detail") or []}
    places: dict[tuple[int, int], list[Values]] = {}
    for judged in search.get("rungs") or []:
        if judged["trial_id"] in depth_of:
            places.setdefault((int(judged["rung"]), depth_of[judged["trial_id"]]), []).append(judged)
    return [{
        "rung": rung, "unfreeze_depth": depth, "judged": len(found), "stopped": sum(bool(one["stopped"]) for one in found),
        "cutoff": span([one.get("cutoff") for one in found]), "best": max((number(one["accuracy"]) or 0.0 for one in found), default=None),
    } for (rung, depth), found in sorted(places.items())]  # fmt: skip


def span(shares: Sequence[Any]) -> str:
    """The least and the largest of some shares: "61.2–70.0%"; a dash where there is none."""
    values = [value for share in shares if (value := number(share)) is not None]
    if not values:
        return "–"
    low, high = percent(min(values)), percent(max(values))
    return high if low == high else f"{low.removesuffix('%')}–{high}"


def failures(search: Values, most: int = 5) -> list[tuple[str, str, int]]:
    """(how, reason, trials) of the trials that gave nothing, the most frequent reasons first."""
    failed = [trial for trial in search.get("trials_detail") or [] if trial.get("status") not in ("finished", "stopped")]
    reasons = Counter((str(trial.get("status")), short(trial.get("reason") or "no reason given", 160)) for trial in failed)
    return [(ENDINGS.get(status, "failed"), reason, count) for (status, reason), count in reasons.most_common(most)]


def estimate_said(search: Values) -> str:
    """The planner's estimate against what it came to."""
    cost, plan = search.get("cost") or {}, search.get("plan") or {}
    estimated, measured = number(cost.get("estimated_s")), number(cost.get("measured_s"))
    if measured is None:
        return ""
    if not estimated:
        return f"Shared features and trials took {duration(measured)}; there was no estimate."
    ratio = measured / estimated
    off = f"{percent(abs(ratio - 1), 0)} {'more' if ratio > 1 else 'less'} than" if ratio < 2 else f"{ratio:.1f} times"
    against = "as estimated" if abs(ratio - 1) < 0.05 else f"{off} the estimate of {duration(estimated)}"
    said = f"Shared features and trials took {duration(measured)}, {against}"
    epochs, workers = number(plan.get("expected_epochs")), number(plan.get("workers"))
    if epochs and workers:
        said += f". It reckoned with {epochs:.3g} epochs a trial on {counted(workers, 'worker')}"
    return said + "."


def sharing_said(search: Values, features: Values, dataset: Values) -> str:
    """How many images the cache spared, and how many FLOPs the shared prefix."""
    cost, said = search.get("cost") or {}, []
    images = int((number(dataset.get("train")) or 0) + (number(dataset.get("val")) or 0))
    computed = number(features.get("computed_images"))
    if computed is not None and images:
        kept = max(0, images - int(computed))
        everything = f"The frozen prefix ran once over all {counted(images, 'image')}, for every cut; the next search computes none."
        new = f"The frozen prefix ran over {counted(computed, 'image')}; the features of {kept:,} were there from earlier searches."
        said.append(new if kept else everything)
    shared, without = number(cost.get("flops")), number(cost.get("flops_without_sharing"))
    if shared and without:
        said.append(f"With the whole backbone in every trial, the same epochs would have cost {without / shared:.1f} times the FLOPs.")
    return " ".join(said)


def features_said(search: Values) -> str:
    """What the features are worth untouched: k-NN beside the linear probe, and what unfreezing added."""
    probe, best = search.get("probe") or {}, best_trial(search)
    knn, linear = number(probe.get("knn_accuracy")), number(probe.get("accuracy"))
    if linear is None:
        return ""
    said = f"The best linear probe reaches {percent(linear)} on the backbone's features as they are"
    if knn is not None:
        said += f"; their nearest neighbours alone, without any training (k-NN), give {percent(knn)}"
        if knn > linear + 0.02:
            said += ". A probe below k-NN has not learned what the features hold: try other learning rates or more epochs"
    gained = points(best["accuracy"], linear) if best else "–"
    return said + (f". The best trial is {apart(best['accuracy'], linear)} the probe." if best and gained != "–" else ".")


def flops(value: Any) -> str:
    return f"{plain(value)}FLOP" if (number(value) or 0) >= 1e6 else f"{plain(value)} FLOP"
