"""Searches as the real rules judge them, over made-up learning curves: small, large and hostile ones for the report's tests."""

from __future__ import annotations

import math
import random
from dataclasses import asdict
from typing import Any

from ray_jobs.fidelity import Halving
from ray_jobs.search import Epoch, TrialRecord, best_of, best_trial, ranked, trial_detail
from ray_jobs.search_space import TrialConfig
from tasks.report_search import SearchContent

HOSTILE = "</script><img src=x onerror=alert(1)> & <b>bold</b>"
DECISIONS = (
    "depth 0 is the first; depth 1 is tried",
    "depth 1 gained +3.1 points over shallower depths (val 79.8%): depth 2 is tried",
    "depth 2 gained +0.4 points over shallower depths (val 80.2%), no more than half a standard error (0.9 points): depth 4 and deeper "
    "were not tried",
)
DEPTHS, MAX_EPOCHS = (0, 1, 2, 4), 8


def searched(count: int, *, wide: bool = False, by_depth: bool = False, hostile: bool = False) -> dict[str, Any]:
    """What a search of so many trials gives; `wide` searches every dimension, `by_depth` compares within each depth as the ladder does."""
    rng = random.Random(count)
    records = [TrialRecord(f"{index:05d}", _config(index, count, rng, wide=wide), 1_795_277_298_292) for index in range(count)]
    halving = Halving(MAX_EPOCHS, cohort_of=lambda record: record.config.unfreeze_depth if by_depth else 0)
    for index, record in enumerate(records):
        _train(record, rng)
        if count > 30 and index % 97 == 50:
            record.status, record.reason, record.curve = "out_of_memory", "torch.OutOfMemoryError: CUDA out of memory", record.curve[:1]
        halving.judge(records[: index + 1])
    details = [trial_detail(record, MAX_EPOCHS) for record in ranked(records)]
    spent = sum(detail["seconds"] for detail in details)
    found = {
        "search_id": "d5d8dfbf753fc4fd170a0d48e36fbaa8", "trials": count, "best": best_of(best_trial(records)), "seconds": spent / 2,
        "trials_detail": details, "rungs": [vars(judged) for judged in halving.judged],
        "decisions": list(DECISIONS) if by_depth else [],
        "probe": {"lr": 1e-2, "accuracy": 0.757, "val_loss": 0.9, "knn_accuracy": 0.702},
        "cost": {"estimated_s": 0.45 * spent + 6.0, "measured_s": spent / 2 + 5.1, "prefix_s": 5.1, "trials_s": spent, "flops": 1.08e13,
                 "flops_without_sharing": 3.17e13},
        "plan": {"prefix_s": 6.0, "trials_s": 0.45 * spent, "workers": 2, "expected_epochs": 4.2, "estimated_s": 0.45 * spent + 6.0},
    }  # fmt: skip
    return _made_hostile(found) if hostile else found


def search_content(search: dict[str, Any], **changes: Any) -> SearchContent:
    """The page of such a search."""
    dataset = {"version": "9f86d0", "uri": "s3://unfreeze/datasets/pets/9f86d0", "train": 1351, "val": 284, "classes": ["cat", "dog"]}
    whole: dict[str, Any] = {
        "name": "pets", "spec": {"name": "pets", "search": {"max_epochs": MAX_EPOCHS}}, "versions": {"torch": "2.15.0"}, "git_commit": None,
        "dataset": dataset, "search": search, "features": {"computed_images": 87},
    }  # fmt: skip
    return SearchContent(**(whole | changes))


def _config(index: int, count: int, rng: random.Random, *, wide: bool) -> TrialConfig:
    depth = DEPTHS[index * len(DEPTHS) // count]
    rate = 10 ** (-4 + 2 * rng.random())
    if not wide:
        return TrialConfig(depth, rate)
    return TrialConfig(
        depth, rate, weight_decay=10 ** (-5 + 3 * rng.random()), label_smoothing=rng.choice([0.0, 0.1]),
        layer_decay=0.6 + 0.4 * rng.random(), optimizer=rng.choice(["adamw", "sgd"]), batch_size=rng.choice([16, 32, 64]),
        augmentation_strength=rng.random(), backbone=rng.choice(["vit_small_patch16_224.augreg_in21k", "vit_small_patch16_224.dino"]),
    )  # fmt: skip


def _train(record: TrialRecord, rng: random.Random) -> None:
    depth, off = record.config.unfreeze_depth, abs(math.log10(record.config.lr) + 3 - 0.4 * (record.config.unfreeze_depth == 0))
    top = 0.76 + 0.045 * min(depth, 2) / 2 - 0.12 * off**2 + rng.gauss(0, 0.012)
    each = (0.012, 0.7, 3.9, 9.5)[DEPTHS.index(depth)] * (0.9 + 0.2 * rng.random())
    for epoch in range(1, MAX_EPOCHS + 1):
        accuracy = min(0.99, top - 0.3 * math.exp(-epoch / 2) + rng.gauss(0, 0.008))
        record.curve.append(Epoch(epoch, accuracy, 1.5 - accuracy, 1.4 - accuracy, each))
    record.seconds = each * MAX_EPOCHS


def _made_hostile(found: dict[str, Any]) -> dict[str, Any]:
    details = [
        {**detail, "trial_id": f"{HOSTILE}{detail['trial_id']}", "reason": f"{HOSTILE}\n\x00\udce9" * 4}
        for detail in found["trials_detail"]
    ]
    odd: list[dict[str, Any]] = [
        {
            **asdict(TrialConfig(4, 1e-3)),
            "trial_id": "__proto__",
            "accuracy": None,
            "epochs": 0,
            "status": status,
            "seconds": 0.0,
            "curve": [],
        }
        for status in ("failed", HOSTILE)
    ]
    odd[0]["reason"], odd[1]["optimizer"] = HOSTILE, HOSTILE
    rungs = [{**judged, "trial_id": f"{HOSTILE}{judged['trial_id']}"} for judged in found["rungs"]]
    return {**found, "trials_detail": [*details, *odd], "rungs": rungs, "decisions": [HOSTILE], "search_id": HOSTILE}
