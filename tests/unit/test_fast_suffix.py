"""A suffix sped up trains to the same numbers: logits, gradients, statistics, in both modes."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from ray_jobs.cuts import Cuts
from ray_jobs.depthwise import depthwise
from ray_jobs.fast_suffix import speed_up
from ray_jobs.products import linear

SIZE = 96


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def close(one: Tensor, other: Tensor) -> bool:
    one, other = one.detach(), other.detach()
    return float((one - other).abs().max()) <= 1e-5 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("size", "kernel", "stride", "padding"), [
    (3, 5, 1, (2, 2, 2, 2)), (6, 5, 1, (2, 2, 2, 2)), (6, 5, 2, (1, 2, 1, 2)), (7, 5, 2, (2, 2, 2, 2)), (5, 7, 1, (3, 3, 3, 3)),
    (2, 7, 1, (3, 3, 3, 3)), (40, 5, 1, (2, 2, 2, 2)), (1, 5, 1, (2, 2, 2, 2)),
])  # fmt: skip
def test_a_depthwise_convolution_by_taps_is_the_ordinary_one_with_its_gradients(
    size: int, kernel: int, stride: int, padding: tuple[int, int, int, int], bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.randn((4, 16, size, size), generator=generator).contiguous(memory_format=torch.channels_last)
    weight_C1KK, bias_C = torch.randn((16, 1, kernel, kernel), generator=generator), torch.randn(16, generator=generator)
    found, expected = [], []
    for results, by_taps in ((found, True), (expected, False)):
        inputs = [images_BCHW.clone().requires_grad_(), weight_C1KK.clone().requires_grad_(), bias_C.clone().requires_grad_()]
        x, w, b = inputs[0], inputs[1], inputs[2] if bias else None
        out = depthwise(x, w, b, stride, padding) if by_taps else conv2d(pad(x, padding), w, b, stride, groups=16)
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        results += [out, *(value.grad for value in inputs if value.grad is not None)]
    assert len(found) == len(expected)
    assert all(close(one, other) for one, other in zip(found, expected, strict=True))


def test_a_linear_layer_by_onednn_has_torchs_values_and_gradients() -> None:
    torch.manual_seed(0)
    layer, input_BND = nn.Linear(24, 12), torch.randn(3, 5, 24)
    one, other = input_BND.clone().requires_grad_(), input_BND.clone().requires_grad_()
    found, expected = linear(one, layer.weight, layer.bias), layer(other)
    gradients = torch.autograd.grad(found.square().sum(), [one, layer.weight, layer.bias])
    wanted = torch.autograd.grad(expected.square().sum(), [other, layer.weight, layer.bias])
    assert close(found, expected)
    assert all(close(a, b) for a, b in zip(gradients, wanted, strict=True))


def suffix_and_values(name: str, depth: int) -> tuple[Any, list[Tensor], nn.Module]:
    torch.manual_seed(0)
    options: dict[str, Any] = {"img_size": SIZE} if name.startswith("vit") else {}
    model: nn.Module = timm.create_model(name, num_classes=5, **options).eval().to(memory_format=torch.channels_last)
    cuts = Cuts(model, [depth], SIZE)
    images_BCHW = torch.randn((8, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        values = [value.clone() for value in cuts.prefix(images_BCHW.contiguous(memory_format=torch.channels_last))[depth]]
    return cuts.suffix(depth), values, model


@pytest.mark.parametrize(("name", "depth"), [
    ("tf_efficientnet_lite0", 0), ("tf_efficientnet_lite0", 2), ("efficientnet_b0", 2), ("mobilenetv3_small_100", 3), ("resnet10t", 1),
    ("vit_tiny_patch16_224", 2), ("convnext_atto", 1),
])  # fmt: skip
def test_a_suffix_sped_up_gives_the_same_logits_gradients_and_statistics(name: str, depth: int) -> None:
    results = []
    for fast in (False, True):
        suffix, values, model = suffix_and_values(name, depth)
        names = [key for key, _ in suffix.named_parameters()]
        suffix = speed_up(speed_up(suffix)) if fast else suffix
        assert [key for key, _ in suffix.named_parameters()] == names
        suffix.train()
        torch.manual_seed(3)
        logits_NK = suffix(*values)
        nn.functional.cross_entropy(logits_NK, torch.arange(8) % 5).backward()
        gradients = {key: value.grad for key, value in suffix.named_parameters()}
        suffix.eval()
        with torch.inference_mode():
            judged_NK = suffix(*values)
        results.append((logits_NK, judged_NK, gradients, {key: value.clone() for key, value in model.named_buffers()}))
    (logits, judged, gradients, statistics), (fast_logits, fast_judged, fast_gradients, fast_statistics) = results
    assert close(fast_logits, logits)
    assert close(fast_judged, judged)
    assert gradients.keys() == fast_gradients.keys()
    for key, gradient in gradients.items():  # rounding may take a value across a kink of relu6, so not each entry by itself
        assert float((fast_gradients[key] - gradient).norm()) <= 1e-3 * float(gradient.norm()) + 1e-5, key
    assert all(close(fast_statistics[key].float(), statistics[key].float()) for key in statistics)


def test_the_suffix_of_lite0_keeps_no_slow_call() -> None:
    suffix = speed_up(suffix_and_values("tf_efficientnet_lite0", 2)[0])
    left = [suffix.get_submodule(str(node.target)) for node in suffix.graph.nodes if node.op == "call_module"]
    assert not any(isinstance(module, nn.AdaptiveAvgPool2d) for module in left)
    assert all(module.kernel_size == (3, 3) for module in left if isinstance(module, nn.Conv2d))
