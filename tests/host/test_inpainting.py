"""A masked part is unchanged in the result, wherever the path starts, and the rest equals the library's result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from host_server import HostServer
from prompts import Graph, Link
from safetensors.torch import load_file

from unidiffuser.checkpoints.checkpoint import load_checkpoint
from unidiffuser.encoders.clip import TextEncoder
from unidiffuser.path import NoisePath
from unidiffuser.samplers import Streams, add_noise, item_generators, sample
from unidiffuser.small.network import build
from unidiffuser.streams import draw_noise

SEED, STEPS, LEVEL, SCALE = 7, 5, 600.0, 0.18215
REWRITTEN, KEPT = [2, 3, 4], [0, 1, 5, 6]  # tokens of "a red b", one per letter, with "red" to rewrite


def run(server: HostServer, graph: Graph, out: Callable[[int], Link]) -> dict[str, torch.Tensor]:
    """The sampled streams "img" and "text", scaled as in the model."""
    graph.save(out(0), "inpainted")
    graph.add("TestDumpText", text=out(2), file=str(server.base / "text.pt"))
    server.run(graph.prompt)
    newest = max((server.base / "output").rglob("inpainted_*.latent"), key=lambda path: path.stat().st_mtime_ns)
    return {
        "img": load_file(newest)["latent_tensor"] * SCALE,
        "text": torch.load(server.base / "text.pt", weights_only=True),
    }


def given(server: HostServer) -> tuple[torch.Tensor, torch.Tensor]:
    """The clean image latent, scaled as in the model, and the CLIP token, both encoded by the host."""
    graph = Graph()
    latent, token = graph.encoded()
    graph.save(latent, "clean")
    graph.add("TestDumpToken", output=token, file=str(server.base / "token.pt"))
    server.run(graph.prompt)
    newest = max((server.base / "output").rglob("clean_*.latent"), key=lambda path: path.stat().st_mtime_ns)
    token = torch.load(server.base / "token.pt", weights_only=True)
    return load_file(newest)["latent_tensor"] * SCALE, token.reshape(1, 1, -1).float()


def left_half(graph: Graph, latent: Link) -> Link:
    """A LATENT with a mask on its left half."""
    black = graph.add("SolidMask", value=0.0, width=128, height=128)()
    white = graph.add("SolidMask", value=1.0, width=64, height=128)()
    mask = graph.add("MaskComposite", destination=black, source=white, x=0, y=0, operation="add")()
    return graph.add("SetLatentNoiseMask", samples=latent, mask=mask)()


def halves() -> torch.Tensor:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    return mask


def test_a_picture_from_a_level_between(server: HostServer, tiny_file: Path) -> None:
    graph = Graph()
    latent, token = graph.encoded()
    path = graph.path("text to image", STEPS, start=LEVEL)()
    masked = left_half(graph, latent)
    out = graph.sampler(
        path, SEED, image_guidance=1.0, latent_image=masked, clip_vision_output=token, text=graph.text("red cat")
    )
    made = run(server, graph, out)["img"]

    clean, clip_img = given(server)
    checkpoint = load_checkpoint(tiny_file)
    generators = item_generators(SEED, 1)
    noisy = add_noise(clean, draw_noise(clean.shape[1:], generators, "cpu"), LEVEL)
    start = Streams(
        img=torch.where(halves() > 0, noisy, clean),
        clip_img=add_noise(clip_img, draw_noise(clip_img.shape[1:], generators, "cpu"), LEVEL),
        text=TextEncoder.from_checkpoint(checkpoint)(["red cat"]),
    )
    net = checkpoint.load_into(build(checkpoint.config.uvit), "uvit")
    wanted = sample(
        net,
        NoisePath.text_to_image(STEPS, start=LEVEL),
        start,
        guidance=(1.0, 2.0),
        generator=generators,
        mask=Streams(img=halves()),
    )
    torch.testing.assert_close(made, wanted.need("img"), rtol=0, atol=1e-3)
    torch.testing.assert_close(made[..., 8:], clean[..., 8:], rtol=0, atol=1e-5)
    assert (made[..., :8] - clean[..., :8]).abs().mean() > 1e-2


def clean_words(graph: Graph, server: HostServer) -> Path:
    """The text latent of "a red b", from a path that keeps the text unchanged."""
    file = server.base / "words.pt"
    kept = graph.sampler(graph.path("text to image", 1)(), text=graph.text("a red b"))(2)
    graph.add("TestDumpText", text=kept, file=str(file))
    return file


@pytest.mark.parametrize("start", [LEVEL, 1000.0])
def test_words_are_kept_from_any_level(server: HostServer, start: float) -> None:
    graph = Graph()
    latent, token = graph.encoded()
    text = graph.add("UniDiffuserRewriteWords", clip=graph.clip, text="a red b", words="red", rest=False)()
    path = graph.path("image to text", STEPS, start=start)()
    words = clean_words(graph, server)
    made = run(server, graph, graph.sampler(path, SEED, latent_image=latent, clip_vision_output=token, text=text))["text"]
    clean = torch.load(words, weights_only=True)
    torch.testing.assert_close(made[:, KEPT], clean[:, KEPT], rtol=0, atol=1e-5)
    assert (made[:, REWRITTEN] - clean[:, REWRITTEN]).abs().mean() > 1e-2


@pytest.mark.parametrize(("image_end", "text_end", "rest"), [(0, 500, "image to text"), (500, 0, "text to image")])
def test_a_mask_holds_across_two_samplers(server: HostServer, image_end: float, text_end: float, rest: str) -> None:
    """The first sampler leaves one stream noisy; the second continues and still keeps the masked part."""
    graph = Graph()
    latent, token = graph.encoded()
    text = graph.add("UniDiffuserRewriteWords", clip=graph.clip, text="a red b", words="red", rest=False)()
    words = clean_words(graph, server)
    corners = {"image_start": 1000, "text_start": 1000, "image_corner": 700, "text_corner": 700}
    first = graph.path("through a corner", 2, **corners, image_end=image_end, text_end=text_end)()
    half = graph.sampler(first, SEED, latent_image=left_half(graph, latent), clip_vision_output=token, text=text)
    second = graph.path(rest, 2, start=500)()
    made = run(server, graph, graph.sampler(second, SEED, latent_image=half(0), clip_vision_output=half(1), text=half(2)))
    torch.testing.assert_close(made["text"][:, KEPT], torch.load(words, weights_only=True)[:, KEPT], rtol=0, atol=1e-5)
    torch.testing.assert_close(made["img"][..., 8:], given(server)[0][..., 8:], rtol=0, atol=1e-5)


def test_a_masked_inversion_changes_only_the_rest(server: HostServer) -> None:
    graph = Graph()
    latent, token = graph.encoded()
    noise = graph.add(
        "UniDiffuserInvert",
        model=graph.model,
        latent_image=left_half(graph, latent),
        clip_vision_output=token,
        text=graph.text("red"),
        steps=4,
        seed=0,
    )
    out = graph.sampler(
        graph.path("text to image", 4)(),
        method="ddim",
        latent_image=noise(0),
        clip_vision_output=noise(1),
        text=graph.text("blue dog"),
    )
    made, clean = run(server, graph, out)["img"], given(server)[0]
    torch.testing.assert_close(made[..., 8:], clean[..., 8:], rtol=0, atol=1e-5)
    assert (made[..., :8] - clean[..., :8]).abs().mean() > 1e-2


def test_a_mask_that_comes_too_late_is_refused(server: HostServer) -> None:
    graph = Graph()
    latent, token = graph.encoded()
    noise = graph.add("UniDiffuserInvert", model=graph.model, latent_image=latent, clip_vision_output=token, steps=2, seed=0)
    out = graph.sampler(graph.path("image", 2)(), latent_image=left_half(graph, noise(0)), clip_vision_output=noise(1))
    graph.show(out(0))
    with pytest.raises(RuntimeError, match="Set the mask before"):
        server.run(graph.prompt)
