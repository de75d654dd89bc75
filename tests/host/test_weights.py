"""The MODEL with weights in fp8, quantised or compiled, and saved again from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from host_server import HostServer
from prompts import Graph, Link
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_server import tiny_server

FP8 = torch.float8_e4m3fn


def ksampler(server: HostServer, model: str = "tiny.safetensors", change: str | None = None, **settings: str) -> torch.Tensor:
    """The latent of KSampler with the MODEL of a file, after a core node `change`."""
    graph = Graph(model)
    behind: Link = graph.model if change is None else graph.add(change, model=graph.model, **settings)()
    graph.save(graph.ksampler(graph.text("red cat"), graph.text(""), graph.empty(), behind)(), "weights")
    server.run(graph.prompt, 1200)  # compiling takes minutes on a slow machine
    newest = max((server.base / "output").rglob("weights_*.latent"), key=lambda path: path.stat().st_mtime_ns)
    return load_file(newest)["latent_tensor"]


def joint(server: HostServer, model: str = "tiny.safetensors", change: str | None = None, **settings: str) -> torch.Tensor:
    """The same latent from UniDiffuser Sampler."""
    graph = Graph(model)
    behind: Link = graph.model if change is None else graph.add(change, model=graph.model, **settings)()
    graph.save(graph.sampler(graph.path("joint")(), model=behind)(), "weights")
    server.run(graph.prompt, 1200)
    newest = max((server.base / "output").rglob("weights_*.latent"), key=lambda path: path.stat().st_mtime_ns)
    return load_file(newest)["latent_tensor"]


def rewrite(source: Path, target: Path, quantised: bool) -> None:
    """The checkpoint with its blocks in fp8: plain, or in the host's format with a scale for each."""
    with safe_open(source, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for key, weight in list(tensors.items()):
        if not (key.startswith("uvit.") and "_block" in key and key.endswith(".weight") and weight.ndim == 2):
            continue
        scale = weight.abs().max() / torch.finfo(FP8).max if quantised else torch.tensor(1.0)
        tensors[key] = (weight / scale).to(FP8)
        if quantised:
            layer = key.removesuffix(".weight")
            tensors[f"{layer}.weight_scale"] = scale.float()
            told = json.dumps({"format": "float8_e4m3fn"}).encode()
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(told), dtype=torch.uint8)
    save_file(tensors, target, metadata)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean absolute difference, in standard deviations of `b`."""
    return float((a - b).abs().mean() / b.std())


@pytest.mark.parametrize("quantised", [False, True])
def test_a_file_in_fp8(server: HostServer, tiny_file: Path, quantised: bool) -> None:
    name = f"fp8-{quantised}.safetensors"
    rewrite(tiny_file, tiny_file.with_name(name), quantised)
    server.get("/object_info/UniDiffuserLoader")
    for sampled in (ksampler, joint):
        assert 0 < difference(sampled(server, name), sampled(server)) < 0.2
    if quantised:
        assert "Using mixed precision operations" in server.log


def test_a_quantised_model_can_be_saved_and_loaded_again(server: HostServer, tiny_file: Path) -> None:
    rewrite(tiny_file, tiny_file.with_name("quantised.safetensors"), quantised=True)
    server.get("/object_info/UniDiffuserLoader")
    before = joint(server, "quantised.safetensors")
    graph = Graph("quantised.safetensors")
    graph.add("ModelSave", model=graph.model, filename_prefix="checkpoints/quantised")
    server.run(graph.prompt)
    (file,) = (server.base / "output/checkpoints").glob("quantised_*.safetensors")
    tiny_file.with_name("again.safetensors").write_bytes(file.read_bytes())
    server.get("/object_info/UniDiffuserLoader")
    assert difference(joint(server, "again.safetensors"), before) < 0.05


def test_compiled(server: HostServer) -> None:
    for sampled in (ksampler, joint):
        made = sampled(server, change="TorchCompileModel", backend="inductor")
        torch.testing.assert_close(made, sampled(server), rtol=0, atol=1e-2)


def test_a_server_that_holds_all_weights_in_fp8(server: HostServer, tmp_path: Path) -> None:
    with tiny_server(tmp_path, "--fp8_e4m3fn-unet") as small:
        for sampled in (ksampler, joint):
            assert 0 < difference(sampled(small), sampled(server)) < 0.3
