"""A training stage: the model, the data and the loss that the training loop runs."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Batch: TypeAlias = dict[str, Tensor]
"""Tensors by name, each (B, ...): row i belongs to example i. On the CPU when built; the loop moves them to the device."""


@dataclass(frozen=True)
class ExampleCost:
    """Compute of one example: its tokens, and the floating-point operations of its forward and backward pass."""

    tokens: int
    flops: float


class TrainingStage(ABC):
    """A model, its data and its loss, as the training loop needs them.

    For each step the loop calls `order` once. For each pass it calls `examples` (ahead of time, in worker processes if there
    are any), moves the batch to the device and calls `loss`. Write a subclass with `examples`, `loss` and `export`, and
    add it to `unidiffuser.training.stages.STAGES`.

    Attributes:
        model: the module to train; parameters that require no gradient stay frozen.
        size: examples in an epoch.
        blocks: classes of the modules that FSDP2 shards, activation checkpointing recomputes and `compile` compiles one by one.
    """

    model: nn.Module
    size: int
    blocks: tuple[type[nn.Module], ...] = ()

    def order(self, batch_size: int, seed: int, step: int) -> Tensor:
        """Indices (batch_size,) of one step's examples over all processes; depends on the arguments alone."""
        return step_indices(self.size, batch_size, seed, step)

    @abstractmethod
    def examples(self, indices: Tensor, seeds: Sequence[int]) -> Batch:
        """Build the batch of these examples on the CPU.

        Args:
            indices: (B,) integers in 0..size-1.
            seeds: B seeds, one per example, for the random numbers that belong to it. A stage that draws all its random
                numbers from them, and none in `loss`, has the same losses on any number of processes.

        Returns:
            tensors (B, ...) by name.
        """

    @abstractmethod
    def loss(self, model: Any, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Scalar means over the batch by name; "loss" is minimised, the others are logged.

        Args:
            model: the model as wrapped for training (DDP, FSDP2, CUDA graphs); call this one, not `self.model`.
            batch: from `examples`, on the device.
            generator: source of the random numbers of this pass, on the CPU.
        """

    def cost(self) -> ExampleCost | None:
        """Compute of one example, for the speed log; None if unknown."""
        return None

    def example_name(self, index: int) -> str:
        """Name of an example in its data set, for error messages."""
        return str(index)

    def fingerprint(self) -> str:
        """Identifies the data: a run is resumed only with the data that it began with."""
        return f"{self.size} examples"

    def sample(self, model: Any) -> Any:
        """A PIL image that shows the progress of training, or None."""
        return None

    @abstractmethod
    def export(self, model: Any) -> None:
        """Write the result of the run; called once at the end, with the averaged weights in the model."""


def generator_on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """A generator on `device`, seeded from a CPU generator; on the CPU this generator itself."""
    if device.type == "cpu":
        return generator
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    return torch.Generator(device).manual_seed(seed)


@contextmanager
def seeded_init(seed: int) -> Iterator[None]:
    """Seed the global generator, the only one that module initialisers use, and restore its state afterwards."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.random.set_rng_state(state)


def step_indices(size: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Indices (batch_size,) of one step: epochs are seeded permutations laid end to end, so any step is computed alone."""
    first = step * batch_size
    parts: list[Tensor] = []
    while (have := sum(map(len, parts))) < batch_size:
        epoch, offset = divmod(first + have, size)
        parts.append(_permutation(size, seed * 1_000_003 + epoch)[offset : offset + batch_size - have])
    return torch.cat(parts)


@functools.lru_cache(maxsize=2)
def _permutation(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed), device="cpu")
