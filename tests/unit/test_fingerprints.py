"""Near-duplicates: a copy of a picture is found however it was saved, and another picture is not."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ray_jobs.fingerprints import CANDIDATES, FINGERPRINT_BYTES, NEAR, Pictures, distances, fingerprint, near_duplicates

EMOJI = Path(__file__).parents[2] / "examples" / "emoji-noto.zip"


def photo(seed: int, side: int = 120) -> Image.Image:
    """Structure at every scale, as photos have it, in colours that go together."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    planes = [np.fft.ifft2(np.fft.fft2(rng.normal(size=(side, side))) / np.maximum(frequency, 1 / side) ** 1.2).real for _ in range(4)]
    planes = [plane / plane.std() for plane in planes]
    pixels = np.stack([planes[0] + 0.5 * plane for plane in planes[1:]], -1) * 35 + 120
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@cache
def emoji() -> tuple[Image.Image, ...]:
    with ZipFile(EMOJI) as archive:
        names = [name for name in sorted(archive.namelist()) if name.endswith(".png")]
        return tuple(Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in names[::4])


def pictures(images: Sequence[Image.Image]) -> Pictures:
    content = b"".join(map(fingerprint, images))
    sizes = np.array([image.size for image in images], np.int64).reshape(-1, 2)
    return Pictures(np.frombuffer(content, np.uint8).reshape(-1, FINGERPRINT_BYTES), sizes[:, 0], sizes[:, 1])


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=quality)
    return Image.open(io.BytesIO(sink.getvalue())).convert("RGB")


def resized(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)


def cropped(image: Image.Image, share: float) -> Image.Image:
    return image.crop((round(share * image.width), 0, image.width, round((1 - share) * image.height)))


def darker(image: Image.Image, share: float) -> Image.Image:
    return image.point(lambda value: int(value * (1 - share)))


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "jpeg 30": lambda image: jpeg(image, 30),
    "jpeg 95": lambda image: jpeg(image, 95),
    "half as large": lambda image: resized(image, 0.5),
    "twice as large": lambda image: resized(image, 2),
    "cropped": lambda image: cropped(image, 0.02),
    "darker": lambda image: darker(image, 0.15),
    "darker, smaller and compressed": lambda image: darker(jpeg(resized(image, 0.7), 60), 0.1),
}


@pytest.mark.parametrize("change", COPIES)
def test_a_copy_of_a_photo_is_found_and_nothing_else_is(change: str) -> None:
    originals = [photo(seed) for seed in range(40)]
    pairs = near_duplicates(pictures([COPIES[change](image) for image in originals]), pictures(originals))
    assert pairs.mine_P.tolist() == pairs.other_P.tolist()
    assert len(pairs.mine_P) >= 38


@pytest.mark.parametrize("change", ["jpeg 30", "jpeg 95", "half as large", "twice as large", "darker"])
def test_a_copy_of_an_icon_is_found(change: str) -> None:
    originals = emoji()[::5]
    pairs = near_duplicates(pictures([COPIES[change](image) for image in originals]), pictures(originals))
    found = set(pairs.mine_P[pairs.mine_P == pairs.other_P].tolist())
    assert len(found) >= 0.97 * len(originals)


def test_different_icons_are_different_pictures() -> None:
    every = pictures(emoji())
    pairs = near_duplicates(every, every)
    assert np.count_nonzero(pairs.mine_P != pairs.other_P) <= 0.02 * len(every)


def test_a_changed_colour_is_another_picture() -> None:
    red, blue = (Image.new("RGB", (64, 64), "white") for _ in range(2))
    red.paste((220, 40, 40), (10, 10, 50, 54))
    blue.paste((40, 60, 220), (10, 10, 50, 54))
    assert not len(near_duplicates(pictures([red]), pictures([blue])).mine_P)


def test_pictures_of_another_shape_or_without_contrast_are_near_to_nothing() -> None:
    image = photo(1)
    assert not len(near_duplicates(pictures([image]), pictures([image.resize((120, 90))])).mine_P)
    flat = pictures([Image.new("RGB", (32, 32), (grey, grey, grey)) for grey in (0, 90, 91, 255)])
    assert not len(near_duplicates(flat, flat).mine_P)


@settings(max_examples=20)
@given(st.permutations(range(12)), st.permutations(range(12)))
def test_the_order_of_the_pictures_does_not_matter(mine: list[int], others: list[int]) -> None:
    originals, copies = [photo(seed, 32) for seed in range(12)], [jpeg(photo(seed, 32), 50) for seed in range(12)]
    pairs = near_duplicates(pictures([originals[n] for n in mine]), pictures([copies[n] for n in others]))
    assert {(mine[a], others[b]) for a, b in zip(pairs.mine_P, pairs.other_P, strict=True)} == {(n, n) for n in range(12)}


@settings(max_examples=20)
@given(st.integers(0, 99), st.integers(0, 99))
def test_the_distance_is_symmetric_and_none_to_itself(a: int, b: int) -> None:
    one, other = pictures([photo(a, 32)]).fingerprints_NB, pictures([photo(b, 32)]).fingerprints_NB
    assert distances(one, other) == pytest.approx(distances(other, one), rel=1e-4)
    assert distances(one, one)[0] == 0.0
    assert (distances(one, other)[0] <= NEAR) == (a == b)


def test_the_closest_is_found_among_more_look_alikes_than_are_looked_at_and_over_block_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_jobs.fingerprints.BLOCK_M", 7)
    monkeypatch.setattr("ray_jobs.fingerprints.BLOCK_N", 2)
    base, rng = photo(0, 64), np.random.default_rng(0)
    alike = [Image.blend(base, photo(int(seed), 64), 0.35) for seed in rng.integers(1, 10_000, 3 * CANDIDATES)]
    others = pictures([*alike[:50], base, *alike[50:]])
    pairs = near_duplicates(pictures([jpeg(base, 70)] * 3), others)
    assert {(n, 50) for n in range(3)} <= set(zip(pairs.mine_P.tolist(), pairs.other_P.tolist(), strict=True))


def test_nothing_against_nothing_is_nothing() -> None:
    none, some = pictures([]), pictures([photo(1)])
    assert [len(near_duplicates(a, b).mine_P) for a, b in ((none, some), (some, none), (none, none))] == [0, 0, 0]
