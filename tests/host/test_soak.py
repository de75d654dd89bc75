"""Many prompts in a row on one ComfyUI: all tasks mixed, a tenth interrupted, a twentieth invalid."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from host_server import HostServer, InvalidPrompt, error_of
from prompts import Graph, Link
from tiny_server import tiny_server

COUNT = 400
FIRST = 40  # prompts after which every task has run a few times
GROWTH = 1.03  # resident memory after all prompts over that after the first


def text_to_image(graph: Graph, seed: int) -> None:
    graph.show(graph.ksampler(graph.text("red cat"), graph.text(""), graph.empty(batch_size=1 + seed % 3), seed=seed)())


def image_to_text(graph: Graph, seed: int) -> None:
    latent, token = graph.encoded(graph.picture(red=seed * 1001 % 0xFFFFFF))
    graph.caption(graph.sampler(graph.path("image to text")(), seed, latent_image=latent, clip_vision_output=token)(2))


def unconditional(graph: Graph, seed: int) -> None:
    out = graph.sampler(graph.path(("joint", "image", "text")[seed % 3])(), seed, caption_decoder=graph.decoder)
    graph.show(out(0))
    graph.caption(out(2), candidates=2)


def chain(graph: Graph, seed: int) -> None:
    latent, token = graph.encoded()
    made = graph.add(
        "UniDiffuserGibbsChain",
        model=graph.model,
        vae=graph.vae,
        caption_decoder=graph.decoder,
        rounds=2,
        steps=2,
        seed=seed,
        method="dpmpp_2m",
        image_guidance=2.0,
        text_guidance=2.0,
        latent_image=latent,
        clip_vision_output=token,
    )
    graph.add("PreviewImage", images=made(0))


def interpolate(graph: Graph, seed: int) -> None:
    frames = graph.add(
        "UniDiffuserInterpolate",
        model=graph.model,
        clip_vision=graph.clip_vision,
        vae=graph.vae,
        frames=3,
        steps=2,
        image_a=graph.picture(),
        image_b=graph.picture(red=0x20C020),
        text_guidance=2.0,
        seed=seed,
    )
    graph.add("PreviewImage", images=frames())


def score(graph: Graph, seed: int) -> None:
    graph.score("cat\ndog", levels=2, seed=seed)


def described(graph: Graph, seed: int) -> None:
    picture = graph.picture(90 + seed % 3 * 50, seed * 1003 % 0xFFFFFF)
    inputs = {"fit": "pad", "steps": 2, "text_guidance": 2.0, "candidates": 2, "seed": seed, "image": picture}
    parts = {"model": graph.model, "vae": graph.vae, "clip_vision": graph.clip_vision, "caption_decoder": graph.decoder}
    show_pairs(graph, picture, graph.add("UniDiffuserCaptionPicture", **parts, **inputs)())


def pair(graph: Graph, seed: int) -> None:
    inputs = {"prompt": "red cat", "count": 2, "steps": 2, "image_guidance": 2.0, "text_guidance": 2.0, "seed": seed}
    parts = {"model": graph.model, "clip": graph.clip, "vae": graph.vae, "caption_decoder": graph.decoder}
    made = graph.add("UniDiffuserTextToPair", **parts, **inputs)
    show_pairs(graph, made(0), made(1))


def drawn_path(graph: Graph, seed: int) -> None:
    path = graph.add("UniDiffuserNoisePath", task="drawn", steps=3, spacing="uniform", **{"task.points": "1000,1000 400,0 0,0"})
    out = graph.sampler(path(), seed, caption_decoder=graph.decoder)
    show_pairs(graph, graph.add("VAEDecode", samples=out(0), vae=graph.vae)(), graph.caption(out(2))())


def show_pairs(graph: Graph, images: Link, captions: Link) -> None:
    graph.add("UniDiffuserShowPairs", images=images, captions=captions, filename_prefix="soak", save=True, text_files=False)


def endless(graph: Graph, seed: int) -> None:
    graph.show(graph.sampler(graph.path("joint", 1000)(), seed)())


def invalid(graph: Graph, seed: int) -> None:
    graph.caption(graph.sampler(graph.path("image to text")(), seed)(2))


TASKS: list[Callable[[Graph, int], None]] = [
    text_to_image,
    image_to_text,
    unconditional,
    chain,
    interpolate,
    score,
    described,
    pair,
    drawn_path,
]


def one(server: HostServer, number: int) -> str:
    """Run prompt `number`; how it ended."""
    task = invalid if number % 20 == 0 else endless if number % 10 == 5 else TASKS[number % len(TASKS)]
    graph = Graph()
    task(graph, number)
    try:
        running = server.queue(graph.prompt)
    except InvalidPrompt:
        return "not queued"
    if task is endless:
        while not server.get("/queue")["queue_running"]:
            time.sleep(0.05)
        time.sleep(0.5)
        server.request("/interrupt", {})
    entry = server.wait(running)
    if entry["status"]["status_str"] == "success":
        return "success"
    return "interrupted" if error_of(entry) == "interrupted" else "refused in the node"


@pytest.mark.slow
@pytest.mark.usefixtures("host")
def test_many_prompts_end_as_they_should_and_memory_stays(tmp_path: Path) -> None:
    with tiny_server(tmp_path) as server:
        process, ends, before = psutil.Process(server.process.pid), Counter[str](), 0
        for number in range(1, COUNT + 1):
            ends[one(server, number)] += 1
            if number == FIRST:
                before = process.memory_info().rss
        last = process.memory_info().rss
    twentieth = COUNT // 20
    assert ends == {"success": 17 * twentieth, "interrupted": 2 * twentieth, "refused in the node": twentieth}
    assert last < GROWTH * before, f"{last / before:.3f}"
