"""Palettes: a style written into a latent and read again, pictures drawn in the colours of a style."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config, write_tiny_checkpoint

from unidiffuser.checkpoints.checkpoint import ModelConfig, convert, load_checkpoint
from unidiffuser.emoji.colours import randomly_coloured
from unidiffuser.encoders.autoencoder import Autoencoder
from unidiffuser.small.palette import Palette

STYLES = ["flat", "soft", "lined"]
PALETTE = {"manners": STYLES, "colours": 5}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(styles: int = 7, colours: int = 5) -> Palette:
    """With weights where a new palette has zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        palette = Palette(styles, colours).requires_grad_(False)
    for parameter in palette.parameters():
        if not parameter.any():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator(4)))
    return palette


def one_hot(kind: int, styles: int) -> torch.Tensor:
    return torch.eye(styles)[kind : kind + 1]


def smooth_latents(count: int = 1, side: int = 32) -> torch.Tensor:
    """Latents without patterns from cell to cell."""
    coarse = torch.randn(count, 4, side // 8, side // 8, generator=generator(1))
    return torch.nn.functional.interpolate(coarse, scale_factor=8, mode="bilinear")


# ---- The code -------------------------------------------------------------------------------------------------------


@given(kind=st.integers(0, 6), noise=st.floats(0, 0.5), loud=st.floats(0.8, 4), shift=st.sampled_from([0, 2, 4]))
@settings(max_examples=40, deadline=None)
def test_a_style_is_read_through_noise_strong_guidance_and_even_shifts(kind, noise, loud, shift):
    palette, clean = filled(), smooth_latents()
    coded = palette.write_code(clean, one_hot(kind, 7))
    louder = clean + loud * (coded - clean) + noise * torch.randn(clean.shape, generator=generator(2))
    seen = palette.read_code(louder.roll((shift, shift), (2, 3)))[0]
    assert seen.argmax() == kind
    assert seen[kind] > 0.8


def test_the_code_is_small_stays_in_one_channel_and_goes_away():
    palette, clean = filled(), torch.randn(2, 4, 12, 10, generator=generator())
    without = palette.write_code(clean, torch.zeros(2, 7))
    coded = palette.write_code(clean, torch.eye(7)[[1, 4]])
    assert torch.equal(coded[:, :3], clean[:, :3])
    assert (coded - without).abs().max() < 0.6
    assert palette.read_code(without).max() < 0.01
    torch.testing.assert_close(palette.write_code(coded, torch.zeros(2, 7)), without, rtol=0, atol=1e-5)
    torch.testing.assert_close(palette.write_code(without, torch.eye(7)[[1, 4]]), coded, rtol=0, atol=1e-5)


def test_pictures_have_next_to_no_code_of_their_own():
    assert filled().read_code(smooth_latents(8)).max() < 0.05


# ---- The colours ----------------------------------------------------------------------------------------------------

COLOURS = torch.tensor([[[255, 0, 0], [0, 0, 255]], [[220, 30, 40], [20, 40, 210]], [[128, 128, 0], [0, 99, 99]]])


def pictures(count: int = 60, side: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Rectangles in the two colours of a style on white: levels (N, H, W, 3) and styles (N,)."""
    g = generator(5)
    levels, kinds = torch.full((count, side, side, 3), 255, dtype=torch.uint8), torch.arange(count) % len(COLOURS)
    for picture, kind in zip(levels, kinds, strict=True):
        for colour in COLOURS[kind]:
            top, left = torch.randint(side // 2, (2,), generator=g).tolist()
            picture[top : top + side // 2, left : left + side // 2] = colour
    return levels, kinds


def begun(colours: int = 4) -> Palette:
    palette = Palette(len(COLOURS), colours)
    palette.init_colours(*pictures())
    return palette


def test_a_palette_starts_from_the_commonest_colours_of_each_style():
    palette = begun()
    for kind, colours in enumerate(COLOURS):
        found = {tuple(c) for c in ((palette.colours[kind] + 1) * 127.5).round().long().tolist()}
        assert found == {(255, 255, 255), *map(tuple, colours.tolist())}  # white fills what is left
    with pytest.raises(ValueError, match="style 1 has no pictures"):
        palette.init_colours(pictures()[0], torch.zeros(60, dtype=torch.long))


def test_near_colours_become_exact_and_nothing_changes_without_a_style():
    palette, (levels, kinds) = begun().requires_grad_(False), pictures(9)
    true = levels.permute(0, 3, 1, 2).float() / 127.5 - 1
    drawn = true + 0.05 * torch.randn(9, 3, 1, 1, generator=generator(6))
    palette.gate.fill_(20)
    out = palette(drawn, torch.eye(3)[kinds])
    assert (out - true).abs().mean() < 0.2 * (drawn - true).abs().mean()
    assert torch.equal(palette(drawn, torch.zeros(9, 3)), drawn)
    palette.gate.fill_(-20)
    torch.testing.assert_close(palette(drawn, torch.eye(3)[kinds]), drawn, rtol=0, atol=1e-6)


def test_used_colours_identify_the_style_and_random_ones_none():
    palette, (levels, kinds) = begun(), pictures()
    pixels = levels.permute(0, 3, 1, 2).float() / 127.5 - 1
    shown = torch.cat([pixels, randomly_coloured(pixels, generator(7))])
    wanted = torch.cat([kinds, torch.full_like(kinds, 3)])
    right = palette.fit_classifier(palette.colour_usage(shown), wanted)
    assert right == pytest.approx((palette.style_logits(shown).argmax(1) == wanted).float().mean().item())
    assert (palette.style_logits(pixels).argmax(1) == kinds).all()
    assert (palette.style_logits(shown).argmax(1) == wanted).float().mean() > 0.9
    assert palette.colours.grad is None  # telling styles apart does not move the colours


def test_random_colours_keep_white_and_stay_in_range():
    pixels = torch.rand(6, 3, 4, 4, generator=generator()) * 2 - 1
    pixels[:, :, 0] = 1
    out = randomly_coloured(pixels, generator(1))
    torch.testing.assert_close(out[:, :, 0], torch.ones(6, 3, 4), rtol=0, atol=1e-5)
    assert out.abs().max() <= 1
    assert ((out - pixels).abs().flatten(1).mean(1) > 0.01).all()


# ---- In an autoencoder ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_palette(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("palette") / "model.safetensors"
    write_tiny_checkpoint(path, palette=PALETTE)
    return path


def test_an_autoencoder_writes_the_style_code_and_decodes_in_it(with_palette: Path):
    autoencoder = Autoencoder.from_checkpoint(load_checkpoint(with_palette))
    palette = autoencoder.palette
    assert palette is not None
    palette.usage.bias.data.copy_(torch.tensor([0.0, 50.0, 0.0, 0.0]))
    pixels = torch.rand(2, 3, 64, 64, generator=generator()) * 2 - 1
    latents = autoencoder.encode(pixels, [generator(1), generator(2)])
    mean, std = autoencoder.posterior(pixels)
    assert (palette.read_code(mean).argmax(1) == 1).all()
    assert palette.read_code(mean)[:, 1].min() > 0.9
    assert std.shape == mean.shape == latents.shape
    drawn = autoencoder.decode(palette.write_code(latents, torch.eye(3)[[0, 0]]))
    other = autoencoder.decode(palette.write_code(latents, torch.eye(3)[[2, 2]]))
    none = autoencoder.decode(palette.write_code(latents, torch.zeros(2, 3)))
    assert not torch.allclose(drawn, other, atol=1e-3)
    assert not torch.allclose(drawn, none, atol=1e-3)
    # A palette whose colours attract from afar, as this one's do, makes some 1e-6 of the decoder's own into some 1e-5.
    torch.testing.assert_close(autoencoder.decode(latents)[1:], autoencoder.decode(latents[1:]), rtol=0, atol=1e-4)


def test_checkpoints_keep_a_palette_and_a_missing_one_is_refused(with_palette: Path, tmp_path: Path):
    checkpoint = load_checkpoint(with_palette)
    assert checkpoint.config.vae.palette == PALETTE
    assert ModelConfig.from_dict(checkpoint.config.to_dict()) == checkpoint.config
    convert(with_palette, tmp_path / "half.safetensors", torch.float16)
    autoencoder = Autoencoder.from_checkpoint(load_checkpoint(tmp_path / "half.safetensors"), dtype=torch.float32)
    kept = checkpoint.state_dict("vae", "palette.")
    assert autoencoder.palette is not None
    for name, value in autoencoder.palette.state_dict().items():
        torch.testing.assert_close(value, kept[name], rtol=1e-3, atol=1e-3)
    bare = replace(tiny_config(), vae=replace(tiny_config().vae, palette=PALETTE))
    write_tiny_checkpoint(tmp_path / "bare.safetensors")
    checkpoint = load_checkpoint(tmp_path / "bare.safetensors")
    checkpoint.config = bare
    with pytest.raises(ValueError, match="palette"):
        Autoencoder.from_checkpoint(checkpoint)
