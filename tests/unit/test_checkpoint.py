"""Checkpoints: what is saved comes back, and nothing half-written is ever read."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from infra.errors import ServiceError
from ray_jobs import checkpoint
from ray_jobs.checkpoint import Checkpoint, CheckpointWriter
from tests.fakes import MemoryObjectStore

ROOT = "s3://bucket/fits/x/checkpoints"


def made(epoch: int, *, own_best: bool = True) -> Checkpoint:
    tensors = {"head.weight": torch.full((2, 3), float(epoch))}
    best = tensors if own_best else {"head.weight": torch.full((2, 3), -1.0)}
    return Checkpoint(epoch, tensors, best, {"head.weight|exp_avg": torch.ones(2, 3)}, {"history": [epoch], "best_epoch": epoch})


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("own_best", [True, False])
def test_what_is_saved_comes_back(own_best: bool) -> None:
    store, saved = MemoryObjectStore(), made(3, own_best=own_best)
    uri = checkpoint.save(store, ROOT, saved)
    found = checkpoint.load(store, uri)
    assert uri == f"{ROOT}/epoch-0003"
    assert found.epoch == 3
    assert found.state == saved.state
    for kind in ("trainable", "best", "optimizer"):
        left, right = getattr(found, kind), getattr(saved, kind)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_what_is_saved_amid_an_epoch_comes_back_and_lies_between_the_epochs() -> None:
    store, shares = MemoryObjectStore(), {"norm.running_mean": torch.ones(2, 3)}
    for saved in (made(1), dataclasses.replace(made(1, own_best=False), step=12, shares=shares)):
        uri = checkpoint.save(store, ROOT, saved)
    assert uri == f"{ROOT}/epoch-0001-step-00012"
    found = checkpoint.latest(store, ROOT)
    assert found
    assert (found.epoch, found.step, found.state) == (1, 12, made(1).state)
    assert torch.equal(found.shares["norm.running_mean"], shares["norm.running_mean"])
    assert checkpoint.epochs(store, ROOT) == [1]
    checkpoint.save(store, ROOT, made(2))
    assert checkpoint.positions(store, ROOT) == [(1, 0), (1, 12), (2, 0)]


def test_nothing_that_is_written_is_a_pickle() -> None:
    store = MemoryObjectStore()
    checkpoint.save(store, ROOT, made(1))
    assert {uri.rsplit(".", 1)[1] for uri in store.objects} == {"safetensors", "json"}


def test_the_last_committed_checkpoint_is_found_by_number() -> None:
    store = MemoryObjectStore()
    for epoch in (2, 10, 9):
        checkpoint.save(store, ROOT, made(epoch))
    found = checkpoint.latest(store, ROOT)
    assert found
    assert found.epoch == 10
    assert checkpoint.latest(store, "s3://bucket/other") is None


def test_a_kill_at_any_write_leaves_the_checkpoint_before() -> None:
    counting = MemoryObjectStore()
    checkpoint.save(counting, ROOT, made(2))
    for survived in range(counting.writes):
        store = MemoryObjectStore()
        checkpoint.save(store, ROOT, made(1))
        first = store.writes

        def kill(uri: str, store: MemoryObjectStore = store, limit: int = first + survived) -> None:
            if store.writes >= limit:
                raise Killed

        store.before_write = kill
        with pytest.raises(Killed):
            checkpoint.save(store, ROOT, made(2))
        found = checkpoint.latest(store, ROOT)
        assert found
        assert found.epoch == 1


@pytest.mark.parametrize("name", ["trainable.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over_and_said_so(name: str, caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryObjectStore()
    checkpoint.save(store, ROOT, made(1))
    uri = checkpoint.save(store, ROOT, made(2))
    store.objects[f"{uri}/{name}"] += b" "
    found = checkpoint.latest(store, ROOT)
    assert found
    assert found.epoch == 1
    assert "epoch 2 is damaged" in caplog.text


def test_a_checkpoint_that_cannot_be_written_is_logged_and_the_next_one_is_written(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryObjectStore()

    def refuse(uri: str) -> None:
        if "epoch-0002" in uri:
            raise ServiceError("S3 is down")

    store.before_write = refuse
    with CheckpointWriter(store, ROOT) as writer:
        for epoch in (1, 2, 3):
            writer.write(made(epoch), best_epoch=epoch)
    assert checkpoint.epochs(store, ROOT) == [1, 3]
    assert "epoch 2 could not be written" in caplog.text


def test_the_last_two_and_the_best_are_kept() -> None:
    store = MemoryObjectStore()
    with CheckpointWriter(store, ROOT) as writer:
        for epoch in range(1, 7):
            writer.write(made(epoch), best_epoch=min(epoch, 2))
    assert checkpoint.epochs(store, ROOT) == [2, 5, 6]
    assert not [uri for uri in store.objects if "epoch-0001" in uri]


def test_an_optimizer_goes_on_as_if_never_stopped() -> None:
    def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer, dict[torch.Tensor, str]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True), names

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        model(torch.randn(8, 3, generator=torch.Generator().manual_seed(number))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    one, its_optimizer, its_names = model_and_optimizer()
    for number in range(3):
        step(one, its_optimizer, number)
    tensors, state = checkpoint.trainable_tensors(one), checkpoint.optimizer_tensors(its_optimizer, its_names)
    other, other_optimizer, other_names = model_and_optimizer()
    checkpoint.load_trainable(other, tensors)
    checkpoint.load_optimizer(other_optimizer, other_names, state)
    for number in range(3, 6):
        step(one, its_optimizer, number)
        step(other, other_optimizer, number)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_an_optimizer_of_images_laid_out_by_channel_goes_on_as_if_never_stopped() -> None:
    def made_anew() -> tuple[nn.Module, torch.optim.Optimizer, dict[torch.Tensor, str]]:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True), {p: name for name, p in model.named_parameters()}

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(number))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    one, its_optimizer, its_names = made_anew()
    step(one, its_optimizer, 0)
    other, other_optimizer, other_names = made_anew()
    checkpoint.load_trainable(other, checkpoint.trainable_tensors(one))
    checkpoint.load_optimizer(other_optimizer, other_names, checkpoint.optimizer_tensors(its_optimizer, its_names))
    step(one, its_optimizer, 1)
    step(other, other_optimizer, 1)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_a_checkpoint_of_another_depth_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    tensors = checkpoint.trainable_tensors(model)
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match="not the model's"):
        checkpoint.load_trainable(model, tensors)
