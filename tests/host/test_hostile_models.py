"""Hostile and damaged files of ComfyUI's ModelSave end in one sentence of Load UniDiffuser, and nothing in them runs."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from host_server import HostServer
from prompts import Graph
from safetensors.torch import load_file, save_file

KEY = "unidiffuser_origin"
Tensors = dict[str, torch.Tensor]
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def saved(server: HostServer) -> Tensors:
    """The tensors of a file that the host saved from the tiny checkpoint's MODEL."""
    graph = Graph()
    graph.add("ModelSave", model=graph.model, filename_prefix="checkpoints/hostile")
    server.run(graph.prompt)
    (file,) = (server.base / "output/checkpoints").glob("hostile_*.safetensors")
    return load_file(file)


def stored(value: Any) -> torch.Tensor:
    return torch.tensor(list(value if isinstance(value, bytes) else json.dumps(value).encode()), dtype=torch.uint8)


def with_origin(tensors: Tensors, change: Change) -> Tensors:
    """The tensors with another entry for the origin."""
    origin = json.loads(bytes(tensors[KEY].tolist()))
    return tensors | {KEY: stored(change(origin) or origin)}


def field(section: str, name: str, value: Any) -> Change:
    return lambda origin: origin["config"][section].update({name: value})


def load(server: HostServer, name: str) -> str:
    """The error of Load UniDiffuser for a file, or "" if the MODEL can be used."""
    server.get("/object_info/UniDiffuserLoader")
    graph = Graph(name)
    graph.show(graph.ksampler(graph.text("red"), graph.text(""), graph.empty())())
    try:
        server.run(graph.prompt)
    except RuntimeError as error:
        return str(error)
    return ""


class Runs:
    """A pickle that creates a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (field("uvit", "depth", 10**6), "uvit.depth asks for 500000 layers"),
        (field("uvit", "depth", "4"), "uvit.depth must be a whole number"),
        (field("uvit", "num_heads", 0), "num_heads"),
        (field("uvit", "embed_dim", 10**12), "describes no network"),
        (field("uvit", "patch_size", 0), "damaged"),
        (field("uvit", "img_size", 10**9), "positions, but pos_embed has"),
        (field("caption", "prefix_dim", [1]), "caption.prefix_dim must be a whole number"),
        (lambda origin: {**origin, "config": [1]}, "names no checkpoint"),
        (lambda origin: {**origin, "name": 5}, "names no checkpoint"),
        (lambda origin: ["os.system", "true"], "names no checkpoint"),
        (lambda origin: b"[" * 200_000, "nested too deeply"),
        (lambda origin: b"\x80\x04cos\nsystem\n", "is not JSON"),
        (lambda origin: {**origin, "name": "../../../../../../etc/passwd"}, "etc/passwd' is not in"),
        (lambda origin: {**origin, "name": "/etc/passwd"}, "The checkpoint '/etc/passwd' is not in"),
        (lambda origin: {**origin, "name": "x\0y" * 10_000}, "is not in"),
        (lambda origin: {**origin, "name": "hostile.safetensors"}, "does not hold the weights of the diffusion network"),
    ],
)  # fmt: skip
def test_a_hostile_origin(server: HostServer, saved: Tensors, change: Change, words: str) -> None:
    save_file(with_origin(saved, change), server.base / "models/unidiffuser/hostile.safetensors")
    start = time.monotonic()
    error = load(server, "hostile.safetensors")
    assert error.startswith(("UniDiffuserLoader: ValueError: ", "UniDiffuserLoader: FileNotFoundError: ")), error
    assert words in error
    assert "\n" not in error.strip()
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {k: v for k, v in t.items() if "mid_block" not in k}, "tensors are missing"),
        (lambda t: t | {KEY: t[KEY].float()}, "numbers of torch.float32"),
        (lambda t: t | {KEY: torch.tensor(10**12)}, "in 0 dimensions"),
        (
            lambda t: t | {"model.diffusion_model.text_embed.weight": torch.zeros(1, 1)},
            "1 of its tensors are of another shape or type, as text_embed.weight",
        ),
    ],
)
def test_damaged_tensors(server: HostServer, saved: Tensors, change: Callable[[Tensors], Tensors], words: str) -> None:
    save_file(change(dict(saved)), server.base / "models/unidiffuser/hostile.safetensors")
    error = load(server, "hostile.safetensors")
    assert error.startswith("UniDiffuserLoader: ValueError: "), error
    assert words in error


@pytest.mark.parametrize("name", ["hostile.safetensors", "uvit_hostile.pth"])
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_pickle_does_not_run(server: HostServer, tmp_path: Path, name: str, form: str) -> None:
    path, trace = server.base / "models/unidiffuser" / name, tmp_path / "ran"
    if form == "pickle":
        path.write_bytes(pickle.dumps({KEY: Runs(trace)}))
    else:
        torch.save({KEY: Runs(trace), "pos_embed": torch.zeros(1)}, path)
    error = load(server, name)
    path.unlink()
    assert error.startswith("UniDiffuserLoader: ValueError: "), error
    assert name in error
    assert not trace.exists()


def test_the_file_itself_loads(server: HostServer, saved: Tensors) -> None:
    save_file(saved, server.base / "models/unidiffuser/hostile.safetensors")
    assert load(server, "hostile.safetensors") == ""
