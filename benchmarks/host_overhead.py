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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/host"))
from inside import load_pack, start_host

BATCH, STEPS = 8, 20
SOLVERS = ("euler", "simple"), ("dpmpp_2m", "normal")  # the node's own defaults; what our templates use
Times = tuple[float, ...]


def now() -> Times:
    return time.perf_counter(), time.process_time()


def since(start: Times) -> Times:
    """Seconds (by the clock, of the processor)."""
    return tuple(b - a for a, b in zip(start, now(), strict=True))


def import_pack() -> list[Any]:
    """The nodes of the pack, freshly imported."""
    extension = asyncio.run(load_pack().comfy_entrypoint())
    asyncio.run(extension.on_load())
    return asyncio.run(extension.get_node_list())


def ksampler(model: Any, clip: Any, solver: tuple[str, str], runs: int) -> tuple[list[Times], list[Times], int]:
    """Seconds of some runs of KSampler on the bundled model, those inside of the network, and how often a run called it.

    Both are of the same runs, so that a slow moment hits both.
    """
    import torch

    import nodes

    positive, negative = (nodes.CLIPTextEncode().encode(clip, text)[0] for text in ("red apple", ""))
    latent = {"samples": torch.zeros(BATCH, 4, 16, 16)}
    inside: list[Times] = []
    started: list[Times] = []
    net = model.model.diffusion_model
    hooks = [
        net.register_forward_pre_hook(lambda *_: started.append(now())),
        net.register_forward_hook(lambda *_: inside.append(since(started.pop()))),
    ]

    wholes, nets = [], []
    with torch.inference_mode():  # as in the server
        for number in range(runs + 1):
            inside.clear()
            start = now()
            nodes.common_ksampler(model, 0, STEPS, 4.0, *solver, positive, negative, latent)
            if number > 0:  # the first loads the model
                wholes.append(since(start))
                nets.append(tuple(map(sum, zip(*inside, strict=True))))
    for hook in hooks:
        hook.remove()
    return wholes, nets, len(inside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    start_host()
    start = now()
    found = import_pack()
    clock, processor = since(start)
    print(f"import beyond the host: {clock:.3f} s by the clock, {processor:.3f} s of the processor")

    model, clip = next(node for node in found if node.__name__ == "LoadUniDiffuser").execute("emoji").args[:2]
    for solver in SOLVERS:
        wholes, nets, count = ksampler(model, clip, solver, runs)
        print(f"KSampler, {' '.join(solver)}, batch {BATCH}, {STEPS} steps, {count} evaluations; medians of {runs} runs:")
        for column, what in enumerate(("by the clock", "of the processor")):
            whole, net = (statistics.median(t[column] for t in times) for times in (wholes, nets))
            more = statistics.median(100 * (w[column] / n[column] - 1) for w, n in zip(wholes, nets, strict=True))
            print(f"{what}: {whole:.3f} s, of which {net:.3f} s in the network: {more:+.1f} % beyond it")


if __name__ == "__main__":
    main()
