"""What the pack costs inside a ComfyUI: seconds to import it, and KSampler against the bare network evaluations it makes.

    cd ComfyUI && python ../UniDiffuser/benchmarks/host_overhead.py [--runs 5]

with the host's own python. Processor seconds stand beside the clock's: on a busy machine only they mean anything.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/host"))
from inside import load_pack, start_host

BATCH, STEPS = 8, 20


def seconds(function: Callable[[], Any]) -> tuple[float, float, Any]:
    """(by the clock, of the processor, result) of one call."""
    clock, processor = time.perf_counter(), time.process_time()
    result = function()
    return time.perf_counter() - clock, time.process_time() - processor, result


def import_pack() -> list[Any]:
    """The nodes of the pack, freshly imported."""
    extension = asyncio.run(load_pack().comfy_entrypoint())
    asyncio.run(extension.on_load())
    return asyncio.run(extension.get_node_list())


def ksampler(loader: Any) -> tuple[Callable[[], None], Callable[[], None], int]:
    """One run of KSampler on the bundled model, the network evaluations that it made, and their number."""
    import torch

    import nodes

    model, clip = loader.execute("emoji").args[:2]
    positive, negative = (nodes.CLIPTextEncode().encode(clip, text)[0] for text in ("red apple", ""))
    latent = {"samples": torch.zeros(BATCH, 4, 16, 16)}

    @torch.inference_mode()  # as the server does
    def run() -> None:
        nodes.common_ksampler(model, 0, STEPS, 4.0, "dpmpp_2m", "normal", positive, negative, latent)

    net, calls = model.model.diffusion_model, []
    hook = net.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    run()
    hook.remove()

    @torch.inference_mode()
    def bare() -> None:
        for args, kwargs in calls:
            net(*args, **kwargs)

    bare()
    return run, bare, len(calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    start_host()
    clock, processor, found = seconds(import_pack)
    print(f"import beyond the host: {clock:.3f} s by the clock, {processor:.3f} s of the processor")

    run, bare, count = ksampler(next(node for node in found if node.__name__ == "LoadUniDiffuser"))
    times: dict[Any, list[tuple[float, ...]]] = {run: [], bare: []}
    for _ in range(runs):  # in turn, so that a slow moment hits both
        for function, found_times in times.items():
            found_times.append(seconds(function)[:2])
    print(f"KSampler, batch {BATCH}, {STEPS} steps, {count} evaluations; median of {runs} runs:")
    for column, what in enumerate(("by the clock", "of the processor")):
        whole, net = (statistics.median(t[column] for t in times[function]) for function in (run, bare))
        print(f"{what}: {whole:.3f} s, bare evaluations {net:.3f} s: {100 * (whole / net - 1):+.1f} %")


if __name__ == "__main__":
    main()
