"""Whole jobs in one node, and the Prompt Helper."""

from __future__ import annotations

import io
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from host_server import HostServer
from node_texts import NodeTexts
from PIL import Image
from prompts import Graph, Link
from tiny import write_tiny_checkpoint

import unidiffuser
from unidiffuser.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from unidiffuser.checkpoints.vocabulary import Vocabulary
from unidiffuser.options import resolve
from unidiffuser.path import NoisePath
from unidiffuser.streams import Streams, item_generators

ROOT = Path(__file__).resolve().parents[2]
PROMPT = {"prompt": "red apple, twemoji", "count": 2, "steps": 8, "image_guidance": 3.0, "text_guidance": 3.0, "seed": 0}


def pictures(server: HostServer, shown: dict) -> list[Image.Image]:
    return [Image.open(io.BytesIO(server.file(item))).convert("RGB") for item in shown["images"]]


def load(server: HostServer, graph: Graph, picture: Image.Image, name: str) -> Link:
    picture.save(server.base / "input" / name)
    return graph.add("LoadImage", image=name)()


def encoders(graph: Graph) -> dict[str, Link]:
    return {"model": graph.model, "vae": graph.vae, "clip_vision": graph.clip_vision}


def encode(graph: Graph, image: Link, fit: str = "crop", size: int = 0, **more: Link) -> Link:
    return graph.add("UniDiffuserEncodePicture", **encoders(graph), image=image, fit=fit, size=size, **more)


def caption(graph: Graph, image: Link, candidates: int = 1, seed: int = 0) -> Link:
    settings = {"fit": "crop", "steps": 8, "text_guidance": 3.0, "candidates": candidates, "seed": seed}
    given = {**encoders(graph), "caption_decoder": graph.decoder, "image": image}
    return graph.add("UniDiffuserCaptionPicture", **given, **settings)


def pair(graph: Graph, **settings: object) -> Link:
    given = {"model": graph.model, "clip": graph.clip, "vae": graph.vae, "caption_decoder": graph.decoder}
    return graph.add("UniDiffuserTextToPair", **given, **{**PROMPT, **settings})


def halves(width: int, height: int) -> Image.Image:
    """A picture that is red at the left and blue at the right."""
    picture = Image.new("RGB", (width, height), (220, 30, 30))
    picture.paste((30, 30, 220), (width // 2, 0, width, height))
    return picture


@pytest.mark.parametrize(
    ("fit", "size", "expected"),
    [("crop", 0, (128, 128)), ("pad", 0, (128, 128)), ("keep shape", 0, (192, 96)), ("crop", 100, (96, 96))],
)
def test_pictures_of_any_size_are_encoded(server: HostServer, fit: str, size: int, expected: tuple[int, int]) -> None:
    graph = Graph()
    image = load(server, graph, halves(200, 100), "wide.png")
    encoded = encode(graph, image, fit, size)
    preview = graph.add("PreviewImage", images=encoded(2))()[0]
    out = graph.sampler(graph.path("image to text")(), latent_image=encoded(0), clip_vision_output=encoded(1))
    decoded, words = graph.show(encoded(0)), graph.caption(out(2))()[0]
    shown = server.run(graph.prompt)
    [seen] = pictures(server, shown[preview])
    assert seen.size == expected
    assert pictures(server, shown[decoded])[0].size == expected
    assert len(shown[words]["text"]) == 1
    width, height = expected
    assert seen.getpixel((4, height // 2))[0] > 200
    assert seen.getpixel((width - 4, height // 2))[2] > 200
    assert (seen.getpixel((width // 2, 2)) == (255, 255, 255)) == (fit == "pad")


def test_an_encoded_picture_equals_the_library_s_and_a_batch_its_items(server: HostServer, tiny_file: Path) -> None:
    graph = Graph()
    image = load(server, graph, halves(300, 170), "uneven.png")
    many = graph.add("RepeatImageBatch", image=image, amount=18)()
    files = {}
    for name, given in (("one", image), ("many", many)):
        encoded = encode(graph, given)
        files[name] = server.base / f"{name}.pt"
        graph.add("TestDumpToken", output=encoded(1), file=str(files[name]))
        graph.add("PreviewImage", images=encoded(2))
    server.run(graph.prompt)
    one, many_tokens = (torch.load(file, weights_only=True) for file in files.values())
    assert many_tokens.shape[0] == 18
    assert torch.allclose(many_tokens, one.expand_as(many_tokens), atol=1e-5)
    model = unidiffuser.load(tiny_file, device="cpu")
    ours = model.image_token_encoder([unidiffuser.media.images.fit(halves(300, 170), 128, 128)])
    assert torch.nn.functional.cosine_similarity(ours.flatten(), one.flatten(), dim=0) > 0.999


def test_a_large_picture_takes_little_memory(server: HostServer) -> None:
    """4000 x 3000 pixels: the picture itself is 144 MB in the host; its full encoding would take gigabytes."""
    graph = Graph("emoji")
    image = load(server, graph, halves(4000, 3000), "large.png")
    for node in (encode(graph, image)(2), encode(graph, image, "keep shape")(2)):
        graph.add("PreviewImage", images=node)
    usual = Graph("emoji")
    usual.add("PreviewImage", images=encode(usual, load(server, usual, halves(200, 100), "small.png"))(2))
    server.run(usual.prompt)
    status, peak, done = Path(f"/proc/{server.process.pid}/status"), [0], threading.Event()

    def resident() -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS"))

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], resident())

    before, watcher = resident(), threading.Thread(target=watch)
    watcher.start()
    server.run(graph.prompt)
    done.set()
    watcher.join()
    assert peak[0] - before < 1_000_000  # kB


def test_the_vae_refuses_pictures_that_the_model_cannot_take(server: HostServer) -> None:
    graph = Graph("emoji")
    large = graph.add("EmptyImage", width=4000, height=3000, batch_size=1, color=0)()
    graph.add("PreviewAny", source=graph.add("VAEEncode", pixels=large, vae=graph.vae)())
    with pytest.raises(RuntimeError, match=r"VAEEncode.*4000 x 3000 pixels.*'Encode Picture'"):
        server.run(graph.prompt)


def test_a_size_that_the_model_cannot_take_is_refused(server: HostServer) -> None:
    graph = Graph()
    graph.add("PreviewImage", images=encode(graph, graph.picture(), size=4096)(2))
    with pytest.raises(RuntimeError, match=r"'size' 4096 gives 4096 x 4096 pixels; this model was trained on 128 x 128"):
        server.run(graph.prompt)


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_a_mask_goes_where_its_picture_goes(server: HostServer, fit: str) -> None:
    """The right half of a wide picture is masked, from a mask of another size."""
    graph = Graph()
    image = load(server, graph, halves(200, 100), "wide.png")
    left = graph.add("SolidMask", value=0.0, width=40, height=20)()
    right = graph.add("SolidMask", value=1.0, width=20, height=20)()
    mask = graph.add("MaskComposite", destination=left, source=right, x=20, y=0, operation="add")()
    encoded = encode(graph, image, fit, mask=mask)
    shown_mask = graph.add("MaskToImage", mask=graph.add("TestLatentMask", samples=encoded(0))())()
    preview = graph.add("PreviewImage", images=shown_mask)()[0]
    seen = np.asarray(pictures(server, server.run(graph.prompt)[preview])[0])[..., 0]
    assert seen.shape == (128, 128)
    middle = seen[40:88]
    assert middle[:, 72:].min() > 250
    assert middle[:, :56].max() < 5
    assert (seen[:20].max() < 5) == (fit == "pad")  # borders are kept


def test_captions_of_pictures(server: HostServer) -> None:
    graph = Graph("emoji")
    fox, lion = (graph.add("UniDiffuserExamplePicture", picture=name)() for name in ("fox", "lion"))
    both = caption(graph, graph.add("ImageBatch", image1=fox, image2=lion)(), candidates=3)
    alone = caption(graph, lion, seed=1)
    shown_all = graph.add("PreviewAny", source=both(1))()[0]
    again = graph.caption(both(3))()[0]
    with NodeTexts(server.port) as texts:
        shown = server.run(graph.prompt)
        first, *_, fourth, _, _ = shown[both()[0]]["text"][0].splitlines()
        assert first.startswith("fox")
        assert fourth.startswith("lion")
        assert fourth.split("  (")[0] == shown[alone()[0]]["text"][0]  # image k uses seed + k
        assert len(shown[shown_all]["text"]) == 6
        assert [line[0] for line in shown[again]["text"][0].splitlines()] == ["f", "l"]
        assert texts.of(both()[0]) == shown[both()[0]]["text"][0]


def test_pairs_from_a_text(server: HostServer) -> None:
    graph = Graph("emoji")
    made, odd = pair(graph), pair(graph, prompt="castle in the mountains", count=1)
    latent = graph.show(made(2))
    again = graph.caption(made(4))()[0]
    with NodeTexts(server.port) as texts:
        shown = server.run(graph.prompt)
        assert texts.of(odd()[0]).startswith('\u26a0 The model does not know "mountains" (nearest: volcano).')
    captions = shown[made()[0]]["text"][0].splitlines()
    assert captions[0] == PROMPT["prompt"]
    assert shown[again]["text"][0].splitlines() == captions
    first, second = pictures(server, shown[made()[0]])
    assert first.tobytes() != second.tobytes()
    assert [image.tobytes() for image in pictures(server, shown[latent])] == [first.tobytes(), second.tobytes()]
    model = unidiffuser.load("emoji", device="cpu", dtype=torch.float32)
    options = resolve({"steps": 8, "guidance": 3.0}, model.config)
    text = Streams(text=model.encode_texts([PROMPT["prompt"]] * 2))
    drawn = model.run(NoisePath.text_to_image(8), text, options, item_generators(0, 2))
    ours = np.asarray(model.decode_images(drawn)[0], np.float32)
    assert np.abs(ours - np.asarray(first, np.float32)).max() < 8
    written = model.run(NoisePath.image_to_text(8), drawn.replace(text=None), options, item_generators(0, 2))
    assert captions == model.decode_texts(written)


def helper(graph: Graph, concept: str, style: str, **more: Link) -> str:
    prompt = graph.add("UniDiffuserPromptHelper", concept=concept, style=style, **more)()
    return graph.add("PreviewAny", source=prompt)()[0]


def test_prompts_from_the_words_of_a_checkpoint(server: HostServer, tiny_file: Path) -> None:
    other = tiny_file.with_name("words.safetensors")
    write_tiny_checkpoint(other)
    checkpoint = load_checkpoint(other)
    weights = {part: checkpoint.state_dict(part) for part in checkpoint.parts()}
    config = replace(checkpoint.config, vocabulary=Vocabulary(("dragonfly",), ("ink",)))
    save_checkpoint(other, config, {part: {k: v.clone() for k, v in w.items()} for part, w in weights.items()},
                    checkpoint.tokenizer_specs())  # fmt: skip
    inputs = server.get("/object_info/UniDiffuserPromptHelper")["UniDiffuserPromptHelper"]["input"]["required"]
    concepts, styles = (inputs[name][1]["options"] for name in ("concept", "style"))
    assert concepts[0] == "monkey"
    assert concepts[-1] == "dragonfly"
    assert styles == ["(none)", "noto", "twemoji", "flat", "fluent", "ink"]

    graph = Graph("words.safetensors")
    good = helper(graph, "dragonfly", "ink", clip=graph.clip)
    free = helper(graph, "red apple", "(none)")
    shown = server.run(graph.prompt)
    assert shown[good]["text"][0] == "dragonfly, ink"
    assert shown[free]["text"][0] == "red apple"
    for model, concept, style, message in (
        ("emoji", "dragonfly", "noto", "'concept' is 'dragonfly', which the loaded checkpoint does not know. Nearest: dragon"),
        ("emoji", "kitten", "noto", "'concept' is 'kitten', which the loaded checkpoint does not know. Nearest: cat."),
        ("emoji", "cat", "ink", "'style' is 'ink', which the loaded checkpoint does not know."),
        ("words.safetensors", "cat", "ink", "Choose one of: dragonfly."),
    ):
        graph = Graph(model)
        helper(graph, concept, style, clip=graph.clip)
        with pytest.raises(RuntimeError) as error:
            server.run(graph.prompt)
        assert message in str(error.value)
    graph = Graph()  # a checkpoint that lists no words
    free = helper(graph, "anything", "(none)", clip=graph.clip)
    assert server.run(graph.prompt)[free]["text"][0] == "anything"


def test_the_loader_shows_the_words(server: HostServer) -> None:
    graph = Graph("emoji")
    graph.show(graph.ksampler(graph.text("cat"), graph.text(""), graph.empty(), steps=1)())
    with NodeTexts(server.port) as texts:
        server.request("/free", {"unload_models": True, "free_memory": True})
        server.run({"1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}},
                    "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}})  # fmt: skip
        server.run(graph.prompt)
        styles, concepts = texts.of("1").splitlines()
    assert styles == "4 styles: noto, twemoji, flat, fluent"
    assert concepts.startswith("240 concepts: monkey, gorilla, dog")
    assert concepts.endswith("and 216 more")
