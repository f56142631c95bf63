"""Decode, resize and normalise on one core, against Pillow with torchvision's first transforms: python benchmarks/decode_and_resize.py

Arms interleaved, CPU seconds, the least of several repeats. Prints a table; writes JSON where --json names a file.
"""

from __future__ import annotations

import argparse
import io
import json
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from ray_jobs.features import pixels_of
from ray_jobs.preprocessing import normalise

EMOJI = Path(__file__).resolve().parent.parent / "examples" / "emoji-noto.zip"
MEAN = STD = (0.5, 0.5, 0.5)
Arm = Callable[[Sequence[bytes], int], object]


def torchvision_v1(images: Sequence[bytes], size: int) -> object:
    """What most code does."""
    steps = [transforms.Resize(size, InterpolationMode.BICUBIC), transforms.CenterCrop(size), transforms.ToTensor()]
    transform = transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])
    return torch.stack([transform(Image.open(io.BytesIO(data)).convert("RGB")) for data in images])


def ours(images: Sequence[bytes], size: int) -> object:
    """What features are computed from."""
    return normalise(pixels_of(images, image_size=size, max_pixels=10**8), MEAN, STD)


def photos(count: int, width: int, height: int) -> list[bytes]:
    """JPEG files with about as much in them as photographs have."""
    made = []
    for seed in range(count):
        coarse = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
        sink = io.BytesIO()
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(sink, "JPEG", quality=88)
        made.append(sink.getvalue())
    return made


def emoji(count: int) -> list[bytes]:
    with zipfile.ZipFile(EMOJI) as archive:
        return [archive.read(name) for name in archive.namelist()[:count]]


def measure(images: Sequence[bytes], size: int, repeats: int) -> dict[str, float]:
    """Milliseconds an image, by arm."""
    arms: dict[str, Arm] = {"torchvision v1": torchvision_v1, "ours": ours}
    least = dict.fromkeys(arms, float("inf"))
    for _ in range(repeats):
        for name, arm in arms.items():
            started = time.process_time()
            arm(images, size)
            least[name] = min(least[name], 1000 * (time.process_time() - started) / len(images))
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    share, repeats = (4, 3) if chosen.small else (1, 7)
    cases = {
        "emoji, PNG of 64 px, to 96": (emoji(256 // share), 96),
        "JPEG 500 x 375, to 224": (photos(64 // share, 500, 375), 224),
        "JPEG 1600 x 1200, to 224": (photos(12 // share, 1600, 1200), 224),
    }
    found = {name: measure(images, size, repeats) for name, (images, size) in cases.items()}
    print(f"{'ms an image, one core':<30}{'torchvision v1':>16}{'ours':>8}{'ratio':>8}")
    for name, ms in found.items():
        print(f"{name:<30}{ms['torchvision v1']:>16.2f}{ms['ours']:>8.2f}{ms['torchvision v1'] / ms['ours']:>8.2f}")
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
