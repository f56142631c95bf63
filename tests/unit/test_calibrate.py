"""A calibration measures every depth of the search and leaves the model as it was."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import timm
import torch

from ray_jobs.calibrate import calibrate
from ray_jobs.groups import head_names, num_groups
from ray_jobs.plan import Workload, plan
from tests.small_data import CLASSES, draw


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet10t"])
def test_a_calibration_measures_each_depth_and_the_pixels_and_moves_no_weight(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    images = []
    for seed in range(8):
        draw(CLASSES[seed % 3], seed).save(data := io.BytesIO(), "png")
        images.append(data.getvalue())
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval().to(memory_format=torch.channels_last)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    known = calibrate(model, images, [0, 1, 2], image_size=32, max_pixels=10**6, mean=(0.5,) * 3, std=(0.5,) * 3, folder=tmp_path)
    assert set(known.depths) == {0, 1, 2, num_groups(model)}
    for key, tensor in model.state_dict().items():
        if key not in head_names(model):
            assert torch.equal(tensor, before[key]), key
    pixels = known.depths[num_groups(model)]
    assert pixels.prefix_s == 0
    assert pixels.size_bytes == 3 * 32 * 32
    costs = [known.depths[depth] for depth in (0, 1, 2)]
    assert [cost.frozen_s for cost in costs] == sorted(cost.frozen_s for cost in costs)
    assert all(cost.train_s > 0 and cost.size_bytes > 0 for cost in costs)
    assert costs[0].prefix_s >= costs[2].prefix_s > 0
    assert known.decode_s > 0
    assert known.read_bytes_per_s > 0
    assert not list(tmp_path.iterdir())
    assert plan(known, Workload({0: 4, 1: 4, 2: 4}, 8, 1000, 200)).estimated_s > 0
