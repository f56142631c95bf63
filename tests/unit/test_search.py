"""The plain decisions of a search: which trials, how each ended, which is best."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pyarrow.parquet as pq
import pytest

from infra.errors import UserError
from ray_jobs import search
from ray_jobs.search import Epoch, TrialRecord
from ray_jobs.search_space import TrialConfig
from ray_jobs.spec import Spec
from ray_jobs.spec_file import parse_spec


def record(number: int, depth: int, lr: float, *accuracies: float, loss: float = 1.0) -> TrialRecord:
    curve = [Epoch(i, accuracy, loss, loss, 0.1) for i, accuracy in enumerate(accuracies, 1)]
    return TrialRecord(f"{number:05d}", TrialConfig(depth, lr), curve=curve)


def test_the_best_trial_is_chosen_by_accuracy_then_loss_then_depth() -> None:
    worse, deep = record(0, 0, 1e-3, 0.7), record(1, 4, 1e-3, 0.6, 0.8)
    shallow, lossy = record(2, 1, 1e-3, 0.8), record(3, 0, 1e-3, 0.8, loss=1.5)
    assert search.best_trial([worse, deep, shallow, lossy]) is shallow
    assert search.ranked([worse, deep, shallow, lossy]) == [shallow, deep, lossy, worse]


def test_a_diverged_trial_never_wins_and_a_search_of_nothing_else_says_why() -> None:
    diverged, fine = record(0, 2, 1.0, 0.99), record(1, 0, 1e-3, 0.5)
    diverged.status, diverged.reason = "diverged", "the loss became nan in epoch 2"
    assert search.best_trial([diverged, fine]) is fine
    assert search.ranked([diverged, fine])[-1] is diverged
    with pytest.raises(UserError, match="the loss became nan in epoch 2"):
        search.best_trial([diverged])


def test_a_trial_cut_short_is_stopped_and_one_that_ran_through_is_finished() -> None:
    assert search.ended(record(0, 0, 1e-3, 0.5, 0.6), max_epochs=3) == "stopped"
    assert search.ended(record(0, 0, 1e-3, 0.5, 0.6, 0.7), max_epochs=3) == "finished"


@pytest.mark.parametrize(("error", "status"), [
    ("ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory", "out_of_memory"),
    ("[enforce fail at alloc_cpu.cpp:128] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes", "out_of_memory"),
    ("ValueError: shapes do not match", "failed"),
])  # fmt: skip
def test_the_status_of_a_dead_trial_tells_memory_from_other_causes(error: str, status: str) -> None:
    assert search.status_of_error(error) == status


def test_the_tables_hold_a_row_an_epoch_and_a_row_a_trial_best_first() -> None:
    empty = record(2, 1, 1.0)
    empty.status = "diverged"
    details = [search.trial_detail(r, 2) for r in search.ranked([record(0, 0, 1e-3, 0.5, 0.4), empty, record(1, 2, 1e-3, 0.9)])]
    epochs = pq.read_table(io.BytesIO(search.epochs_table(details))).to_pylist()
    board = pq.read_table(io.BytesIO(search.leaderboard_table(details))).to_pylist()
    found = [(row["trial_id"], row["epoch"], row["val_accuracy"]) for row in epochs]
    assert found == [("00001", 1, 0.9), ("00000", 1, 0.5), ("00000", 2, 0.4)]
    assert [(row["rank"], row["unfreeze_depth"], row["accuracy"], row["status"]) for row in board] == [
        (1, 2, 0.9, "stopped"), (2, 0, 0.5, "finished"), (3, 1, None, "diverged"),
    ]  # fmt: skip


def spec_with(**fields: Any) -> Spec:
    return parse_spec({"name": "pets", "data": {"source": "x"}, "backbone": {"name": "resnet18"}, "search": fields})


def test_the_id_of_a_search_knows_its_backbones_by_content_and_their_order() -> None:
    def id_of(spec: Spec, *digests: str) -> str:
        return search.search_id(spec, backbone_digests=digests, dataset_version="v")

    several = spec_with(backbone=["resnet34"])
    moved = spec_with(backbone=[{"name": "resnet34", "weights": "/elsewhere/w.pth"}])
    assert len({id_of(spec_with(), "a"), id_of(several, "a", "b"), id_of(several, "b", "a"), id_of(several, "a", "c")}) == 4
    assert id_of(several, "a", "b") == id_of(moved, "a", "b")


def test_the_id_of_a_warm_started_search_is_what_it_was_before_there_were_more_dimensions() -> None:
    def id_of(point: TrialConfig) -> str:
        return search.search_id(spec_with(), backbone_digests=["a"], dataset_version="v", warm=[point])

    plain = TrialConfig(1, 1e-3)
    assert id_of(plain) == id_of(replace(plain, augmentation_strength=1.0, backbone=""))
    assert len({id_of(plain), id_of(replace(plain, augmentation_strength=0.5)), id_of(replace(plain, backbone="vit"))}) == 3


def test_a_reader_sees_every_backbone_by_its_name() -> None:
    own, other = record(0, 0, 1e-3, 0.5), record(1, 0, 1e-3, 0.6)
    other.config = replace(other.config, backbone="vit")
    assert [search.trial_detail(r, 1, "resnet18")["backbone"] for r in (own, other)] == ["resnet18", "vit"]
    assert search.best_of(own, "resnet18")["backbone"] == "resnet18"


def test_flops_count_three_forwards_where_trained_and_one_where_frozen() -> None:
    details = [{"unfreeze_depth": 1, "epochs": 2}]
    shared, unshared = search.flops_counted(details, suffix={0: 1, 1: 10}, whole=100, train=5, val=1)
    assert shared == 6 * 99 + 2 * (3 * 5 + 1) * 10
    assert unshared == 2 * ((3 * 5 + 1) * 10 + 6 * 90)
