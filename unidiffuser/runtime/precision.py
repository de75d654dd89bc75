"""Which number format a model runs in when nobody says, and how a batch stays what its items are alone in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor


def multiplies_bf16() -> bool:
    """Whether this CPU multiplies bf16 faster than fp32 (x86: AMX; Arm: what oneDNN accepts).

    oneDNN takes bf16 on other CPUs too and is then slower, so it is not asked on x86. AVX512_BF16 without AMX does not count:
    on a Xeon of that kind products and convolutions of any size took 1.7 to 1.9 times as long as in fp32 (docs/speed.md), and
    batches filled up to one size (`depends_on_batch`) make a single picture slower still.
    """
    if torch.backends.cpu.get_cpu_capability().startswith(("AVX", "DEFAULT", "NO AVX")):
        # NOTE: a private name, which may go: a CPU that cannot be asked counts as one without.
        supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
        return bool(supported is not None and supported())
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(torch.backends.mkldnn.is_available() and supported is not None and supported())


def automatic_dtype(device: torch.device) -> torch.dtype:
    """Of the network and the autoencoder: float16 on a GPU; on a CPU bfloat16 where it multiplies that, else float32."""
    if device.type != "cpu":
        return torch.float16
    return torch.bfloat16 if multiplies_bf16() else torch.float32


def automatic_side_dtype(device: torch.device) -> torch.dtype:
    """Of the CLIP towers and the caption decoder, which take little of the time: as they are on a CPU.

    A condition in bf16 would add as much error as the whole network does, and beams would tie differently.
    """
    return torch.float16 if device.type != "cpu" else torch.float32


def depends_on_batch(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether an item's result may show which others were computed beside it, unless batches are of one size.

    oneDNN's kernels choose by the number of rows in which order they add, and a sum that is then rounded to 8 or 11 bits
    shows that. fp32 hides it below one level of an 8-bit picture.
    """
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)


Result = TypeVar("Result", Tensor, Tensor | None)
ROWS = 512  # of a matrix product (`UViT.rows`): keeps the matrix units of a CPU busy; more would only cost small batches


def in_fixed_batches(function: Callable[..., Sequence[Result]], size: int, *given: Tensor) -> list[Result]:
    """`function` of tensors with the batch in front, called with `size` items at a time, the last of them copies."""
    batch = len(given[0])
    filled = [torch.cat((x, x[-1:].expand(-batch % size, *x.shape[1:]))) for x in given]
    parts = [function(*cut) for cut in zip(*(x.split(size) for x in filled), strict=True)]
    # A result that is None in one part is None in all.
    return [outs[0] if outs[0] is None else torch.cat(outs)[:batch] for outs in zip(*parts, strict=True)]  # type: ignore[misc]
