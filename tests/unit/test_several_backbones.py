"""What the steps make of a search of several backbones: shares of the trials, sums of the plans, past points, the winner."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from infra import tracking
from ray_jobs.plan_on_ray import trials_by_depth
from ray_jobs.spec import Spec
from ray_jobs.spec_file import parse_spec
from tasks import outcome, publishing
from tasks.features import together
from tasks.planning import whole_plan
from tasks.search import past_points, winner

OWN, OTHER = {"name": "resnet18", "digest": "a", "groups": 6}, {"name": "vit", "digest": "b", "groups": 3}


def spec_of(**search: Any) -> Spec:
    return parse_spec(
        {"name": "pets", "data": {"source": "x"}, "backbone": {"name": "resnet18"}, "search": {"backbone": ["vit"], **search}}
    )


def test_each_backbone_is_planned_with_its_own_trials_and_probes() -> None:
    grid = spec_of(unfreeze_depth=[0, 1], lr=[1e-3, 1e-2])
    alone = grid.with_backbone(grid.backbone)
    assert trials_by_depth(grid, OWN) == trials_by_depth(grid, OTHER) == trials_by_depth(alone, OWN) == {0: 4, 1: 2}
    drawn = spec_of(unfreeze_depth=[0, 1], num_trials=10)
    both = [sum(trials_by_depth(drawn, backbone).values()) for backbone in (OWN, OTHER)]
    assert sum(both) == 10 + 2 * 4
    assert trials_by_depth(spec_of(unfreeze_depth=[0, 1], num_trials=12, searcher="optuna"), OTHER) == {0: 3 + 4, 1: 3}


def plan(seconds: float, cut: int) -> dict[str, Any]:
    figures = {"estimated_s": 3 * seconds, "prefix_s": seconds, "trials_s": 2 * seconds, "memory_bytes": 10}
    return {"materialise": [cut], "source": {"0": cut}, **figures, "workers": 2, "expected_epochs": 4.0, "calibration": {}}


def test_the_estimate_of_a_search_is_the_sum_over_its_backbones() -> None:
    whole = whole_plan([OWN, OTHER], [plan(1.0, 0), plan(2.0, 1)])
    assert (whole["estimated_s"], whole["prefix_s"], whole["trials_s"], whole["memory_bytes"]) == (9.0, 3.0, 6.0, 20)
    assert whole["source"] == {"resnet18": {"0": 0}, "vit": {"0": 1}}
    assert whole_plan([OWN], [plan(1.0, 0)]) == {key: value for key, value in plan(1.0, 0).items() if key != "calibration"}


def test_the_features_of_all_backbones_take_the_time_and_space_of_each() -> None:
    parts = [
        {"computed_images": 5, "seconds": 1.0, "bytes": 7, "features": {}},
        {"computed_images": 9, "seconds": 2.0, "bytes": 1, "features": {}},
    ]
    assert together(parts) == {"computed_images": 9, "seconds": 3.0, "bytes": 8}


def test_the_winner_is_the_best_trials_backbone_and_the_only_one_of_an_older_search() -> None:
    assert winner([OWN, OTHER], {"best": {"backbone": "vit"}}) is OTHER
    assert winner([OWN], {"best": {"unfreeze_depth": 1}}) is OWN


def test_past_points_are_looked_up_for_every_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The own backbone's are from before there could be others."""
    old = {"unfreeze_depth": "1", "lr": "0.001", "weight_decay": "0.0001", "label_smoothing": "0.0", "layer_decay": "1.0"}
    params = {**old, "optimizer": "adamw", "batch_size": "32"}
    past = {"resnet18": (params, 0.7), "vit": ({**params, "augmentation_strength": "1.0", "backbone": "vit"}, 0.8), "other": (params, 0.9)}

    def trials_of(experiment: str, backbone: str) -> Iterator[tuple[dict[str, str], dict[str, float]]]:
        found, accuracy = past[backbone]
        yield {**found, "backbone": backbone}, {"best_val_accuracy": accuracy}

    monkeypatch.setattr(tracking, "past_trials", trials_of)
    points = past_points.fn(spec_of(warm_start=True), {"version": "v"}, [OWN, OTHER])["points"]
    assert [(point["backbone"], point["unfreeze_depth"], point["augmentation_strength"]) for point in points] == [
        ("vit", 1, 1.0),
        ("", 1, 1.0),
    ]


def test_a_finished_retraining_is_known_by_all_of_its_backbones() -> None:
    def uri(*digests: str) -> str:
        return publishing._outcome_uri(spec_of(), {"version": "v"}, [{"digest": digest} for digest in digests])

    assert len({uri("a"), uri("a", "b"), uri("a", "c"), uri("b", "a")}) == 4


def test_the_answer_names_the_best_backbone_where_there_were_several() -> None:
    search = {"search_id": "s", "trials": 2, "seconds": 1.0, "leaderboard_uri": "u", "backbones": ["resnet18", "vit"]}
    best = {"unfreeze_depth": 1, "lr": 1e-3, "accuracy": 0.5, "backbone": "vit"}
    assert outcome._search({**search, "best": best})["best"] == best
    assert "backbone" not in outcome._search({**search, "backbones": ["vit"], "best": best})["best"]
