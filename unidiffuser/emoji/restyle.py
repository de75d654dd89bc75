"""MixStyle: feature statistics exchanged between pictures, so that a classifier of concepts ignores style."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..streams import draw_uniform


class Restyle:
    """MixStyle (Zhou et al., arXiv 2104.02008) as a forward hook of an early layer with outputs (B, C, H, W).

    The mean and deviation of early features carry the style of a picture, their layout the concept. An encoder trained on a
    concept with the statistics of every style recognises it in a style where it has never been trained on it. The hook does
    nothing outside `during`.
    """

    def __init__(self) -> None:
        self.fraction = 0.0
        self.generator: torch.Generator | None = None

    @contextmanager
    def during(self, fraction: float, generator: torch.Generator) -> Iterator[None]:
        """While this is open, statistics are exchanged for a fraction of the pictures of each batch."""
        self.fraction, self.generator = fraction, generator
        try:
            yield
        finally:
            self.generator = None

    def __call__(self, module: nn.Module, inputs: Any, x: Tensor) -> Tensor:
        if self.generator is None or not self.fraction:
            return x
        return exchanged(x.float(), self.fraction, self.generator).to(x.dtype)


def exchanged(x: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Features (B, C, H, W), a fraction of them with statistics between their own and those of another item."""
    count = len(x)
    other = torch.randperm(count, generator=generator, device=generator.device).to(x.device)
    # The weight of its own statistics has the arcsine distribution, Beta(1/2, 1/2): mostly near 0 or near 1.
    own = (draw_uniform((count,), generator) * (math.pi / 2)).sin().square()
    own = torch.where(draw_uniform((count,), generator) < fraction, own, 1.0).to(x)[:, None, None, None]
    mean, deviation = x.mean((2, 3), keepdim=True).detach(), (x.var((2, 3), keepdim=True) + 1e-6).sqrt().detach()
    return (x - mean) / deviation * torch.lerp(deviation[other], deviation, own) + torch.lerp(mean[other], mean, own)
