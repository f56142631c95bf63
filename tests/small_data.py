"""A small image classification task that anyone can learn: three shapes in noise, a folder for each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("circle", "square 🟦", "stripes")
SIDE = 40


def draw(label: str, seed: int) -> Image.Image:
    """One image of the class, its place and colour drawn from the seed."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 90, (SIDE, SIDE, 3), dtype=np.uint8))
    pen = ImageDraw.Draw(image)
    left, top = (int(v) for v in rng.integers(3, 12, 2))
    box = (left, top, left + 22, top + 22)
    colour = tuple(int(v) for v in rng.integers(150, 255, 3))
    if label == "circle":
        pen.ellipse(box, fill=colour)
    elif label == "stripes":
        for x in range(left, left + 22, 6):
            pen.rectangle((x, top, x + 2, top + 22), fill=colour)
    else:
        pen.rectangle(box, fill=colour)
    return image


def write_folder(root: Path, images_per_class: int = 30) -> Path:
    """A folder a class below `root`, PNG files within."""
    for number, label in enumerate(CLASSES):
        folder = root / label
        folder.mkdir(parents=True)
        for index in range(images_per_class):
            draw(label, 1000 * number + index).save(folder / f"{index:03d}.png")
    return root
