"""Convolutions in place of CLIP's patch embedding, for image encoders that learn from thousands of pictures, not millions.

A transformer on plain patches has to learn from its pictures that a thing is the same thing a little further to the left;
a few convolutions know it (Xiao et al., "Early Convolutions Help Transformers See Better", arXiv 2106.14881).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]


def no_norm(channels: int) -> nn.Module:
    return nn.Identity()


class ConvBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al., arXiv 1512.03385); more channels come with half the side."""

    def __init__(self, inputs: int, channels: int, norm: Norm, ops: Any, **factory: Any):
        super().__init__()
        narrower = inputs != channels
        self.conv1 = ops.Conv2d(inputs, channels, 3, 2 if narrower else 1, 1, **factory)
        self.norm1 = norm(channels)
        self.conv2 = ops.Conv2d(channels, channels, 3, 1, 1, **factory)
        self.norm2 = norm(channels)
        if narrower:
            self.shortcut = ops.Conv2d(inputs, channels, 1, **factory)
            self.norm3 = norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if hasattr(self, "shortcut"):
            x = self.norm3(self.shortcut(F.avg_pool2d(x, 2)))
        return F.relu(x + h)


class ConvStem(nn.Module):
    """Pictures (B, 3, H, W) -> the features of patches (B, channels[-1], H/p, W/p).

    p is `unshuffle` times 2 for each change of `channels`, times `pool`.

    Args:
        unshuffle: side of the squares of pixels that become channels first.
        channels: of the first convolution and of each block after it; where they change, the side is halved.
        pool: side of the squares of places whose features are averaged in the end. Things keep their layout from one way of
            drawing them to another, but not their outlines: a few large patches generalise better than many small ones.
        norm: makes what follows each convolution: in training BatchNorm2d, which `fold_norms` takes in afterwards.
        operations: where Conv2d comes from: `torch.nn`, or a host's namespace of the same name.
    """

    def __init__(
        self,
        unshuffle: int,
        channels: Sequence[int],
        pool: int = 1,
        norm: Norm = no_norm,
        operations: Any = nn,
        **factory: Any,
    ):
        super().__init__()
        self.unshuffle, self.pool = unshuffle, pool
        self.conv = operations.Conv2d(3 * unshuffle**2, channels[0], 3, 1, 1, **factory)
        self.norm = norm(channels[0])
        self.blocks = nn.Sequential(*(ConvBlock(a, b, norm, operations, **factory) for a, b in pairwise(channels)))

    @property
    def weight(self) -> Tensor:
        """transformers asks the patch embedding's weight for its dtype."""
        weight: Tensor = self.conv.weight
        return weight

    def forward(self, pixels: Tensor) -> Tensor:
        x = F.pixel_unshuffle(pixels, self.unshuffle).contiguous(memory_format=torch.channels_last)
        x = self.blocks(F.relu(self.norm(self.conv(x))))
        return F.avg_pool2d(x, self.pool) if self.pool > 1 else x

    @torch.no_grad()
    def fold_norms(self) -> None:
        """Let each convolution do what the BatchNorm2d after it does with its running statistics, and drop those."""
        from torch.nn.utils.fusion import fuse_conv_bn_eval

        owners: list[tuple[nn.Module, str, str]] = [(self, "conv", "norm")]
        for block in self.blocks:
            owners += [(block, "conv1", "norm1"), (block, "conv2", "norm2")]
            owners += [(block, "shortcut", "norm3")] if hasattr(block, "shortcut") else []
        for owner, conv, norm in owners:
            if isinstance(getattr(owner, norm), nn.BatchNorm2d):
                setattr(owner, conv, fuse_conv_bn_eval(getattr(owner, conv).eval(), getattr(owner, norm).eval()))
                setattr(owner, norm, nn.Identity())
