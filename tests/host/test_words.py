"""Words in and out: captions of encoded prompts, what the model does not know of a prompt."""

from __future__ import annotations

import re

import pytest
import torch
from host_server import HostServer
from node_texts import NodeTexts
from prompts import Graph

from unidiffuser.runtime.lora import Change, write_lora

UNKNOWN = '\u26a0 The model does not know "mountains" (nearest: volcano).'


def test_a_half_precision_decoder_repeats_encoded_prompts(server: HostServer) -> None:
    """The decoder of the bundled file is stored in float16, CLIP text of the host is float32."""
    graph = Graph("emoji")
    prompt = "red apple, twemoji"
    texts = [
        graph.text(prompt),
        graph.add("UniDiffuserRewriteWords", clip=graph.clip, text=prompt, words="apple", rest=True)(),
    ]
    captions = [graph.caption(text)()[0] for text in texts]
    shown = server.run(graph.prompt)
    assert [shown[caption]["text"][0] for caption in captions] == [prompt, prompt]


def sampled(graph: Graph, kind: str, text: list) -> str:
    """Id of a node that samples with a text."""
    size = graph.empty(128)
    if kind == "KSampler":
        nothing = graph.add("ConditioningZeroOut", conditioning=text)()
        node = graph.ksampler(text, nothing, size)()
    elif kind == "SamplerCustomAdvanced":
        guider = graph.add("BasicGuider", model=graph.model, conditioning=text)()
        node = graph.add(
            "SamplerCustomAdvanced",
            noise=graph.add("RandomNoise", noise_seed=0)(),
            guider=guider,
            sampler=graph.add("KSamplerSelect", sampler_name="euler")(),
            sigmas=graph.add("BasicScheduler", model=graph.model, scheduler="normal", steps=2, denoise=1.0)(),
            latent_image=size,
        )()
    else:
        path = graph.path("text to image", 2)()
        node = graph.sampler(path, latent_image=size, text=text, caption_decoder=graph.decoder)()
    graph.show(node)
    return node[0]


@pytest.mark.parametrize("kind", ["KSampler", "SamplerCustomAdvanced", "UniDiffuserSampler"])
def test_samplers_name_the_words_that_the_model_does_not_know(server: HostServer, kind: str) -> None:
    graph = Graph("emoji")
    bad, good, long = (
        sampled(graph, kind, graph.text(text))
        for text in (
            "(castle:1.2) in the mountains, embedding:none",
            "red apple, noto",
            "red apple, green apple, pear, peach, banana, lemon, grapes and watermelon",
        )
    )
    with NodeTexts(server.port) as texts:
        server.run(graph.prompt)
        assert texts.of(bad).split("\n\n")[0] == UNKNOWN  # above the caption, if there is one
        cut = texts.of(long).split("\n\n")[0]
        assert cut.startswith("\u26a0 Cut to the text encoder's limit of 10 tokens, which loses \"")
        assert cut.endswith('grapes and watermelon".')
        assert UNKNOWN[0] not in texts.of(good, 0)
    assert UNKNOWN[2:] in server.log


@pytest.mark.parametrize("kind", ["KSampler", "UniDiffuserSampler"])
def test_samplers_name_a_conditioning_that_is_read_in_part(server: HostServer, kind: str) -> None:
    graph = Graph("emoji")
    one, other = graph.text("red apple, noto"), graph.text("pear, noto")
    long = graph.text("red apple, green apple, pear, peach, banana, lemon, grapes and watermelon")
    joined = sampled(graph, kind, graph.add("ConditioningConcat", conditioning_to=one, conditioning_from=other)())
    cut = sampled(graph, kind, long)
    with NodeTexts(server.port) as texts:
        server.run(graph.prompt)
        assert "as 'Conditioning (Concat)' makes it, but this model reads only the first prompt" in texts.of(joined)
        assert "Concat" not in texts.of(cut)


def test_a_checkpoint_without_a_vocabulary_warns_only_of_what_is_cut(server: HostServer) -> None:
    graph = Graph()
    short, long = (sampled(graph, "KSampler", graph.text(text)) for text in ("qwerty", "qwertyuiop"))
    with NodeTexts(server.port) as texts:
        server.run(graph.prompt)
        assert texts.of(long).startswith("\u26a0 Cut to the text encoder's limit of 6 tokens")
        assert not re.search("Cut|not know", texts.of(short, 0))


def test_a_warning_goes_when_the_prompt_is_mended(server: HostServer) -> None:
    with NodeTexts(server.port) as texts:
        for text, shown in (("castle in the mountains", UNKNOWN), ("castle", "")):
            graph = Graph("emoji")
            node = sampled(graph, "KSampler", graph.text(text))
            server.run(graph.prompt)
            assert texts.of(node) == shown
        assert [text for name, text in texts.history if name == node] == [UNKNOWN, ""]


def test_a_chain_keeps_its_warning_above_the_captions(server: HostServer) -> None:
    graph = Graph("emoji")
    chain = graph.add(
        "UniDiffuserGibbsChain",
        model=graph.model,
        vae=graph.vae,
        caption_decoder=graph.decoder,
        text=graph.text("castle in the mountains"),
        rounds=2,
        steps=2,
        seed=0,
        method="dpmpp_2m",
        image_guidance=3.0,
        text_guidance=3.0,
    )
    graph.add("PreviewImage", images=chain())
    with NodeTexts(server.port) as texts:
        server.run(graph.prompt)
        warning, captions = texts.of(chain()[0]).split("\n\n")
        assert warning == UNKNOWN
        assert len(captions.splitlines()) == 2


def test_inversion_and_scores_warn_too(server: HostServer) -> None:
    graph = Graph("emoji")
    text = graph.text("castle in the mountains")
    latent, token = graph.encoded()
    inverted = graph.add(
        "UniDiffuserInvert", model=graph.model, latent_image=latent, clip_vision_output=token, text=text, steps=2, seed=0
    )()
    graph.show(inverted)
    scores = graph.score("lion\nmountains\na red lion")()[0]
    with NodeTexts(server.port) as texts:
        server.run(graph.prompt)
        assert texts.of(inverted[0]) == UNKNOWN
        assert texts.of(scores).startswith(UNKNOWN)


def test_a_lora_on_the_model_may_know_the_words(server: HostServer) -> None:
    write_lora(
        server.base / "models/loras/blank.safetensors",
        {"uvit": {"in_blocks.0.attn.qkv": Change(torch.zeros(2, 256), torch.zeros(768, 2))}},
        {},
    )
    server.get("/object_info/LoraLoaderModelOnly")
    graph = Graph("emoji")
    graph.model = graph.add("LoraLoaderModelOnly", model=graph.model, lora_name="blank.safetensors", strength_model=1.0)()
    node = sampled(graph, "KSampler", graph.text("zorbi in the mountains"))
    with NodeTexts(server.port) as texts:
        server.run(graph.prompt)
        assert texts.of(node, 0.5) == ""
