"""Bad input gives an error of its node with a remedy, and the next prompt runs."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from host_server import HostServer, InvalidPrompt, error_of
from PIL import Image
from prompts import Graph, Link

CHAIN = {"rounds": 1, "steps": 1, "seed": 0, "method": "dpmpp_2m", "image_guidance": 2.0, "text_guidance": 2.0}


def chain(graph: Graph, **inputs: Link) -> Link:
    """The pictures of a Gibbs chain."""
    parts = {"model": graph.model, "vae": graph.vae, "caption_decoder": graph.decoder, **inputs}
    return graph.add("UniDiffuserGibbsChain", **CHAIN, **parts)()


def sixteen_channels(graph: Graph) -> None:
    graph.show(graph.sampler(graph.path("joint")(), latent_image=graph.add("TestForeignLatent")())())


def sixteen_channels_in_the_core_sampler(graph: Graph) -> None:
    graph.show(graph.ksampler(graph.text("red"), graph.text(""), graph.add("TestForeignLatent")())())


def sixteen_channels_in_a_chain(graph: Graph) -> None:
    _, token = graph.encoded()
    latent = graph.add("TestForeignLatent")()
    graph.add("PreviewImage", images=chain(graph, latent_image=latent, clip_vision_output=token))


def the_size_of_sdxl(graph: Graph) -> None:
    graph.show(graph.sampler(graph.path("joint")(), latent_image=graph.empty(1024, 1024))())


def the_size_of_sdxl_in_the_core_sampler(graph: Graph) -> None:
    graph.show(graph.ksampler(graph.text("red"), graph.text(""), graph.empty(1024, 1024))())


def not_a_multiple_of_the_patch(graph: Graph) -> None:
    graph.show(graph.ksampler(graph.text("red"), graph.text(""), graph.empty(136, 128))())


def foreign_text(graph: Graph) -> None:
    graph.show(graph.ksampler(graph.add("TestForeignConditioning")(), graph.text(""), graph.empty())())


def foreign_text_in_our_sampler(graph: Graph) -> None:
    graph.show(graph.sampler(graph.path("text to image")(), text=graph.add("TestForeignConditioning")())())


def foreign_text_to_decode(graph: Graph) -> None:
    graph.caption(graph.add("TestForeignConditioning")())


def foreign_text_as_negative(graph: Graph) -> None:
    foreign = graph.add("TestForeignConditioning")()
    graph.show(graph.sampler(graph.path("text to image")(), text=graph.text("red"), negative=foreign)())


def foreign_token(graph: Graph) -> None:
    latent, _ = graph.encoded()
    token = graph.add("TestForeignToken")()
    graph.caption(graph.sampler(graph.path("image to text")(), latent_image=latent, clip_vision_output=token)(2))


def foreign_model(graph: Graph) -> None:
    graph.show(graph.sampler(graph.path("joint")(), model=graph.add("TestForeignModel")())())


def foreign_model_to_invert(graph: Graph) -> None:
    latent, token = graph.encoded()
    noise = graph.add(
        "UniDiffuserInvert",
        model=graph.add("TestForeignModel")(),
        latent_image=latent,
        clip_vision_output=token,
        text=graph.text("red"),
        steps=2,
        seed=0,
    )
    graph.show(noise())


def foreign_model_to_interpolate(graph: Graph) -> None:
    frames = graph.add(
        "UniDiffuserInterpolate",
        model=graph.add("TestForeignModel")(),
        clip_vision=graph.clip_vision,
        vae=graph.vae,
        image_a=graph.picture(),
        image_b=graph.picture(),
        frames=2,
        steps=2,
        text_guidance=1.0,
        seed=0,
    )
    graph.add("PreviewImage", images=frames())


def foreign_model_to_score(graph: Graph) -> None:
    latent, token = graph.encoded()
    graph.add(
        "UniDiffuserScoreCaptions",
        model=graph.add("TestForeignModel")(),
        clip=graph.clip,
        latent_image=latent,
        clip_vision_output=token,
        captions="red",
        levels=1,
        seed=0,
    )


def foreign_model_in_a_chain(graph: Graph) -> None:
    graph.add("PreviewImage", images=chain(graph, model=graph.add("TestForeignModel")()))


def no_memory(graph: Graph) -> None:
    model = graph.add("TestOutOfMemory", model=graph.model, kind="MemoryError")()
    graph.show(graph.sampler(graph.path("joint")(), model=model)())


def no_memory_in_the_core_sampler(graph: Graph) -> None:
    model = graph.add("TestOutOfMemory", model=graph.model, kind="MemoryError")()
    graph.show(graph.ksampler(graph.text("red"), graph.text(""), graph.empty(), model=model)())


def more_than_the_machine_has(graph: Graph) -> None:
    model = graph.add("TestOutOfMemory", model=graph.model, kind="a petabyte")()
    graph.show(graph.sampler(graph.path("joint")(), model=model)())


def no_device_memory(graph: Graph) -> None:
    model = graph.add("TestOutOfMemory", model=graph.model, kind="OutOfMemoryError")()
    graph.show(graph.ksampler(graph.text("red"), graph.text(""), graph.empty(), model=model)())


def no_device_memory_in_our_sampler(graph: Graph) -> None:
    model = graph.add("TestOutOfMemory", model=graph.model, kind="OutOfMemoryError")()
    graph.show(graph.sampler(graph.path("joint")(), model=model)())


def captioning_without_a_picture(graph: Graph) -> None:
    graph.caption(graph.sampler(graph.path("image to text")())(2))


def captioning_without_the_token(graph: Graph) -> None:
    latent, _ = graph.encoded()
    graph.caption(graph.sampler(graph.path("image to text")(), latent_image=latent)(2))


def painting_without_a_text(graph: Graph) -> None:
    graph.show(graph.sampler(graph.path("text to image")())())


def a_path_that_ends_nowhere(graph: Graph) -> None:
    graph.sampler(
        graph.path(
            "through a corner",
            image_start=1000,
            image_corner=800,
            image_end=500,
            text_start=1000,
            text_corner=800,
            text_end=500,
        )()
    )
    graph.show([list(graph.prompt)[-1], 0])


def more_candidates_than_beams(graph: Graph) -> None:
    graph.caption(graph.sampler(graph.path("text")())(2), candidates=9)


def a_word_that_is_not_there(graph: Graph) -> None:
    text = graph.add("UniDiffuserRewriteWords", clip=graph.clip, text="a red cat", words="blue", rest=True)()
    graph.caption(graph.sampler(graph.path("text")(), text=text)(2))


def no_captions(graph: Graph) -> None:
    graph.score("  \n", levels=2, seed=0)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (sixteen_channels, ["16", "4 channels", "Empty Latent Image"]),
        (sixteen_channels_in_the_core_sampler, ["16", "4 channels", "Empty Latent Image"]),
        (sixteen_channels_in_a_chain, ["16", "4 channels", "Empty Latent Image"]),
        (the_size_of_sdxl, ["1024 x 1024", "128 x 128", "smaller 'Empty Latent Image'"]),
        (the_size_of_sdxl_in_the_core_sampler, ["1024 x 1024", "128 x 128", "smaller 'Empty Latent Image'"]),
        (not_a_multiple_of_the_patch, ["multiples of 32 pixels"]),
        (foreign_text, ["77 x 2048", "CLIP output of 'Load UniDiffuser'"]),
        (foreign_text_in_our_sampler, ["77 x 2048", "Load UniDiffuser"]),
        (foreign_text_to_decode, ["77 x 2048", "UniDiffuser Sampler"]),
        (foreign_text_as_negative, ["77 x 2048", "Load UniDiffuser"]),
        (foreign_token, ["1280", "CLIP_VISION output of 'Load UniDiffuser'"]),
        (foreign_model, ["not a UniDiffuser", "Load UniDiffuser"]),
        (foreign_model_to_invert, ["UniDiffuserInvert", "not a UniDiffuser", "Load UniDiffuser"]),
        (foreign_model_to_interpolate, ["UniDiffuserInterpolate", "not a UniDiffuser", "Load UniDiffuser"]),
        (foreign_model_to_score, ["UniDiffuserScoreCaptions", "not a UniDiffuser", "Load UniDiffuser"]),
        (foreign_model_in_a_chain, ["UniDiffuserGibbsChain", "not a UniDiffuser", "Load UniDiffuser"]),
        (no_memory, ["UniDiffuserSampler: MemoryError", "lower batch size"]),
        (no_memory_in_the_core_sampler, ["KSampler: MemoryError", "lower batch size"]),
        (more_than_the_machine_has, ["UniDiffuserSampler: MemoryError", "lower batch size"]),
        (no_device_memory, ["KSampler: torch.OutOfMemoryError", "batch_size"]),  # the host's own advice
        (no_device_memory_in_our_sampler, ["UniDiffuserSampler: torch.OutOfMemoryError", "batch_size"]),
        (captioning_without_a_picture, ["latent_image", "clip_vision_output"]),
        (captioning_without_the_token, ["clip_vision_output"]),
        (painting_without_a_text, ["'text'"]),
        (a_path_that_ends_nowhere, ["'image_end' is 500", "at least one of them to 0"]),
        (more_candidates_than_beams, ["beams"]),
        (a_word_that_is_not_there, ["blue"]),
        (no_captions, ["captions"]),
    ],
)
def test_the_node_says_what_to_do(server: HostServer, build: Callable[[Graph], None], words: list[str]) -> None:
    graph = Graph()
    build(graph)
    with pytest.raises(RuntimeError) as error:
        server.run(graph.prompt)
    assert all(word in str(error.value) for word in words), error.value
    good = Graph()
    good.show(good.sampler(good.path("joint", 1)())())
    assert server.run(good.prompt)


def test_a_path_of_no_steps_is_not_queued(server: HostServer) -> None:
    graph = Graph()
    graph.show(graph.sampler(graph.path("joint", 0)())())
    with pytest.raises(InvalidPrompt) as error:
        server.queue(graph.prompt)
    assert "steps" in str(error.value)


def test_a_mask_of_another_size_is_scaled(server: HostServer) -> None:
    """As in the host; the inpainting tests check which part is kept."""
    shown = []
    for side in (128, 70):
        graph = Graph()
        latent, token = graph.encoded()
        mask = graph.add("SolidMask", value=1.0, width=side, height=2 * side)()
        masked = graph.add("SetLatentNoiseMask", samples=latent, mask=mask)()
        out = graph.sampler(
            graph.path("text to image")(), latent_image=masked, clip_vision_output=token, text=graph.text("red cat")
        )
        preview = graph.show(out())
        shown.append(server.file(server.run(graph.prompt)[preview]["images"][0]))
    assert pixels(shown[0]) == pixels(shown[1])


def pixels(file: bytes) -> bytes:
    with Image.open(io.BytesIO(file)) as picture:
        return picture.tobytes()


def test_a_path_of_no_steps_says_so_behind_a_wire(server: HostServer) -> None:
    """A number from another node is not validated when the prompt is queued."""
    graph = Graph()
    steps = graph.add("PrimitiveInt", value=0)()
    graph.show(graph.sampler(graph.path("joint", steps)())())
    with pytest.raises(RuntimeError, match="steps"):
        server.run(graph.prompt)


def test_a_deleted_checkpoint_is_named(server: HostServer) -> None:
    folder = server.base / "models/unidiffuser"
    (folder / "gone.safetensors").write_bytes((folder / "tiny.safetensors").read_bytes())
    server.get("/object_info/UniDiffuserLoader")
    slow = Graph()
    slow.show(slow.sampler(slow.path("joint", 200)())())
    doomed = Graph("gone.safetensors")
    doomed.show(doomed.sampler(doomed.path("joint", 1)())())
    first, second = server.queue(slow.prompt), server.queue(doomed.prompt)
    (folder / "gone.safetensors").unlink()
    server.wait(first)
    entry = server.wait(second)
    assert error_of(entry).startswith("UniDiffuserLoader")
    assert "gone.safetensors" in error_of(entry)
    assert "models/unidiffuser" in error_of(entry)
    good = Graph()
    good.show(good.sampler(good.path("joint", 1)())())
    assert server.run(good.prompt)
