"""Convex upsampling at the end of an autoencoder's decoder: what it guarantees, and checkpoints that have it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config, write_tiny_checkpoint

import unidiffuser
from unidiffuser.checkpoints.checkpoint import convert, load_checkpoint
from unidiffuser.checkpoints.config import ModelConfig, VAEConfig
from unidiffuser.encoders.autoencoder import Autoencoder, to_encoder_size, to_pixels
from unidiffuser.small.upsampler import ConvexUpsampler, convex_upsample

UPSAMPLER = {"features": 5, "width": 8}
PALETTE = {"manners": ["flat", "lined"], "colours": 5}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(features: int = 5) -> ConvexUpsampler:
    """With random weights in its last layer, where a fresh one has zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        upsampler = ConvexUpsampler(features, 8).requires_grad_(False)
    upsampler.conv_out.weight.copy_(torch.randn(upsampler.conv_out.weight.shape, generator=generator(2)))
    return upsampler


@given(seed=st.integers(0, 10**6), colour=st.tuples(*[st.floats(-1, 1, width=16)] * 3))
@settings(max_examples=25, deadline=None)
def test_flat_areas_stay_flat_and_no_pixel_leaves_the_range_of_its_neighbours(seed, colour):
    pixels = torch.rand(2, 3, 8, 12, generator=generator(seed)) * 2 - 1
    pixels[1] = torch.tensor(colour).view(3, 1, 1)
    out = trained()(pixels, torch.randn(2, 5, 2, 3, generator=generator(seed + 1)))
    assert out.shape == (2, 3, 16, 24)
    torch.testing.assert_close(out[1], pixels[1].repeat_interleave(2, 1).repeat_interleave(2, 2), rtol=0, atol=1e-5)
    padded = F.pad(pixels, (1, 1, 1, 1), mode="replicate")
    low, high = (-F.max_pool2d(-padded, 3, 1), F.max_pool2d(padded, 3, 1))
    for bound, sign in ((low, 1), (high, -1)):
        assert (sign * (out - bound.repeat_interleave(2, 2).repeat_interleave(2, 3)) > -1e-5).all()


def test_each_weight_belongs_to_its_subpixel_and_neighbour():
    pixels = torch.rand(1, 3, 4, 4, generator=generator())
    logits = torch.full((1, 4, 9, 4, 4), -1e4)
    for subpixel, neighbour in enumerate((0, 2, 6, 8)):  # each takes the coarse pixel on its own side
        logits[:, subpixel, neighbour] = 0
    out = convex_upsample(pixels, logits.flatten(1, 2))
    padded = F.pad(pixels, (1, 1, 1, 1), mode="replicate")
    assert torch.equal(out[:, :, 0::2, 0::2], padded[:, :, 0:4, 0:4])
    assert torch.equal(out[:, :, 0::2, 1::2], padded[:, :, 0:4, 2:6])
    assert torch.equal(out[:, :, 1::2, 0::2], padded[:, :, 2:6, 0:4])
    assert torch.equal(out[:, :, 1::2, 1::2], padded[:, :, 2:6, 2:6])


def test_a_fresh_upsampler_is_nearly_bilinear():
    with torch.random.fork_rng():
        upsampler = ConvexUpsampler(5, 8).requires_grad_(False)
    pixels = torch.rand(1, 3, 16, 16, generator=generator()) * 2 - 1
    out = upsampler(pixels, torch.zeros(1, 5, 4, 4))
    assert (out - F.interpolate(pixels, scale_factor=2, mode="bilinear")).abs().max() < 0.12


def test_it_learns_a_sharp_edge_that_bilinear_interpolation_blurs():
    fine = torch.where(torch.arange(16) < 7, -1.0, 1.0).expand(1, 3, 16, 16)
    coarse = F.avg_pool2d(fine, 2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        upsampler = ConvexUpsampler(1, 8)
    optimizer = torch.optim.Adam(upsampler.parameters(), 1e-2)
    features = torch.zeros(1, 1, 2, 2)
    for _ in range(60):
        optimizer.zero_grad()
        (upsampler(coarse, features) - fine).abs().mean().backward()
        optimizer.step()
    blurred = (F.interpolate(coarse, scale_factor=2, mode="bilinear") - fine).abs().mean()
    assert (upsampler(coarse, features) - fine).abs().mean() < 0.25 * blurred


# ---- In an autoencoder ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[None, PALETTE], ids=["plain", "palette"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("upsampler") / "model.safetensors"
    write_tiny_checkpoint(path, palette=request.param, upsampler=UPSAMPLER)
    return path


def test_pictures_are_read_at_half_their_sides_and_decoded_at_twice(checkpoint: Path):
    autoencoder = Autoencoder.from_checkpoint(load_checkpoint(checkpoint))
    config = autoencoder.config
    assert config.downscale == 2 * replace(config, upsampler=None).downscale
    pixels = torch.rand(2, 3, 4 * config.downscale, 2 * config.downscale, generator=generator()) * 2 - 1
    latents = autoencoder.encode(pixels, generator(1))
    assert latents.shape == (2, 4, 4, 2)
    doubled = F.avg_pool2d(pixels, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(autoencoder.encode(doubled, generator(1)), latents, rtol=0, atol=1e-5)
    assert autoencoder.decode(latents).shape == pixels.shape
    torch.testing.assert_close(autoencoder.decode(latents[1:]), autoencoder.decode(latents)[1:], rtol=0, atol=1e-4)


def test_the_features_beside_the_pixels_guide_the_upsampler():
    config = VAEConfig(patch_size=4, upsampler=UPSAMPLER)
    x = torch.rand(1, 48 + 5, 3, 3, generator=generator())
    out = to_pixels(x, config, upsampler=trained())
    assert out.shape == (1, 3, 24, 24)
    x[:, 48:] += 1
    assert not torch.allclose(to_pixels(x, config, upsampler=trained()), out, atol=1e-3)
    assert torch.equal(to_pixels(x, config), F.pixel_shuffle(x[:, :48], 4))
    assert to_encoder_size(out, config).shape[2:] == (12, 12)


def test_checkpoints_keep_an_upsampler_and_a_missing_one_is_refused(checkpoint: Path, tmp_path: Path):
    loaded = load_checkpoint(checkpoint)
    assert ModelConfig.from_dict(loaded.config.to_dict()) == loaded.config
    convert(checkpoint, tmp_path / "half.safetensors", torch.float16)
    kept = load_checkpoint(tmp_path / "half.safetensors").state_dict("vae", "upsampler.")
    assert set(kept) == set(loaded.state_dict("vae", "upsampler."))
    write_tiny_checkpoint(tmp_path / "bare.safetensors")
    bare = load_checkpoint(tmp_path / "bare.safetensors")
    bare.config = replace(tiny_config(), vae=replace(tiny_config().vae, upsampler=UPSAMPLER))
    with pytest.raises(ValueError, match="upsampler"):
        Autoencoder.from_checkpoint(bare)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"upsampler": {"features": 0, "width": 8}}, "upsampler.features must be a whole number from 1 to 1024, not 0"),
        ({"upsampler": {"features": 5, "width": 10**9}}, "upsampler.width"),
        ({"upsampler": {"features": 5}}, 'must have "features" and "width"'),
        ({"upsampler": UPSAMPLER, "patch_size": 2}, "patch_size is 2"),
        ({"palette": {"manners": ["flat"], "colours": 10**9}}, "palette.colours"),
        ({"palette": {"manners": [], "colours": 5}}, "palette.manners"),
    ],
)
def test_impossible_sizes_are_refused_before_anything_is_built(fields, message):
    with pytest.raises(ValueError, match=message):
        VAEConfig(**fields)


def test_a_model_with_an_upsampler_draws_and_captions_at_its_size(checkpoint: Path):
    model = unidiffuser.load(checkpoint)
    pictures = model.text_to_image("red apple", steps=2, seed=0)
    side = model.config.uvit.latent_size[0] * model.config.vae.downscale
    assert pictures[0].size == (side, side) == (model.config.image_size,) * 2
    assert isinstance(model.image_to_text(pictures[0], steps=2, seed=0)[0], str)
