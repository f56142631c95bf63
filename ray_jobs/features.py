"""Compute what crosses every wanted cut for some images, in one forward pass. One bare process; no Ray.

Shapes: N images, H height, W width, B images of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_jobs import augment
from ray_jobs.cuts import Cuts
from ray_jobs.fast_prefix import Forward, Values, fast_prefix
from ray_jobs.images import shrink
from ray_jobs.preprocessing import decode, normalise, to_square
from ray_jobs.spec import Augmentation

BATCH = 32


def pixels_of(images: Iterable[bytes], *, image_size: int, max_pixels: int) -> NDArray[np.uint8]:
    """pixels_NHWC of the decoded images, squared: what val and serving see, view 0."""
    return np.stack([to_square(decode(data, max_pixels), image_size) for data in images])


def views_of(
    images: Sequence[tuple[str, bytes]], views: Sequence[int], *, image_size: int, max_pixels: int, augmentation: Augmentation,
) -> dict[int, NDArray[np.uint8]]:  # fmt: skip
    """pixels_NHWC of each view of some images, given with their sha256; each image is decoded once."""
    transform = augment.build(augmentation, image_size)
    out = {view: np.empty((len(images), image_size, image_size, 3), dtype=np.uint8) for view in views}
    for position, (sha256, data) in enumerate(images):
        decoded = decode(data, max_pixels)
        image_CHW = torch.from_numpy(np.array(shrink(decoded, image_size))).permute(2, 0, 1)
        for view in views:
            if view:
                seen_CHW = augment.seeded(transform, image_CHW, augment.seed_of_view(sha256, view))
                out[view][position] = seen_CHW.permute(1, 2, 0).numpy()
            else:
                out[view][position] = to_square(decoded, image_size)
    return out


class FrozenPrefix:
    """The shared pass over the images: every cut of a model at once, computed in the fastest way found on the first full batch."""

    def __init__(self, cuts: Cuts) -> None:
        self.cuts = cuts
        self._forward: Forward | None = None

    def __call__(self, images_BCHW: Tensor) -> Values:
        if self._forward is None:
            if len(images_BCHW) < BATCH:  # too few for a trial to pay
                few: Values = self.cuts.prefix(images_BCHW)
                return few
            self._forward = fast_prefix(self.cuts, images_BCHW)
        return self._forward(images_BCHW)


@torch.inference_mode()
def features_of(
    prefix: FrozenPrefix | None, pixels_NHWC: NDArray[np.uint8], *, depths: Sequence[int], mean: Sequence[float], std: Sequence[float],
) -> Mapping[int, list[NDArray[Any]]]:  # fmt: skip
    """The values of each depth, a row an image: those that `prefix` taps, and for any other depth the input itself, as pixels."""
    tapped = prefix.cuts.depths if prefix else ()
    out: dict[int, list[NDArray[Any]]] = {depth: [pixels_NHWC] for depth in depths if depth not in tapped}
    if prefix is None:
        return out
    like = next(prefix.cuts.model.parameters())
    parts: dict[int, list[tuple[torch.Tensor, ...]]] = {depth: [] for depth in tapped}
    for start in range(0, len(pixels_NHWC), BATCH):
        images_BCHW = torch.from_numpy(normalise(pixels_NHWC[start : start + BATCH], mean, std))
        images_BCHW = images_BCHW.to(like.device, like.dtype, memory_format=torch.channels_last)
        for depth, values in prefix(images_BCHW).items():
            parts[depth].append(tuple(values))
    for depth in tapped:
        out[depth] = [torch.cat(value).contiguous().cpu().numpy() for value in zip(*parts[depth], strict=True)]
    return out
