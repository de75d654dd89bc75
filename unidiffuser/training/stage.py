"""What a stage adds to the loop: a model, data and a loss."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Work:
    """What one example costs: its tokens, and the floating-point operations of its forward and backward pass."""

    tokens: int
    flops: float


class Stage(ABC):
    """A model, data and a loss. ``size`` is the number of examples in an epoch.

    The loop calls :meth:`order`, :meth:`batch` and :meth:`draw` ahead of time, perhaps in other processes, and :meth:`loss`
    on the device. ``blocks`` are the classes of modules that are sharded, or computed again going backwards, one by one.
    """

    model: nn.Module
    size: int
    blocks: tuple[type[nn.Module], ...] = ()

    def order(self, batch_size: int, seed: int, step: int) -> Tensor:
        """Indices (batch_size,) of the examples of one step, all processes together: a function of its arguments alone."""
        return step_indices(self.size, batch_size, seed, step)

    @abstractmethod
    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """The examples of these indices, on the CPU."""

    def draw(self, batch: dict[str, Tensor], seeds: list[int]) -> dict[str, Tensor]:
        """Add the random numbers of each example, made from its own seed.

        A stage that draws all of them here, and none in :meth:`loss`, has the same losses with any number of processes.
        """
        return batch

    @abstractmethod
    def loss(self, model: Any, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Means over the batch, by name; "loss" is the one that is minimised. Randomness comes from ``generator`` (CPU)."""

    def work(self) -> Work | None:
        """The cost of one example, for the log; None where nobody counted."""
        return None

    def name_of(self, index: int) -> str:
        """How an example is called where its data lie."""
        return str(index)

    def fingerprint(self) -> str:
        """Changes when the data change, so that a resumed run does not silently go on with others."""
        return f"{self.size} examples"

    def sample(self, model: Any) -> Any:
        """A PIL picture of where training stands, or None."""
        return None

    @abstractmethod
    def export(self, model: Any) -> None:
        """Write what the next stage reads; called with the averaged weights when the run ends."""


def generator_on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """A generator of that device, seeded by this one of the CPU; where the device is the CPU, this one itself."""
    if device.type == "cpu":
        return generator
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return torch.Generator(device).manual_seed(seed)


@contextmanager
def seeded_init(seed: int) -> Iterator[None]:
    """Module initialisers know only the global generator: seed it for the time of building, then give its state back."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.random.set_rng_state(state)


def step_indices(size: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Indices of one step's batch: epochs are seeded permutations laid end to end, so any step can be computed alone."""
    first = step * batch_size
    parts: list[Tensor] = []
    while (have := sum(map(len, parts))) < batch_size:
        epoch, offset = divmod(first + have, size)
        parts.append(_permutation(size, seed * 1_000_003 + epoch)[offset : offset + batch_size - have])
    return torch.cat(parts)


@functools.lru_cache(maxsize=2)
def _permutation(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))
