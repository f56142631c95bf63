"""From the bytes of an image file to what the backbone sees.

Self-contained (Pillow, numpy and torch only): a copy of this very file is shipped inside each served model, so that training and
serving cannot differ. Shapes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

# Only formats with a signature of their own and a decoder inside Pillow (MPO comes with JPEG): EPS would start Ghostscript, TGA
# claims any bytes.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF")
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+",
               b"\x00\x00\x00\x0cjP  ", b"\xff\x4f\xff\x51")  # fmt: skip
_END_MARKS = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PNG\r\n\x1a\n": b"IEND\xaeB`\x82", b"GIF87a": b";", b"GIF89a": b";"}
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_PIL_MODULES = re.compile(r"PIL\.")
_pixel_limit_lock = threading.Lock()


class BadImageError(ValueError):
    """One file that cannot be used; `reason` is empty, unsupported, unreadable, truncated or oversized."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class Decoded(NamedTuple):
    """A decoded image, upright and RGB, with the mode and format of its file."""

    image: Image.Image
    mode: str
    format: str


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """The upright RGB image in the bytes of a file. Raises BadImageError; never decompresses more than `max_pixels`."""
    return decode_file(data, max_pixels).image


def decode_file(data: bytes, max_pixels: int) -> Decoded:
    """As `decode`, with the mode and format of the file."""
    if not data:
        raise BadImageError("empty", "the file has no bytes")
    _silence_pillow()
    opened = _open(data, max_pixels)
    mode, file_format = opened.mode, opened.format or ""
    width, height = opened.size
    if width * height > max_pixels:
        raise BadImageError("oversized", f"{width} x {height} pixels, more than the limit of {max_pixels / 1e6:g} megapixels")
    try:
        opened.load()
        return Decoded(_to_rgb(_upright(opened)), mode, file_format)
    except BadImageError:
        raise
    except Exception as error:  # decoders raise anything on damaged bytes: OSError, SyntaxError, struct.error, zlib.error, ...
        raise _explained(error, data) from error


def to_square(image: Image.Image, image_size: int) -> np.ndarray:
    """The centre square of an RGB image as uint8 HWC: cropped, then resized to `image_size` (antialiased bicubic).

    torch's kernel resizes bytes as Pillow does, to within one level in 255, and three times as fast.
    """
    import torch  # here, because whoever only decodes does without

    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square_HWC = np.array(image.crop((left, top, left + side, top + side)), dtype=np.uint8)
    square_BCHW = torch.from_numpy(square_HWC).permute(2, 0, 1).unsqueeze(0)
    resized_BCHW = torch.nn.functional.interpolate(square_BCHW, (image_size, image_size), mode="bicubic", antialias=True)
    return resized_BCHW.squeeze(0).permute(1, 2, 0).contiguous().numpy()


def normalise(pixels_NHWC: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """uint8 NHWC pixels as the float32 NCHW input of a backbone: (x / 255 - mean) / std."""
    images_NCHW = np.ascontiguousarray(np.moveaxis(pixels_NHWC, -1, 1), dtype=np.float32)
    images_NCHW /= 255
    images_NCHW -= np.asarray(mean, dtype=np.float32)[:, None, None]
    images_NCHW /= np.asarray(std, dtype=np.float32)[:, None, None]
    return images_NCHW


def _open(data: bytes, max_pixels: int) -> Image.Image:
    try:
        try:
            return Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError as error:
            if Image.MAX_IMAGE_PIXELS is None or max_pixels <= 2 * Image.MAX_IMAGE_PIXELS:
                raise BadImageError("oversized", f"more than the limit of {max_pixels / 1e6:g} megapixels") from error
            with _without_pillow_limit():
                return Image.open(io.BytesIO(data), formats=FORMATS)
    except BadImageError:
        raise
    except Exception as error:  # as above: a damaged header raises anything
        raise _explained(error, data) from error


@contextmanager
def _without_pillow_limit() -> Iterator[None]:
    """Our own limit, which the caller checks before anything is decompressed, is above Pillow's; only the header is read here."""
    with _pixel_limit_lock:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _explained(error: Exception, data: bytes) -> BadImageError:
    """Why these bytes could not be decoded."""
    if isinstance(error, MemoryError | Image.DecompressionBombError):
        return BadImageError("oversized", str(error) or "too large for this machine's memory")
    if not _looks_like_an_image(data):
        return BadImageError("unsupported", f"not an image of a known format ({', '.join(FORMATS)})")
    if isinstance(error, EOFError) or "truncated" in str(error).lower() or _is_cut_short(data):
        return BadImageError("truncated", "the file ends before the image does")
    detail = "its header is damaged" if isinstance(error, UnidentifiedImageError) else f"{type(error).__name__}: {error}"
    return BadImageError("unreadable", detail)


def _looks_like_an_image(data: bytes) -> bool:
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    is_avif = data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis")
    is_ppm = data[:1] == b"P" and data[1:2] in b"123456" and data[2:3].isspace()
    return is_webp or is_avif or is_ppm or data.startswith(_SIGNATURES)


def _is_cut_short(data: bytes) -> bool:
    if data[:4] == b"RIFF":
        return len(data) < int.from_bytes(data[4:8], "little") + 8
    return any(data.startswith(start) and end not in data[-64:] for start, end in _END_MARKS.items())


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF, in as many ways as there are cameras; the pixels are still good
        turn = None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_as_bytes(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        white = Image.new("RGBA", with_alpha.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, with_alpha).convert("RGB")
    if image.mode == "LAB":
        raise BadImageError("unsupported", "the LAB colour mode; save it as RGB")
    return image.convert("RGB")


def _as_bytes(values_HW: np.ndarray) -> np.ndarray:
    """Grey values of more than 8 bits as uint8: 16-bit integers and floats in 0..1 by their full scale, others by their own range."""
    is_float = values_HW.dtype.kind == "f"
    values_HW = np.nan_to_num(values_HW.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(values_HW.min()), float(values_HW.max())
    full_scale = 1.0 if is_float else 65535.0
    if low >= 0 and high <= full_scale:
        low, high = 0.0, full_scale
    return np.round((values_HW - low) * (255 / max(high - low, 1e-12))).clip(0, 255).astype(np.uint8)


def _silence_pillow() -> None:
    """Pillow warns on odd metadata and on large images, which are judged here. A filter, not `catch_warnings`: that is not thread-safe."""
    ours = ("ignore", None, Warning, _PIL_MODULES, 0)
    if not warnings.filters or warnings.filters[0] != ours:
        warnings.filterwarnings("ignore", module=_PIL_MODULES.pattern)
