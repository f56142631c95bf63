"""Compute what crosses every wanted cut for a range of images, in one forward pass. One bare process; no Ray.

Shapes: N images, H height, W width, B images of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ray_jobs.cuts import Cuts
from ray_jobs.preprocessing import decode, normalise, to_square

BATCH = 32


def pixels_of(images: Iterable[bytes], *, image_size: int, max_pixels: int) -> NDArray[np.uint8]:
    """pixels_NHWC of the decoded images, squared."""
    return np.stack([to_square(decode(data, max_pixels), image_size) for data in images])


@torch.inference_mode()
def features_of(
    cuts: Cuts | None, pixels_NHWC: NDArray[np.uint8], *, depths: Sequence[int], mean: Sequence[float], std: Sequence[float],
) -> Mapping[int, list[NDArray[Any]]]:  # fmt: skip
    """The values of each depth, a row an image: those that `cuts` was made for, and for any other depth the input itself, as pixels."""
    tapped = cuts.depths if cuts else ()
    out: dict[int, list[NDArray[Any]]] = {depth: [pixels_NHWC] for depth in depths if depth not in tapped}
    if cuts is None:
        return out
    like = next(cuts.model.parameters())
    parts: dict[int, list[tuple[torch.Tensor, ...]]] = {depth: [] for depth in tapped}
    for start in range(0, len(pixels_NHWC), BATCH):
        images_BCHW = torch.from_numpy(normalise(pixels_NHWC[start : start + BATCH], mean, std))
        images_BCHW = images_BCHW.to(like.device, like.dtype, memory_format=torch.channels_last)
        for depth, values in cuts.prefix(images_BCHW).items():
            parts[depth].append(tuple(values))
    for depth in tapped:
        out[depth] = [torch.cat(value).contiguous().cpu().numpy() for value in zip(*parts[depth], strict=True)]
    return out
