"""How much memory training needs: computed for any network without allocating it.

What is kept for the backward pass is not estimated by a formula. The network runs on torch's fake tensors, which have shapes
and no data, and every tensor that autograd saves is counted, once a storage. So the table follows the network as it is; its
test holds it against a network that does run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..uvit import Block, UViT, UViTConfig

GB = 2**30
GPUS = (16, 24, 40, 48, 80, 141)
"""Memory of common GPUs in GB."""
RESERVE = 1.5 * GB  # CUDA's context, the communication buffers, and what the allocator cannot use
LORA_RANK = 16
_LAYERS = SimpleNamespace(Linear=nn.Linear, Conv2d=nn.Conv2d, LayerNorm=nn.LayerNorm, Embedding=nn.Embedding)
# A namespace of its own, as the network's initialisation looks at numbers, which fake tensors do not have.


@dataclass(frozen=True)
class Setup:
    """One way to train.

    Attributes:
        devices: over which FSDP2 cuts weights, gradients, optimizer and average; 1 for DDP or a single GPU.
        recompute: `checkpoint_activations`.
        lora: rank of the adapters; 0 trains everything.
    """

    name: str
    devices: int = 1
    recompute: bool = False
    lora: int = 0


SETUPS = (
    Setup("full"),
    Setup("full, activations recomputed", recompute=True),
    Setup("full, FSDP over 8, activations recomputed", devices=8, recompute=True),
    Setup(f"LoRA of rank {LORA_RANK}", lora=LORA_RANK),
    Setup(f"LoRA of rank {LORA_RANK}, activations recomputed", recompute=True, lora=LORA_RANK),
)


@dataclass(frozen=True)
class Need:
    """Bytes on one GPU: what every step holds, and what each example of a pass adds."""

    fixed: int
    example: int

    def batch(self, memory: float) -> int:
        """Examples of one pass that fit into so many bytes; 0 when none does."""
        return max(0, int((memory - RESERVE - self.fixed) // self.example))


def need(config: UViTConfig, setup: Setup, precision: str = "bf16") -> Need:
    """The memory that training this network needs.

    Weights, gradients, both AdamW moments and the average are float32. With bf16, DDP keeps a bf16 copy of the weights while a
    step runs (autocast), FSDP2 gathers two blocks at a time in bf16. A LoRA's base is float32 too, and has no gradients.
    """
    low = 2 if precision == "bf16" else 4
    weights, trained, largest = _count(config, setup.lora)
    frozen = (weights - trained) if setup.lora else 0
    state = trained * 20 + frozen * 4  # 4 bytes each: weights, gradients, two moments, average
    if setup.devices > 1:
        fixed = state // setup.devices + 2 * largest * (low + 4)
    else:
        fixed = state + ((trained + frozen) * 2 if precision == "bf16" else 0)

    def example(depth: int) -> int:
        one, two = (saved_bytes(replace(config, depth=depth), batch, setup, precision) for batch in (1, 2))
        return two - one

    # Every pair of blocks keeps the same, so two shallow networks tell what a deep one keeps.
    shallow, deeper = example(2), example(4)
    return Need(fixed, shallow + (config.depth // 2 - 1) * (deeper - shallow))


def _count(config: UViTConfig, rank: int) -> tuple[int, int, int]:
    """Parameters of the network, of those that are trained, of the largest block."""
    network = UViT(config, device="meta")
    weights = sum(p.numel() for p in network.parameters())
    largest = max(sum(p.numel() for p in m.parameters()) for m in network.modules() if isinstance(m, Block))
    if not rank:
        return weights, weights, largest
    _adapt(network, rank)
    adapters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return weights, adapters, largest


class _Adapter(nn.Module):
    """A frozen Linear with a low-rank addition, for counting."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base
        factory: dict[str, Any] = {"bias": False, "device": base.weight.device}
        self.down = nn.Linear(base.in_features, rank, **factory)
        self.up = nn.Linear(rank, base.out_features, **factory)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


def _adapt(network: nn.Module, rank: int) -> None:
    network.requires_grad_(False)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):  # the convolution that reads patches is as nothing beside these
                setattr(parent, name, _Adapter(child, rank))


def saved_bytes(config: UViTConfig, batch: int, setup: Setup, precision: str = "bf16", fake: bool = True) -> int:
    """Bytes that a training step keeps for its backward pass, weights not counted.

    With ``recompute`` these are the inputs of the blocks, and of one block everything.

    Args:
        fake: False runs the network in earnest, to check the count.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() if fake else nullcontext():
        network = UViT(config, operations=_LAYERS)
        if setup.lora:
            _adapt(network, setup.lora)
        kept = _Saved(network)
        if setup.recompute:
            for block in [m for m in network.modules() if isinstance(m, Block)]:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
        streams = [torch.zeros(batch, *shape) for shape in config.item_shapes.values()]
        if setup.lora:
            streams = [x.requires_grad_() for x in streams]  # else a checkpoint whose input asks for no gradient has none
        label = torch.ones(batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), kept.counting():
            out = network(*streams, label, label)
            loss = sum(x.float().square().mean() for x in out)
        total = kept.bytes
        del loss
    if setup.recompute:
        shallow = replace(config, depth=0)
        plain = replace(setup, recompute=False)
        with_block, without = (saved_bytes(c, batch, plain, precision, fake) for c in (replace(config, depth=2), shallow))
        total += with_block - without  # of one block on the way down and one on the way up; the larger is more than half
    return total


class _Saved:
    """Counts what autograd saves, each storage once, parameters left out."""

    def __init__(self, network: nn.Module):
        self.known = {p.untyped_storage()._cdata for p in network.parameters()}
        self.seen: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        return sum(self.seen.values())

    def counting(self) -> Any:
        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.seen[storage._cdata] = storage.nbytes()
            return tensor

        unpack: Callable[[Tensor], Tensor] = lambda tensor: tensor  # noqa: E731
        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
