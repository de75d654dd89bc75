"""Train UniDiffuser LoRA in a real server: the file, interrupt and resume, refused inputs."""

from __future__ import annotations

import io
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from host_server import HostServer, error_of
from PIL import Image
from prompts import Graph
from safetensors.torch import load_file
from tiny import HEAD, write_tiny_checkpoint

import unidiffuser


@pytest.fixture(scope="module", autouse=True)
def peft(server: HostServer) -> None:
    python = server.process.args[0]
    if subprocess.run([python, "-c", "import peft"], capture_output=True).returncode:
        pytest.skip("NO PEFT in the host's Python: pip install -r requirements.txt there to run these tests")


def training(graph: Graph, **more: Any) -> Any:
    first = graph.add("EmptyImage", width=96, height=80, batch_size=1, color=0xC03010)()
    second = graph.add("EmptyImage", width=128, height=128, batch_size=1, color=0x10C030)()
    settings = {
        "captions": "zor\nzor cat",
        "name": "zor",
        "steps": 4,
        "learning_rate": 0.01,
        "batch_size": 2,
        "rank": 2,
        "kept_pairs": 3,
        "variations": 2,
        "preview_every": 2,
        "seed": 1,
        "images": graph.add("ImageBatch", image1=first, image2=second)(),
        **more,
    }
    return graph.add(
        "UniDiffuserTrainLora",
        model=graph.model,
        clip=graph.clip,
        vae=graph.vae,
        clip_vision=graph.clip_vision,
        caption_decoder=graph.decoder,
        **settings,
    )


def picture_of(server: HostServer, shown: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(server.file(shown["images"][0]))).convert("RGB")


def drawn(graph: Graph, model: Any, decoder: Any) -> tuple[str, str]:
    """Preview and caption of a joint sample of a model."""
    out = graph.sampler(graph.path("joint", 3)(), 3, model=model)
    words = graph.add(
        "UniDiffuserDecodeCaption", caption_decoder=decoder, text=out(2), method="beam", candidates=2, beams=3, top_p=0.8,
        temperature=1.0, seed=0,
    )  # fmt: skip
    return graph.show(out(0)), words()[0]


@pytest.fixture(scope="module", params=["patches", "detail head"])
def trained(request: pytest.FixtureRequest, server: HostServer, tiny_file: Path) -> tuple[Path, Path, bytes, list[str]]:
    """(model file, LoRA file, picture, captions) by the outputs of a run."""
    file, word = tiny_file, "zor"
    if request.param == "detail head":
        file, word = tiny_file.with_name("tiny_head.safetensors"), "zorhead"
        write_tiny_checkpoint(file, downscale=4, uvit=HEAD | {"detail_inner": 12, "detail_inner_blocks": 1, "detail_told": 8})
        server.get("/object_info/UniDiffuserLoader")
    graph = Graph(file.name)
    node = training(graph, name=word, steps=16)  # enough to change the captions of the untrained decoder
    picture, words = drawn(graph, node(0), node(1))
    name = graph.add("PreviewAny", source=node(2))()[0]
    plot, sample = (graph.add("PreviewImage", images=node(k))()[0] for k in (3, 4))
    shown = server.run(graph.prompt)
    assert shown[name]["text"] == [f"{word}.safetensors"]
    assert picture_of(server, shown[plot]).size == (768, 432)
    assert picture_of(server, shown[sample]).width > 4 * 128
    assert not (server.base / "user/unidiffuser/lora" / word).exists()
    return (
        file,
        server.base / f"models/loras/{word}.safetensors",
        picture_of(server, shown[picture]).tobytes(),
        shown[words]["text"],
    )


def test_the_file_does_the_same_in_every_loader(server: HostServer, trained: tuple[Path, Path, bytes, list[str]]) -> None:
    model, file, picture, words = trained
    server.get("/object_info/LoraLoaderModelOnly")
    graph = Graph(model.name)
    plain = drawn(graph, graph.model, graph.decoder)
    ours = graph.add(
        "UniDiffuserLoraLoader",
        model=graph.model,
        caption_decoder=graph.decoder,
        lora_name=file.name,
        strength_model=1.0,
        strength_captions=1.0,
    )
    with_ours = drawn(graph, ours(0), ours(1))
    core = graph.add("LoraLoaderModelOnly", model=graph.model, lora_name=file.name, strength_model=1.0)()
    with_core = drawn(graph, core, graph.decoder)
    again = drawn(graph, graph.model, graph.decoder)
    shown = server.run(graph.prompt)
    made = [picture_of(server, shown[p]).tobytes() for p, _ in (plain, with_ours, with_core, again)]
    said = [shown[w]["text"] for _, w in (plain, with_ours, with_core, again)]
    assert made[1] == picture
    assert made[2] == picture
    assert made[0] != picture
    assert said[1] == words
    assert said[0] == said[3] != words  # the same decoder, with the LoRA and again without it
    assert made[3] == made[0]


def test_the_library_loads_the_file(trained: tuple[Path, Path, bytes, list[str]]) -> None:
    file, lora, *_ = trained
    model = unidiffuser.load(file)
    before = model.text_to_image("zor", seed=0)[0].tobytes()
    model.load_lora(lora)
    assert model.text_to_image("zor", seed=0)[0].tobytes() != before
    assert {name.split(".")[0] for name in load_file(lora)} == {"diffusion_model", "caption_decoder"}


def test_an_interrupted_run_leaves_no_file_and_goes_on(server: HostServer) -> None:
    graph = Graph()
    training(graph, name="long", steps=100_000, preview_every=10_000)
    prompt_id = server.queue(graph.prompt)
    run, end = server.base / "user/unidiffuser/lora/long", time.monotonic() + 240
    while not list(run.glob("*/checkpoints/[0-9]*")) and time.monotonic() < end:
        time.sleep(0.2)
    server.request("/interrupt", {})
    assert error_of(server.wait(prompt_id)) == "interrupted"
    assert not list((server.base / "models/loras").glob("long*"))
    (kept,) = run.glob("*/checkpoints/[0-9]*")

    graph = Graph()
    node = training(graph, name="long", steps=int(kept.name) + 1, preview_every=10_000)
    graph.add("PreviewAny", source=node(2))
    before = time.monotonic()
    server.run(graph.prompt)
    assert time.monotonic() >= before
    assert (server.base / "models/loras/long.safetensors").is_file()
    assert not run.exists()
    assert f"at step {int(kept.name)}" in server.log  # it resumed instead of starting again


def test_a_name_in_use_gets_a_number(server: HostServer, trained: tuple[Path, Path, bytes, list[str]]) -> None:
    file = trained[1]
    before = file.read_bytes()
    graph = Graph()
    node = training(graph, steps=1, captions="zor", name=file.stem)
    name = graph.add("PreviewAny", source=node(2))()[0]
    assert server.run(graph.prompt)[name]["text"] == [f"{file.stem}-2.safetensors"]
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"captions": "a\nb\nc"}, "'captions' has 3 lines for 2 images"),
        ({"captions": " \n"}, "'captions' has 0 lines for 2 images"),
        ({"name": "../../etc/x"}, "is not a valid file name"),
        ({"model": "foreign"}, "not a UniDiffuser"),
    ],
)
def test_bad_input_is_refused(server: HostServer, settings: dict[str, Any], text: str) -> None:
    graph = Graph()
    if settings.get("model") == "foreign":
        settings = {}
        graph.model = graph.add("TestForeignModel")()
    training(graph, **settings)
    with pytest.raises(RuntimeError, match=text):
        server.run(graph.prompt)


def test_a_file_that_is_no_lora_for_the_model_is_refused(server: HostServer) -> None:
    (server.base / "models/loras/none.safetensors").write_bytes(
        (server.base / "models/unidiffuser/tiny.safetensors").read_bytes()
    )
    server.get("/object_info/UniDiffuserLoraLoader")
    graph = Graph()
    node = graph.add(
        "UniDiffuserLoraLoader", model=graph.model, caption_decoder=graph.decoder, lora_name="none.safetensors",
        strength_model=1.0, strength_captions=1.0,
    )  # fmt: skip
    drawn(graph, node(0), node(1))
    with pytest.raises(RuntimeError, match="is not a LoRA"):
        server.run(graph.prompt)
