"""The buffers that move while a fit trains (running statistics): a set for each share, whichever rank trains it.

A rank with several shares puts a share's set into the model before it trains a batch of it. So what comes out of an epoch does not
depend on how many workers there are.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

Tensors = dict[str, Tensor]


class ShareBuffers:
    """The sets of one rank's shares; the model itself holds that of the current share."""

    def __init__(self, model: nn.Module, shares: range, of: int) -> None:
        """The model is in training mode: what is frozen is not, and does not move."""
        modules = ((prefix, module) for prefix, module in model.named_modules() if module.training)
        named = [item for prefix, module in modules for item in module.named_buffers(prefix, recurse=False)]
        self.names, self.live = [name for name, _ in named], [buffer for _, buffer in named]
        self.shares, self.of, self.current = shares, of, shares[0]
        self.kept = {share: [buffer.clone() for buffer in self.live] for share in shares}

    def switch(self, share: int) -> None:
        """Put this share's set into the model."""
        if share != self.current and self.live:
            torch._foreach_copy_(self.kept[self.current], self.live)
            torch._foreach_copy_(self.live, self.kept[share])
        self.current = share

    def spread(self) -> None:
        """Every share goes on from what the model holds."""
        self.current = self.shares[0]
        for buffers in self.kept.values():
            _copy(buffers, self.live)

    def merge(self) -> None:
        """At the end of an epoch: the mean over all shares of all ranks, for every share. Each rank must call it."""
        if self.of > 1:
            _copy(self.kept[self.current], self.live)
            for number, buffer in enumerate(self.live):
                if buffer.is_floating_point():
                    buffer.copy_(summed(sum((self.kept[share][number] for share in self.shares[1:]), self.kept[self.shares[0]][number])))
                    buffer /= self.of
        self.spread()

    def gathered(self) -> Tensors:
        """The sets of all shares of all ranks, stacked by share, on the CPU. Each rank must call it."""
        _copy(self.kept[self.current], self.live)
        found = {}
        for number, name in enumerate(self.names):
            stacked = self.live[number].new_zeros((self.of, *self.live[number].shape))
            for share in self.shares:
                stacked[share] = self.kept[share][number]
            found[name] = summed(stacked).to("cpu", copy=True)
        return found

    def scatter(self, gathered: Tensors) -> None:
        """Put back what was gathered, by whatever number of ranks."""
        for share in self.shares:
            _copy(self.kept[share], [gathered[name][share] for name in self.names])
        self.current = self.shares[0]
        _copy(self.live, self.kept[self.current])


def summed(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    for left, right in zip(to, source, strict=True):
        left.copy_(right)
