"""Depthwise convolutions whose weight gradient is computed tap by tap, where oneDNN has no good kernel for it.

oneDNN's weight gradient of depthwise kernels larger than 3 x 3 takes 20 times the forward pass (docs/LOG.md); here each tap is a
product of two shifted views, summed. Shapes: B images, C channels, H height, W width, K x K taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from ray_jobs.products import has_onednn

LARGEST_MAP = 12 * 12
"""Positions of the output beyond which oneDNN is as fast."""

Padding = tuple[int, int, int, int]


def gains(conv: nn.Conv2d) -> bool:
    """Whether this is a kind of convolution that `depthwise` speeds up."""
    plain = conv.groups == conv.in_channels == conv.out_channels and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    return plain and max(conv.kernel_size) > 3 and not isinstance(conv.padding, str)


def depthwise(images_BCHW: Tensor, weight_C1KK: Tensor, bias_C: Tensor | None, stride: int, padding: Padding) -> Tensor:
    """conv2d over zeros to the left, right, top and bottom (as many or more to the right and bottom), one channel at a time."""
    out_BCHW: Tensor
    if not has_onednn(images_BCHW) or images_BCHW.shape[2] * images_BCHW.shape[3] > LARGEST_MAP * stride**2:
        out_BCHW = conv2d(pad(images_BCHW, padding), weight_C1KK, bias_C, stride, groups=len(weight_C1KK))
    else:
        out_BCHW = _Depthwise.apply(images_BCHW, weight_C1KK, stride, padding)
        if bias_C is not None:
            out_BCHW = out_BCHW + bias_C[:, None, None]
    return out_BCHW


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images_BCHW: Tensor, weight_C1KK: Tensor, stride: int, padding: Padding) -> Tensor:
        left, right, top, bottom = padding
        # more zeros on one side: a border on the small kernel says the same as one on all the images
        wide_C1KK = pad(weight_C1KK, (right - left, 0, bottom - top, 0)) if (left, top) != (right, bottom) else weight_C1KK
        ctx.save_for_backward(images_BCHW, weight_C1KK, wide_C1KK)
        ctx.stride, ctx.padding = stride, padding
        return conv2d(images_BCHW, wide_C1KK, None, stride, (bottom, right), groups=len(weight_C1KK))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        images_BCHW, weight_C1KK, wide_C1KK = ctx.saved_tensors
        gradient_BCHW = gradients[0].contiguous(memory_format=torch.channels_last)
        into_images, into_weight = None, None
        if ctx.needs_input_grad[0]:
            strides, inner = [ctx.stride] * 2, [ctx.padding[3], ctx.padding[1]]
            into_images = torch.ops.aten.convolution_backward(
                gradient_BCHW, images_BCHW, wide_C1KK, None, strides, inner, [1, 1], False, [0, 0], len(wide_C1KK), [True, False, False]
            )[0]
        if ctx.needs_input_grad[1]:
            into_weight = _weight_gradient(images_BCHW, weight_C1KK, gradient_BCHW, ctx.stride, ctx.padding)
        return into_images, into_weight, None, None


def _weight_gradient(images_BCHW: Tensor, weight_C1KK: Tensor, gradient_BCHW: Tensor, stride: int, padding: Padding) -> Tensor:
    """One tap after another: the images, shifted by the tap and thinned by the stride, times the gradient, summed."""
    images_BHWC, gradient_BHWC = images_BCHW.permute(0, 2, 3, 1), gradient_BCHW.permute(0, 2, 3, 1)
    height, width = weight_C1KK.shape[2:]
    rows = [_overlap(tap - padding[2], stride, images_BHWC.shape[1], gradient_BHWC.shape[1]) for tap in range(height)]
    columns = [_overlap(tap - padding[0], stride, images_BHWC.shape[2], gradient_BHWC.shape[2]) for tap in range(width)]
    found_KKC = weight_C1KK.new_zeros(height, width, len(weight_C1KK))
    for i, (rows_in, rows_out) in enumerate(rows):
        for j, (columns_in, columns_out) in enumerate(columns):
            if rows_out.stop > rows_out.start and columns_out.stop > columns_out.start:
                both_BHWC = images_BHWC[:, rows_in, columns_in] * gradient_BHWC[:, rows_out, columns_out]
                torch.sum(both_BHWC, (0, 1, 2), out=found_KKC[i, j])
    return found_KKC.permute(2, 0, 1).unsqueeze(1).to(memory_format=torch.channels_last)


def _overlap(shift: int, stride: int, size_in: int, size_out: int) -> tuple[slice, slice]:
    """Which inputs meet which outputs: input o * stride + shift meets output o."""
    first = max(0, -(shift // stride))
    last = min(size_out - 1, (size_in - 1 - shift) // stride)
    return slice(first * stride + shift, max(last, 0) * stride + shift + 1, stride), slice(first, last + 1)
