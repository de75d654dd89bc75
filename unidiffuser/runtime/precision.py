"""Number formats by device, and results that do not depend on the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..uvit import UViT

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Number formats of weights."""


def weight_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The number format of weights by its name or as itself; ValueError for another one."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(f'torch.{name}' for name in DTYPES)}, got {dtype!r}")
    return found


def usable_device(device: torch.device | str) -> torch.device:
    """The device, once it is clear that this machine has it; ValueError otherwise."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:  # torch raises any of them
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"device {str(device)!r} cannot be used here ({reason}); choose another, or none") from None
    return found


def best_device() -> str:
    """The fastest kind of device of this machine."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def multiplies_bf16() -> bool:
    """Whether this CPU multiplies bf16 faster than fp32 (x86: AMX; Arm: what oneDNN accepts).

    oneDNN accepts bf16 on other x86 CPUs too, where it is slower. AVX512_BF16 without AMX does not count: on such a Xeon matrix
    products and convolutions took 1.7 to 1.9 times as long as in fp32 (docs/speed.md), and padding batches to one size
    (`depends_on_batch`) makes a single picture slower still.
    """
    if torch.backends.cpu.get_cpu_capability().startswith(("AVX", "DEFAULT", "NO AVX")):
        # NOTE: a private function of torch, which may disappear; without it the CPU counts as one without AMX.
        supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
        return bool(supported is not None and supported())
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(torch.backends.mkldnn.is_available() and supported is not None and supported())


def automatic_dtype(device: torch.device) -> torch.dtype:
    """Format of the network and the autoencoder: float16 on a GPU; on a CPU bfloat16 where that is fast, else float32."""
    if device.type != "cpu":
        return torch.float16
    return torch.bfloat16 if multiplies_bf16() else torch.float32


def automatic_encoder_dtype(device: torch.device) -> torch.dtype:
    """Format of the CLIP towers and the caption decoder, which take little time: float16 on a GPU, float32 on a CPU.

    bf16 would add as much error to the conditioning as to the whole network, and beams would tie differently.
    """
    return torch.float16 if device.type != "cpu" else torch.float32


def depends_on_batch(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the result of an item varies with its batch, unless all batches have the same size.

    oneDNN chooses its order of summation by the number of rows, which is visible in sums rounded to 8 or 11 bits. In fp32 the
    difference is below one level of an 8-bit picture.
    """
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)


Result = TypeVar("Result", Tensor, Tensor | None)
ROWS = 512  # minimum rows of a matrix product: keeps a CPU's matrix units busy; more would slow small batches down


def fix_batches(net: UViT, rows: int = ROWS) -> UViT:
    """Make every layer of a network compute as in batches of one size, so that no item depends on its batch.

    Each layer processes the whole batch before the next one runs, which keeps its weights in the CPU's cache. Where several
    items make a batch of that size, see `_SameBits`, a batch of another size is computed as it is if that gives the same bits.

    Args:
        net: the network, changed in place; its parameters keep their names.
        rows: minimum rows (tokens) of a matrix product; a batch has as many items as that takes.
    """
    embed, config = net.embed, net.config
    children = [layer for child in net.children() for layer in (child if isinstance(child, nn.ModuleList) else [child])]
    layers = [layer for layer in children if not isinstance(layer, (nn.LayerNorm, nn.Embedding))]  # these work row by row
    items = 1

    def counted(img: Tensor, *inputs: Any) -> Tensor:
        nonlocal items
        patches = img.shape[2] * img.shape[3] // config.patch_size**2
        items = math.ceil(rows / (config.tokens - math.prod(config.grid) + patches))
        return embed(img, *inputs)

    net.embed = counted  # type: ignore[method-assign, assignment]
    for layer in layers:
        products = [part for part in layer.modules() if isinstance(part, (nn.Linear, nn.Conv2d)) and part is not layer]
        for part in (*products, layer):
            part.forward = _SameBits(part.forward, lambda: items)  # type: ignore[method-assign]
    return net


class _SameBits:
    """A layer whose results are those of batches of one size, computed in other batches where that changes no bit.

    A CPU's order of summation depends on the shapes alone. So whether a batch gives the bits of fixed ones as it is, or filled
    up to half their size, is found out once for each shape, on random inputs: in most layers it does, except for long sums of
    few rows. A layer and the products inside it are examined apart, so that one product is padded where the rest needs none.

    Args:
        plain: the layer's own forward.
        items: items of a fixed batch.
    """

    def __init__(self, plain: Callable[..., Tensor], items: Callable[[], int]):
        self.plain, self.items = plain, items
        self.sizes: dict[tuple[Any, ...], int] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        items = self.items()
        if len(inputs[0]) == items:
            return self.plain(*inputs)
        # One item that is large enough alone has nothing to gain; a traced graph cannot depend on the values of a comparison.
        if items == 1 or torch.compiler.is_compiling():
            return self._in_batches(items, *inputs)
        shapes = (items, torch.get_num_threads(), *(x.shape for x in inputs))
        if shapes not in self.sizes:
            self.sizes[shapes] = self._smallest(items, *inputs)
        return self._in_batches(self.sizes[shapes], *inputs)

    def _smallest(self, items: int, *like: Tensor) -> int:
        """The smallest batch, 0 for the inputs as they are, that has the bits of `items`."""
        generator = torch.Generator().manual_seed(0)
        given = [torch.randn(x.shape, generator=generator, dtype=torch.float32, device="cpu").to(x) for x in like]
        wanted, half = self._in_batches(items, *given), math.ceil(items / 2)
        sizes = (0, half) if len(like[0]) < half else (0,)
        return next((size for size in sizes if torch.equal(self._in_batches(size, *given), wanted)), items)

    def _in_batches(self, size: int, *inputs: Tensor) -> Tensor:
        return in_fixed_batches(lambda *chunk: (self.plain(*chunk),), size, *inputs)[0] if size else self.plain(*inputs)


def in_fixed_batches(function: Callable[..., Sequence[Result]], size: int, *inputs: Tensor) -> list[Result]:
    """Call `function` on `size` items (B, ...) at a time; the last call is padded with copies of the last item."""
    batch = len(inputs[0])
    padded = [torch.cat((x, x[-1:].expand(-batch % size, *x.shape[1:]))) for x in inputs]
    parts = [function(*chunk) for chunk in zip(*(x.split(size) for x in padded), strict=True)]
    # An output that is None for one chunk is None for all.
    return [outs[0] if outs[0] is None else torch.cat(outs)[:batch] for outs in zip(*parts, strict=True)]  # type: ignore[misc]
