"""Speed and memory of this library and of diffusers' UniDiffuserPipeline with the same weights.

    python -m benchmarks [--parts tasks,own,captions,full,costs,profile,scaling] [--device cuda] [--json FILE] [--doc FILE]

Contestants take turns and the medians count. By default ratios are by the wall clock; `--clock processor` takes processor
time instead (best with `--threads 1`), for a machine that has other work. What an approximation costs in quality is
measured by `python -m unidiffuser.emoji.studies.quality`.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import unidiffuser
from benchmarks import captions, costs, full, profiles, tasks
from benchmarks.clock import in_turns, network_flops, peak_flops
from benchmarks.report import SENTENCE, SPEED, markdown, plot_scaling, sentence
from unidiffuser.media.files import write_between, write_text
from unidiffuser.runtime.precision import automatic_dtype

PARTS = ("tasks", "own", "captions", "full", "costs", "profile", "scaling")


def machine(device: torch.device, clock: str) -> dict[str, Any]:
    import diffusers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    dtypes = dict.fromkeys((torch.float32, automatic_dtype(device)))
    peaks = {_name(d): peak_flops(device, d, clock) / 1e9 for d in dtypes}
    return {
        "device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "diffusers": diffusers.__version__,
        "peak_gflops": peaks, "clock": clock,
    }  # fmt: skip


@torch.inference_mode()
def profile(name: str, device: torch.device, peaks: dict[str, float], clock: str) -> dict[str, Any]:
    """Time by operator of one evaluation of 32 items (16 guided pictures), and of decoding 16 pictures."""
    model = unidiffuser.load(name, device=device)
    config, batch = model.config.uvit, 32
    given = [torch.randn(batch, *shape, device=device).to(model.dtype) for shape in config.item_shapes.values()]
    labels = [torch.full((batch,), label, device=device) for label in (500.0, 0.0)]
    labels.append(torch.ones(batch, dtype=torch.long, device=device))  # curated
    latents = torch.randn(16, *config.item_shapes["img"])
    runs: dict[str, Callable[[], object]] = {
        f"evaluation, {batch} items": lambda: model.net(*given, *labels, heads=("img", "clip_img")),
        "decoding 16 pictures": lambda: model.autoencoder.decode(latents),
    }
    rows = {
        label: {"s": in_turns({"": run}, 5)[""][clock], "fractions": profiles.time_fractions(run)}
        for label, run in runs.items()
    }
    evaluation = rows[f"evaluation, {batch} items"]
    speed = network_flops(config, batch) / evaluation["s"]
    return rows | {f"evaluation, {batch} items": evaluation | {"peak": speed / 1e9 / peaks[_name(model.dtype)]}}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default: all)")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=8, help="captions of the part captions (default 8)")
    parser.add_argument("--peer-images", type=int, help="decode only so many with the peer and scale up (default: all)")
    parser.add_argument("--json", type=Path, default=Path("out/benchmarks.json"), help="parts of earlier runs in it are kept")
    parser.add_argument("--doc", type=Path, help="write the tables into this file, between the markers")
    parser.add_argument("--readme", type=Path, help="write one sentence of the parts tasks and own into this file, likewise")
    args = parser.parse_args()
    parts = args.parts.split(",") if args.parts else []
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown parts {sorted(unknown)}; there are {', '.join(PARTS)}")
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    clock = f"{args.clock}_s"
    found: dict[str, Any] = json.loads(args.json.read_text()) if args.json.is_file() else {}
    if parts:
        found |= {"model": args.model, "machine": machine(args.device, clock)}
    peaks = found["machine"]["peak_gflops"]

    run: dict[str, Callable[[], Any]] = {
        "tasks": lambda: list(tasks.measure(args.model, args.device, args.steps, args.guidance, args.repeats)),
        "own": lambda: list(tasks.own(args.model, args.device, args.repeats)),
        "captions": lambda: captions.measure(args.device, args.images, args.peer_images),
        "full": lambda: full.measure(args.device, clock, args.repeats),
        "costs": lambda: costs.measure(args.model, str(args.device), args.repeats),
        "profile": lambda: profile(args.model, args.device, peaks, clock),
        "scaling": lambda: list(tasks.scaling(args.model, args.device, args.repeats)),
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    for part in parts:
        found[part] = run[part]()
        write_text(args.json, json.dumps(found, indent=1))
    if "scaling" in parts:
        plot_scaling(found["scaling"], clock, args.json.with_name("scaling.png"))
    text = markdown(found)
    print(text)
    if args.doc:
        write_between(args.doc, text, SPEED)
    if args.readme:
        write_between(args.readme, sentence(found), SENTENCE)


if __name__ == "__main__":
    main()
