"""Show Pairs and the strip of a Gibbs chain in a real server."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from host_server import HostServer
from PIL import Image
from prompts import Graph


def pairs(graph: Graph, images: Any, captions: Any, **inputs: Any) -> str:
    settings = {"filename_prefix": "pairs/pair", "save": True, "text_files": False, **inputs}
    return graph.add("UniDiffuserShowPairs", images=images, captions=captions, **settings)()[0]


def test_pairs_are_saved_with_caption_and_prompt(server: HostServer) -> None:
    graph = Graph()
    out = graph.sampler(graph.path("joint")(), latent_image=graph.empty(batch_size=3), caption_decoder=graph.decoder)
    image = graph.add("VAEDecode", samples=out(0), vae=graph.vae)()
    captions = graph.caption(out(2))
    node = pairs(graph, image, captions(0), filename_prefix="mine/%batch_num%-pair", text_files=True)
    shown = server.run(graph.prompt)
    assert [item["type"] for item in shown[node]["images"]] == ["output"] * 3
    assert shown[node]["unidiffuser_captions"] == shown[captions()[0]]["text"][0].splitlines()
    for number, (item, caption) in enumerate(zip(shown[node]["images"], shown[node]["unidiffuser_captions"], strict=True)):
        path = Path(server.base) / "output" / item["subfolder"] / item["filename"]
        assert item["subfolder"] == "mine"
        assert item["filename"].startswith(f"{number}-pair_")
        assert path.with_suffix(".txt").read_text(encoding="utf-8") == caption + "\n"
        with Image.open(path) as saved:
            assert saved.size == (128, 128)
            assert saved.text["caption"] == caption
            assert json.loads(saved.text["prompt"])[node]["class_type"] == "UniDiffuserShowPairs"


def test_one_caption_is_for_all_and_nothing_is_saved_when_switched_off(server: HostServer) -> None:
    graph = Graph()
    image = graph.add("EmptyImage", width=40, height=24, batch_size=2, color=0xFF0000)()
    other = graph.add("EmptyImage", width=16, height=16, batch_size=1, color=0x00FF00)()
    both = graph.add("RebatchImages", images=image, batch_size=1)()
    text = graph.add("PrimitiveString", value="一只红苹果")()
    first, second = pairs(graph, both, text, save=False, text_files=True), pairs(graph, other, text, save=False)
    before = set((Path(server.base) / "output").rglob("*"))
    shown = server.run(graph.prompt)
    assert [item["type"] for item in shown[first]["images"]] == ["temp"] * 2
    assert shown[first]["unidiffuser_captions"] == ["一只红苹果"] * 2
    assert set((Path(server.base) / "output").rglob("*")) == before
    with Image.open(io.BytesIO(server.file(shown[second]["images"][0]))) as saved:
        assert (saved.size, saved.text["caption"]) == ((16, 16), "一只红苹果")


def test_another_number_of_captions_is_refused(server: HostServer) -> None:
    graph = Graph()
    image = graph.add("EmptyImage", width=16, height=16, batch_size=3, color=0)()
    pairs(graph, image, graph.add("PrimitiveString", value="one\ntwo")())
    with pytest.raises(RuntimeError, match=r"'images' has 3 images and 'captions' 2 captions"):
        server.run(graph.prompt)


def test_a_gibbs_chain_shows_all_rounds_so_far(server: HostServer) -> None:
    graph = Graph()
    chain = graph.add(
        "UniDiffuserGibbsChain",
        model=graph.model,
        vae=graph.vae,
        caption_decoder=graph.decoder,
        text=graph.text("red"),
        rounds=3,
        steps=2,
        seed=5,
        method="dpmpp_2m",
        image_guidance=2.0,
        text_guidance=2.0,
    )
    node = pairs(graph, chain(0), chain(1), save=False)
    shown = server.run(graph.prompt)
    strips = [found for name, found in shown.items() if name != node and "unidiffuser_captions" in found]
    strips.sort(key=lambda strip: len(strip["images"]))
    assert [len(strip["images"]) for strip in strips] == [1, 2, 3]
    assert strips[0]["images"] == strips[2]["images"][:1]
    assert strips[1]["unidiffuser_captions"] == strips[2]["unidiffuser_captions"][:2]
    assert shown[node]["unidiffuser_captions"] == strips[2]["unidiffuser_captions"]
    files = [server.file(item) for item in strips[2]["images"]]
    last = [server.file(item) for item in shown[node]["images"]]
    for strip, pair in zip(files, last, strict=True):
        assert Image.open(io.BytesIO(strip)).tobytes() == Image.open(io.BytesIO(pair)).tobytes()
