"""A model on several processes: DDP or FSDP2, and its precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from ..distributed import World
from ..runtime.precision import multiplies_bf16
from .config import TrainConfig


def distribute(model: nn.Module, blocks: tuple[type[nn.Module], ...], config: TrainConfig, world: World) -> nn.Module:
    """The model on its device, wrapped (DDP) or sharded (FSDP2) if there are several processes.

    Raises:
        ValueError: the installed torch has no FSDP2.
    """
    if config.checkpoint_activations:
        from torch.utils.checkpoint import checkpoint

        for module in model.modules():
            if isinstance(module, blocks):  # the instance's own forward, so names of parameters do not change
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]
    if config.compile:
        for module in model.modules():
            if isinstance(module, blocks):  # one by one: blocks of one class share their compiled code
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
    """Whether FSDP2 has sharded this model."""
    return hasattr(model, "set_requires_gradient_sync")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without the DDP wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def synchronised(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Context of an accumulated pass: gradients are averaged over the processes in the last one only."""
    if is_sharded(model):
        model.set_requires_gradient_sync(last)  # type: ignore[operator]
    elif isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def autocast(model: nn.Module, precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Autocast to bf16 for a model that is not sharded; FSDP2 casts by its own policy."""
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bf16(precision, device) and not is_sharded(model))


def in_bf16(precision: str, device: torch.device) -> bool:
    """Whether this device computes in bf16; see `TrainConfig.precision`."""
    return precision == "bf16" or (precision == "auto" and (device.type != "cpu" or multiplies_bf16()))


def whole(value: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
