"""Which number format a model runs in when nobody says, and how a batch stays what its items are alone in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..uvit import UViT


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
ROWS = 512  # of a matrix product: keeps the matrix units of a CPU busy; more would only slow small batches down


def fix_batches(net: UViT, rows: int = ROWS) -> UViT:
    """Let every layer of a network work on batches of one size, so that no item depends on the others beside it.

    Args:
        net: the network, changed in place; its parameters keep their names.
        rows: the least number of tokens in a matrix product; a batch is as many items as that takes.

    Each layer goes through the whole batch before the next one begins, which keeps its weights in the cache.
    """
    embed, config = net.embed, net.config
    layers: list[nn.Module] = [net.patch_embed, net.text_embed, net.clip_img_embed, *net.in_blocks, net.mid_block]
    layers += [*net.out_blocks, net.decoder_pred, net.clip_img_out, net.text_out]
    layers += [child for name, child in net.named_children() if name == "detail"]
    items = 1

    def counted(img: Tensor, *given: Any) -> Tensor:
        nonlocal items
        patches = img.shape[2] * img.shape[3] // config.patch_size**2
        items = math.ceil(rows / (config.tokens - math.prod(config.grid) + patches))
        return embed(img, *given)

    def fixed(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *given: in_fixed_batches(lambda *part: (layer(*part),), items, *given)[0]

    net.embed = counted  # type: ignore[method-assign, assignment]
    for layer in layers:
        layer.forward = fixed(layer.forward)
    return net


def in_fixed_batches(function: Callable[..., Sequence[Result]], size: int, *given: Tensor) -> list[Result]:
    """`function` of tensors with the batch in front, called with `size` items at a time, the last of them copies."""
    batch = len(given[0])
    filled = [torch.cat((x, x[-1:].expand(-batch % size, *x.shape[1:]))) for x in given]
    parts = [function(*cut) for cut in zip(*(x.split(size) for x in filled), strict=True)]
    # A result that is None in one part is None in all.
    return [outs[0] if outs[0] is None else torch.cat(outs)[:batch] for outs in zip(*parts, strict=True)]  # type: ignore[misc]
