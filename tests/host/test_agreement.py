"""The same sample through KSampler, through the UniDiffuser Sampler and through the library without a host."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_server import HostServer
from PIL import Image
from prompts import Graph
from safetensors.torch import load_file, save_file
from tiny import HEAD, WIDTH, write_tiny_checkpoint

from unidiffuser.checkpoints.checkpoint import load_checkpoint
from unidiffuser.encoders.autoencoder import Autoencoder
from unidiffuser.encoders.captions import CaptionDecoder
from unidiffuser.encoders.clip import ImageTokenEncoder, TextEncoder
from unidiffuser.media.images import to_tensor
from unidiffuser.path import NoisePath
from unidiffuser.samplers import Streams, item_generators, sample
from unidiffuser.small.network import build

ROOT = Path(__file__).resolve().parents[2]
SEED, STEPS, GUIDANCE, PROMPT, SCALE = 5, 6, 3.0, "red cat", 0.18215


def saved(server: HostServer, graph: Graph, name: str) -> torch.Tensor:
    """The LATENT that a prompt saves under `name`, in the model's units."""
    server.run(graph.prompt)
    newest = max((server.base / "output").rglob(f"{name}_*.latent"), key=lambda path: path.stat().st_mtime_ns)
    return load_file(newest)["latent_tensor"] * SCALE


def by_ksampler(
    server: HostServer,
    lora: str | None = None,
    sampler: str = "dpmpp_2m",
    prompt: str = PROMPT,
    file: str = "tiny.safetensors",
) -> torch.Tensor:
    graph = Graph(file)
    model = with_lora(graph, lora)
    sigmas = graph.path("text to image", STEPS)(1)
    guider = graph.add("CFGGuider", model=model, positive=graph.text(prompt), negative=graph.text(""), cfg=GUIDANCE)()
    noise = graph.add("RandomNoise", noise_seed=SEED)()
    solver = graph.add("KSamplerSelect", sampler_name=sampler)()
    out = graph.add(
        "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=solver, sigmas=sigmas, latent_image=graph.empty()
    )
    graph.save(out(), "ksampler")
    return saved(server, graph, "ksampler")


def by_node(
    server: HostServer, lora: str | None = None, method: str = "dpmpp_2m", file: str = "tiny.safetensors"
) -> torch.Tensor:
    graph = Graph(file)
    out = graph.sampler(
        graph.path("text to image", STEPS)(),
        SEED,
        with_lora(graph, lora),
        image_guidance=GUIDANCE,
        method=method,
        latent_image=graph.empty(),
        text=graph.text(PROMPT),
        negative=graph.text(""),
    )
    graph.save(out(), "node")
    return saved(server, graph, "node")


def with_lora(graph: Graph, lora: str | None) -> list[object]:
    if lora is None:
        return graph.model
    return graph.add("LoraLoaderModelOnly", model=graph.model, lora_name=lora, strength_model=1.0)()


def by_library(file: Path, method: str = "dpmpp_2m", prompt: str = PROMPT) -> torch.Tensor:
    checkpoint = load_checkpoint(file)
    net = checkpoint.load_into(build(checkpoint.config.uvit), "uvit")
    encode = TextEncoder.from_checkpoint(checkpoint)
    out = sample(
        net,
        NoisePath.text_to_image(STEPS),
        Streams(text=encode([prompt])),
        guidance=GUIDANCE,
        method=method,
        generator=item_generators(SEED, 1),
        negative=encode([""]),
    )
    return out.need("img")


@pytest.mark.parametrize("method", ["dpmpp_2m", "euler"])
def test_three_ways_agree(server: HostServer, tiny_file: Path, method: str) -> None:
    core, node, ksampler = by_library(tiny_file, method), by_node(server, method=method), by_ksampler(server, sampler=method)
    assert core.std() > 0.1
    torch.testing.assert_close(node, core, rtol=0, atol=1e-3)
    torch.testing.assert_close(ksampler, node, rtol=0, atol=1e-3)


def test_three_ways_agree_with_a_head_for_large_patches(server: HostServer, tiny_file: Path) -> None:
    """The network predicts the picture instead of the noise, with the host's convolutions."""
    file = tiny_file.with_name("large_patches.safetensors")
    write_tiny_checkpoint(file, downscale=4, uvit=HEAD | {"detail_inner": 12, "detail_inner_blocks": 1, "detail_told": 8})
    server.get("/object_info/UniDiffuserLoader")
    core, node, ksampler = by_library(file), by_node(server, file=file.name), by_ksampler(server, file=file.name)
    assert core.shape[-1] == 32
    assert core.std() > 0.1
    torch.testing.assert_close(node, core, rtol=0, atol=1e-3)
    torch.testing.assert_close(ksampler, node, rtol=0, atol=1e-3)


def test_the_prompt_matters(server: HostServer) -> None:
    assert (by_ksampler(server) - by_ksampler(server, prompt="blue dog")).abs().max() > 1e-3


@pytest.mark.parametrize("prompt", ["q w e r t y u i o p", "qwertyuiop"], ids=["words", "one word"])
def test_a_prompt_is_cut_as_in_the_library(server: HostServer, tiny_file: Path, prompt: str) -> None:
    core, ksampler = by_library(tiny_file, prompt=prompt), by_ksampler(server, prompt=prompt)
    torch.testing.assert_close(ksampler, core, rtol=0, atol=1e-3)
    assert (core - by_library(tiny_file, prompt=prompt[:3])).abs().max() > 1e-3


def test_a_prompt_has_the_rows_of_stable_diffusion(server: HostServer, tiny_file: Path) -> None:
    """Packs count on 77, whatever the encoder reads."""
    read = load_checkpoint(tiny_file).config.uvit.num_text_tokens
    graph, file = Graph(), server.base / "rows.pt"
    graph.add("TestDumpText", text=graph.text("q w (e:1.3) r t y u i o p"), file=str(file))
    server.run(graph.prompt)
    rows = torch.load(file, weights_only=True)[0]
    assert len(rows) == 77
    assert read < 77
    assert rows[:read].abs().amin(dim=0).min() > 0
    assert torch.count_nonzero(rows[read:]) == 0


QKV, PROJ, FC1 = "in_blocks.0.attn.qkv", "mid_block.attn.proj", "out_blocks.1.mlp.fc1"
ENDS = {"kohya": ("lora_up", "lora_down"), "peft": ("lora_B", "lora_A")}
DIFFUSERS = {  # names in diffusers' UniDiffuserModel, which splits qkv
    QKV: [f"transformer.transformer_in_blocks.0.attn1.to_{x}" for x in "qkv"],
    PROJ: ["transformer.transformer_mid_block.attn1.to_out.0"],
    FC1: ["transformer.transformer_out_blocks.1.block.ff.net.0.proj"],
}
STYLES: dict[str, tuple[str, Callable[[str], str], bool]] = {  # ends of the keys, the name's spelling, names of diffusers
    "kohya": ("kohya", lambda name: "lora_unet_" + name.replace(".", "_"), False),
    "kohya on diffusers": ("kohya", lambda name: "lora_unet_" + name.replace(".", "_"), True),
    "peft": ("peft", lambda name: f"base_model.model.{name}", False),
    "host": ("peft", lambda name: f"diffusion_model.{name}", False),
    "diffusers": ("peft", lambda name: f"unet.{name}", True),
    "peft on diffusers": ("peft", lambda name: f"base_model.model.{name}", True),
}


def write_lora(path: Path, style: str) -> None:
    """A LoRA of rank 2 on three Linears, the same for every style of `STYLES`."""
    ends, spell, of_diffusers = STYLES[style]
    generator, tensors = torch.Generator().manual_seed(3), {}
    for module, (rows, columns) in {QKV: (144, 48), PROJ: (48, 48), FC1: (192, 48)}.items():
        up, down = torch.randn(rows, 2, generator=generator), torch.randn(2, columns, generator=generator)
        names = DIFFUSERS[module] if of_diffusers else [module]
        for name, part in zip(names, up.chunk(len(names)), strict=True):
            high, low = ENDS[ends]
            alpha = {f"{spell(name)}.alpha": torch.tensor(4.0)} if ends == "kohya" else {}
            scale = 0.5 if alpha else 1.0  # undone by alpha / rank
            tensors |= {f"{spell(name)}.{high}.weight": part * scale, f"{spell(name)}.{low}.weight": down.clone(), **alpha}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


@pytest.fixture(scope="module")
def plain(server: HostServer) -> torch.Tensor:
    return by_node(server)


@pytest.fixture(scope="module")
def with_fused_lora(server: HostServer) -> torch.Tensor:
    write_lora(server.base / "models/loras/kohya.safetensors", "kohya")
    return by_node(server, "kohya.safetensors")


@pytest.mark.parametrize("style", STYLES)
def test_a_lora_changes_both_equally_and_unloads_exactly(
    server: HostServer, plain: torch.Tensor, with_fused_lora: torch.Tensor, style: str
) -> None:
    write_lora(server.base / f"models/loras/{style}.safetensors", style)
    node, ksampler = by_node(server, f"{style}.safetensors"), by_ksampler(server, f"{style}.safetensors")
    assert (node - plain).abs().max() > 1e-2
    torch.testing.assert_close(node, with_fused_lora, rtol=0, atol=1e-4)
    torch.testing.assert_close(ksampler, node, rtol=0, atol=1e-3)
    assert torch.equal(by_node(server), plain)
    assert "lora key not loaded" not in server.log


def test_a_lora_of_queries_and_values_alone(server: HostServer, plain: torch.Tensor) -> None:
    """PEFT's default layers. A LoRA of zeros on the keys must change nothing."""
    q, k, v = DIFFUSERS[QKV]
    generator = torch.Generator().manual_seed(4)
    up, down = torch.randn(2, 48, 2, generator=generator), torch.randn(2, 2, 48, generator=generator)
    two = {f"unet.{name}.lora_B.weight": up[i].clone() for i, name in enumerate((q, v))}
    two |= {f"unet.{name}.lora_A.weight": down[i].clone() for i, name in enumerate((q, v))}
    three = two | {f"unet.{k}.lora_B.weight": torch.zeros(48, 1), f"unet.{k}.lora_A.weight": torch.ones(1, 48)}
    found = []
    for name, tensors in (("two", two), ("three", three)):
        save_file(tensors, server.base / f"models/loras/{name}.safetensors")
        found.append(by_node(server, f"{name}.safetensors"))
    assert (found[0] - plain).abs().max() > 1e-2
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


def test_a_model_that_the_host_has_saved_loads_again(server: HostServer, with_fused_lora: torch.Tensor) -> None:
    graph = Graph()
    graph.add("ModelSave", model=with_lora(graph, "kohya.safetensors"), filename_prefix="checkpoints/merged")
    server.run(graph.prompt)
    (file,) = (server.base / "output/checkpoints").glob("merged_*.safetensors")
    (server.base / "models/unidiffuser/merged.safetensors").write_bytes(file.read_bytes())
    server.get("/object_info/UniDiffuserLoader")
    graph = Graph("merged.safetensors")
    out = graph.sampler(
        graph.path("text to image", STEPS)(),
        SEED,
        image_guidance=GUIDANCE,
        latent_image=graph.empty(),
        text=graph.text(PROMPT),
        negative=graph.text(""),
    )
    graph.save(out(), "merged")
    torch.testing.assert_close(saved(server, graph, "merged"), with_fused_lora, rtol=0, atol=1e-3)


def by_ksampler_node(server: HostServer, change: Callable[[Graph], object]) -> torch.Tensor:
    """The latent of a plain KSampler with the MODEL that `change` returns."""
    graph = Graph()
    out = graph.ksampler(graph.text(PROMPT), graph.text(""), graph.empty(), change(graph))
    graph.save(out(), "changed")
    return saved(server, graph, "changed")


def test_a_merge_with_a_lora_is_half_of_it(server: HostServer, with_fused_lora: torch.Tensor) -> None:
    def lora(graph: Graph, strength: float) -> object:
        node = "LoraLoaderModelOnly"
        return graph.add(node, model=graph.model, lora_name="kohya.safetensors", strength_model=strength)()

    def merged(graph: Graph) -> object:
        return graph.add("ModelMergeSimple", model1=graph.model, model2=lora(graph, 1.0), ratio=0.5)()

    half = by_ksampler_node(server, lambda graph: lora(graph, 0.5))
    torch.testing.assert_close(by_ksampler_node(server, merged), half, rtol=0, atol=1e-3)
    assert (half - by_ksampler_node(server, lambda graph: graph.model)).abs().max() > 1e-2


def test_a_replaced_schedule_is_followed(server: HostServer) -> None:
    def same(graph: Graph) -> object:
        return graph.add("ModelSamplingDiscrete", model=graph.model, sampling="eps", zsnr=False)()

    plain = by_ksampler_node(server, lambda graph: graph.model)
    torch.testing.assert_close(by_ksampler_node(server, same), plain, rtol=0, atol=5e-3)  # it rounds timesteps


PALETTE = {"palette": {"manners": ["flat", "soft", "lined"], "colours": 5}}
UPSAMPLER = {"upsampler": {"features": 5, "width": 8}}


@pytest.mark.parametrize("extras", [{}, PALETTE, UPSAMPLER, PALETTE | UPSAMPLER], ids=["plain", "palette", "upsampler", "both"])
def test_the_vae_agrees(server: HostServer, tiny_file: Path, extras: dict[str, Any]) -> None:
    if extras:
        tiny_file = tiny_file.with_name(f"{'-'.join(extras)}.safetensors")
        write_tiny_checkpoint(tiny_file, **extras)
        server.get("/object_info/UniDiffuserLoader")
    graph = Graph(tiny_file.name)
    made = graph.sampler(graph.path("joint")(), SEED)
    preview = graph.show(made())
    graph.save(made(), "vae")
    shown = server.run(graph.prompt)[preview]["images"][0]
    picture = np.asarray(Image.open(io.BytesIO(server.file(shown))), dtype=np.float32)
    newest = max((server.base / "output").rglob("vae_*.latent"), key=lambda path: path.stat().st_mtime_ns)
    pixels = Autoencoder.from_checkpoint(load_checkpoint(tiny_file)).decode(load_file(newest)["latent_tensor"] * SCALE)
    ours = ((pixels[0].permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5).numpy()
    assert np.abs(picture - ours).max() < 2
    assert picture.std() > 1

    graph = Graph(tiny_file.name)
    latent, _ = graph.encoded(graph.add("UniDiffuserExamplePicture", picture="sunflower")())
    graph.save(latent, "encoded")
    server.run(graph.prompt)
    newest = max((server.base / "output").rglob("encoded_*.latent"), key=lambda path: path.stat().st_mtime_ns)
    with Image.open(ROOT / "nodes/pictures/sunflower.png") as sunflower:
        mean, std = Autoencoder.from_checkpoint(load_checkpoint(tiny_file)).posterior(to_tensor([sunflower.convert("RGB")]))
    away = (load_file(newest)["latent_tensor"] * SCALE - mean) / std
    assert away.abs().max() < 6  # one sample of the same posterior
    assert away.std() < 1.5


@pytest.mark.parametrize("stem", [{}, {"stem": {"unshuffle": 4, "channels": [8, WIDTH]}}], ids=["patches", "convolutions"])
def test_the_clip_image_token_agrees(server: HostServer, tiny_file: Path, stem: dict[str, Any]) -> None:
    if stem:
        tiny_file = tiny_file.with_name("convolutions.safetensors")
        write_tiny_checkpoint(tiny_file, **stem)
    graph = Graph(tiny_file.name)
    _, token = graph.encoded(graph.add("UniDiffuserExamplePicture", picture="sunflower")())
    file = server.base / "token.pt"
    graph.add("TestDumpToken", output=token, file=str(file))
    server.run(graph.prompt)
    with Image.open(ROOT / "nodes/pictures/sunflower.png") as picture:
        ours = ImageTokenEncoder.from_checkpoint(load_checkpoint(tiny_file))([picture.convert("RGB")])
    theirs = torch.load(file, weights_only=True)
    assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.999  # two bicubic filters


def test_captions_agree(server: HostServer, tiny_file: Path) -> None:
    graph = Graph()
    words = graph.caption(graph.sampler(graph.path("text", STEPS)(), SEED, text_guidance=1.0)(2), candidates=3)()[0]
    shown = server.run(graph.prompt)[words]["text"][0]
    checkpoint = load_checkpoint(tiny_file)
    net = checkpoint.load_into(build(checkpoint.config.uvit), "uvit")
    out = sample(net, NoisePath.text(STEPS), Streams(), generator=item_generators(SEED, 1))
    found = CaptionDecoder.from_checkpoint(checkpoint).decode(out.need("text"), beams=3, count=3)[0]
    assert shown == "\n".join(f"{caption.text}  ({caption.score:.2f})" for caption in found)
