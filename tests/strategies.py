"""Hypothesis strategies, and builders of image files and sources, for the tests of data preparation."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from hypothesis import strategies as st
from PIL import Image

from infra.object_store import join_uri
from ray_jobs.sources import Item
from ray_jobs.spec import DataSpec

SPLITS = ("train", "val", "holdout")


def png(colour: int = 0, size: tuple[int, int] = (4, 4)) -> bytes:
    """A small PNG whose content is decided by `colour` (0 to 0xFFFFFF)."""
    return encoded(Image.new("RGB", size, (colour >> 16 & 255, colour >> 8 & 255, colour & 255)), "PNG")


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    """The bytes of an image file."""
    sink = io.BytesIO()
    image.save(sink, file_format, **options)
    return sink.getvalue()


def two_classes(count: int = 20) -> dict[str, bytes]:
    """Files of a good source by path: `count` different images in each of two classes."""
    return {f"{label}/{number:03}.png": png(number * 2 + index) for index, label in enumerate(("cat", "dog")) for number in range(count)}


def write_folder(root: Path, files: Mapping[str, bytes]) -> Path:
    """`files` as a folder."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_zip(path: Path, files: Mapping[str, bytes]) -> Path:
    """`files` as a zip."""
    with ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def data_spec(source: Path | str, **changes: Any) -> DataSpec:
    """A DataSpec with a fifth of the images on each of the two smaller sides."""
    return DataSpec(**{"source": str(source), "val_fraction": 0.2, "holdout_fraction": 0.2, **changes})


def below(prefix_uri: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """`files` as objects below an s3:// prefix."""
    return {join_uri(prefix_uri, name): data for name, data in files.items()}


labels = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6).filter(lambda text: bool(text.strip()))
file_names = st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=8)
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
fractions = st.tuples(st.floats(0.01, 0.44), st.floats(0.01, 0.44))


@st.composite
def items(draw: st.DrawFn) -> Item:
    """An image of a manifest: with or without a group, never with a split of its own."""
    group = draw(st.none() | st.sampled_from("abcdefghij"))
    return Item(draw(file_names), draw(st.sampled_from(["cat", "dog", "🦜/a"])), "", 0, group=group)
