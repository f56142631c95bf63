"""Views of an image: the centre as serving sees it, the others fixed by the image's own content."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import torch

from ray_jobs.features import pixels_of, views_of
from tests.small_data import CLASSES, draw

SIZE, LIMIT = 32, 10**6


def images(count: int) -> list[tuple[str, bytes]]:
    made = []
    for seed in range(count):
        sink = io.BytesIO()
        draw(CLASSES[seed % 3], seed).save(sink, "PNG")
        made.append((hashlib.sha256(sink.getvalue()).hexdigest(), sink.getvalue()))
    return made


def test_a_view_depends_on_the_image_and_its_number_and_on_nothing_before_it() -> None:
    some = images(4)
    whole = views_of(some, [0, 1, 2], image_size=SIZE, max_pixels=LIMIT, augmentation="symbol")
    np.testing.assert_array_equal(whole[0], pixels_of([data for _, data in some], image_size=SIZE, max_pixels=LIMIT))
    torch.rand(7)
    alone = views_of(some[2:3], [2], image_size=SIZE, max_pixels=LIMIT, augmentation="symbol")
    np.testing.assert_array_equal(alone[2][0], whole[2][2])
    assert not np.array_equal(whole[1], whole[2])
    assert not np.array_equal(whole[0], whole[1])
