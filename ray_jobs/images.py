"""The images of one split of a dataset for one rank or task: their labels, and their pixels kept for as long as they are used.

Shapes: N rows of a range, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ray_jobs.dataset import Dataset
from ray_jobs.preprocessing import decode, to_square

KEPT_PER_SIZE = 1.25  # what a random crop can use: a crop of 64 % of the area still has a pixel for each of the backbone's


@dataclass(frozen=True)
class Range:
    """Consecutive rows of one split, in the dataset's canonical order: `start` to `stop` (exclusive) of the split."""

    dataset: Dataset
    split: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def bytes(self) -> Iterator[bytes]:
        """The original bytes of each image."""
        first = self.dataset.manifest.column("split").to_pylist().index(self.split)  # a split's rows are consecutive
        return self.dataset.image_bytes(first + self.start, first + self.stop)

    def column(self, name: str) -> list[Any]:
        """A column of the manifest."""
        manifest = self.dataset.manifest
        first = manifest.column("split").to_pylist().index(self.split)
        values: list[Any] = manifest.column(name).slice(first + self.start, len(self)).to_pylist()
        return values


class Images(Protocol):
    """Pixels by position in the range, uint8 CHW."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Tensor: ...


def labels_of(dataset: Dataset, split: str) -> npt.NDArray[np.int64]:
    """The label numbers of a whole split."""
    return np.array([row.label_index for row in dataset.rows([split])], dtype=np.int64)


def squares(rows: Range, *, image_size: int, max_pixels: int) -> Tensor:
    """What val and holdout see: the centre squares of the rows, uint8 NHWC."""
    pixels_NHWC = torch.empty((len(rows), image_size, image_size, 3), dtype=torch.uint8)
    for position, data in enumerate(rows.bytes()):
        pixels_NHWC[position] = torch.from_numpy(to_square(decode(data, max_pixels), image_size))
    return pixels_NHWC


def keep(rows: Range, *, image_size: int, max_pixels: int, budget_bytes: int, spool: Path) -> Images:
    """The rows' images for many epochs: decoded once where that fits the budget, else their files, decoded at each use."""
    if _decoded_bytes(rows, image_size) <= budget_bytes:
        return DecodedImages(rows, image_size=image_size, max_pixels=max_pixels)
    return EncodedImages(rows, image_size=image_size, max_pixels=max_pixels, spool=spool)


class DecodedImages:
    """Every image in memory, its shorter side at most 1.25 times the backbone's."""

    def __init__(self, rows: Range, *, image_size: int, max_pixels: int) -> None:
        self._images = [_to_tensor(shrink(decode(data, max_pixels), image_size)) for data in rows.bytes()]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        return self._images[index]


class EncodedImages:
    """Every image as its file's bytes, end to end in one file of this machine, mapped into memory."""

    def __init__(self, rows: Range, *, image_size: int, max_pixels: int, spool: Path) -> None:
        self._image_size, self._max_pixels = image_size, max_pixels
        self._ends = [0]
        spool.parent.mkdir(parents=True, exist_ok=True)
        with spool.open("wb") as file:
            for data in rows.bytes():
                file.write(data)
                self._ends.append(file.tell())
        self._bytes = np.memmap(spool, dtype=np.uint8, mode="r")
        spool.unlink()  # the mapping keeps the file for as long as this process lives, however it ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Tensor:
        data = self._bytes[self._ends[index] : self._ends[index + 1]].tobytes()
        return _to_tensor(shrink(decode(data, self._max_pixels), self._image_size))


def shrink(image: Image.Image, image_size: int) -> Image.Image:
    """The image with its shorter side at most 1.25 times `image_size`; small ones stay as they are."""
    width, height = _kept_size(image.width, image.height, image_size)
    return image if (width, height) == image.size else image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def _kept_size(width: int, height: int, image_size: int) -> tuple[int, int]:
    scale = min(1.0, KEPT_PER_SIZE * image_size / min(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _decoded_bytes(rows: Range, image_size: int) -> int:
    kept = (_kept_size(width, height, image_size) for width, height in zip(rows.column("width"), rows.column("height"), strict=True))
    return sum(3 * width * height for width, height in kept)


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()
