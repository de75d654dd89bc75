"""Time of the network by kind of operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "matrix products": ("addmm", "mm", "bmm", "linear", "gemm", "nvjet", "cutlass"),
    "attention": ("scaled_dot_product", "flash", "fmha", "softmax"),
    "convolutions": ("conv",),
    "normalisation": ("norm",),
    "activations": ("gelu", "silu"),
    "sums and copies": (
        "add",
        "copy",
        "cat",
        "mul",
        "sub",
        "to",
        "clone",
        "index",
        "div",
        "elementwise",
        "memcpy",
        "pad",
        "fill",
    ),
}


def time_fractions(run: Callable[[], object], repeats: int = 3) -> dict[str, float]:
    """Fraction of the time for each kind of operator (self time; on a GPU that of its kernels), largest first."""
    run()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as found:
        for _ in range(repeats):
            run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    gpu = torch.cuda.is_available()
    totals: dict[str, float] = {}
    for event in found.key_averages():
        spent = event.self_device_time_total if gpu else event.self_cpu_time_total
        name = event.key.removeprefix("aten::").lstrip("_").lower()
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "the rest")
        totals[kind] = totals.get(kind, 0.0) + spent
    whole = sum(totals.values()) or 1.0
    ordered = sorted(totals.items(), key=lambda item: -item[1])
    return {kind: spent / whole for kind, spent in ordered}
