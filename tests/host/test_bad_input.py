"""Wrong input says in its node what is wrong and what to do; the server goes on and the next prompt runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from host_server import HostServer, InvalidPrompt, error_of
from prompts import Graph


def sixteen_channels(graph: Graph) -> None:
    latent = graph.add("EmptySD3LatentImage", width=128, height=128, batch_size=1)()
    graph.show(graph.sampler(graph.path("joint")(), latent_image=latent)())


def not_a_multiple_of_the_patch(graph: Graph) -> None:
    graph.show(graph.ksampler(graph.text("red"), graph.text(""), graph.empty(136, 128))())


def foreign_text(graph: Graph) -> None:
    graph.show(graph.ksampler(graph.add("TestForeignConditioning")(), graph.text(""), graph.empty())())


def foreign_text_in_our_sampler(graph: Graph) -> None:
    graph.show(graph.sampler(graph.path("text to image")(), text=graph.add("TestForeignConditioning")())())


def foreign_text_to_decode(graph: Graph) -> None:
    graph.caption(graph.add("TestForeignConditioning")())


def foreign_model(graph: Graph) -> None:
    graph.show(graph.sampler(graph.path("joint")(), model=graph.add("TestForeignModel")())())


def no_memory(graph: Graph) -> None:
    model = graph.add("TestOutOfMemory", model=graph.model, kind="MemoryError")()
    graph.show(graph.sampler(graph.path("joint")(), model=model)())


def no_device_memory(graph: Graph) -> None:
    model = graph.add("TestOutOfMemory", model=graph.model, kind="OutOfMemoryError")()
    graph.show(graph.ksampler(graph.text("red"), graph.text(""), graph.empty(), model=model)())


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
    latent, token = graph.encoded()
    graph.add(
        "UniDiffuserScoreCaptions",
        model=graph.model,
        clip=graph.clip,
        latent_image=latent,
        clip_vision_output=token,
        captions="  \n",
        levels=2,
        seed=0,
    )


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (sixteen_channels, ["16", "4 channels", "Empty Latent Image"]),
        (not_a_multiple_of_the_patch, ["multiples of 32 pixels"]),
        (foreign_text, ["77 x 2048", "CLIP output of 'Load UniDiffuser'"]),
        (foreign_text_in_our_sampler, ["77 x 2048", "Load UniDiffuser"]),
        (foreign_text_to_decode, ["77 x 2048", "UniDiffuser Sampler"]),
        (foreign_model, ["not a UniDiffuser", "Load UniDiffuser"]),
        (no_memory, ["memory"]),
        (no_device_memory, ["memory"]),
        (captioning_without_a_picture, ["latent_image", "clip_vision_output"]),
        (captioning_without_the_token, ["clip_vision_output"]),
        (painting_without_a_text, ["'text'"]),
        (a_path_that_ends_nowhere, ["path must end", "500"]),
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
    assert "gone.safetensors" in error_of(entry)
    assert "models/unidiffuser" in error_of(entry)
