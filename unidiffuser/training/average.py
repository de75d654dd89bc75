"""An exponential moving average of the weights, cut over the processes as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """The average of a model's trainable weights.

    Attributes:
        shadow: the average by the weight's name, in float32 or whatever the weight has; sharded where the weight is.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights: dict[str, Tensor] = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        self.shadow: dict[str, Tensor] = {name: weight.clone() for name, weight in self.weights.items()}

    def update(self, step: int) -> None:
        """After the optimizer's 0-based ``step``. The horizon grows with the steps, 1 - (1 + step)^-0.8, up to ``decay``."""
        decay = min(1 - (1 + step) ** -0.8, self.decay)
        torch._foreach_lerp_(_local(self.shadow), _local(self.weights), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights inside of the block, its own again after it."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def install(self) -> None:
        """Leave the averaged weights in the model; the run is over."""
        self._exchange()

    def _exchange(self) -> None:
        for weight, shadow in zip(_local(self.weights), _local(self.shadow), strict=True):
            kept = weight.clone()
            weight.copy_(shadow)
            shadow.copy_(kept)


def _local(tensors: dict[str, Tensor]) -> list[Tensor]:
    """This process's part of each; a view, not a copy."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors.values()]
