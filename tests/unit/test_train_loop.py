"""The training loop of a trial: torch's own AdamW and OneCycleLR, exact from the cache, and honest when it diverges."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import timm
import torch
from torch import nn

from ray_jobs.cuts import Cuts
from ray_jobs.features import FrozenPrefix, features_of
from ray_jobs.groups import freeze, num_groups, set_mode
from ray_jobs.preprocessing import normalise
from ray_jobs.train_loop import Diverged, OneCycle, Recipe, Rows, SuffixTraining, class_weights, draw_views
from ray_jobs.trial import normalised

SIZE, TRAIN, VAL, CLASSES = 32, 24, 8, 3
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
RECIPE = Recipe(lr=1e-3, max_epochs=2, batch_size=8, weight_decay=1e-2, label_smoothing=0.1, class_weights=(0.5, 1.0, 1.5), seed=5)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("resnet10t", num_classes=CLASSES).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bn2.weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)  # zero-initialised gammas would hide what the blocks do
    return model


def pixels_and_labels() -> tuple[np.ndarray, torch.Tensor]:
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (TRAIN + VAL, SIZE, SIZE, 3), dtype=np.uint8), torch.from_numpy(rng.integers(0, CLASSES, TRAIN + VAL))


@pytest.mark.parametrize("depth", [0, 1, 2, "all"])
def test_training_on_cached_features_equals_training_the_whole_model_on_images(depth: int | str) -> None:
    model = small_model()
    depth = num_groups(model) if isinstance(depth, str) else depth
    cuts = Cuts(model, [depth], SIZE)
    model.double()  # Adam blows single precision's rounding up
    twin = copy.deepcopy(model)
    start = copy.deepcopy(model.state_dict())
    pixels_NHWC, labels_N = pixels_and_labels()

    freeze(twin, depth)
    images_NCHW = torch.from_numpy(normalise(pixels_NHWC, MEAN, STD)).double()
    whole = SuffixTraining(twin, Rows([images_NCHW], labels_N, TRAIN), RECIPE, set_mode=lambda on: set_mode(twin, depth, on))
    expected = [whole.epoch() for _ in range(2)]

    values = features_of(FrozenPrefix(cuts) if depth < num_groups(model) else None, pixels_NHWC, depths=[depth], mean=MEAN, std=STD)[depth]
    suffix = cuts.suffix(depth)
    prepare: Callable = tuple if depth < num_groups(model) else lambda v: [normalised(v, MEAN, STD)[0].double()]
    rows = Rows([torch.from_numpy(v) for v in values], labels_N, TRAIN)
    cached = SuffixTraining(suffix, rows, RECIPE, set_mode=suffix.train, prepare=prepare)
    found = [cached.epoch() for _ in range(2)]

    for one, other in zip(expected, found, strict=True):
        assert other.train_loss == pytest.approx(one.train_loss, abs=1e-6)
        assert other.val_loss == pytest.approx(one.val_loss, abs=1e-6)
        assert other.val_accuracy == one.val_accuracy
    for (name, one), other in zip(twin.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-6, msg=name)
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, start[name])}
    assert moved == {name for name, value in twin.named_parameters() if value.requires_grad}


def test_stored_pixels_become_the_very_images_that_preprocessing_makes() -> None:
    pixels_NHWC, _ = pixels_and_labels()
    (images_NCHW,) = normalised([torch.from_numpy(pixels_NHWC)], MEAN, STD)
    np.testing.assert_array_equal(images_NCHW.numpy(), normalise(pixels_NHWC, MEAN, STD))


def test_the_optimizer_steps_exactly_as_torchs_adamw_under_its_one_cycle_schedule() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4)).to(memory_format=torch.channels_last)
    theirs = copy.deepcopy(ours)
    optimizer = OneCycle(list(ours.parameters()), peak_lr=3e-2, weight_decay=0.05, steps=10)
    reference = torch.optim.AdamW(theirs.parameters(), lr=3e-2, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(reference, 3e-2, total_steps=10)
    for _ in range(10):
        images_BCHW = torch.randn(5, 3, 8, 8)
        ours(images_BCHW).square().mean().backward()
        optimizer.step()
        reference.zero_grad()
        theirs(images_BCHW).square().mean().backward()
        reference.step()
        schedule.step()
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_even_a_search_of_very_few_steps_has_a_schedule(steps: int) -> None:
    layer = nn.Linear(2, 2)
    optimizer = OneCycle(list(layer.parameters()), peak_lr=1e-2, weight_decay=0.0, steps=steps)
    for _ in range(steps):
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in layer.parameters())


def linear_training(recipe: Recipe, features_ND: torch.Tensor | None = None) -> SuffixTraining:
    torch.manual_seed(0)
    layer = nn.Linear(6, CLASSES)
    values_ND = torch.randn(TRAIN + VAL, 6) if features_ND is None else features_ND
    labels_N = torch.randint(0, CLASSES, (TRAIN + VAL,))
    return SuffixTraining(layer, Rows([values_ND], labels_N, TRAIN), recipe, set_mode=layer.train)


def test_a_loss_that_is_no_number_raises_diverged_with_its_epoch() -> None:
    training = linear_training(RECIPE, torch.full((TRAIN + VAL, 6), float("inf")))
    with pytest.raises(Diverged, match="epoch 1"):
        training.epoch()


def test_the_same_seed_gives_the_same_training_and_another_seed_another_order() -> None:
    one, two = linear_training(RECIPE).epoch(), linear_training(RECIPE).epoch()
    assert (one.train_loss, one.val_loss) == (two.train_loss, two.val_loss)
    other = linear_training(Recipe(**{**vars(RECIPE), "seed": 6})).epoch()
    assert other.train_loss != one.train_loss


def test_rare_classes_weigh_more_only_where_the_classes_are_imbalanced() -> None:
    assert class_weights([10, 15, 20], "auto") is None
    assert class_weights([10, 1000], "none") is None
    weights = class_weights([100, 400], "auto")
    assert weights is not None
    assert weights[0] == pytest.approx(2 * weights[1])
    assert sum(weights) / len(weights) == pytest.approx(1.0)
    assert class_weights([0, 1, 9], "auto") is not None


def test_each_epoch_draws_a_view_for_each_train_row_and_one_view_draws_nothing() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(1, CLASSES)
    values_ND = torch.arange(TRAIN + VAL + 2 * TRAIN, dtype=torch.float32)[:, None]
    labels_N = torch.randint(0, CLASSES, (TRAIN + VAL,))
    recipe = Recipe(**{**vars(RECIPE), "lr": 1e-6})
    seen: list[int] = []

    def prepare(values: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        seen.extend(int(row) for row in values[0])
        return values

    training = SuffixTraining(layer, Rows([values_ND], labels_N, TRAIN, views=3), recipe, set_mode=layer.train, prepare=prepare)
    training.epoch()
    trained, judged = seen[:TRAIN], seen[TRAIN:]
    assert judged == list(range(TRAIN, TRAIN + VAL))
    assert sorted(row if row < TRAIN else (row - TRAIN - VAL) % TRAIN for row in trained) == list(range(TRAIN))
    assert len({(row - VAL) // TRAIN if row >= TRAIN else 0 for row in trained}) == 3
    before = list(trained)
    seen.clear()
    training.epoch()
    assert seen[:TRAIN] != before

    one = SuffixTraining(nn.Linear(1, CLASSES), Rows([values_ND], labels_N, TRAIN), recipe, set_mode=layer.train)
    one.epoch()
    order = torch.Generator().manual_seed(recipe.seed)
    torch.randperm(TRAIN, generator=order)
    assert torch.equal(one.order.get_state(), order.get_state())


def views_drawn(strength: float, views: int = 4, rows: int = 20_000) -> torch.Tensor:
    """How often each view is drawn, of so many rows."""
    drawn_N = draw_views(torch.arange(rows), views, rows, rows, torch.Generator().manual_seed(3), strength=strength)
    assert torch.equal(drawn_N % rows, torch.arange(rows))
    return torch.bincount(drawn_N // rows, minlength=views) / rows


def test_at_full_strength_the_views_are_drawn_from_the_stream_that_they_always_were() -> None:
    generator, plain = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    rows_N = torch.arange(TRAIN)
    view_N = torch.randint(4, rows_N.shape, generator=plain)
    expected_N = torch.where(view_N > 0, rows_N + TRAIN + VAL + (view_N - 1) * TRAIN, rows_N)
    assert torch.equal(draw_views(rows_N, 4, TRAIN, TRAIN + VAL, generator, strength=1.0), expected_N)
    assert torch.equal(generator.get_state(), plain.get_state())


@pytest.mark.parametrize("strength", [0.25, 0.5, 0.9, 1.0])
def test_strength_is_the_share_of_the_augmented_draws_that_stay_and_they_stay_uniform(strength: float) -> None:
    shares = views_drawn(strength)
    assert float(shares[1:].sum()) == pytest.approx(0.75 * strength, abs=0.015)
    assert shares[1:].tolist() == pytest.approx([0.25 * strength] * 3, abs=0.015)


def test_without_strength_every_draw_is_the_image_as_val_sees_it() -> None:
    assert views_drawn(0.0).tolist() == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_features_stored_in_sixteen_bits_train_as_their_widened_values(kind: torch.dtype) -> None:
    stored_ND = torch.randn((TRAIN + VAL, 6), generator=torch.Generator().manual_seed(1)).to(kind)
    assert linear_training(RECIPE, stored_ND).epoch().val_loss == linear_training(RECIPE, stored_ND.float()).epoch().val_loss


def test_sgd_steps_as_torchs_own_under_its_one_cycle_schedule() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizer = OneCycle(list(ours.parameters()), peak_lr=3e-2, weight_decay=0.05, steps=10, kind="sgd")
    plain = torch.optim.SGD(theirs.parameters(), lr=3e-2, momentum=0.9, nesterov=True, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(plain, 3e-2, total_steps=10)
    for _ in range(10):
        x = torch.randn(5, 4)
        ours(x).square().sum().backward()
        optimizer.step()
        plain.zero_grad()
        theirs(x).square().sum().backward()
        plain.step()
        schedule.step()
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-6)


def test_a_scale_slows_its_own_parameters_alone() -> None:
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = OneCycle([first, second], peak_lr=1e-2, weight_decay=0.0, steps=10, kind="sgd", scales=[1.0, 0.5])
    for _ in range(3):
        (first.sum() + second.sum()).backward()
        optimizer.step()
    assert torch.allclose(1 - first, 2 * (1 - second))
