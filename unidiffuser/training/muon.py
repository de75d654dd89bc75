"""Muon that orthogonalises all matrices of one shape in one batch.

Written by hand: torch.optim.Muon takes some thirty small kernels for each matrix, whose launches dominate a small network on a
GPU, and always works in bfloat16, which is slow on most CPUs. The arithmetic is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Keller Jordan's quintic: singular values become about 0.7 to 1.2
ITERATIONS = 5
TINY = 1e-7  # a zero gradient stays zero


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised by Newton-Schulz iterations (https://kellerjordan.github.io/posts/muon).

    Updates are scaled to the size of AdamW's (Liu et al., arXiv 2502.16982), so learning rate and weight decay carry over. With
    several processes each orthogonalises a part of the matrices; the results are those of one process.

    Args:
        params: matrices, also sharded by FSDP2.
        lr, momentum: learning rate and momentum.
        weight_decay: decoupled weight decay.

    Raises:
        ValueError: a parameter that is not a matrix.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter.ndim != 2:
                raise ValueError(f"Muon is for matrices, not for a tensor of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]  # torch's stubs overload it
        """Update all matrices that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple[torch.Size, torch.device], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault((parameter.shape, parameter.device), []).append(parameter)
            for (shape, _), parameters in alike.items():
                grads = [p.grad for p in parameters if p.grad is not None]
                buffers = [self._momentum(p) for p in parameters]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, buffers, group["momentum"])
                made = _orthogonal_by_all(torch.stack([_whole(x) for x in ahead]))
                updates = [_cut_like(x, given) for x, given in zip(made, ahead, strict=True)]
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, updates, alpha=-0.2 * max(shape) ** 0.5 * group["lr"])
        return loss

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (N, rows, columns) with their singular values set to about 1; float32 on a CPU, else bfloat16."""
    low = _in_bf16(matrices.device)
    x = matrices.to(torch.bfloat16 if low else torch.float32)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=TINY)
    x = _polar(x) if low else _polar_by_gram(x)
    return x.mT if tall else x


def _in_bf16(device: torch.device) -> bool:
    return device.type != "cpu"


def _polar(x: Tensor) -> Tensor:
    """Newton-Schulz steps on wide matrices themselves: an order of operations that is stable in bfloat16."""
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _polar_by_gram(x: Tensor) -> Tensor:
    """The same in products of the Gram matrix, of which the factors that the steps multiply x with are polynomials.

    Half the work for matrices four times as wide as high. It squares the range of the singular values, too much for bfloat16.
    """
    a, b, c = COEFFICIENTS
    gram = x @ x.mT
    one = a * torch.eye(gram.shape[-1], device=x.device)
    factor = product = one
    for number in range(ITERATIONS):
        if number:
            gram = factor @ gram @ factor
        factor = (gram @ gram).mul_(c).add_(gram, alpha=b).add_(one)
        product = factor @ product if number else factor
    return product @ x


def _orthogonal_by_all(matrices: Tensor) -> Tensor:
    """`orthogonal` in the dtype of the matrices, divided over the processes and gathered."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    made = torch.zeros_like(matrices)
    # On a CPU there are no launch times to hide, and one matrix fits the cache.
    together = 1 if matrices.device.type == "cpu" else len(matrices)
    for given, result in zip(matrices[rank::size].split(together), made[rank::size].split(together), strict=True):
        result.copy_(orthogonal(given))
    if size > 1:
        dist.all_reduce(made)  # the matrices of other processes are 0 here
    return made


def _whole(x: Any) -> Tensor:
    """The whole of a matrix that FSDP2 may have sharded."""
    found: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return found


def _cut_like(x: Tensor, given: Any) -> Tensor:
    """A whole matrix, sharded as `given` is."""
    if not hasattr(given, "full_tensor"):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, given.device_mesh, given.placements)
