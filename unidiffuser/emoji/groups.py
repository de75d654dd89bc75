"""Random choice among the pictures of a group: of one style, or of one concept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..streams import draw_uniform


class GroupSampler:
    """Draws, for given items, random items of the same group.

    Args:
        values: one for each item; items with equal values are a group.
    """

    def __init__(self, values: Sequence[Any]):
        number = {value: i for i, value in enumerate(dict.fromkeys(values))}
        self.groups = torch.tensor([number[value] for value in values])
        self.counts = torch.bincount(self.groups)
        self.starts = self.counts.cumsum(0) - self.counts
        self.items = self.groups.argsort(stable=True)  # those of the first group, then those of the second ...
        self.places = self.items.argsort()  # the place of each item in that order

    def to(self, device: torch.device) -> GroupSampler:
        """Itself, on the device."""
        for name in ("groups", "counts", "starts", "items", "places"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def draw(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Items (B,) of the same groups as the items `index` (B,), themselves included; all on one device."""
        groups = self.groups[index]
        device, counts = generator.device, self.counts[groups]
        wide = torch.float32 if device.type == "mps" else torch.float64  # Metal has no doubles; floats may round up
        chance = torch.rand(index.shape, generator=generator, dtype=wide, device=device)
        place = torch.minimum((chance * counts).long(), counts - 1)
        return self.items[self.starts[groups] + place]

    def draw_other(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Items (B,) of the same groups as the items `index` (B,), never themselves unless they are alone in theirs."""
        groups = self.groups[index]
        starts, others = self.starts[groups], self.counts[groups] - 1
        chance = draw_uniform(index.shape, generator)
        further = 1 + torch.minimum((chance * others).long(), (others - 1).clamp_min(0))
        return self.items[starts + (self.places[index] - starts + further) % (others + 1)]
