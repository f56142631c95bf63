"""The fast prefix gives the plain prefix's values, at every cut, and touches nothing of the model."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from ray_jobs.cuts import Cuts
from ray_jobs.fast_prefix import TOLERANCE, fast_prefix, folded, fused
from ray_jobs.groups import num_groups

SIZE = 48
NAMES = ["tf_efficientnet_lite0", "resnet18", "resnet10t", "mobilenetv3_small_050", "convnext_atto", "vit_tiny_patch16_224", "regnetx_002"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def cuts_of(name: str) -> Cuts:
    options: dict[str, Any] = {"img_size": SIZE} if name.startswith("vit") else {}
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=5, **options).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator) * (0.3 if tensor.ndim <= 1 else 0.02)
                tensor.add_(noise.abs() if key.endswith("running_var") else noise)
    return Cuts(model.to(memory_format=torch.channels_last), range(num_groups(model)), SIZE)


def images(batch: int) -> Tensor:
    images_BCHW = torch.randn((batch, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(2))
    return images_BCHW.contiguous(memory_format=torch.channels_last)


def assert_equal_values(found: Any, expected: Any) -> None:
    assert list(found) == list(expected)
    for depth, values in expected.items():
        for one, other in zip(found[depth], values, strict=True):
            assert one.shape == other.shape
            assert float((one - other).abs().max()) <= TOLERANCE * float(other.abs().max()), depth


@pytest.mark.parametrize("name", NAMES)
def test_a_rewritten_prefix_gives_the_same_values_at_every_cut_and_leaves_the_model_alone(name: str) -> None:
    cuts = cuts_of(name)
    before = {key: tensor.clone() for key, tensor in cuts.model.state_dict().items()}
    with torch.inference_mode():
        for rewritten in (folded(cuts.prefix), fused(cuts.prefix, images(4)), fast_prefix(cuts, images(4))):
            for batch in (1, 5):
                assert_equal_values(rewritten(images(batch)), cuts.prefix(images(batch)))
    for key, tensor in cuts.model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def test_every_norm_behind_a_convolution_is_gone_and_the_sums_are_inside() -> None:
    rewritten = fused(cuts_of("resnet18").prefix, images(2))
    kinds = {type(module).__name__ for module in rewritten.modules()}
    assert not kinds & {"BatchNorm2d", "ReLU", "Conv2d"}
    assert not any(node.op == "call_function" and "add" in str(node.target) for node in rewritten.graph.nodes)


def test_training_the_model_later_does_not_change_a_prefix_made_before() -> None:
    cuts = cuts_of("resnet10t")
    with torch.no_grad():
        expected = cuts.prefix(images(2))
        rewritten = folded(cuts.prefix)
        for parameter in cuts.model.parameters():
            parameter.mul_(2)
        assert_equal_values(rewritten(images(2)), expected)


@pytest.mark.parametrize(("slow_for", "chosen"), [(5, True), (1000, False)])
def test_a_busy_moment_does_not_decide_which_prefix_is_taken(monkeypatch: pytest.MonkeyPatch, slow_for: int, chosen: bool) -> None:
    """Two workers that chose otherwise would compute features that differ in the last digits."""
    cuts, looks = cuts_of("resnet10t"), iter(range(1000))

    def seconds(forward: Any, images_BCHW: Tensor) -> float:
        return 1.0 if forward is cuts.prefix or next(looks) >= slow_for else 2.0

    monkeypatch.setattr("ray_jobs.fast_prefix._seconds", seconds)
    assert (fast_prefix(cuts, images(4)) is not cuts.prefix) == chosen
