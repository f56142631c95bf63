"""All heads at once train as each would alone, and none disturbs another."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from ray_jobs.cuts import Cuts
from ray_jobs.fast_suffix import speed_up
from ray_jobs.groups import head_names
from ray_jobs.heads import HeadResult, HeadRows, head_rows, knn_accuracy, train_alone, train_heads
from ray_jobs.train_loop import EpochResult, Recipe, Rows, SuffixTraining

SIZE, TRAIN, VAL, CLASSES, WIDTH = 32, 70, 30, 4, 24
WEIGHTS = (0.5, 1.0, 1.5, 1.0)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def recipe(**changes: Any) -> Recipe:
    given = {"lr": 3e-3, "max_epochs": 4, "batch_size": 16, "weight_decay": 1e-2, "label_smoothing": 0.0, "class_weights": None, "seed": 3}
    return Recipe(**{**given, **changes})


DIFFERENT = [
    recipe(), recipe(lr=1e-1), recipe(lr=1e-2, weight_decay=0.5), recipe(label_smoothing=0.2), recipe(class_weights=WEIGHTS),
    recipe(label_smoothing=0.1, class_weights=WEIGHTS, lr=2e-2), recipe(seed=4), recipe(batch_size=32), recipe(max_epochs=2),
]  # fmt: skip


def learnable() -> Rows:
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.randint(0, CLASSES, (TRAIN + VAL,), generator=generator)
    centres_KD = torch.randn(CLASSES, WIDTH, generator=generator)
    return Rows([centres_KD[labels_N] + 2 * torch.randn(TRAIN + VAL, WIDTH, generator=generator)], labels_N, TRAIN)


def first_tensors(bias: bool = True) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {f"fc.{name}": value.detach() for name, value in nn.Linear(WIDTH, CLASSES, bias=bias).named_parameters()}


def together(recipes: list[Recipe], bias: bool = True, **options: Any) -> list[HeadResult]:
    rows = learnable()
    return train_heads(HeadRows(rows.values[0], rows.labels_N, rows.train), first_tensors(bias), recipes, **options)


def alone(one: Recipe, bias: bool = True, patience: int | None = None, rows: Rows | None = None) -> HeadResult:
    layer = nn.ModuleDict({"fc": nn.Linear(WIDTH, CLASSES, bias=bias)})
    layer.load_state_dict(first_tensors(bias))
    training = SuffixTraining(layer["fc"], rows or learnable(), one, set_mode=layer.train)
    return train_alone(training, patience, lambda: {name: value.detach().numpy().copy() for name, value in layer.named_parameters()})


def assert_same(one: HeadResult, other: HeadResult) -> None:
    assert (one.status, one.best_epoch, len(one.curve)) == (other.status, other.best_epoch, len(other.curve))
    for left, right in zip(one.curve, other.curve, strict=True):
        assert left.train_loss == pytest.approx(right.train_loss, abs=1e-4)
        assert left.val_loss == pytest.approx(right.val_loss, abs=1e-4)
        assert left.val_accuracy == right.val_accuracy
    assert one.head.keys() == other.head.keys()
    for name, value in one.head.items():
        torch.testing.assert_close(torch.from_numpy(value), torch.from_numpy(other.head[name]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [2, 100])
def test_many_different_heads_train_as_each_would_alone(bias: bool, chunk: int) -> None:
    found = together(DIFFERENT, bias, chunk=chunk)
    assert [result.recipe for result in found] == DIFFERENT
    for result in found:
        assert_same(result, alone(result.recipe, bias))


@pytest.mark.parametrize("chunk", [2, 100])
def test_heads_of_different_strengths_each_draw_their_own_views(chunk: int) -> None:
    plain = learnable()
    views_ND = torch.randn(2 * TRAIN, WIDTH, generator=torch.Generator().manual_seed(5))
    rows = Rows([torch.cat([plain.values[0], views_ND])], plain.labels_N, TRAIN, views=3)
    recipes = [recipe(augmentation_strength=strength) for strength in (1.0, 0.5, 0.0, 1.0)]
    found = train_heads(HeadRows(rows.values[0], rows.labels_N, TRAIN, views=3), first_tensors(), recipes, chunk=chunk)
    for result in found:
        assert_same(result, alone(result.recipe, rows=rows))
    assert len({result.curve[0].train_loss for result in found}) == 3
    without_views = alone(recipe())  # draws nothing for views, so its second epoch has another order
    assert found[2].curve[0].train_loss == pytest.approx(without_views.curve[0].train_loss, abs=1e-4)


def test_a_head_that_diverges_is_marked_and_leaves_the_others_as_they_were() -> None:
    wild = recipe(lr=1e38)
    calm, lost, last = together([recipe(), wild, recipe(lr=1e-2)])
    assert lost.status == "diverged"
    assert "epoch" in lost.reason
    assert all(math.isfinite(epoch.val_loss) for epoch in lost.curve)
    assert_same(calm, together([recipe()])[0])
    assert_same(last, together([recipe(lr=1e-2)])[0])


def test_a_head_without_progress_stops_after_its_patience_and_the_others_go_on() -> None:
    recipes = [recipe(lr=1e-9, max_epochs=9), recipe(max_epochs=9)]
    stuck, moving = together(recipes, patience=2)
    assert_same(moving, alone(recipes[1], patience=2))
    stopped = alone(recipes[0], patience=2)
    assert (stuck.status, len(stuck.curve)) == (stopped.status, len(stopped.curve))


def test_patience_counts_epochs_since_the_best_one() -> None:
    result = HeadResult(recipe(max_epochs=9))
    for accuracy in (0.5, 0.6, 0.6, 0.5):
        result.note(EpochResult(1.0, 1.0 - accuracy, accuracy, 0.0), 2, dict)
    assert (result.status, result.best_epoch, len(result.curve)) == ("stopped", 2, 4)


def test_the_same_seed_gives_the_same_heads_bit_by_bit() -> None:
    one, other = together(DIFFERENT), together(DIFFERENT)
    assert [result.curve[-1].val_loss for result in one] == [result.curve[-1].val_loss for result in other]


@pytest.mark.parametrize(("name", "options"), [
    ("tf_efficientnet_lite0", {"drop_rate": 0.3}), ("resnet10t", {}), ("convnext_atto", {"drop_rate": 0.3}),
    ("vit_tiny_patch16_224", {"img_size": SIZE}),
])  # fmt: skip
def test_heads_of_a_real_backbone_agree_with_its_depth_0_suffix_dropout_included(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=CLASSES, **options).eval()
    cuts = Cuts(model, [0], SIZE)
    images_NCHW = torch.randn(24, 3, SIZE, SIZE)
    with torch.no_grad():
        rows = Rows([value.clone() for value in cuts.prefix(images_NCHW)[0]], torch.arange(24) % CLASSES, 16)
    suffix = speed_up(cuts.suffix(0))
    found = head_rows(suffix, rows)
    assert found is not None
    assert found.dropout == options.get("drop_rate", 0.0)
    one = recipe(batch_size=8, max_epochs=2)
    (fast,) = train_heads(found, {key: model.get_parameter(key) for key in head_names(model)}, [one])
    slow = train_alone(SuffixTraining(suffix, rows, one, set_mode=suffix.train), None, lambda: {
        key: model.get_parameter(key).detach().numpy().copy() for key in head_names(model)
    })  # fmt: skip
    assert_same(fast, slow)


def test_a_classifier_that_is_not_one_linear_layer_is_left_to_the_ordinary_training() -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=CLASSES, img_size=SIZE).eval()
    cuts = Cuts(model, [0], SIZE)
    with torch.no_grad():
        rows = Rows([value.clone() for value in cuts.prefix(torch.randn(4, 3, SIZE, SIZE))[0]], torch.zeros(4, dtype=torch.long), 2)
    assert head_rows(cuts.suffix(0), rows) is None


def test_neighbours_name_what_lies_in_clusters_and_only_guess_in_noise() -> None:
    rows = learnable()
    features_ND, labels_N = rows.values[0], rows.labels_N
    split = (features_ND[:TRAIN], labels_N[:TRAIN], features_ND[TRAIN:], labels_N[TRAIN:])
    assert knn_accuracy(*split) > 0.6
    assert knn_accuracy(torch.randn(TRAIN, WIDTH, generator=torch.Generator().manual_seed(7)), *split[1:]) < 0.6
    assert knn_accuracy(features_ND, labels_N, features_ND, labels_N, k=1) == 1.0
