"""A LoRA for few sampling steps without guidance acts in the host's own sampler as in the library."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from host_server import HostServer
from prompts import Graph
from test_agreement import PROMPT, SEED, saved

import unidiffuser
from unidiffuser.checkpoints.checkpoint import load_checkpoint
from unidiffuser.data.shards import MANIFEST, write_shard
from unidiffuser.path import NoisePath
from unidiffuser.samplers import Streams, item_generators, sample
from unidiffuser.training.distill_run import distill, distill_config
from unidiffuser.training.trajectories import Route

STEPS = 2


def random_latents(out: Path, model: Path, pairs: int = 4) -> Path:
    """Shards of pairs of random latents."""
    shapes, generator = load_checkpoint(model).config.uvit.item_shapes, torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(pairs, *shape, generator=generator).half() for name, shape in shapes.items()}
    tensors = {"mean": tensors["img"], "std": tensors.pop("img").abs() / 10, **tensors, "first": torch.arange(pairs + 1)}
    out.mkdir()
    write_shard(out / "0.safetensors", tensors, {"keys": list(map(str, range(pairs)))})
    shard = {"name": "0.safetensors", "samples": pairs, "bytes": (out / "0.safetensors").stat().st_size}
    (out / MANIFEST).write_text(json.dumps({"encoding": {"image_size": 128}, "samples": pairs, "shards": [shard]}))
    return out


def by_core(server: HostServer, lora: str | None) -> torch.Tensor:
    graph = Graph()
    model = graph.model
    if lora is not None:
        model = graph.add("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=1.0)()
    out = graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("RandomNoise", noise_seed=SEED)(),
        guider=graph.add("CFGGuider", model=model, positive=graph.text(PROMPT), negative=graph.text(""), cfg=1.0)(),
        sampler=graph.add("KSamplerSelect", sampler_name="ddim")(),
        sigmas=graph.path("text to image", STEPS)(1),
        latent_image=graph.empty(),
    )
    graph.save(out(), "student")
    return saved(server, graph, "student")


def test_the_core_sampler_follows_the_student(server: HostServer, tiny_file: Path, tmp_path: Path) -> None:
    config = distill_config(tmp_path / "run", steps=20, batch_size=8, learning_rate=0.01)
    latents = random_latents(tmp_path / "latents", tiny_file)
    file = distill(config, tiny_file, latents, [Route("text_to_image", STEPS, 3, count=8)], rank=4, progress=False)
    (server.base / "models/loras/student.safetensors").write_bytes(file.read_bytes())
    server.get("/object_info/LoraLoaderModelOnly")

    model = unidiffuser.load(tiny_file, device="cpu", dtype=torch.float32)
    text = Streams(text=model.encode_texts([PROMPT]))

    def by_library() -> torch.Tensor:
        path, generator = NoisePath.text_to_image(STEPS), item_generators(SEED, 1)
        return sample(model.net, path, text, guidance=1.0, method="ddim", generator=generator).need("img")

    plain = by_library()
    model.load_lora(file)
    student = by_library()
    assert (student - plain).abs().max() > 0.05
    torch.testing.assert_close(by_core(server, "student.safetensors"), student, rtol=0, atol=1e-3)
    torch.testing.assert_close(by_core(server, None), plain, rtol=0, atol=1e-3)
