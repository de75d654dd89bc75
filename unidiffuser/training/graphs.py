"""A training step as CUDA graphs: a small network's kernels are over before Python has launched the next ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import World
from .config import TrainConfig

MOST = 4  # sizes of batches that are kept as graphs; a run has one, or two where passes differ by an example


class Graphed:
    """A model whose forward and backward pass are recorded at the first call with tensors of some shapes, and then replayed.

    What it is called with must be tensors alone, and what happens inside must be the same each time: no random numbers, no
    decisions by values. Other calls, and those without gradients, go to the model itself, which stays as it is. Everything
    else that is asked of it is the model's.
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
        # Casts of weights that are kept from one call to the next would be of weights before the optimizer's step.
        with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), enabled=low, cache_enabled=False):
            recorded: Callable[..., Any] = torch.cuda.make_graphed_callables(_Held(self.model), tuple(x.clone() for x in given))
        return recorded


class _Held(nn.Module):
    """Only holds a module: recording replaces the `forward` of what it is given."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *given: Tensor) -> Any:
        return self.model(*given)


def recorded(net: nn.Module, config: TrainConfig, world: World) -> Any:
    """The network as the loss calls it: as it is, or as CUDA graphs where the config asks for them and there is a GPU.

    Raises:
        ValueError: several processes, or activations that are computed again, which cannot be recorded.
    """
    if not config.cuda_graphs or world.device.type != "cuda":
        return net
    if world.size > 1 or config.checkpoint_activations:
        raise ValueError("cuda_graphs is for one process that keeps its activations; leave it out, or the others")
    return Graphed(net)
