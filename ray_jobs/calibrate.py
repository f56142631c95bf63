"""Measure, on real images, what the planner must know about one machine: a second or two. Torch, no Ray.

Shapes: B images, H height, W width, N rows.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ray_jobs.cuts import Cuts
from ray_jobs.fast_prefix import fast_prefix
from ray_jobs.fast_suffix import speed_up
from ray_jobs.features import pixels_of
from ray_jobs.groups import head_names, num_groups
from ray_jobs.heads import head_rows, train_heads
from ray_jobs.plan import Calibration, DepthCost
from ray_jobs.preprocessing import normalise
from ray_jobs.train_loop import OneCycle, Recipe, Rows

BATCH = 32
DECODED = 16
HEADS, STEPS = 32, 16
"""Heads trained together, and for how long, to know the cost of one."""
LONG_S = 0.25
"""What takes longer is measured by its first run alone."""
PROBE_BYTES = 16_000_000


def calibrate(
    model: nn.Module, images: Sequence[bytes], depths: Sequence[int], *, image_size: int, max_pixels: int,
    mean: Sequence[float], std: Sequence[float], folder: Path,
) -> Calibration:  # fmt: skip
    """The costs of these depths for a model (channels_last, on its device) and some of the images; `folder` is on the local tier.

    The model's tensors are as before afterwards.
    """
    started = time.perf_counter()
    sample = [images[i % len(images)] for i in range(BATCH)]
    decode_s = _seconds(lambda: pixels_of(sample[:DECODED], image_size=image_size, max_pixels=max_pixels)) / DECODED
    pixels_BHWC = pixels_of(sample, image_size=image_size, max_pixels=max_pixels)
    images_BCHW = torch.from_numpy(normalise(pixels_BHWC, mean, std))
    images_BCHW = images_BCHW.to(next(model.parameters()).device, memory_format=torch.channels_last)
    groups = num_groups(model)
    cuts = Cuts(model, sorted({0, groups, *depths}), image_size)
    costs = _costs(cuts, images_BCHW, sorted(set(depths)), pixels_BHWC.nbytes // BATCH)
    read, write = _bandwidth(folder)
    return Calibration(groups, costs, decode_s, read, write, time.perf_counter() - started)


def _costs(cuts: Cuts, images_BCHW: Tensor, wanted: Sequence[int], pixel_bytes: int) -> dict[int, DepthCost]:
    with torch.inference_mode():
        fast = fast_prefix(cuts, images_BCHW)
        whole_s = _seconds(lambda: fast(images_BCHW)) / BATCH
    with torch.no_grad():
        values = {depth: tuple(value.clone() for value in found) for depth, found in cuts.prefix(images_BCHW).items()}
    depths = sorted({*wanted, cuts.num_groups})
    measured = [_frozen(cuts, depth, values[depth]) for depth in depths]
    frozen_s = dict(zip(depths, accumulate(measured, max), strict=True))  # more groups never cost less
    sizes = {depth: sum(value[0].nbytes for value in values[depth]) for depth in depths} | {cuts.num_groups: pixel_bytes}
    costs = {}
    for depth in depths:
        prefix_s = (1 - frozen_s[depth] / frozen_s[cuts.num_groups]) * whole_s
        train_s = _trained(cuts, depth, values[depth]) if depth in wanted else 0.0
        costs[depth] = DepthCost(prefix_s, frozen_s[depth], train_s, sizes[depth])
    cuts.reset(0)
    return costs


def _frozen(cuts: Cuts, depth: int, values: Sequence[Tensor]) -> float:
    suffix = speed_up(cuts.suffix(depth))
    with torch.inference_mode():
        return _seconds(lambda: suffix(*values)) / BATCH


def _trained(cuts: Cuts, depth: int, values: Sequence[Tensor]) -> float:
    """Seconds of one image in a training step; at depth 0, of one head among many."""
    suffix = speed_up(cuts.suffix(depth))
    labels_B = torch.arange(BATCH, device=values[0].device) % 2
    many = Rows([value.repeat(STEPS + 1, *[1] * (value.ndim - 1)) for value in values], labels_B.repeat(STEPS + 1), STEPS * BATCH)
    if depth == 0 and (rows := head_rows(suffix, many)):
        head = {name: cuts.model.get_parameter(name).detach() for name in head_names(cuts.model)}
        recipes = [Recipe(1e-3 * (i + 1), 1, BATCH, 0.0, 0.0, None, 0) for i in range(HEADS)]
        return _seconds(lambda: train_heads(rows, head, recipes)) / BATCH / STEPS / HEADS
    optimizer = OneCycle(list(suffix.parameters()), peak_lr=1e-4, weight_decay=0.0, steps=100)
    suffix.train()

    def step() -> None:
        cross_entropy(suffix(*values), labels_B).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    seconds = _seconds(step) / BATCH
    suffix.eval()
    return seconds


def _seconds(work: Callable[[], object]) -> float:
    """The shortest of three runs; of one alone where it is long."""
    first = _once(work)
    return first if first > LONG_S else min(_once(work), _once(work))


def _once(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _bandwidth(folder: Path) -> tuple[float, float]:
    """Bytes a second read at random rows of a mapped file, and written with their digest."""
    rows_ND: NDArray[np.uint8] = np.random.default_rng(0).integers(0, 256, (PROBE_BYTES // 16_000, 16_000), dtype=np.uint8)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".npy") as file:
        started = time.perf_counter()
        np.save(file, rows_ND)
        file.flush()
        hashlib.sha256(rows_ND.data)
        write_s = time.perf_counter() - started
        mapped = torch.from_numpy(np.load(file.name, mmap_mode="c"))
        order_N = torch.randperm(len(mapped), generator=torch.Generator().manual_seed(0))
        read_s = _seconds(lambda: [mapped.index_select(0, some) for some in torch.split(order_N, BATCH)])
    return PROBE_BYTES / read_s, PROBE_BYTES / write_s
