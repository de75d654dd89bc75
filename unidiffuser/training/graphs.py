"""A training step as CUDA graphs: for small networks, whose kernels end before Python has launched the next ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import World
from .config import TrainConfig

MOST = 4  # shapes of batches recorded; a run has one, or two if its passes differ by an example


class Graphed:
    """A model whose forward and backward pass are recorded at the first call with arguments of some shapes, then replayed.

    The model must do the same work in each call: no random numbers, no branches on values. Calls with anything but tensors, and
    calls without gradients, go to the model itself, and so do all attributes.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.recorded: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *given: Any) -> Any:
        if not torch.is_grad_enabled() or not all(isinstance(x, Tensor) for x in given):
            return self.model(*given)
        key = tuple((x.shape, x.dtype) for x in given)
        if key not in self.recorded:
            if len(self.recorded) == MOST:
                return self.model(*given)
            self.recorded[key] = self._record(given)
        return self.recorded[key](*given)

    def _record(self, given: tuple[Tensor, ...]) -> Callable[..., Any]:
        low = torch.is_autocast_enabled("cuda")
        # Autocast would cache casts of the weights from before the optimizer's step.
        with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), enabled=low, cache_enabled=False):
            recorded: Callable[..., Any] = torch.cuda.make_graphed_callables(_Held(self.model), tuple(x.clone() for x in given))
        return recorded


class _Held(nn.Module):
    """Wrapper of a module, as recording replaces the `forward` of the module that it gets."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *given: Tensor) -> Any:
        return self.model(*given)


def recorded(net: nn.Module, config: TrainConfig, world: World) -> Any:
    """The network as the loss calls it: with CUDA graphs if the config sets `cuda_graphs` and there is a GPU.

    Raises:
        ValueError: several processes or activation checkpointing, which cannot be recorded.
    """
    if not config.cuda_graphs or world.device.type != "cuda":
        return net
    if world.size > 1 or config.checkpoint_activations:
        raise ValueError("cuda_graphs needs one process and no checkpoint_activations; set cuda_graphs: false, or change these")
    return Graphed(net)
