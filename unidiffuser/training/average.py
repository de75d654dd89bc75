"""Exponential moving average of the weights, sharded as they are.

Written by hand: torch's AveragedModel is a second model, which FSDP2 would have to shard too, and does not swap its weights in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """Exponential moving average of a model's trainable weights.

    Attributes:
        shadow: the averages by name, in the dtype and sharding of the weights.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights: dict[str, Tensor] = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        self.shadow: dict[str, Tensor] = {name: weight.clone() for name, weight in self.weights.items()}

    def update(self, step: int) -> None:
        """Update after a 0-based optimizer step; the decay rises as 1 - (1 + step)^-0.8 up to the configured one."""
        decay = min(1 - (1 + step) ** -0.8, self.decay)
        torch._foreach_lerp_(_local(self.shadow), _local(self.weights), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Swap the averaged weights into the model inside the block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def install(self) -> None:
        """Put the averaged weights into the model for good."""
        self._exchange()

    def _exchange(self) -> None:
        for weight, shadow in zip(_local(self.weights), _local(self.shadow), strict=True):
            kept = weight.clone()
            weight.copy_(shadow)
            shadow.copy_(kept)


def _local(tensors: dict[str, Tensor]) -> list[Tensor]:
    """This process's shards, as views."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors.values()]
