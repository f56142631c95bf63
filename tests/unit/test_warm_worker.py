"""A process keeps one warm worker for each backbone of a search, and no more."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

from ray_jobs import warm_worker as module
from ray_jobs.warm_worker import warm_worker
from ray_jobs.work import Work


class Made:
    """Stands for a model and its features."""

    def __init__(self, work: Work) -> None:
        self.work = work


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Made]]:
    """Every worker that was made, for as long as anyone keeps it."""
    found: list[weakref.ref[Made]] = []

    def make(work: Work) -> Made:
        worker = Made(work)
        found.append(weakref.ref(worker))
        return worker

    monkeypatch.setattr(module, "_made", make)
    monkeypatch.setattr(module, "_kept", {})
    return found


def work(name: str, backbones: int, seed: int = 0) -> Work:
    values: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "features": (), "sources": (), "class_weights": "auto"}
    sizes = {"image_size": 32, "num_classes": 2, "num_groups": 3, "max_epochs": 1}
    return Work(backbone=name, backbone_uri=f"s3://b/{name}", backbones=backbones, seed=seed, **values, **sizes)


def alive(made: list[weakref.ref[Made]]) -> int:
    gc.collect()
    return sum(one() is not None for one in made)


def test_trials_of_two_backbones_take_turns_without_making_anything_anew(made: list[weakref.ref[Made]]) -> None:
    for _ in range(3):
        for name in ("a", "b"):
            assert warm_worker(work(name, 2)).work.backbone == name
    assert len(made) == 2


def test_the_next_search_finds_the_memory_free(made: list[weakref.ref[Made]]) -> None:
    for seed in range(4):
        for name in ("a", "b"):
            warm_worker(work(name, 2, seed))
            assert alive(made) <= 2
    warm_worker(work("a", 1, seed=9))
    assert alive(made) == 1
