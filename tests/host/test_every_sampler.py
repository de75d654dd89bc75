"""Every sampler with every scheduler of a ComfyUI on the tiny checkpoint: each runs and gives finite values."""

from __future__ import annotations

import pytest
import torch
from host_server import HostServer
from prompts import Graph
from safetensors.torch import load_file

STEPS = 4


def outcome(server: HostServer, sampler: str, scheduler: str) -> str:
    """ "ok", "NaN" or the error of one combination."""
    graph = Graph()
    names = {"sampler_name": sampler, "scheduler": scheduler}
    made = graph.ksampler(graph.text("red cat"), graph.text(""), graph.empty(), steps=STEPS, **names)
    graph.save(made(), f"{sampler}-{scheduler}")
    try:
        server.run(graph.prompt)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    (file,) = (server.base / "output").rglob(f"{sampler}-{scheduler}_*.latent")
    return "ok" if torch.isfinite(load_file(file)["latent_tensor"]).all() else "NaN"


@pytest.mark.slow
def test_every_sampler_runs_with_every_scheduler(server: HostServer) -> None:
    required = server.get("/object_info/KSampler")["KSampler"]["input"]["required"]
    samplers, schedulers = (
        required[key][0] if isinstance(required[key][0], list) else required[key][1]["options"]
        for key in ("sampler_name", "scheduler")
    )
    ends = {f"{sampler}, {scheduler}": outcome(server, sampler, scheduler) for sampler in samplers for scheduler in schedulers}
    assert len(ends) >= 300
    assert {name: end for name, end in ends.items() if end != "ok"} == {}
