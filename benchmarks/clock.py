"""Wall-clock and processor times of several functions, run in turns; medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Times = dict[str, float]
"""wall_s, and processor_s: the sum over all threads of the process, which a busy machine changes less."""


def once(run: Callable[[], object]) -> Times:
    """Times of one run, including the GPU's work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {"wall_s": time.perf_counter() - wall, "processor_s": time.process_time() - processor}


def in_turns(contestants: Mapping[str, Callable[[], object]], repeats: int, warm_up: bool = True) -> dict[str, Times]:
    """Median times of `repeats` runs of each function; they take turns, so that all have the same conditions."""
    runs: dict[str, list[Times]] = {name: [] for name in contestants}
    for turn in range(repeats + warm_up):
        for name, run in contestants.items():
            times = once(run)
            if turn or not warm_up:
                runs[name].append(times)
    return {name: {key: statistics.median(t[key] for t in found) for key in found[0]} for name, found in runs.items()}


def peak_flops(device: torch.device, dtype: torch.dtype, clock: str, side: int | None = None) -> float:
    """FLOP/s of a large square matrix product, the best of ten; by processor time those of one thread."""
    side = side or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = min(once(lambda: a @ b)[clock] for _ in range(10))
    return 2 * side**3 / best


def network_flops(config: Any, batch: int = 1, latent: tuple[int, int] | None = None) -> int:
    """FLOPs of one forward of a U-ViT, counted by torch on tensors without data."""
    from torch.utils.flop_counter import FlopCounterMode

    from unidiffuser.small.network import build

    shapes = config.item_shapes
    if latent is not None:
        shapes["img"] = (config.in_chans, *latent)
    net = build(config, device="meta")
    given = [torch.empty(batch, *shape, device="meta") for shape in shapes.values()]
    labels = [torch.empty(batch, device="meta") for _ in range(2)]
    with FlopCounterMode(display=False) as counter:
        net(*given, *labels)
    return int(counter.get_total_flops())
