"""The report's pictures: small ones, inside the page, and never an address that a browser would ask for."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

from ray_jobs import preprocessing
from tasks.report_words import Values

MOST_PIXELS = 100_000_000
DATA_URI = re.compile(r"data:image/(?:png|jpeg|webp|gif);base64,[A-Za-z0-9+/=]+")


def with_images(pictures: Sequence[Values]) -> list[dict[str, Any]]:
    """Pictures whose address is a picture inside this page; any other address becomes empty, so that the page asks nobody for it."""
    return [{**one, "image": inside(one.get("image"))} for one in pictures]


def inside(address: object) -> str:
    """The address, if it is a picture inside the page; else nothing."""
    return str(address) if DATA_URI.fullmatch(str(address or "")) else ""


def thumbnail(data: bytes, side: int = 96) -> str:
    """A small WebP of an image as a data URI; empty where the bytes are no image that can be read."""
    try:
        small = preprocessing.decode(data, MOST_PIXELS)
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        written = io.BytesIO()
        small.save(written, "WEBP", quality=82)
    except (preprocessing.BadImageError, OSError):  # a missing picture must not cost the report
        return ""
    return "data:image/webp;base64," + base64.b64encode(written.getvalue()).decode("ascii")
