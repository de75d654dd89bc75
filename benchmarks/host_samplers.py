"""Every sampler with every scheduler of a ComfyUI on the tiny checkpoint: which combinations fail or give NaN.

python benchmarks/host_samplers.py [--steps 4] > table.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/host"))
from host_server import HostServer
from prompts import Graph
from tiny_server import tiny_server


def outcome(server: HostServer, sampler: str, scheduler: str, steps: int) -> str:
    """ "ok", "NaN" or the error of one combination."""
    graph = Graph()
    made = graph.ksampler(
        graph.text("red cat"), graph.text(""), graph.empty(), steps=steps, sampler_name=sampler, scheduler=scheduler
    )
    graph.save(made(), f"{sampler}-{scheduler}")
    try:
        server.run(graph.prompt)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    (file,) = (server.base / "output").rglob(f"{sampler}-{scheduler}_*.latent")
    latent = load_file(file)["latent_tensor"]
    return "ok" if torch.isfinite(latent).all() else "NaN"


def table(server: HostServer, steps: int) -> str:
    names = server.get("/object_info/KSampler")["KSampler"]["input"]["required"]
    options = {
        key: names[key][0] if isinstance(names[key][0], list) else names[key][1]["options"]
        for key in ("sampler_name", "scheduler")
    }
    lines = ["| sampler | " + " | ".join(options["scheduler"]) + " |", "|---" * (len(options["scheduler"]) + 1) + "|"]
    for sampler in options["sampler_name"]:
        cells = [outcome(server, sampler, scheduler, steps) for scheduler in options["scheduler"]]
        lines.append(f"| {sampler} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder, tiny_server(Path(folder)) as server:
        print(table(server, steps))


if __name__ == "__main__":
    main()
