"""A frozen prefix for inference alone: BatchNorm folded into convolutions, activations and sums done inside them. Torch only.

The graph of ray_jobs/cuts.py's prefix is rewritten on copies; the model's own tensors stay as they are. The first
candidate whose values equal the plain prefix's on real images is used. Shapes: B images, C channels, H height, W width.
"""

from __future__ import annotations

import copy
import operator
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.nn.functional import pad
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ray_jobs.cuts import Cuts, Prefix
from ray_jobs.products import has_onednn

TOLERANCE = 1e-4
"""Largest difference in fp32, relative to the largest value of the cut."""
TOLERANCE_BF16 = 5e-2
MOST_TRIES = 12
CLEARLY_SLOWER = 1.25
PLAIN = {nn.BatchNorm2d, BatchNormAct2d, nn.Conv2d, Conv2dSame}
"""Kinds whose arithmetic is known; a subclass may do anything."""

Activation = tuple[str, list[float], str]
"""oneDNN's name, numbers and algorithm."""
NO_ACTIVATION: Activation = ("none", [], "")

Values = Mapping[int, tuple[Tensor, ...]]
Forward = Callable[[Tensor], Values]


def fast_prefix(cuts: Cuts, images_BCHW: Tensor) -> Forward:
    """A faster way to compute what `cuts.prefix` computes: the first candidate that agrees with it on these images (a full batch, on
    the model's device) and is not clearly slower.

    Not the fastest by a hair: two workers, or a search and its restart, must come to the same choice, or their features differ in the
    last digits.
    """
    plain = cuts.prefix
    tolerance = TOLERANCE_BF16 if images_BCHW.is_cuda else TOLERANCE
    with torch.inference_mode():
        expected = plain(images_BCHW)
        for make in _candidates(images_BCHW):
            try:
                forward = make(plain)
                if not _agrees(forward(images_BCHW), expected, tolerance):
                    continue
            except (RuntimeError, TypeError):  # an operation that oneDNN does not have for these shapes: no candidate
                continue
            if not _is_clearly_slower(forward, plain, images_BCHW):
                return forward
    return plain


def folded(prefix: Prefix) -> fx.GraphModule:
    """The prefix with every BatchNorm that directly follows a convolution folded into it."""
    fast = _Rewriting(prefix)
    fast.fold_norms()
    return fast.done()


def fused(prefix: Prefix, images_BCHW: Tensor) -> fx.GraphModule:
    """The folded prefix with activations and residual sums inside oneDNN's convolutions; for channels_last fp32 on a CPU."""
    fast = _Rewriting(prefix)
    fast.fold_norms()
    fast.fuse_products(images_BCHW)
    return fast.done()


def _candidates(images_BCHW: Tensor) -> list[Callable[[Prefix], Forward]]:
    """Best first, as measured on several families (docs/LOG.md)."""
    if images_BCHW.is_cuda:
        return [lambda prefix: _in_bf16(folded(prefix)), folded]
    if has_onednn(images_BCHW):
        return [lambda prefix: fused(prefix, images_BCHW), folded]
    return [folded]


def _in_bf16(forward: Forward) -> Forward:
    def in_bf16(images_BCHW: Tensor) -> Values:
        with torch.autocast("cuda", torch.bfloat16):
            found = forward(images_BCHW)
        return {depth: tuple(value.to(images_BCHW.dtype) for value in values) for depth, values in found.items()}

    return in_bf16


def _agrees(found: Values, expected: Values, tolerance: float) -> bool:
    pairs = [pair for depth in expected for pair in zip(found[depth], expected[depth], strict=True)]
    return all(a.dtype == b.dtype and float((a - b).abs().max()) <= tolerance * float(b.abs().max()) for a, b in pairs)


def _is_clearly_slower(forward: Forward, plain: Forward, images_BCHW: Tensor) -> bool:
    """Whether its best run is, in each of many taken in turns: a busy moment must not decide. Both have run before."""
    best_s, plain_s = float("inf"), float("inf")
    for _ in range(MOST_TRIES):
        best_s = min(best_s, _seconds(forward, images_BCHW))
        plain_s = min(plain_s, _seconds(plain, images_BCHW))
        if best_s < CLEARLY_SLOWER * plain_s:
            return False
    return True


def _seconds(forward: Forward, images_BCHW: Tensor) -> float:
    started = time.perf_counter()
    forward(images_BCHW)
    if images_BCHW.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


class _Conv(nn.Module):
    """A convolution of oneDNN with what follows it: + `other`, then an activation, before the output leaves the registers."""

    def __init__(self, conv: nn.Conv2d, padding: tuple[int, int, int, int]) -> None:
        super().__init__()
        left, right, top, bottom = padding
        weight = conv.weight.detach()
        self.outer: tuple[int, int, int, int] | None = None
        self.padding = [max(top, bottom), max(left, right)]
        if (left, top) != (right, bottom):
            if conv.groups > 1 and left <= right and top <= bottom:
                # a depthwise kernel takes a border of zeros more cheaply than the image takes a copy with a border
                weight = pad(weight, (right - left, 0, bottom - top, 0))
            else:
                self.outer, self.padding = padding, [0, 0]
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach(), requires_grad=False)
        self.stride, self.dilation, self.groups = list(conv.stride), list(conv.dilation), conv.groups
        self.activation: Activation = NO_ACTIVATION

    def forward(self, images_BCHW: Tensor, other_BCHW: Tensor | None = None) -> Tensor:
        if self.outer is not None:
            images_BCHW = pad(images_BCHW, self.outer)
        name, scalars, algorithm = self.activation
        where = (self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups)
        convolve: Any = torch.ops.mkldnn._convolution_pointwise
        if other_BCHW is None:
            out_BCHW: Tensor = convolve(images_BCHW, *where, name, scalars, algorithm)
        else:
            unary = None if name == "none" else name
            out_BCHW = convolve.binary(images_BCHW, other_BCHW, *where, "add", 1.0, unary, scalars, algorithm)
        return out_BCHW


class _Linear(nn.Module):
    """A linear layer of oneDNN with the activation behind it: MKL's, torch's own choice, has half the speed on AMD processors."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.activation: Activation = NO_ACTIVATION

    def forward(self, input_XD: Tensor) -> Tensor:
        out_XC: Tensor = torch.ops.mkldnn._linear_pointwise(input_XD, self.weight, self.bias, *self.activation)
        return out_XC


class _Rewriting:
    """A copy of a prefix's graph, its modules replaced one by one."""

    def __init__(self, prefix: Prefix) -> None:
        self.graph = fx.Graph()
        self.graph.output(self.graph.graph_copy(prefix.graph, {}))
        self.modules = {str(node.target): prefix.get_submodule(str(node.target)) for node in self.graph.nodes if node.op == "call_module"}
        self.source = prefix

    def done(self) -> fx.GraphModule:
        root = nn.Module()
        attributes = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        found = {**self.modules, **{name: operator.attrgetter(name)(self.source) for name in attributes}}
        flat = {name: name.replace(".", "_") for name in found}
        for node in self.graph.nodes:
            if node.op in ("call_module", "get_attr"):
                node.target = flat[str(node.target)]
        used = {str(node.target) for node in self.graph.nodes}
        for name, value in found.items():
            if flat[name] in used:
                setattr(root, flat[name], value)
        self.graph.lint()
        return fx.GraphModule(root, self.graph, "FastPrefix")

    def fold_norms(self) -> None:
        for node in list(self.graph.nodes):
            norm, conv = self._module(node), self._module(node.args[0]) if node.args else None
            if not isinstance(norm, nn.BatchNorm2d) or not isinstance(conv, nn.Conv2d) or {type(norm), type(conv)} - PLAIN:
                continue
            if not self._is_private(node.args[0]) or not self._is_called_once(node):
                continue
            self.modules[str(node.args[0].target)] = fuse_conv_bn_eval(conv, norm)
            if isinstance(norm, BatchNormAct2d) and not isinstance(norm.act, nn.Identity):
                self.modules[str(node.target)] = norm.act
            else:
                self._replace(node, node.args[0])

    def fuse_products(self, images_BCHW: Tensor) -> None:
        sizes = _input_sizes(self, images_BCHW)
        for node in list(self.graph.nodes):
            conv = self._module(node)
            if isinstance(conv, nn.Conv2d) and type(conv) in PLAIN and (padding := _padding(conv, sizes[node])) is not None:
                self.modules[str(node.target)] = _Conv(conv, padding)
            elif isinstance(conv, nn.Linear) and type(conv) is nn.Linear:
                self.modules[str(node.target)] = _Linear(conv)
        for node in list(self.graph.nodes):
            if node.target in (operator.add, operator.iadd, torch.add) and not node.kwargs:
                self._sum_inside(node)
            elif (activation := _activation(self._module(node))) is not None:
                self._activate_inside(node, activation)

    def _sum_inside(self, node: fx.Node) -> None:
        order = {other: i for i, other in enumerate(self.graph.nodes)}
        sides = [side for side in node.args if isinstance(side, fx.Node)]
        if len(sides) != 2:
            return
        for conv, other in (sides, sides[::-1]):
            module = self._module(conv)
            if isinstance(module, _Conv) and len(conv.args) == 1 and module.activation == NO_ACTIVATION and self._is_private(conv):
                if order[other] > order[conv]:
                    node.prepend(conv)
                conv.args = (conv.args[0], other)
                self._replace(node, conv)
                return

    def _activate_inside(self, node: fx.Node, activation: Activation) -> None:
        conv: Any = node.args[0]
        module = self._module(conv)
        if isinstance(module, _Conv | _Linear) and module.activation == NO_ACTIVATION and self._is_private(conv):
            module.activation = activation
            self._replace(node, conv)

    def _replace(self, node: fx.Node, by: Any) -> None:
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)

    def _module(self, node: Any) -> nn.Module | None:
        return self.modules[str(node.target)] if isinstance(node, fx.Node) and node.op == "call_module" else None

    def _is_private(self, node: fx.Node) -> bool:
        """Nobody else sees this value, and its module is called nowhere else."""
        return len(node.users) == 1 and self._is_called_once(node)

    def _is_called_once(self, node: fx.Node) -> bool:
        return [other.target for other in self.graph.nodes].count(node.target) == 1


def _activation(module: nn.Module | None) -> Activation | None:
    """oneDNN's words for an activation that it has."""
    match module:
        case nn.ReLU6():
            return "hardtanh", [0.0, 6.0], ""
        case nn.Hardtanh():
            return "hardtanh", [module.min_val, module.max_val], ""
        case nn.ReLU():
            return "relu", [], ""
        case nn.SiLU():
            return "swish", [], ""
        case nn.Hardswish():
            return "hardswish", [], ""
        case nn.GELU():
            return "gelu", [], module.approximate
    return None


def _padding(conv: nn.Conv2d, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """Zeros to the left, right, top and bottom, as torch.nn.functional.pad takes them; None where they are not plain zeros."""
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return None
    if not isinstance(conv, Conv2dSame):
        rows, columns = conv.padding
        return columns, columns, rows, rows
    found: list[int] = []
    for side, kernel, stride, dilation in zip(size[::-1], conv.kernel_size[::-1], conv.stride[::-1], conv.dilation[::-1], strict=True):
        total = max((-(-side // stride) - 1) * stride + (kernel - 1) * dilation + 1 - side, 0)
        found += [total // 2, total - total // 2]
    return found[0], found[1], found[2], found[3]


def _input_sizes(rewriting: _Rewriting, images_BCHW: Tensor) -> dict[fx.Node, tuple[int, int]]:
    """The height and width that reach each module whose input is a map."""
    sizes: dict[fx.Node, tuple[int, int]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n.op == "call_module":
                value = self.fetch_args_kwargs_from_env(n)[0][0]
                if isinstance(value, Tensor) and value.ndim == 4:
                    sizes[original[n.name]] = (value.shape[2], value.shape[3])
            return super().run_node(n)

    original = {node.name: node for node in rewriting.graph.nodes}
    twin = copy.copy(rewriting)
    twin.graph = fx.Graph()
    twin.graph.output(twin.graph.graph_copy(rewriting.graph, {}))
    Recorder(twin.done()).run(images_BCHW[:1])
    return sizes
