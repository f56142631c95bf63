"""The augmentation presets: size, repeatability, and what each keeps as it is."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_jobs import augment
from ray_jobs.preprocessing import to_square
from ray_jobs.spec import Augmentation

PRESETS: tuple[Augmentation, ...] = get_args(Augmentation)
SIZE = 32


def half_and_half() -> torch.Tensor:
    """Dark on the left, light on the right, and in between in a way that tells up from down as well."""
    image_CHW = torch.zeros(3, 48, 40, dtype=torch.uint8)
    image_CHW[:, :, 20:] = 200
    image_CHW[:, 24:, 20:] = 120
    return image_CHW


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [(3, 40, 40), (3, 20, 70), (3, 9, 9)])
def test_every_preset_gives_a_uint8_square_of_the_wanted_size(preset: Augmentation, shape: tuple[int, ...]) -> None:
    image_CHW = torch.randint(0, 256, shape, dtype=torch.uint8)
    made = augment.seeded(augment.build(preset, SIZE), image_CHW, 1)
    assert made.shape == (3, SIZE, SIZE)
    assert made.dtype == torch.uint8


@pytest.mark.parametrize("preset", PRESETS)
def test_the_seed_alone_decides_what_an_image_is_turned_into(preset: Augmentation) -> None:
    transform, image_CHW = augment.build(preset, SIZE), half_and_half()
    first = augment.seeded(transform, image_CHW, 7)
    torch.rand(5)
    assert torch.equal(first, augment.seeded(transform, image_CHW, 7))
    others = {augment.seeded(transform, image_CHW, seed).numpy().tobytes() for seed in range(6)}
    assert len(others) == (1 if preset == "none" else 6)


def test_none_is_what_val_sees_but_for_rounding() -> None:
    from PIL import Image

    image_CHW = torch.arange(3 * 40 * 40).remainder(251).reshape(3, 40, 40).to(torch.uint8)
    seen_HWC = torch.from_numpy(to_square(Image.fromarray(image_CHW.permute(1, 2, 0).numpy()), 40))
    made_CHW = augment.build("none", 40)(image_CHW)
    assert (made_CHW.int() - seen_HWC.permute(2, 0, 1).int()).abs().max() <= 1


def test_symbols_are_never_mirrored_and_photos_are_at_times() -> None:
    def mirrored(preset: Augmentation) -> int:
        transform = augment.build(preset, SIZE)
        made = (augment.seeded(transform, half_and_half(), seed).float() for seed in range(60))
        return sum(bool(image[:, :, :12].mean() > image[:, :, -12:].mean()) for image in made)

    assert mirrored("symbol") == 0
    assert 15 < mirrored("photo") < 45


def test_aerial_images_lie_every_way_round() -> None:
    transform = augment.build("aerial", SIZE)
    corner_CHW = torch.zeros(3, 40, 40, dtype=torch.uint8)
    corner_CHW[:, :14, :14] = 255
    lightest = set()
    for seed in range(60):
        image = augment.seeded(transform, corner_CHW, seed).float()
        quarters = image[:, :16, :16], image[:, :16, 16:], image[:, 16:, :16], image[:, 16:, 16:]
        means = [float(quarter.mean()) for quarter in quarters]
        lightest.add(means.index(max(means)))
    assert lightest == {0, 1, 2, 3}


def test_strength_is_the_share_of_images_that_are_augmented_and_a_stronger_fit_augments_the_same_ones_and_more() -> None:
    seeds = [augment.seed_of(0, epoch, image) for epoch in range(10) for image in range(400)]
    augmented = {strength: {seed for seed in seeds if augment.is_augmented(seed, strength)} for strength in (0.0, 0.25, 0.5, 1.0)}
    assert augmented[0.0] == set()
    assert augmented[1.0] == set(seeds)
    assert augmented[0.25] < augmented[0.5]
    assert len(augmented[0.5]) / len(seeds) == pytest.approx(0.5, abs=0.03)


@given(st.integers(0, 2**63 - 1))
def test_no_seed_is_left_out_at_full_strength(seed: int) -> None:
    assert augment.is_augmented(seed, 1.0)
    assert not augment.is_augmented(seed, 0.0)


@given(st.integers(0, 5), st.integers(-3, 5), st.integers(0, 5), st.integers(0, 5), st.integers(-3, 5), st.integers(0, 5))
def test_seeds_differ_wherever_seed_epoch_or_image_do(a: int, b: int, c: int, d: int, e: int, f: int) -> None:
    assert (augment.seed_of(a, b, c) == augment.seed_of(d, e, f)) == ((a, b, c) == (d, e, f))
    assert 0 <= augment.seed_of(a, b, c) < 2**63
