"""What names features: everything that the values of one cut and one view of an image depend on, besides the image itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from ray_jobs.spec import Augmentation, FeatureDtype, digest_of

FEATURE_CODE_VERSION = 3
"""Raise it whenever the code computes other features from the same weights and images."""

CENTRE = "centre"


@dataclass(frozen=True)
class Transform:
    """From an image file to what the backbone sees."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"


@dataclass(frozen=True)
class FeatureSet:
    """The features of one cut and one view, of any images. A cut of None is the input itself: pixels, the same for every backbone."""

    backbone_digest: str | None
    unfreeze_depth: int | None
    image_size: int
    interpolation: str
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    view: str
    dtype: str

    @property
    def digest(self) -> str:
        return digest_of({"code": FEATURE_CODE_VERSION, **self.plain})

    @property
    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Cell:
    """One cut and one view (0 is the centre) of a search."""

    depth: int
    view: int


def feature_set(cell: Cell, *, backbone_digest: str, num_groups: int, transform: Transform, augmentation: Augmentation,
                dtype: FeatureDtype) -> FeatureSet:  # fmt: skip
    """The set that a cell of a search belongs to."""
    view = f"{augmentation}/{cell.view}" if cell.view else CENTRE
    if cell.depth >= num_groups:
        return FeatureSet(None, None, transform.image_size, transform.interpolation, None, None, view, "uint8")
    mean, std = transform.mean, transform.std
    return FeatureSet(backbone_digest, cell.depth, transform.image_size, transform.interpolation, mean, std, view, dtype)


def cells_of(depths: Iterable[int], views: int) -> list[Cell]:
    """Every cell of a search."""
    return [Cell(depth, view) for depth in sorted(set(depths)) for view in range(views)]
