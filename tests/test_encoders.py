"""Encoders and tokenizers compared with those of transformers and diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import clip_image_processor, clip_tokenizer, gpt2_tokenizer
from PIL import Image
from tiny import tiny_config, tokenizer_specs

from unidiffuser.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from unidiffuser.checkpoints.skeleton import assign_weights
from unidiffuser.checkpoints.tokenizers import STOP, BytePairTokenizer, clip_spec, gpt2_spec, read_spec
from unidiffuser.encoders.autoencoder import Autoencoder
from unidiffuser.encoders.clip import ImageTokenEncoder, TextEncoder, clip_image_model, clip_text_model
from unidiffuser.small.stem import ConvStem

CONFIG = tiny_config()


@pytest.fixture(scope="module")
def clip() -> tuple[BytePairTokenizer, Any]:
    return BytePairTokenizer.from_spec(clip_spec()), clip_tokenizer()


@pytest.fixture(scope="module")
def gpt2() -> tuple[BytePairTokenizer, Any]:
    return BytePairTokenizer.from_spec(gpt2_spec()), gpt2_tokenizer()


texts = st.text(st.characters(codec="utf-8"), max_size=60) | st.lists(
    st.sampled_from(
        ["a photo of", " An ELEPHANT", "'s", "it's", "don't", "  ", "\n", "漢字", "🦊", "é", "e\u0301", "42", "...", "<|"]
    )
).map("".join)


# ---- Tokenizers -----------------------------------------------------------------------------------------------------


def test_published_ids(clip: Any, gpt2: Any) -> None:
    """Well-known ids of the published vocabularies."""
    assert (len(clip[0]), len(gpt2[0])) == (49408, 50258)
    assert clip[0](["a photo of a cat"], 77)[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    assert gpt2[0].encode("Hello world") == [15496, 995]
    assert gpt2[0].encode("<|endoftext|><|EOS|>") == [50256, 50257]


@given(texts)
@settings(max_examples=150, deadline=None)
def test_clip_tokens_equal_transformers(clip: Any, text: str) -> None:
    ours, theirs = clip
    expected = theirs(text, padding="max_length", max_length=77, truncation=True).input_ids
    assert ours([text], 77)[0].tolist() == expected
    assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True)


@given(texts)
@settings(max_examples=150, deadline=None)
def test_gpt2_tokens_equal_transformers_and_decode_to_the_text(gpt2: Any, text: str) -> None:
    ours, theirs = gpt2
    assert ours.encode(text) == theirs(text).input_ids
    assert ours.decode(ours.encode(text)) == text


def test_stop_token_is_left_out_of_the_text(gpt2: Any) -> None:
    assert gpt2[0].decode([15496, 995, 50257]) == "Hello world"
    assert gpt2[0].decode([15496, 50257], skip_special_tokens=False) == "Hello<|EOS|>"


def test_the_end_of_a_long_prompt_is_lost(clip: Any) -> None:
    prompt = "red apple " * 37 + "on a TABLE in Paris" + " under the sea" * 900
    ids = clip[0]([prompt, "short"], 77)
    assert ids.shape == (2, 77)
    assert ids[0, -1] == 49407
    assert clip[0].lost(prompt, 77) == prompt[prompt.index("a TABLE") :]
    assert clip[0].lost("red apple " * 37, 77) == ""


@pytest.mark.parametrize(
    "spec", [{}, {"vocab": [], "merges": []}, {"vocab": {"a": 0}, "merges": ["a b"]}], ids=["empty", "list", "unknown"]
)
def test_invalid_tokenizer_spec_is_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="vocab"):
        BytePairTokenizer.from_spec(spec)


@pytest.mark.parametrize("kind", ["clip", "gpt2"])
def test_saved_tokenizer_folders_are_read(kind: str, request: Any, tmp_path: Path) -> None:
    ours, theirs = request.getfixturevalue(kind)
    theirs.save_pretrained(tmp_path)
    spec = read_spec(tmp_path)
    assert spec is not None
    assert spec["merges"] == ours.merges
    assert spec["vocab"] == {token: i for token, i in ours.vocab.items() if token != STOP}


def test_older_tokenizer_folders_are_read(tmp_path: Path) -> None:
    assert read_spec(tmp_path) is None
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n\n")
    (tmp_path / "added_tokens.json").write_text('{"<|EOS|>": 3}')
    assert read_spec(tmp_path) == {"vocab": {"a": 0, "b": 1, "ab": 2, "<|EOS|>": 3}, "merges": ["a b"]}
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        read_spec(tmp_path)


# ---- Encoders -------------------------------------------------------------------------------------------------------


def test_text_latents(tiny_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    encoder = TextEncoder.from_checkpoint(checkpoint)
    latents = encoder(["a cat", ""])
    assert latents.shape == (2, CONFIG.uvit.num_text_tokens, CONFIG.uvit.text_dim)

    reference = clip_text_model(CONFIG.clip_text).eval()
    prefixed = any(name.startswith("text_model.") for name in reference.state_dict())
    state = checkpoint.state_dict("clip_text")
    reference.load_state_dict({name if prefixed else name.removeprefix("text_model."): t for name, t in state.items()})
    vocab = tokenizer_specs()["clip_tokenizer"]["vocab"]
    ids = [vocab["<|startoftext|>"], vocab["a</w>"], vocab["c"], vocab["a"], vocab["t</w>"]]
    ids += [vocab["<|endoftext|>"]] * (CONFIG.uvit.num_text_tokens - len(ids))
    with torch.inference_mode():
        hidden = reference(torch.tensor([ids])).last_hidden_state
        linear = checkpoint.state_dict("caption", "encode_prefix.")
        expected = hidden @ linear["weight"].T + linear["bias"]
    assert torch.allclose(latents[:1], expected, atol=1e-6)
    assert torch.allclose(encoder(["a cat"]), latents[:1], atol=1e-6)  # whatever else is in the batch
    with pytest.raises(ValueError, match="list of texts"):
        encoder("a cat")


def test_image_tokens(tiny_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    encoder = ImageTokenEncoder.from_checkpoint(checkpoint)
    noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    images = [Image.fromarray(noise), Image.new("RGB", (128, 128), "red")]

    side = CONFIG.clip_image["image_size"]
    processor = clip_image_processor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side},
        image_mean=CONFIG.clip_image["image_mean"], image_std=CONFIG.clip_image["image_std"],
    )  # fmt: skip
    expected = torch.as_tensor(np.stack(processor(images)["pixel_values"]))
    assert torch.allclose(encoder.preprocess(images), expected, atol=1e-6)

    reference = clip_image_model(CONFIG.clip_image).eval()
    assign_weights(reference, checkpoint.state_dict("clip_image"), "reference")
    with torch.inference_mode():
        embeds = reference(pixel_values=expected).image_embeds
    tokens = encoder(images)
    assert tokens.shape == (2, 1, CONFIG.uvit.clip_img_dim)
    assert torch.allclose(tokens[:, 0], embeds, atol=1e-5)


STEM = {"unshuffle": 4, "channels": [8, 8, CONFIG.clip_image["hidden_size"]]}


def test_an_image_tower_with_a_convolutional_stem_survives_saving(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    config = replace(CONFIG, clip_image=CONFIG.clip_image | {"stem": STEM})
    tower = clip_image_model(config.clip_image).eval()
    other = load_checkpoint(tiny_checkpoint)
    parts = {name: other.state_dict(name) for name in other.parts()} | {"clip_image": tower.state_dict()}
    save_checkpoint(tmp_path / "stem.safetensors", config, parts, tokenizer_specs())
    encoder = ImageTokenEncoder.from_checkpoint(load_checkpoint(tmp_path / "stem.safetensors"))
    noise = np.random.default_rng(0).integers(0, 256, (4, 50, 50, 3), dtype=np.uint8)
    images = [Image.fromarray(x) for x in noise]
    with torch.inference_mode():
        expected = tower(pixel_values=encoder.preprocess(images)).image_embeds
    assert torch.allclose(encoder(images)[:, 0], expected, atol=1e-5)
    assert torch.allclose(encoder(images[:1])[0], encoder(images)[0], atol=1e-5)


def test_norms_of_a_stem_fold_into_its_convolutions() -> None:
    g = torch.Generator().manual_seed(0)
    stem = ConvStem(4, [8, 8, 12], norm=torch.nn.BatchNorm2d)
    for _ in range(5):  # running statistics and weights that are not the fresh ones
        stem(torch.randn(4, 3, 32, 32, generator=g) * 2 + 1)
    with torch.no_grad():
        for parameter in stem.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=g)
    pixels = torch.randn(2, 3, 32, 48, generator=g)
    before = stem.eval()(pixels)
    stem.fold_norms()
    assert before.shape == (2, 12, 4, 6)
    assert torch.allclose(stem(pixels), before, atol=1e-5)
    assert set(stem.state_dict()) == set(ConvStem(4, [8, 8, 12]).state_dict())


@pytest.mark.parametrize("image", [Image.new("RGB", (8, 9)), Image.new("L", (8, 8))], ids=["oblong", "grey"])
def test_image_encoder_refuses_other_than_square_rgb(tiny_checkpoint: Path, image: Image.Image) -> None:
    encoder = ImageTokenEncoder.from_checkpoint(load_checkpoint(tiny_checkpoint))
    with pytest.raises(ValueError, match="square RGB"):
        encoder([image])


@pytest.fixture(scope="module")
def autoencoder(tiny_checkpoint: Path) -> Autoencoder:
    return Autoencoder.from_checkpoint(load_checkpoint(tiny_checkpoint))


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in numbers]


def test_latents_are_scaled_samples(autoencoder: Autoencoder) -> None:
    pixels = torch.rand(1, 3, 32, 40, generator=seeds(0)[0]) * 2 - 1
    draws = torch.cat([autoencoder.encode(pixels, seeds(k)) for k in range(400)]) / CONFIG.vae.scale_factor
    with torch.inference_mode():
        folded = torch.nn.functional.pixel_unshuffle(pixels, CONFIG.vae.patch_size)
        posterior = autoencoder.vae.encode(folded).latent_dist
    assert draws.shape[1:] == (4, 4, 5)  # eight times smaller, also when not square
    score = (draws.mean(0) - posterior.mean[0]) / (posterior.std[0] / 20)  # N(0, 1) in each place
    assert score.square().mean() == pytest.approx(1, abs=0.5)
    assert (draws.std(0) / posterior.std[0]).mean() == pytest.approx(1, abs=0.05)


def test_an_item_does_not_depend_on_its_batch(autoencoder: Autoencoder) -> None:
    pixels = torch.rand(3, 3, 32, 32, generator=seeds(0)[0]) * 2 - 1
    together = autoencoder.encode(pixels, seeds(1, 2, 3))
    assert torch.allclose(together[1:2], autoencoder.encode(pixels[1:2], seeds(2)), atol=1e-6)
    assert torch.allclose(autoencoder.decode(together)[1:2], autoencoder.decode(together[1:2]), atol=1e-5)
    global_state = torch.random.get_rng_state()
    autoencoder.encode(pixels, seeds(1)[0])
    assert torch.equal(torch.random.get_rng_state(), global_state)


def test_decode_inverts_scale_and_pixel_unshuffle(autoencoder: Autoencoder) -> None:
    latents = torch.randn(1, 4, 4, 6, generator=seeds(0)[0])
    with torch.inference_mode():
        decoded = autoencoder.vae.decode(latents / CONFIG.vae.scale_factor).sample
    pixels = autoencoder.decode(latents)
    assert pixels.shape == (1, 3, 32, 48)
    assert torch.equal(torch.nn.functional.pixel_unshuffle(pixels, CONFIG.vae.patch_size), decoded)


def test_tiles_of_a_large_picture_are_assembled_in_place(tiny_checkpoint: Path, autoencoder: Autoencoder) -> None:
    tiled = Autoencoder.from_checkpoint(load_checkpoint(tiny_checkpoint), tiling=True)
    small = torch.randn(1, 4, 8, 8, generator=seeds(0)[0])
    assert torch.equal(tiled.decode(small), autoencoder.decode(small))
    large = torch.nn.functional.interpolate(small, (48, 40), mode="bilinear")
    whole, pieces = autoencoder.decode(large), tiled.decode(large)
    assert pieces.shape == whole.shape
    assert not torch.equal(pieces, whole)
    # Random weights let the norms of a tile differ much; a tile in a wrong place would still correlate far less.
    assert torch.corrcoef(torch.stack([pieces.flatten(), whole.flatten()]))[0, 1] > 0.7


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda a: a.encode(torch.zeros(1, 3, 32, 33), seeds(0)), "sides that 8 divides"),
        (lambda a: a.encode(torch.zeros(1, 4, 32, 32), seeds(0)), r"\(B, 3, H, W\)"),
        (lambda a: a.encode(torch.zeros(2, 3, 32, 32), seeds(0)), "2 pictures need as many generators, not 1"),
        (lambda a: a.decode(torch.zeros(1, 3, 4, 4)), r"\(B, 4, H/8, W/8\)"),
        (lambda a: a.decode(torch.full((1, 4, 4, 4), float("nan"))), "NaN or infinite"),
    ],
)
def test_bad_tensors(autoencoder: Autoencoder, call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(autoencoder)


def test_other_precision(tiny_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    exact, half = (TextEncoder.from_checkpoint(checkpoint, dtype=d)(["a cat"]) for d in (None, torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), exact, atol=0.1)
