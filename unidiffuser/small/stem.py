"""Convolutions in place of CLIP's patch embedding, for image encoders that learn from thousands of pictures, not millions.

Convolutions have the translation equivariance that a transformer on plain patches has to learn (Xiao et al., "Early
Convolutions Help Transformers See Better", arXiv 2106.14881).
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
    """No normalisation, in place of one."""
    return nn.Identity()


class ConvBlock(nn.Module):
    """Residual block of two 3x3 convolutions (He et al., arXiv 1512.03385); halves the sides where channels change."""

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
    """Patch embedding by convolutions: pictures (B, 3, H, W) -> features (B, channels[-1], H/p, W/p).

    p is `unshuffle` times 2 for each change of `channels`, times `pool`.

    Args:
        unshuffle: side of the squares of pixels folded into channels first.
        channels: widths of the first convolution and of each block after it; the sides are halved where they change.
        pool: side of the squares of positions averaged at the end. Across styles things keep their layout but not their
            outlines, so a few large patches generalise better than many small ones.
        norm: makes the layer after each convolution; BatchNorm2d in training, which `fold_norms` merges afterwards.
        operations: namespace of Conv2d: `torch.nn`, or a host's.
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
        """Read by transformers for the dtype of its inputs."""
        weight: Tensor = self.conv.weight
        return weight

    def forward(self, pixels: Tensor) -> Tensor:
        x = F.pixel_unshuffle(pixels, self.unshuffle).contiguous(memory_format=torch.channels_last)
        x = self.blocks(F.relu(self.norm(self.conv(x))))
        return F.avg_pool2d(x, self.pool) if self.pool > 1 else x

    @torch.no_grad()
    def fold_norms(self) -> None:
        """Merge each BatchNorm2d, with its running statistics, into the convolution before it."""
        from torch.nn.utils.fusion import fuse_conv_bn_eval

        owners: list[tuple[nn.Module, str, str]] = [(self, "conv", "norm")]
        for block in self.blocks:
            owners += [(block, "conv1", "norm1"), (block, "conv2", "norm2")]
            owners += [(block, "shortcut", "norm3")] if hasattr(block, "shortcut") else []
        for owner, conv, norm in owners:
            if isinstance(getattr(owner, norm), nn.BatchNorm2d):
                setattr(owner, conv, fuse_conv_bn_eval(getattr(owner, conv).eval(), getattr(owner, norm).eval()))
                setattr(owner, norm, nn.Identity())
