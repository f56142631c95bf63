"""The training of one rank: whose rows, which tensors move, when it ends, and that a resumed fit is the same fit."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load as from_safetensors

from infra.committed_folder import fetch, verify
from infra.errors import ServiceError, UserError
from ray_jobs import backbone, checkpoint, images
from ray_jobs import fit as fit_module
from ray_jobs.dataset import open_dataset
from ray_jobs.evaluate import aligned, load_model, mistakes, probabilities
from ray_jobs.fit import Asks, Augmented, Rank, Training, new_model, train
from ray_jobs.fit_attempts import CALLED_AWAY, DONE, ROOM
from ray_jobs.fit_choice import choose
from ray_jobs.fit_plan import EpochRow, Plan, batches_of_share, is_better, lr_at, part_of, plan_fit, rows_of_shares, steps_per_epoch
from ray_jobs.spec import Spec
from tests.fakes import MemoryObjectStore
from tests.fit_worlds import FitWorld, make_world

ALONE = Rank(0, 1, torch.device("cpu"))


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> FitWorld:
    return make_world(tmp_path_factory.mktemp("fit"), MemoryObjectStore())


def result_of(world: FitWorld, plan: Plan, cache: Path) -> dict[str, Any]:
    train(plan, ALONE, store=world.store, cache=cache)
    found: dict[str, Any] = json.loads(world.store.read(f"{plan.fit_uri}/result.json"))
    return found


def weights_at(world: FitWorld, uri: str) -> dict[str, torch.Tensor]:
    return from_safetensors(world.store.read(f"{uri}/model.safetensors"))


def batches_of_ranks(total: int, workers: int, world: int, batch: int, epoch: int) -> list[list[list[int]]]:
    """The rows that each rank trains on in each step, by rank."""
    found = []
    for rank in range(world):
        shares = part_of(workers, rank, world)
        rows = rows_of_shares(total, shares, workers)
        of_share = [batches_of_share(total, share, workers, batch_size=batch, seed=1, epoch=epoch) for share in shares]
        starts = [part_of(total, share, workers).start for share in shares]
        steps = [[start + row for start, part in zip(starts, step, strict=True) for row in part] for step in zip(*of_share, strict=True)]
        assert all(row in rows for step in steps for row in step)
        found.append(steps)
    return found


@given(st.integers(1, 400), st.integers(1, 9), st.integers(2, 40), st.integers(0, 3), st.data())
def test_shards_over_ranks_partition_the_data_for_every_world_size(
    total: int, workers: int, batch: int, epoch: int, data: st.DataObject
) -> None:
    world = data.draw(st.integers(1, workers))
    seen = [row for steps in batches_of_ranks(total, workers, world, batch, epoch) for step in steps for row in step]
    assert sorted(seen) == list(range(total))


@given(st.integers(1, 400), st.integers(1, 9), st.integers(2, 40), st.integers(0, 3), st.data())
def test_a_step_trains_on_the_same_images_for_every_world_size(
    total: int, workers: int, batch: int, epoch: int, data: st.DataObject
) -> None:
    def steps(world: int) -> list[list[int]]:
        ranks = batches_of_ranks(total, workers, world, batch, epoch)
        return [sorted(itertools.chain.from_iterable(parts)) for parts in zip(*ranks, strict=True)]

    assert steps(data.draw(st.integers(1, workers))) == steps(workers)
    assert max(map(len, steps(1))) <= workers * batch


@given(st.integers(1, 400), st.integers(1, 9), st.integers(2, 40), st.integers(0, 3))
def test_a_shares_batches_are_of_one_size_or_one_less(total: int, workers: int, batch: int, epoch: int) -> None:
    for share in range(workers):
        sizes = [len(part) for part in batches_of_share(total, share, workers, batch_size=batch, seed=1, epoch=epoch)]
        assert len(sizes) == steps_per_epoch(total, workers, batch)
        assert max(sizes) <= batch
        assert max(sizes) - min(sizes) <= 1


def test_every_epoch_has_another_order() -> None:
    orders = {tuple(np.concatenate(batches_of_share(50, 0, 2, batch_size=8, seed=0, epoch=epoch)).tolist()) for epoch in range(5)}
    assert len(orders) == 5


@given(st.integers(1, 500), st.floats(1e-6, 1.0))
def test_the_learning_rate_rises_to_its_peak_and_falls_to_nearly_nothing(total: int, peak: float) -> None:
    rates = [lr_at(step, total + 1, peak) for step in range(total + 1)]
    top = rates.index(max(rates))
    assert min(rates) > 0
    assert max(rates) == pytest.approx(peak)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def row(accuracy: float, loss: float | None) -> EpochRow:
    return EpochRow(1, 1.0, accuracy, loss, 0.0)


def test_the_best_epoch_is_the_most_accurate_and_among_equals_the_one_of_lowest_loss() -> None:
    assert is_better(row(0.5, 1.0), None)
    assert is_better(row(0.6, 2.0), row(0.5, 1.0))
    assert not is_better(row(0.4, 0.1), row(0.5, 1.0))
    assert is_better(row(0.5, 0.9), row(0.5, 1.0))
    assert not is_better(row(0.5, 1.0), row(0.5, 1.0))
    assert not is_better(row(1.0, None), None)


@pytest.mark.parametrize(
    ("best", "chosen"),
    [
        (row(0.8, 1.0), "fit"),
        (row(0.6, 0.1), "probe"),
        (row(0.7, 1.1), "probe"),
        (row(0.7, 0.9), "fit"),
        (row(0.7, 1.0), "fit"),
        (None, "probe"),
    ],
)
def test_the_probe_is_kept_where_the_fit_is_worse(world: FitWorld, best: EpochRow | None, chosen: str) -> None:
    found, reason = choose(best, world.plan(probe_accuracy=0.7, probe_val_loss=1.0))
    assert found == chosen
    assert reason.endswith(".")
    assert reason.count(". ") == 0


def test_a_head_that_is_no_better_than_the_probes_is_not_called_negative_transfer(world: FitWorld) -> None:
    found, reason = choose(row(0.6, 1.1), world.plan(probe_accuracy=0.7, probe_val_loss=1.0, unfreeze_depth=0))
    assert found == "probe"
    assert "negative transfer" not in reason


@pytest.mark.parametrize(("of_trial", "workers", "each"), [(32, 1, 32), (32, 2, 16), (64, 2, 32), (32, 3, 11), (32, 16, 8)])
def test_the_workers_share_the_batch_of_the_trial(world: FitWorld, of_trial: int, workers: int, each: int) -> None:
    fit = world.spec.fit.model_copy(update={"num_workers": workers, "batch_size_per_worker": None})
    search = {**world.search, "best": {**world.search["best"], "batch_size": of_trial}}
    dataset = {**world.dataset, "train": 1000}
    assert plan_fit(world.spec.model_copy(update={"fit": fit}), dataset, world.backbone, search).batch_size == each
    fit = fit.model_copy(update={"batch_size_per_worker": 5})
    assert plan_fit(world.spec.model_copy(update={"fit": fit}), dataset, world.backbone, search).batch_size == 5


def test_the_fit_id_changes_with_what_changes_the_result_and_with_nothing_else(world: FitWorld) -> None:
    def id_of(spec: Spec = world.spec, **parts: dict[str, Any]) -> str:
        given = {"dataset": world.dataset, "backbone": world.backbone, "search": world.search, **parts}
        return plan_fit(spec, given["dataset"], given["backbone"], given["search"]).fit_id

    def changed(part: str, **fields: Any) -> Spec:
        return world.spec.model_copy(update={part: getattr(world.spec, part).model_copy(update=fields)})

    def with_best(**fields: float) -> dict[str, Any]:
        return {**world.search, "best": {**world.search["best"], **fields}}

    different = [
        id_of(), id_of(changed("fit", augmentation="symbol")), id_of(changed("fit", patience=1)), id_of(changed("fit", num_workers=2)),
        id_of(changed("search", seed=1)), id_of(search=with_best(weight_decay=0.5)), id_of(dataset={**world.dataset, "version": "x"}),
        id_of(backbone={**world.backbone, "digest": "x"}), id_of(search=with_best(lr=0.5)),
    ]  # fmt: skip
    assert len(set(different)) == len(different)
    moved = world.spec.model_copy(update={"storage": "s3://elsewhere"})
    assert id_of(moved) == id_of(changed("promotion", min_gain=0.5)) == id_of()


def test_too_few_images_for_the_workers_are_refused_before_anything_starts(world: FitWorld) -> None:
    spec = world.spec.model_copy(update={"fit": world.spec.fit.model_copy(update={"num_workers": 500})})
    with pytest.raises(UserError, match=r"too few for fit\.num_workers: 500"):
        plan_fit(spec, world.dataset, world.backbone, world.search)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_exactly_what_is_not_frozen_moves(world: FitWorld, tmp_path: Path, depth: int) -> None:
    training = Training(world.plan(unfreeze_depth=depth), ALONE, world.store, tmp_path)
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    training.epoch()
    moved = {name for name, tensor in training.model.state_dict().items() if not torch.equal(tensor, before[name])}
    parameters = {name for name, _ in training.model.named_parameters()}
    assert moved & parameters == backbone.trainable_names(training.model, depth)
    statistics = {name.rsplit(".", 1)[0] for name in moved - parameters}
    assert statistics <= {name.rsplit(".", 1)[0] for name in backbone.trainable_names(training.model, depth)}


def test_training_starts_from_the_probes_head(world: FitWorld, tmp_path: Path) -> None:
    head = from_safetensors(world.store.read(world.search["probe"]["uri"]))
    state = new_model(world.plan(), world.store, tmp_path).state_dict()
    assert head
    assert all(torch.equal(state[name], tensor) for name, tensor in head.items())


def test_the_fit_learns_and_its_model_folder_is_its_best_epoch(world: FitWorld, tmp_path: Path) -> None:
    plan = world.plan(fit_uri="s3://unfreeze/fits/learns", max_epochs=4, unfreeze_depth=3)
    result = result_of(world, plan, tmp_path)
    assert result["accuracy"] > 0.7
    assert result["chosen"] == "fit"
    assert result["epochs"] == len(result["curve"])
    best = result["curve"][result["best_epoch"] - 1]
    assert (best["val_accuracy"], best["val_loss"]) == (result["accuracy"], result["val_loss"])
    for kind in ("fit", "probe"):
        assert verify(world.store, result[f"{kind}_model_uri"]) == []
    model, view, labels = load_model(fetch(world.store, result["model_uri"], tmp_path / "models"))
    dataset = open_dataset(plan.dataset_uri, world.store, tmp_path / "datasets")
    labels_N = images.labels_of(dataset, "val")
    pixels = images.squares(images.Range(dataset, "val", 0, len(labels_N)), image_size=view.image_size, max_pixels=view.max_pixels)
    again_NK = probabilities(model, pixels.numpy(), view)
    assert labels == sorted(world.dataset["classes"])
    assert (again_NK.argmax(1) == labels_N).mean() == pytest.approx(result["accuracy"])
    assert -np.log(again_NK[np.arange(len(labels_N)), labels_N]).mean() == pytest.approx(result["val_loss"], rel=1e-4)


@pytest.mark.parametrize("killed_after", [1, 2])
def test_a_fit_killed_after_any_epoch_and_run_again_equals_an_undisturbed_one(world: FitWorld, tmp_path: Path, killed_after: int) -> None:
    undisturbed = result_of(world, world.plan(fit_uri="s3://unfreeze/fits/undisturbed", unfreeze_depth=2), tmp_path)
    plan = world.plan(fit_uri=f"s3://unfreeze/fits/killed-{killed_after}", unfreeze_depth=2)

    def kill(done: EpochRow) -> None:
        if done.epoch == killed_after:
            raise Killed

    with pytest.raises(Killed):
        train(plan, ALONE, store=world.store, cache=tmp_path, on_epoch=kill)
    trained: list[int] = []
    train(plan, ALONE, store=world.store, cache=tmp_path, on_epoch=lambda done: trained.append(done.epoch))
    assert trained == list(range(killed_after + 1, 4))
    resumed = json.loads(world.store.read(f"{plan.fit_uri}/result.json"))
    for left, right in zip(undisturbed["curve"], resumed["curve"], strict=True):
        assert {**left, "seconds": 0} == {**right, "seconds": 0}
    one, other = weights_at(world, undisturbed["fit_model_uri"]), weights_at(world, resumed["fit_model_uri"])
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def after_looks(number: int) -> Callable[[], bool]:
    """Yes at this look, and after it."""
    looks = itertools.count()
    return lambda: next(looks) >= number


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("looks", [0, 1, 3, 6])
def test_a_fit_called_away_at_any_step_goes_on_at_that_step_as_if_never_stopped(
    world: FitWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: int, workers: int
) -> None:
    monkeypatch.setattr(fit_module, "STEPS_BETWEEN_LOOKS", 1)
    changes = {"unfreeze_depth": 3, "num_workers": workers, "batch_size": 8 if workers == 1 else 4, "max_epochs": 2}
    undisturbed = result_of(world, world.plan(fit_uri=f"s3://unfreeze/fits/calm-{workers}", **changes), tmp_path)
    plan = world.plan(fit_uri=f"s3://unfreeze/fits/called-{workers}-{looks}", **changes)
    steps = steps_per_epoch(len(Training(plan, ALONE, world.store, tmp_path).train_labels_N), workers, plan.batch_size)
    end = train(plan, ALONE, store=world.store, cache=tmp_path, asks=Asks(is_called_away=after_looks(looks)))
    assert end == CALLED_AWAY
    assert max(checkpoint.positions(world.store, f"{plan.fit_uri}/checkpoints"), default=(0, 0)) == divmod(looks, steps)
    resumed = result_of(world, plan, tmp_path)
    for left, right in zip(undisturbed["curve"], resumed["curve"], strict=True):
        assert {**left, "seconds": 0} == {**right, "seconds": 0}
    one, other = weights_at(world, undisturbed["fit_model_uri"]), weights_at(world, resumed["fit_model_uri"])
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_fit_that_finds_room_ends_after_an_epoch_and_goes_on_as_if_never_stopped(world: FitWorld, tmp_path: Path) -> None:
    undisturbed = result_of(world, world.plan(fit_uri="s3://unfreeze/fits/small"), tmp_path)
    plan = world.plan(fit_uri="s3://unfreeze/fits/grows")
    trained: list[int] = []
    ends = [
        train(
            plan, ALONE, store=world.store, cache=tmp_path, asks=Asks(has_room=lambda: True), on_epoch=lambda row: trained.append(row.epoch)
        )
        for _ in range(3)
    ]
    assert ends == [ROOM, ROOM, DONE]
    assert trained == [1, 2, 3]
    grown = json.loads(world.store.read(f"{plan.fit_uri}/result.json"))
    one, other = weights_at(world, undisturbed["fit_model_uri"]), weights_at(world, grown["fit_model_uri"])
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def _timeless(training: Training) -> EpochRow:
    row = training.epoch()
    assert row
    return dataclasses.replace(row, seconds=0)


def test_images_decoded_at_each_use_train_the_same_model_as_images_kept(world: FitWorld, tmp_path: Path) -> None:
    kept = Training(world.plan(), ALONE, world.store, tmp_path)
    decoded = Training(world.plan(memory_budget_bytes=0), ALONE, world.store, tmp_path)
    assert type(kept.train_images) is not type(decoded.train_images)
    assert _timeless(kept) == _timeless(decoded)


def seen(world: FitWorld, cache: Path, epoch: int, **changes: Any) -> list[torch.Tensor]:
    """The train images as an epoch of a fit sees them."""
    plan = world.plan(**changes)
    training = Training(plan, ALONE, world.store, cache)
    augmented = Augmented(training.train_images, training.train_labels_N, training.train_rows, plan, epoch)
    return [augmented[index][0] for index in range(len(augmented))]


def test_strength_is_the_share_of_images_that_a_fit_augments_the_others_are_as_val_sees_them(world: FitWorld, tmp_path: Path) -> None:
    full, plain = seen(world, tmp_path, 1), seen(world, tmp_path, 1, augmentation="none")
    half = seen(world, tmp_path, 1, augmentation_strength=0.5)
    is_augmented = [torch.equal(one, other) for one, other in zip(half, full, strict=True)]
    assert [torch.equal(one, other) for one, other in zip(half, plain, strict=True)] == [not was for was in is_augmented]
    assert 0.2 < sum(is_augmented) / len(half) < 0.8
    assert all(map(torch.equal, seen(world, tmp_path, 1, augmentation_strength=0.0), plain))
    assert all(map(torch.equal, seen(world, tmp_path, 1, augmentation_strength=0.5), half))  # as a resumed fit would
    assert not all(map(torch.equal, seen(world, tmp_path, 2, augmentation_strength=0.5), half))


def test_the_fit_takes_the_winners_strength_and_one_without_it_keeps_its_id(world: FitWorld) -> None:
    def plan_of(**best: float) -> Plan:
        search = {**world.search, "best": {**world.search["best"], **best}}
        return plan_fit(world.spec, world.dataset, world.backbone, search)

    assert plan_of(augmentation_strength=0.3).augmentation_strength == 0.3
    assert plan_of(augmentation_strength=1.0).fit_id == plan_of().fit_id != plan_of(augmentation_strength=0.3).fit_id


def test_training_stops_when_patience_ends(world: FitWorld, tmp_path: Path) -> None:
    plan = world.plan(fit_uri="s3://unfreeze/fits/patience", lr=1e-9, max_epochs=9, patience=1, unfreeze_depth=0)
    training = Training(plan, ALONE, world.store, tmp_path)
    training.best = EpochRow(1, 1.0, 2.0, 0.0, 0.0)
    training.history = [training.best]
    assert not training.is_over
    training.epoch()
    assert training.is_over
    assert len(training.history) == 2


def test_a_fit_that_diverges_ends_and_leaves_the_probe(world: FitWorld, tmp_path: Path) -> None:
    result = result_of(world, world.plan(fit_uri="s3://unfreeze/fits/diverges", lr=1e38, unfreeze_depth=3), tmp_path)
    assert result["chosen"] == "probe"
    assert result["model_uri"] == result["probe_model_uri"]
    assert result["epochs"] == 1
    assert result["curve"][0]["train_loss"] is None
    json.dumps(result, allow_nan=False)


def test_a_store_that_refuses_checkpoints_does_not_stop_the_fit(tmp_path: Path) -> None:
    store = MemoryObjectStore()
    world = make_world(tmp_path, store)

    def refuse(uri: str) -> None:
        if "checkpoints" in uri:
            raise OSError("no space")

    store.before_write = refuse
    result = result_of(world, world.plan(), tmp_path)
    assert result["epochs"] == 3
    assert result["checkpoint_uri"] is None


@pytest.mark.parametrize("refused", ["result.json", "fit/model.safetensors", "probe/MANIFEST.json"])
def test_a_result_that_cannot_be_written_fails_the_fit(tmp_path: Path, refused: str) -> None:
    store = MemoryObjectStore()
    world = make_world(tmp_path, store)

    def refuse(uri: str) -> None:
        if uri.endswith(refused):
            raise ServiceError("S3 is down")

    store.before_write = refuse
    with pytest.raises(ServiceError, match="S3 is down"):
        result_of(world, world.plan(max_epochs=1), tmp_path)
    assert not any(uri.endswith("result.json") for uri in store.objects)


@given(st.permutations(["a", "b", "c"]))
def test_a_model_with_other_labels_is_compared_by_name(labels: list[str]) -> None:
    given_NC = np.array([[0.5, 0.3, 0.2]])
    aligned_NK, outside_N = aligned(given_NC, labels, ["b", "c", "z"])
    assert outside_N is not None
    assert aligned_NK[0].tolist() == [given_NC[0, labels.index("b")], given_NC[0, labels.index("c")], 0.0]
    assert outside_N[0] == given_NC[0, labels.index("a")]


def test_the_most_confident_mistakes_come_first() -> None:
    rows = [{"sha256": str(n), "true": "a", "predicted": "ab"[n % 2], "probability": n / 10} for n in range(8)]
    assert [row["sha256"] for row in mistakes(rows, 2)] == ["7", "5"]
