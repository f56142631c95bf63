"""Make a suffix train faster on a CPU: the same arithmetic by better kernels. Modules, parameters and their names stay.

What is replaced in the graph: linear layers and 1 x 1 convolutions on small maps (oneDNN's matrix product), depthwise
convolutions with large kernels (ray_jobs/depthwise.py), average pooling (its gradient in the convolutions' order of memory), and
batch norms that timm joins with a ReLU (one step for autograd, which then keeps one map less).
Shapes: B images, C channels, H height, W width, O channels out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.nn.functional import conv2d

from ray_jobs.cuts import Suffix
from ray_jobs.depthwise import depthwise, gains
from ray_jobs.products import has_onednn, linear

SMALL_MAP = 16
"""Positions up to which a 1 x 1 convolution is faster as a matrix product; beyond, its weight gradient is not (docs/LOG.md)."""
LARGE_MAP = 4096
"""The same in bfloat16."""


def speed_up(suffix: Suffix, *, mixed: bool = False) -> Suffix:
    """The same suffix, its graph changed in place; a second time does nothing. `mixed`: see products.linear."""
    if not has_onednn(next(suffix.parameters())):
        return suffix
    for node in list(suffix.graph.nodes):
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            _replace(suffix, node, suffix.get_submodule(str(node.target)), mixed)
        elif node.op == "call_method" and node.target == "mean" and tuple(node.args[1:]) in (((2, 3),), ([2, 3],)):
            _call(suffix.graph, node, _mean_over_map, (node.args[0], bool(node.kwargs.get("keepdim", False))))
    suffix.recompile()
    return suffix


def _replace(suffix: Suffix, node: fx.Node, module: nn.Module, mixed: bool) -> None:
    kind, source = type(module), node.args[0]
    if kind is nn.Linear and not any(user.op == "output" for user in node.users):  # heads.py looks for the classifier as a module
        _call(suffix.graph, node, linear, (source, *_parameters(suffix, node, module), mixed))
    elif isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
        _call(suffix.graph, node, _mean_over_map, (source, True))
    elif isinstance(module, BatchNormAct2d) and kind is BatchNormAct2d and _clamps(module) and isinstance(module.drop, nn.Identity):
        with suffix.graph.inserting_before(node):
            norm = suffix.graph.get_attr(str(node.target))
        _call(suffix.graph, node, _norm_act, (source, norm))
    elif isinstance(module, nn.Conv2d) and kind in (nn.Conv2d, Conv2dSame):
        parameters = _parameters(suffix, node, module)
        if gains(module) and module.stride[0] == module.stride[1]:
            function = _depthwise_same if kind is Conv2dSame else _depthwise
            _call(suffix.graph, node, function, (source, *parameters, module.stride[0], tuple(module.padding)))
        elif module.kernel_size == (1, 1) and module.stride == (1, 1) and module.groups == 1 and module.padding in ((0, 0), 0):
            _call(suffix.graph, node, _pointwise, (source, *parameters, mixed))


def _call(graph: fx.Graph, node: fx.Node, function: Callable[..., Tensor], args: tuple[Any, ...]) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(function, args)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _parameters(suffix: Suffix, node: fx.Node, module: nn.Module) -> tuple[fx.Node, fx.Node | None]:
    """Nodes that read the module's own weight and bias, by name."""
    with suffix.graph.inserting_before(node):
        weight = suffix.graph.get_attr(f"{node.target}.weight")
        return weight, None if module.bias is None else suffix.graph.get_attr(f"{node.target}.bias")


def _clamps(norm: BatchNormAct2d) -> tuple[float, float] | None:
    """The bounds of its activation, where that only clamps."""
    return {nn.ReLU: (0.0, float("inf")), nn.ReLU6: (0.0, 6.0)}.get(type(norm.act))


def _norm_act(images_BCHW: Tensor, norm: BatchNormAct2d) -> Tensor:
    bounds = _clamps(norm)
    out_BCHW: Tensor
    if norm.training and norm.num_batches_tracked is not None and norm.momentum is not None and norm.affine and bounds:
        norm.num_batches_tracked.add_(1)
        statistics = norm.running_mean, norm.running_var
        out_BCHW = _NormAct.apply(images_BCHW, norm.weight, norm.bias, *statistics, norm.momentum, norm.eps, *bounds)
    else:
        out_BCHW = norm(images_BCHW)
    return out_BCHW


class _NormAct(torch.autograd.Function):
    """Batch norm on the batch's statistics, then a clamp in place: its gradient can be told from the result, so nothing else is kept."""

    @staticmethod
    def forward(
        ctx: Any, images_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, mean_C: Tensor, var_C: Tensor, momentum: float, eps: float,
        low: float, high: float,
    ) -> Tensor:  # fmt: skip
        out_BCHW, *batch = torch.native_batch_norm(images_BCHW, weight_C, bias_C, mean_C, var_C, True, momentum, eps)
        out_BCHW.clamp_(low, high)
        ctx.save_for_backward(images_BCHW, weight_C, mean_C, var_C, out_BCHW, *batch)
        ctx.constants = eps, low, high
        return out_BCHW

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        images_BCHW, weight_C, mean_C, var_C, out_BCHW, *batch = ctx.saved_tensors
        eps, low, high = ctx.constants
        open_BCHW = torch.ops.aten.hardtanh_backward(gradients[0], out_BCHW, low, high)
        needs = list(ctx.needs_input_grad[:3])
        found = torch.ops.aten.native_batch_norm_backward(open_BCHW, images_BCHW, weight_C, mean_C, var_C, *batch, True, eps, needs)
        return *found, *[None] * 6


def _pointwise(images_BCHW: Tensor, weight_OC11: Tensor, bias_O: Tensor | None, mixed: bool) -> Tensor:
    batch, channels, height, width = images_BCHW.shape
    if height * width > (LARGE_MAP if mixed else SMALL_MAP) or not has_onednn(images_BCHW):
        return conv2d(images_BCHW, weight_OC11, bias_O)
    out_XO = linear(images_BCHW.permute(0, 2, 3, 1).reshape(-1, channels), weight_OC11.flatten(1), bias_O, mixed)
    return out_XO.view(batch, height, width, -1).permute(0, 3, 1, 2)


def _depthwise(images_BCHW: Tensor, weight_C1KK: Tensor, bias_C: Tensor | None, stride: int, padding: tuple[int, int]) -> Tensor:
    rows, columns = padding
    return depthwise(images_BCHW, weight_C1KK, bias_C, stride, (columns, columns, rows, rows))


def _depthwise_same(images_BCHW: Tensor, weight_C1KK: Tensor, bias_C: Tensor | None, stride: int, _: tuple[int, int]) -> Tensor:
    """TensorFlow's padding: as many outputs as inputs over the stride, the odd zero at the end."""
    borders: list[int] = []
    for size, kernel in zip(images_BCHW.shape[:1:-1], weight_C1KK.shape[:1:-1], strict=True):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        borders += [total // 2, total - total // 2]
    return depthwise(images_BCHW, weight_C1KK, bias_C, stride, (borders[0], borders[1], borders[2], borders[3]))


def _mean_over_map(images_BCHW: Tensor, keepdim: bool) -> Tensor:
    mean_BC11: Tensor = _MeanOverMap.apply(images_BCHW)
    return mean_BC11 if keepdim else mean_BC11.flatten(1)


class _MeanOverMap(torch.autograd.Function):
    """torch's own gives an expanded gradient, with which the norm and the activation before it are three times slower."""

    @staticmethod
    def forward(ctx: Any, images_BCHW: Tensor) -> Tensor:
        ctx.shape = images_BCHW.shape
        return images_BCHW.mean((2, 3), keepdim=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        share_BC11 = gradients[0] / (ctx.shape[2] * ctx.shape[3])
        gradient_BCHW: Tensor = share_BC11.expand(ctx.shape).contiguous(memory_format=torch.channels_last)
        return gradient_BCHW
