"""Matrix products by oneDNN, with gradients. On AMD processors MKL's, torch's own choice for linear layers, has half the speed.

Shapes: X rows, D features in, C features out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def has_onednn(like: Tensor) -> bool:
    """Whether oneDNN computes on tensors like this one: single precision on a CPU."""
    return like.dtype == torch.float32 and like.device.type == "cpu" and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def product(input_XD: Tensor, weight_CD: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """input @ weight.T + bias, without gradients. Views in any order of memory are read as they lie."""
    if not has_onednn(input_XD):
        return functional.linear(input_XD, weight_CD, bias_C)
    out_XC: Tensor = torch.ops.mkldnn._linear_pointwise(input_XD, weight_CD, bias_C, "none", [], "")
    return out_XC


def linear(input_XD: Tensor, weight_CD: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear, with gradients."""
    if not has_onednn(input_XD):
        return functional.linear(input_XD, weight_CD, bias_C)
    out_XC: Tensor = _Linear.apply(input_XD, weight_CD, bias_C)
    return out_XC


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_XD: Tensor, weight_CD: Tensor, bias_C: Tensor | None) -> Tensor:
        ctx.save_for_backward(input_XD, weight_CD)
        return product(input_XD, weight_CD, bias_C)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        input_XD, weight_CD = ctx.saved_tensors
        gradient_XC = gradients[0].flatten(0, -2)
        into_input = product(gradient_XC, weight_CD.t()).view_as(input_XD) if ctx.needs_input_grad[0] else None
        into_weight = product(gradient_XC.t(), input_XD.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None
        into_bias = gradient_XC.sum(0) if ctx.needs_input_grad[2] else None
        return into_input, into_weight, into_bias
