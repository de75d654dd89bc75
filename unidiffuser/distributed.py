"""One process or many: joining the others, and cutting a model over them with DDP or FSDP2.

Who the others are is read from the environment that torchrun and `accelerate launch` set. On a CPU they talk through gloo.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from .runtime.precision import multiplies_bf16
from .training.config import TrainConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """Element by element over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The (small) value of every process, in order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


@contextmanager
def joined(device: str | None = None, patience: timedelta = timedelta(minutes=30)) -> Iterator[World]:
    """Join the processes that the launcher started, and leave them at the end.

    Args:
        device: of this process; None is its own GPU, else the CPU.
        patience: how long one process waits for the others before it gives up.

    Raises:
        ValueError: more processes on this machine than it has GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = torch.device(device) if device else own_device()
    if size == 1:
        yield World(0, 1, chosen)
        return
    if chosen.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this machine has no GPU of its own: start {torch.cuda.device_count()} of them"
            )
        torch.cuda.set_device(chosen)
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and local == 0 and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        # Else the processes of the next attempt find the addresses that those of this one have left in the shared store.
        log.warning("torchrun can only restart this with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment")
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=patience)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), chosen)
    finally:
        dist.destroy_process_group()


def own_device() -> torch.device:
    """The GPU of this process where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def distribute(model: nn.Module, blocks: tuple[type[nn.Module], ...], config: TrainConfig, world: World) -> nn.Module:
    """The model as it is called in training: on its device, wrapped or sharded where there are several processes.

    Raises:
        ValueError: the installed torch has no FSDP2.
    """
    if config.checkpoint_activations:
        from torch.utils.checkpoint import checkpoint

        for module in model.modules():
            if isinstance(module, blocks):  # the instance's own forward: names of parameters stay as they are
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]
    if config.compile:
        for module in model.modules():
            if isinstance(module, blocks):  # one by one: blocks of one kind share what was compiled
                module.compile()
    model.to(world.device)
    if world.size == 1:
        return model
    if config.strategy == "ddp":
        return DistributedDataParallel(model, device_ids=[world.device] if world.device.type == "cuda" else None)
    try:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    except ImportError as error:
        raise ValueError(f"strategy: fsdp needs torch 2.6 or newer, this is {torch.__version__}; use strategy: ddp") from error
    mesh = init_device_mesh(world.device.type, (world.size,))
    low = torch.bfloat16 if in_bf16(config.precision, world.device) else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    for module in list(model.modules()):
        if isinstance(module, blocks):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 cut this model."""
    return hasattr(model, "set_requires_gradient_sync")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself; what DDP wraps."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def synchronised(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """For one of several accumulated passes: gradients are averaged over the processes in the last one only."""
    if is_sharded(model):
        model.set_requires_gradient_sync(last)  # type: ignore[operator]
    elif isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def autocast(model: nn.Module, precision: str, device: torch.device) -> AbstractContextManager[None]:
    """bf16 products for a model that is not sharded; FSDP2 casts by its own policy."""
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bf16(precision, device) and not is_sharded(model))


def in_bf16(precision: str, device: torch.device) -> bool:
    """Whether products are made in bf16 on this device; see `TrainConfig.precision`."""
    return precision == "bf16" or (precision == "auto" and (device.type != "cpu" or multiplies_bf16()))


def whole(value: Tensor) -> Tensor:
    """All of a tensor that may be cut over the processes."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
