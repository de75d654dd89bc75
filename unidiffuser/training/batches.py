"""What each step of a run trains on: a function of seed, step and position in the batch, whatever the number of processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..distributed import World
from .config import TrainConfig
from .stage import Batch, TrainingStage


class Pass(TypedDict):
    """The part of a step that one process computes in one forward and backward pass."""

    indices: Tensor
    """(B,) of the examples."""
    batch: Batch
    seed: int
    """Of the generator that `TrainingStage.loss` receives."""


class Steps(Dataset):
    """This process's part of every step, as passes of at most `micro_batch` examples."""

    def __init__(self, stage: TrainingStage, config: TrainConfig, world: World):
        self.stage, self.config, self.rank, self.size = stage, config, world.rank, world.size
        largest = math.ceil(config.batch_size / world.size)
        self.passes = math.ceil(largest / (config.micro_batch or largest))
        if config.batch_size < world.size * self.passes:
            raise ValueError(f"batch_size {config.batch_size} is too small for {world.size} processes of {self.passes} passes")

    def __getitem__(self, step: int) -> list[Pass]:
        config = self.config
        indices = self.stage.order(config.batch_size, config.seed, step)
        places = torch.arange(config.batch_size).tensor_split(self.size)[self.rank]
        out: list[Pass] = []
        for part in places.tensor_split(self.passes):
            seeds = [example_seed(config.seed, step, place) for place in part.tolist()]
            batch = self.stage.examples(indices[part], seeds)
            for name, value in batch.items():
                if len(value) != len(part):
                    raise ValueError(f"stage {config.stage}: {name!r} has {len(value)} rows for {len(part)} examples")
            out.append({"indices": indices[part], "batch": batch, "seed": seeds[0]})
        return out


def example_seed(seed: int, step: int, place: int) -> int:
    """Seed of the example at this place of this step's batch; mixed, as torch's CPU generator keeps only 32 bits of a seed."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + place * 0x94D049BB133111EB) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 31)) * 0xD6E8FEB86659FD93) & (2**64 - 1)
    return mixed >> 32


def loader(stage: TrainingStage, config: TrainConfig, world: World, start: int) -> Iterator[list[Pass]]:
    """The passes of each step from `start` on, prepared by `config.workers` processes."""
    batches: Any = DataLoader(
        Steps(stage, config, world),
        batch_size=None,
        sampler=range(start, config.steps),  # type: ignore[arg-type]
        num_workers=config.workers,
        pin_memory=world.device.type == "cuda",
        generator=torch.Generator(),  # else it draws from the global one
    )
    return iter(batches)
