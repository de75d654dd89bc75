"""The bundled model: geometry, latents and a smoke test of each direction; its quality is measured by the evaluation."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
import torch
from PIL import Image

import unidiffuser
from unidiffuser.checkpoints.config import VAEConfig
from unidiffuser.emoji.judge import load_judge
from unidiffuser.emoji.prepare import CONCEPTS_FILE
from unidiffuser.emoji.studies.quality import counted
from unidiffuser.media.images import to_tensor
from unidiffuser.path import NoisePath
from unidiffuser.samplers import Streams, sample

FILE = Path(str(files("unidiffuser") / "assets" / "emoji.safetensors"))
EXAMPLE = Path(str(files("unidiffuser") / "assets" / "example.png"))


@pytest.fixture(scope="module")
def model() -> unidiffuser.pipeline.UniDiffuser:
    return unidiffuser.load("emoji", device="cpu")


def test_size_and_geometry(model):
    assert FILE.stat().st_size <= 25e6
    assert model.checkpoint.parts() == ("uvit", "vae", "clip_text", "clip_image", "caption")
    config = model.config
    assert (config.image_size, config.vae.downscale, config.vae.embed_dim, config.vae.scale_factor) == (256, 8, 4, 0.18215)
    assert config.uvit.latent_size == (32, 32)


def test_latents_have_unit_variance_in_the_convention_of_stable_diffusion(model):
    pixels = to_tensor([Image.open(EXAMPLE).convert("RGB").resize((256, 256))] * 2)
    latents = model.autoencoder.encode(pixels, torch.Generator().manual_seed(0))
    assert 0.3 < latents.std() < 2.0
    words = [line.split(" ", 1)[1] for line in CONCEPTS_FILE.read_text("utf-8").splitlines() if not line.startswith("#")]
    text = model.text_encoder(words)
    assert abs(text.std() - 1) < 0.3
    assert text.mean().abs() < 0.2


def test_preview_colours_match_the_picture(model):
    preview = model.config.vae.preview_rgb
    factors, bias = torch.tensor(preview["factors"]), torch.tensor(preview["bias"])
    pixels = to_tensor([Image.open(EXAMPLE).convert("RGB").resize((256, 256))])
    latent = model.autoencoder.encode(pixels, torch.Generator().manual_seed(0))[0].float()
    guessed = torch.einsum("chw,cr->rhw", latent, factors) + bias[:, None, None]
    seen = torch.nn.functional.avg_pool2d(pixels[0], model.config.vae.downscale)
    assert (guessed - seen).square().mean() < 0.05 * seen.var()


def test_preview_colours_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="preview_rgb must have 4 rows"):
        VAEConfig(preview_rgb={"factors": [[0.0] * 3] * 3, "bias": [0.0] * 3})


def test_pictures_match_their_prompts(model):
    """Eight prompts, scored by a classifier trained on real pictures only; chance is 1 in 240."""
    prompts = ["red apple, noto", "pizza, twemoji", "lion, flat", "sunflower, fluent", "rocket, noto", "penguin, twemoji",
               "watermelon, flat", "red heart, noto"]  # fmt: skip
    pictures = model.text_to_image(prompts, seed=0)
    verdicts = load_judge().classify(pictures)
    right = sum(seen.label == prompt.split(",")[0] for seen, prompt in zip(verdicts, prompts, strict=True))
    assert right >= 4


def test_fast_pictures_and_captions_take_a_few_evaluations(model):
    """Eight prompts, as above; each picture and each caption in as many unguided evaluations as the LoRA says."""
    prompts = ["red apple, noto", "pizza, twemoji", "lion, flat", "sunflower, fluent", "rocket, noto", "penguin, twemoji",
               "watermelon, flat", "red heart, noto"]  # fmt: skip
    fast: dict = {"seed": 0, "preset": "fast"}
    with counted(model.net) as rows:
        pictures = model.text_to_image(prompts, **fast)
        captions = model.image_to_text(pictures, **fast)
        pairs = model.joint(count=2, **fast)
    drawn, written, joint = (model.resolve(fast, route) for route in ("text_to_image", "image_to_text", "joint"))
    blocks = model.config.uvit.depth // 2 * 2 + 1
    assert rows[0] == blocks * (8 * drawn["steps"] + 8 * written["steps"] + 2 * joint["steps"])
    assert (drawn["steps"], written["steps"], joint["steps"]) <= (4, 2, 6)
    assert drawn["guidance"] == 1
    verdicts = load_judge().classify(pictures)
    assert sum(seen.label == prompt.split(",")[0] for seen, prompt in zip(verdicts, prompts, strict=True)) >= 7
    assert sum(caption == prompt for caption, prompt in zip(captions, prompts, strict=True)) >= 6
    assert all(caption for _, caption in pairs)
    assert FILE.with_name("emoji-fast.safetensors").stat().st_size < 7e6


def test_captions_name_the_concept(model):
    prompts = ["red apple, noto", "pizza, twemoji", "lion, flat", "sunflower, fluent"]
    pictures = model.text_to_image(prompts, seed=0)
    captions = model.image_to_text(pictures, seed=0)
    assert sum(c.split(",")[0] == p.split(",")[0] for c, p in zip(captions, prompts, strict=True)) >= 2


@pytest.mark.slow
def test_inversion_is_reversible(model):
    """ddim_inverse, then ddim: the latents of a real picture come back within 10 % at 100 steps, guidance 1."""
    pixels = to_tensor([Image.open(EXAMPLE).convert("RGB").resize((256, 256))])
    img = model.autoencoder.encode(pixels, torch.Generator().manual_seed(0))
    clip_img = model.image_token_encoder([Image.open(EXAMPLE).convert("RGB").resize((256, 256))])
    path = NoisePath.text_to_image(100)
    given = Streams(img, clip_img)
    text = sample(model.net, NoisePath.image_to_text(20), given, generator=torch.Generator().manual_seed(1)).text
    noise = sample(model.net, path.reversed(), Streams(img, clip_img, text), method="ddim_inverse")
    back = sample(model.net, path, noise, method="ddim")
    for name in ("img", "clip_img"):
        error = (back.need(name) - given.need(name)).norm() / given.need(name).norm()
        assert error <= 0.1, f"{name} comes back with relative error {error:.3f}"
    live = img.std((0, 2, 3)) > 0.01  # a constant channel of the latents has no noise to invert to
    assert abs(noise.need("img")[:, live].std() - 1) < 0.25


def test_an_item_does_not_depend_on_its_batch(model):
    together = model.text_to_image("red apple", count=3, steps=8, seed=5)
    alone = model.text_to_image("red apple", count=1, steps=8, seed=7)
    difference = (to_tensor([together[2]]) - to_tensor(alone)).abs().max()
    assert difference <= 2 / 127.5  # a rounding of 8 bits
