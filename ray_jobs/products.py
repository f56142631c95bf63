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


def linear(input_XD: Tensor, weight_CD: Tensor, bias_C: Tensor | None = None, mixed: bool = False) -> Tensor:
    """torch.nn.functional.linear, with gradients. `mixed`: factors rounded to bfloat16 (sums stay in float32)."""
    if not has_onednn(input_XD):
        return functional.linear(input_XD, weight_CD, bias_C)
    out_XC: Tensor = _Linear.apply(input_XD, weight_CD, bias_C, mixed)
    return out_XC


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16 (AVX-512 BF16 or AMX): twice as fast, or more."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_XD: Tensor, weight_CD: Tensor, bias_C: Tensor | None, mixed: bool) -> Tensor:
        ctx.mixed = mixed
        input_XD, weight_CD = _rounded(input_XD, mixed), _rounded(weight_CD, mixed)
        ctx.save_for_backward(input_XD, weight_CD)
        return _product(input_XD, weight_CD, bias_C)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        input_XD, weight_CD = ctx.saved_tensors
        exact_XC = gradients[0].flatten(0, -2)
        gradient_XC = _rounded(exact_XC, ctx.mixed)
        into_input = _product(gradient_XC, weight_CD.t()).view(input_XD.shape) if ctx.needs_input_grad[0] else None
        into_weight = _product(gradient_XC.t(), input_XD.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None
        into_bias = exact_XC.sum(0) if ctx.needs_input_grad[2] else None
        return into_input, into_weight, into_bias, None


def _rounded(value: Tensor, mixed: bool) -> Tensor:
    return value.to(torch.bfloat16) if mixed else value


def _product(input_XD: Tensor, weight_CD: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """In float32, whatever the factors are."""
    bias_C = None if bias_C is None else bias_C.to(input_XD.dtype)
    out_XC: Tensor = torch.ops.mkldnn._linear_pointwise(input_XD, weight_CD, bias_C, "none", [], "")
    return out_XC.float()
