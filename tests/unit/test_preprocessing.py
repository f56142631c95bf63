"""From file bytes to pixels: every mode and orientation, and each kind of bad file by its reason."""

from __future__ import annotations

import importlib.util
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch  # noqa: F401 - to_square loads it, which would count as the time of one example
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, features

from ray_jobs import preprocessing
from ray_jobs.preprocessing import BadImageError, decode, decode_file, normalise, to_square
from tests.strategies import encoded, png

LIMIT = 100_000_000
FORMATS = [("PNG", 0), ("JPEG", 8), ("WEBP", 8), ("GIF", 0), ("BMP", 0), ("TIFF", 0), ("PPM", 0), ("JPEG2000", 3)]


def photo(width: int = 40, height: int = 30) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, 255 - x * 255 // width], axis=-1).astype(np.uint8))


def reason_of(data: bytes, max_pixels: int = LIMIT) -> str:
    with pytest.raises(BadImageError) as caught:
        decode(data, max_pixels)
    assert str(caught.value).startswith(caught.value.reason + ": ")
    return caught.value.reason


def outcome(data: bytes, max_pixels: int) -> str:
    try:
        return decode(data, max_pixels).mode
    except BadImageError as error:
        return error.reason


def huge_png(width: int, height: int) -> bytes:
    """A PNG that claims to be this large; its header is sound, its pixels are missing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(("file_format", "tolerance"), FORMATS)
def test_each_format_decodes_to_the_pixels_that_were_saved(file_format: str, tolerance: int) -> None:
    flat = Image.new("RGB", (17, 9), (200, 100, 51))
    decoded = decode_file(encoded(flat, file_format), LIMIT)
    assert (decoded.image.mode, decoded.image.size, decoded.format) == ("RGB", (17, 9), file_format)
    assert np.abs(np.asarray(decoded.image).astype(int) - np.asarray(flat)).max() <= tolerance


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_decodes() -> None:
    assert decode(encoded(photo(), "AVIF"), LIMIT).size == (40, 30)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_once(orientation: int, file_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(), file_format, exif=exif)
    with Image.open(io.BytesIO(data)) as plain:
        expected = ImageOps.exif_transpose(plain).convert("RGB")
    result = decode(data, LIMIT)
    assert result.size == ((30, 40) if orientation >= 5 else (40, 30))
    assert np.array_equal(np.asarray(result), np.asarray(expected))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 255)), (255, 0, 0)),
        (Image.new("LA", (2, 2), (0, 0)), (255, 255, 255)),
        (Image.new("L", (2, 2), 7), (7, 7, 7)),
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
        (Image.new("I;16", (2, 2), 0x8080), (128, 128, 128)),
        (Image.new("I", (2, 2), 65535), (255, 255, 255)),
        (Image.new("F", (2, 2), 0.2), (51, 51, 51)),
        (Image.new("CMYK", (2, 2), (0, 0, 0, 255)), (0, 0, 0)),
        (Image.new("RGB", (2, 2), (1, 2, 3)).convert("P", palette=Image.Palette.ADAPTIVE), (1, 2, 3)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_each_mode_becomes_rgb_with_transparency_on_white(image: Image.Image, expected: tuple[int, int, int]) -> None:
    file_format = "TIFF" if image.mode in ("I", "F", "CMYK") else "PNG"
    assert decode(encoded(image, file_format), LIMIT).getpixel((0, 0)) == expected


def test_a_palette_with_a_transparent_colour_is_composited_on_white() -> None:
    image = Image.new("P", (2, 2), 0)
    image.putpalette([10, 20, 30])
    assert decode(encoded(image, "PNG", transparency=0), LIMIT).getpixel((1, 1)) == (255, 255, 255)
    assert decode(encoded(image, "PNG", transparency=bytes([0])), LIMIT).getpixel((1, 1)) == (255, 255, 255)


def test_of_an_animation_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data, LIMIT).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    "data",
    [b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", bytes(64), b"\x00\x00\x00\x18ftypmp42" + bytes(40), b"%!PS-Adobe-3.0 EPSF"],
)
def test_what_is_no_image_is_unsupported(data: bytes) -> None:
    assert reason_of(data) == "unsupported"


def test_a_file_without_bytes_is_empty() -> None:
    assert reason_of(b"") == "empty"


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
def test_a_file_that_ends_early_is_truncated(file_format: str, share: float) -> None:
    data = encoded(Image.effect_noise((64, 64), 100).convert("RGB"), file_format)
    assert reason_of(data[: int(len(data) * share)]) in ({"truncated"} if file_format != "TIFF" else {"truncated", "unreadable"})


def test_an_image_that_breaks_after_its_signature_is_unreadable() -> None:
    data = bytearray(png())
    data[12:16] = b"XXXX"
    assert reason_of(bytes(data)) == "unreadable"


@pytest.mark.parametrize("side", [1_001, 10_000, 14_000, 60_000])
def test_a_decompression_bomb_is_oversized_and_never_decompressed(side: int) -> None:
    assert reason_of(huge_png(side, 1000), max_pixels=1_000_000) == "oversized"


def test_a_limit_above_pillows_own_is_honoured_and_pillows_stays_as_it_was() -> None:
    before = Image.MAX_IMAGE_PIXELS
    assert reason_of(huge_png(20_000, 20_000), max_pixels=500_000_000) != "oversized"  # past the size check: its pixels are missing
    assert reason_of(huge_png(30_000, 20_000), max_pixels=500_000_000) == "oversized"
    assert before == Image.MAX_IMAGE_PIXELS


def test_pillow_warnings_do_not_leak() -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0\x01" * 3  # a directory of 65535 entries that is not there
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(encoded(photo(), "JPEG", exif=exif), LIMIT).size == (40, 30)
        assert reason_of(huge_png(10_000, 10_000)) in {"unreadable", "truncated"}  # Pillow alone warns above 89 megapixels


SIGNATURES = [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"RIFF\0\0\0\0WEBP", b"P6 "]


@given(st.binary(max_size=64), st.sampled_from(SIGNATURES))
def test_no_bytes_whatsoever_raise_anything_else(rest: bytes, start: bytes) -> None:
    assert outcome(start + rest, 10_000) in {"RGB", "empty", "unsupported", "unreadable", "truncated", "oversized"}


@given(st.integers(0, 400), st.integers(0, 255), st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]))
def test_a_damaged_byte_gives_an_image_or_a_reason(position: int, value: int, file_format: str) -> None:
    data = bytearray(encoded(photo(12, 9), file_format))
    data[position % len(data)] = value
    assert outcome(bytes(data), 1_000_000) in {"RGB", "unsupported", "unreadable", "truncated", "oversized"}


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([16, 32, 33]))
def test_any_image_becomes_a_square_that_can_be_written_to(width: int, height: int, image_size: int) -> None:
    pixels_HWC = to_square(photo(width, height), image_size)
    assert pixels_HWC.shape == (image_size, image_size, 3)
    assert pixels_HWC.dtype == np.uint8
    assert pixels_HWC.flags.writeable  # torch.from_numpy warns otherwise


@given(st.integers(1, 40), st.integers(1, 4), st.sampled_from([16, 32, 64]), st.booleans())
def test_the_square_is_the_centre_of_the_image_resized(side: int, times: int, image_size: int, upright: bool) -> None:
    width, height = (side, side * times) if upright else (side * times, side)
    left, top = (width - side) // 2, (height - side) // 2
    centre = photo(width, height).crop((left, top, left + side, top + side))
    expected = np.asarray(centre.resize((image_size, image_size), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(to_square(photo(width, height), image_size) - expected).max() <= 1  # the two kernels round apart


def test_a_square_image_is_just_resized() -> None:
    expected = photo(50, 50).resize((24, 24), Image.Resampling.BICUBIC)
    assert np.abs(to_square(photo(50, 50), 24) - np.asarray(expected).astype(int)).max() <= 1


def test_an_extremely_long_image_needs_no_long_intermediate() -> None:
    assert to_square(Image.new("RGB", (60_000, 1), (9, 9, 9)), 224).max() == 9


def test_normalise_is_the_definition() -> None:
    pixels_NHWC = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 3), dtype=np.uint8)
    before, mean, std = pixels_NHWC.copy(), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images_NCHW = normalise(pixels_NHWC, mean, std)
    expected = ((pixels_NHWC / 255 - mean) / std).transpose(0, 3, 1, 2)
    assert images_NCHW.dtype == np.float32
    assert images_NCHW.flags.c_contiguous
    np.testing.assert_allclose(images_NCHW, expected, rtol=1e-5, atol=1e-6)
    assert np.array_equal(pixels_NHWC, before)


def test_a_copy_of_the_file_works_by_itself(tmp_path: Path) -> None:
    copy = tmp_path / "shipped.py"
    copy.write_text(Path(preprocessing.__file__).read_text())
    spec = importlib.util.spec_from_file_location("shipped", copy)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.decode(png(0x010203), LIMIT).getpixel((0, 0)) == (1, 2, 3)
