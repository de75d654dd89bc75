"""A LoRA for few sampling steps without guidance acts in the host's own sampler as in the library."""

from __future__ import annotations

from pathlib import Path

import torch
from host_server import HostServer
from pairs import random_latents
from prompts import Graph
from test_agreement import PROMPT, SEED, saved

import unidiffuser
from unidiffuser.checkpoints.checkpoint import load_checkpoint
from unidiffuser.path import NoisePath
from unidiffuser.samplers import Streams, item_generators, sample
from unidiffuser.training.distill_run import distill, distill_config
from unidiffuser.training.trajectories import Route

STEPS = 2


def by_core(
    server: HostServer, lora: str | None, choice: str | None = None, sampler: str = "ddim", steps: int = STEPS
) -> torch.Tensor:
    graph = Graph()
    model = graph.model if choice is None else graph.add("UniDiffuserLoader", model_name=choice)(0)
    if lora is not None:
        model = graph.add("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=1.0)()
    out = graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("RandomNoise", noise_seed=SEED)(),
        guider=graph.add("CFGGuider", model=model, positive=graph.text(PROMPT), negative=graph.text(""), cfg=1.0)(),
        sampler=graph.add("KSamplerSelect", sampler_name=sampler)(),
        sigmas=graph.path("text to image", steps)(1),
        latent_image=graph.empty(),
    )
    graph.save(out(), "student")
    return saved(server, graph, "student")


def test_the_core_sampler_follows_the_student(server: HostServer, tiny_file: Path, tmp_path: Path) -> None:
    config = distill_config(tmp_path / "run", steps=20, batch_size=8, learning_rate=0.01)
    latents = random_latents(tmp_path, load_checkpoint(tiny_file).config.uvit.item_shapes, 4)
    file = distill(config, tiny_file, latents, [Route("text_to_image", STEPS, 3, count=8)], rank=4, progress=False)
    (server.base / "models/loras/student.safetensors").write_bytes(file.read_bytes())
    server.get("/object_info/LoraLoaderModelOnly")

    model = unidiffuser.load(tiny_file, device="cpu", dtype=torch.float32)
    text = Streams(text=model.encode_texts([PROMPT]))

    def by_library(method: str = "ddim", steps: int = STEPS) -> torch.Tensor:
        path, generator = NoisePath.text_to_image(steps), item_generators(SEED, 1)
        return sample(model.net, path, text, guidance=1.0, method=method, generator=generator).need("img")

    plain = by_library()
    model.load_lora(file)
    student = by_library()
    assert (student - plain).abs().max() > 0.05
    torch.testing.assert_close(by_core(server, "student.safetensors"), student, rtol=0, atol=1e-3)
    torch.testing.assert_close(by_core(server, None), plain, rtol=0, atol=1e-3)
    # The host draws the fresh noise of its sampler lcm in its own way, so only the prediction of one step can be equal.
    one = by_core(server, "student.safetensors", sampler="lcm", steps=1)
    torch.testing.assert_close(one, by_library("lcm", 1), rtol=0, atol=1e-3)
    renewed = by_core(server, "student.safetensors", sampler="lcm")
    assert (renewed - student).abs().max() > 0.05
    assert torch.equal(renewed, by_core(server, "student.safetensors", sampler="lcm"))

    beside = tiny_file.with_name(f"{tiny_file.stem}-fast.safetensors")
    beside.write_bytes(file.read_bytes())
    try:
        info = server.get("/object_info/UniDiffuserLoader")["UniDiffuserLoader"]
        names = info["input"]["required"]["model_name"]
        listed = str(names)
        assert f"{tiny_file.name} (fast)" in listed
        assert beside.name not in listed
        torch.testing.assert_close(by_core(server, None, f"{tiny_file.name} (fast)"), student, rtol=0, atol=1e-3)
    finally:
        beside.unlink()
