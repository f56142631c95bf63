"""What a training image may be turned into while keeping its class: the presets of `fit.augmentation`.

Each takes a uint8 image CHW of at least the backbone's size on both sides and gives uint8 CHW of exactly that size. A preset
changes only what the kind of image leaves its class independent of:

none    what val sees: the shorter side to the size, the centre. For data so large that it needs no more variety.
photo   things seen from anywhere: crop of 35 % to all of it, mirror, slight turn, light and colour, a patch hidden.
symbol  emoji, logos, signs, text: a mirror would change the meaning and a narrow crop lose it, so the whole stays in view
        and is moved, turned and leaned a little; colour carries meaning, so only light, contrast and saturation move, slightly.
aerial  seen from above there is no up: all eight turns and mirrors of the square, any crop of half or more; light and colour.

Hue stays: it carries class in most data sets, and turning it costs more time than all the rest together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode

from ray_jobs.spec import Augmentation

WHITE = 255


def build(preset: Augmentation, image_size: int) -> Callable[[Tensor], Tensor]:
    """The random transform of a preset; it draws from torch's global generator, see `seeded`."""
    steps = {"none": _none, "photo": _photo, "symbol": _symbol, "aerial": _aerial}[preset](image_size)
    transform: Callable[[Tensor], Tensor] = v2.Compose(steps)
    return transform


def seed_of(seed: int, epoch: int, image: int) -> int:
    """A seed for one image of one epoch: nothing but these three decides what it is turned into, so a resumed fit sees the same images."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{image}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def is_augmented(seed: int, strength: float) -> bool:
    """Whether the image of this seed (see `seed_of`) is augmented, which a share `strength` of all are.

    Decided by the seed's upper bits: torch's generator takes the lower 32 only, so the image that is augmented looks as at any
    other strength.
    """
    return (seed >> 32) < strength * 2**31


def seed_of_view(sha256: str, view: int) -> int:
    """A seed for one fixed view of an image: the same in any dataset, on any machine."""
    digest = hashlib.blake2b(f"{sha256}/{view}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seeded(transform: Callable[[Tensor], Tensor], image_CHW: Tensor, seed: int) -> Tensor:
    """`transform` with every draw decided by `seed`. Leaves torch's global CPU generator at a place that `seed` decides, too."""
    torch.default_generator.manual_seed(seed)
    return transform(image_CHW)


def _none(image_size: int) -> list[v2.Transform]:
    return [v2.Resize(image_size, interpolation=InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(image_size)]


def _photo(image_size: int) -> list[v2.Transform]:
    return [
        v2.RandomResizedCrop(image_size, scale=(0.35, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.RandomRotation(10, interpolation=InterpolationMode.BILINEAR)], p=0.5),
        v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3),
        v2.RandomErasing(p=0.2, scale=(0.02, 0.15), value=127),
    ]


def _symbol(image_size: int) -> list[v2.Transform]:
    lean = v2.RandomAffine(
        degrees=12, translate=(0.08, 0.08), scale=(0.85, 1.1), shear=6, interpolation=InterpolationMode.BILINEAR, fill=WHITE
    )  # symbols are drawn on white, and the corners that a turn lays bare should look like the rest
    return [
        *_none(image_size),
        lean,
        v2.RandomResizedCrop(image_size, scale=(0.7, 1.0), ratio=(0.85, 1.18), interpolation=InterpolationMode.BICUBIC, antialias=True),
        v2.ColorJitter(brightness=0.15, contrast=0.15, saturation=0.15),
    ]


def _aerial(image_size: int) -> list[v2.Transform]:
    quarter_turns = v2.RandomChoice([v2.Identity(), *(v2.RandomRotation((turn, turn)) for turn in (90, 180, 270))])
    return [
        v2.RandomResizedCrop(image_size, scale=(0.5, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(),
        quarter_turns,
        v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
    ]
