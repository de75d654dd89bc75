"""MixStyle: while an encoder learns what pictures show, they take over how others of the batch are drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Restyle:
    """MixStyle (Zhou et al., arXiv 2104.02008): pictures take over the channel statistics of others of the batch.

    The mean and spread of early features say how a picture is drawn, their layout what it shows. An encoder that has seen a
    thing with the statistics of every style knows it in a style where it has never seen it. A forward hook for the outputs
    (B, C, H, W) of early layers; it does nothing outside :meth:`during`.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[slice, float]] = []
        self.generator: torch.Generator | None = None

    @contextmanager
    def during(self, parts: list[tuple[slice, float]], generator: torch.Generator) -> Iterator[None]:
        """In here, each part of a batch exchanges statistics among itself, for a share of its pictures."""
        self.parts, self.generator = [(part, share) for part, share in parts if share > 0], generator
        try:
            yield
        finally:
            self.parts, self.generator = [], None

    def __call__(self, module: nn.Module, inputs: Any, x: Tensor) -> Tensor:
        if self.generator is None or not self.parts:
            return x
        x = x.clone()
        for part, share in self.parts:
            x[part] = exchanged(x[part].float(), share, self.generator).to(x.dtype)
        return x


def exchanged(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Features (B, C, H, W), a share of them with means and deviations between their own and those of another of the batch."""
    count = len(x)
    other = torch.randperm(count, generator=generator).to(x.device)
    # How much of its own a picture keeps is mostly nearly all or nearly nothing: the arcsine distribution, Beta(1/2, 1/2).
    own = (torch.rand(count, generator=generator) * (math.pi / 2)).sin().square()
    own = torch.where(torch.rand(count, generator=generator) < share, own, 1.0).to(x)[:, None, None, None]
    mean, deviation = x.mean((2, 3), keepdim=True).detach(), (x.var((2, 3), keepdim=True) + 1e-6).sqrt().detach()
    return (x - mean) / deviation * torch.lerp(deviation[other], deviation, own) + torch.lerp(mean[other], mean, own)
