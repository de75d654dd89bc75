"""The parts of the bundled model's training: which pairs the network sees, latents, augmentation and encoders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from toy_recipe import SIDE, STYLES, toy

from unidiffuser.checkpoints.checkpoint import load_checkpoint
from unidiffuser.emoji.autoencoder import SCALE, AutoencoderStage, PatchedAutoencoder, principal_colours, reduced, vae_config
from unidiffuser.emoji.colours import fitted_palette
from unidiffuser.emoji.decoder import Crop, random_crop
from unidiffuser.emoji.groups import GroupSampler
from unidiffuser.emoji.image_encoder import image_tokens
from unidiffuser.emoji.image_folder import ImageFolder
from unidiffuser.emoji.network import NetworkStage
from unidiffuser.emoji.network_options import Captioning, Drawing, Mix
from unidiffuser.emoji.pairs import form_weights, noise_of_another, shifted
from unidiffuser.emoji.recipe import Recipe
from unidiffuser.emoji.restyle import Restyle, exchanged
from unidiffuser.emoji.settings import read_settings
from unidiffuser.emoji.text_encoder import load_text_encoder
from unidiffuser.encoders.autoencoder import Autoencoder
from unidiffuser.encoders.clip import clip_image_model
from unidiffuser.schedule import add_noise
from unidiffuser.streams import Streams
from unidiffuser.training.augment import augmented
from unidiffuser.training.config import TrainConfig
from unidiffuser.training.loop import train

EVERY = {"style": tuple(STYLES)}


# --- the pairs that the network sees ---------------------------------------------------------------------------------


def stage_of(run: Path, data: Path, **changes: Any) -> NetworkStage:
    """The network's stage of the toy recipe, with other settings, on the encoders of the toy run."""
    options = replace(read_settings(Recipe, toy(data), "toy").network, **changes)
    return NetworkStage(TrainConfig("network", "unused"), options, data, run / "network/encoders.safetensors")


def seen_by_the_loss(stage: NetworkStage, count: int) -> tuple[Streams, dict[str, torch.Tensor], Streams]:
    """Pairs, as the means of their latents, labels and noise of one batch."""
    seen: list[Any] = []
    for latents in (stage.latents, *(pairs.latents for pairs in (stage.captioning, stage.drawing) if pairs)):
        latents.std.zero_()  # so that a latent identifies its picture
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "unidiffuser.emoji.network.diffusion_loss",
            lambda net, clean, generator, labels, noise, **_: seen.append((clean, labels, noise)),
        )
        stage.loss(None, {"index": torch.arange(count) % stage.size}, torch.Generator().manual_seed(0))
    found: tuple[Streams, dict[str, torch.Tensor], Streams] = seen[0]
    return found


def nearest(x: torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance to, and row of, the nearest of some latents."""
    far = torch.cdist(x.flatten(1), latents.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    return far.min(1)  # type: ignore[return-value]


def test_captions_belong_to_the_token_and_latents_to_the_style(toy_run: Path, toy_pictures: Path) -> None:
    captioning = Captioning(where=EVERY, versions=1, place=0.0, other_latent=1.0)
    stage = stage_of(toy_run, toy_pictures, captioning=captioning, drawing=None)
    clean, labels, _ = seen_by_the_loss(stage, 200)
    latents, records = stage.captioning.latents, stage.captioning.latents.records
    given = labels["img"] == 0
    of_token, of_latent = nearest(clean.clip_img, latents.clip_img)[1], nearest(clean.img, latents.mean)[1]
    of_text = nearest(clean.text, latents.text)[1]
    assert 0 < given.sum() < len(given)
    assert (of_token != of_latent)[given].any()
    assert (of_token == of_latent)[~given].all()
    for token, latent, text, learnt in zip(*(x.tolist() for x in (of_token, of_latent, of_text, given)), strict=True):
        assert records[token]["style"] == records[latent]["style"]
        assert text in (latents.captions[token][:1] if learnt else latents.captions[token])


DRAWING = Drawing(
    where=EVERY, fraction=1.0, fraction_below=1.0, changed_below=0, shift=0, other_start=0.0, other_start_from=1,
    other_picture=0.0, with_style=1.0,
)  # fmt: skip


def test_pictures_of_clean_captions_are_those_of_drawing(toy_run: Path, toy_pictures: Path) -> None:
    apart = {"mix": Mix(clean_text=2, equal=1), "captioning": None, "where": {"style": ("red",)}}
    stage = stage_of(toy_run, toy_pictures, **apart, drawing=replace(DRAWING, where={"style": ("blue",)}))
    clean, labels, _ = seen_by_the_loss(stage, 400)
    drawn = labels["text"] == 0
    assert 0 < drawn.sum() < len(drawn)
    for rows, latents, forms in ((drawn, stage.drawing.latents, 1), (~drawn, stage.latents, 2)):
        distance, picture = nearest(clean.img[rows], latents.mean)
        assert distance.max() < 1e-3
        texts = nearest(clean.text[rows], latents.text)[1]
        picture = picture // latents.versions
        assert all(text in latents.captions[k][:forms] for k, text in zip(picture.tolist(), texts.tolist(), strict=True))


def test_another_start_is_the_same_concept_and_the_caption_names_the_style(toy_run: Path, toy_pictures: Path) -> None:
    """From label 3 on, the noisy picture is that of another style; pictures are mirrored below label 2 only."""
    drawing = replace(DRAWING, other_start=1.0, other_start_from=3, changed_below=2, with_style=0.5)
    stage = stage_of(
        toy_run, toy_pictures, mix=Mix(clean_text=1), captioning=None, drawing=drawing, lean=0.0, logit_normal=None
    )
    clean, labels, noise = seen_by_the_loss(stage, 40000)
    at, latents, records = labels["img"], stage.drawing.latents, stage.drawing.latents.records
    assert (labels["text"] == 0).all()
    noisy = add_noise(clean.img, noise.img, at.float())
    shown = [nearest(x, latents.mean)[1] for x in (clean.img, noisy)]
    (goal, version), (begun, other) = ((x // latents.versions, x % latents.versions) for x in shown)
    # There is next to no noise at the labels that are looked at.
    assert set(version[at < 2].tolist()) == {0, 1}
    assert not version[at >= 2].any()
    early, late = at < 3, (at >= 3) & (at < 5)
    assert not other[late].any()
    assert (goal == begun)[early].all()
    assert 0.2 < (goal != begun)[late].float().mean() < 1
    for a, b in zip(goal[late].tolist(), begun[late].tolist(), strict=True):
        assert records[a]["label"] == records[b]["label"]
    captions = latents.captions[goal]
    of_text = nearest(clean.text, latents.text)[1]
    assert (captions == of_text[:, None]).any(1).all()
    first = captions[:, 0] == of_text
    assert first[~early].all()
    assert 0 < first[early].sum() < early.sum()


def test_pictures_are_shifted_at_low_noise_only(toy_run: Path, toy_pictures: Path) -> None:
    """Below label 500 all pictures are of `drawing`, moved by two cells at most; above it a fifth is, and none is moved."""
    drawing = replace(DRAWING, where={"style": ("blue",)}, fraction=0.2, changed_below=500, shift=2)
    apart = {"mix": Mix(clean_text=1), "captioning": None, "where": {"style": ("red",)}}
    stage = stage_of(toy_run, toy_pictures, **apart, drawing=drawing)
    clean, labels, _ = seen_by_the_loss(stage, 4000)
    below, side, latents = labels["img"] < 500, clean.img.shape[-1], stage.drawing.latents
    places = [(torch.arange(side) + move).clamp(0, side - 1) for move in (-2, 0, 2)]
    index = torch.arange(len(latents.mean)) // latents.versions
    bare = latents.with_style_code(latents.mean, None)
    moves = torch.stack(
        [latents.with_style_code(bare[:, :, rows][..., columns], index) for rows in places for columns in places]
    )
    far = (clean.img[:, None, None] - moves.transpose(0, 1)).flatten(3).abs().amax(3)  # (pairs, pictures, moves)
    as_moved = far.amin(1) < 1e-4
    assert as_moved.any(1)[below].all()
    assert all((as_moved[:, move] & below).any() for move in range(len(moves)))
    still = len(moves) // 2
    other = as_moved[:, [k for k in range(len(moves)) if k != still]].any(1) & ~as_moved[:, still]
    assert not other[~below].any()
    assert 0.15 < as_moved[~below, still].float().mean() < 0.25


def test_captions_of_lent_pictures_keep_their_style_code(toy_run: Path, toy_pictures: Path) -> None:
    """Some captions are shown with another picture of their concept, in the code of the style that they name; moved or not."""
    drawing = replace(DRAWING, other_picture=0.5, shift=2, changed_below=500)
    stage = stage_of(toy_run, toy_pictures, mix=Mix(clean_text=1), captioning=None, drawing=drawing)
    clean, labels, _ = seen_by_the_loss(stage, 2000)
    latents, records = stage.drawing.latents, stage.drawing.latents.records
    palette = latents.autoencoder.palette
    of_text = nearest(clean.text, latents.text)[1]
    pictures = {int(text): row for row, (text, *_) in enumerate(latents.captions.tolist())}
    wanted = torch.tensor([pictures[text] for text in of_text.tolist()])
    torch.testing.assert_close(palette.write_code(clean.img, latents.styles[wanted]), clean.img, rtol=0, atol=1e-4)
    whole = labels["img"] >= 500  # the others are moved
    bare, known = palette.remove_code(clean.img[whole]), palette.remove_code(latents.mean)
    distance, shown = nearest(bare, known)
    assert distance.max() < 1e-2
    pairs = list(zip(wanted[whole].tolist(), (shown // latents.versions).tolist(), strict=True))
    assert all(records[a]["label"] == records[b]["label"] for a, b in pairs)
    lent = {row for row, given in pairs if row != given}
    assert lent == set(stage.drawing.lent.nonzero()[:, 0].tolist()) & set(wanted[whole].tolist())
    assert 0 < len(lent) < len({row for row, _ in pairs})


def test_pictures_need_both_captions_where_both_are_used() -> None:
    assert form_weights(0.7, 2).tolist() == pytest.approx([0.7, 0.3])
    assert form_weights(1.0, 1).tolist() == [1.0]
    with pytest.raises(ValueError, match="needs two, with and without the style"):
        form_weights(0.7, 1)


@given(values=st.lists(st.sampled_from("abc"), min_size=1, max_size=12), seed=st.integers(0, 2**31))
def test_items_of_the_same_group_are_drawn_and_all_of_them(values, seed):
    index = torch.arange(len(values)).repeat(300)
    found = GroupSampler(values).draw(index, torch.Generator().manual_seed(seed)).view(300, -1)
    others = GroupSampler(values).draw_other(index, torch.Generator().manual_seed(seed)).view(300, -1)
    for row, value in enumerate(values):
        assert {values[k] for k in found[:, row].tolist()} == {value}
        group = {k for k, other in enumerate(values) if other == value}
        assert set(found[:, row].tolist()) == group
        assert set(others[:, row].tolist()) == (group - {row} or {row})


@given(seed=st.integers(0, 2**31), label=st.integers(1, 1000))
def test_the_noise_of_another_makes_the_same_noisy_pair(seed, label):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 3, 4, 4), (2, 1, 6), (2, 5, 4))
    clean, other, noise = (Streams(*(torch.randn(s, generator=generator).double() for s in shapes)) for _ in range(3))
    labels = {"img": torch.tensor([label, 1000]), "text": torch.tensor([0, label])}
    made = noise_of_another(clean, other, noise, labels)
    for name, x in clean.items():
        t = labels["text" if name == "text" else "img"].double()
        ours, theirs = add_noise(x, made.need(name), t), add_noise(other.need(name), noise.need(name), t)
        torch.testing.assert_close(ours[t > 0], theirs[t > 0], rtol=0, atol=1e-4)
    assert torch.equal(made.text[0], noise.text[0])  # clean: there is no noise to change


# --- pictures and latents --------------------------------------------------------------------------------------------


def test_image_folder_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no metadata\.jsonl"):
        ImageFolder(tmp_path, 8)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n')
    with pytest.raises(ValueError, match=r"metadata\.jsonl:1"):
        ImageFolder(tmp_path, 8)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n')
    with pytest.raises(FileNotFoundError, match=r"a\.png"):
        ImageFolder(tmp_path, 8).pixels(torch.tensor([0]))
    with pytest.raises(ValueError, match="no record"):
        ImageFolder(tmp_path, 8, {"split": "train"})


def test_image_folder_crops_to_a_square(tmp_path):
    image = Image.new("RGB", (64, 16), "white")
    image.paste((0, 0, 0), (24, 0, 40, 16))
    image.save(tmp_path / "wide.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "wide.png", "text": "a"}\n')
    assert ImageFolder(tmp_path, 8).pixels(torch.tensor([0])).max() == -1  # only the black middle


def test_what_is_shifted_moves_by_pairs_of_cells_and_repeats_its_border():
    x = torch.randn(64, 2, 6, 5, generator=torch.Generator().manual_seed(0))
    out = shifted(x, 3, torch.Generator().manual_seed(1))
    seen = set()
    for ours, theirs in zip(out, x, strict=True):
        fitting = [
            (down, right)
            for down in range(-3, 4)
            for right in range(-3, 4)
            if torch.equal(ours, theirs[:, (torch.arange(6) + down).clamp(0, 5)][..., (torch.arange(5) + right).clamp(0, 4)])
        ]
        assert len(fitting) == 1
        seen.add(fitting[0])
    assert {a for a, _ in seen} == {b for _, b in seen} == {-2, 0, 2}
    assert torch.equal(shifted(x, 1, torch.Generator()), x)


def test_rescaling_the_latents_does_not_change_the_picture():
    model = PatchedAutoencoder(vae_config(64, 4, (32, 32), 1)).eval()
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        mean, logvar = model.moments(pixels)
        before = model.decode(mean)
        model.rescale(torch.tensor([2.0, 0.5, 3.0, 1.0]), torch.tensor([0.1, -0.2, 0.3, 0.0]))
        scaled, scaled_logvar = model.moments(pixels)
        after = model.decode(scaled)
    assert torch.allclose(before, after, atol=1e-5)
    assert torch.allclose(scaled[:, 0], (mean[:, 0] - 0.1) * 2, atol=1e-5)
    assert torch.allclose(scaled_logvar[:, 2], logvar[:, 2] + 2 * np.log(3.0), atol=1e-5)


def test_principal_colours_have_unit_variance_each_and_the_widest_comes_first():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.tensor([[0.3, 0.2, 0.0], [0.3, -0.1, 0.05], [0.3, 0.1, -0.1]])
    pixels = torch.einsum("ij,bjhw->bihw", mixing, torch.randn(4, 3, 32, 32, generator=generator)) + 0.5
    matrix, mean = principal_colours(pixels)
    colours = torch.einsum("ij,bjhw->ibhw", matrix, pixels - mean.view(-1, 1, 1)).flatten(1)
    torch.testing.assert_close(torch.cov(colours), torch.eye(3), atol=1e-3, rtol=0)
    assert matrix.square().sum(1).diff().min() > 0  # the wider a direction, the less it is stretched


def test_noise_on_the_latents_has_each_picture_s_standard_deviation():
    model = PatchedAutoencoder(vae_config(64, 4, (32, 32), 1)).eval()
    pixels, noise = torch.rand(3, 3, 64, 64) * 2 - 1, torch.randn(3, 4, 8, 8)
    spread = torch.tensor([0.0, 0.3, 0.1])
    with torch.no_grad():
        mean, logvar, decoded = model(pixels, noise, spread)
        std = (logvar.exp() + (spread / SCALE).square().view(-1, 1, 1, 1)).sqrt()
        assert torch.allclose(decoded, model.decode(mean + std * noise), atol=1e-5)
        assert torch.allclose(model(pixels[:1], noise[:1])[2], decoded[:1], atol=1e-5)


def test_plain_latents_are_the_reduced_picture(toy_pictures: Path, tmp_path: Path) -> None:
    options = replace(read_settings(Recipe, toy(toy_pictures, steps=200), "toy").autoencoder, batch_size=6, learning_rate=3e-3)
    config = options.config("autoencoder", tmp_path, seed=0, precision="no")
    stage = AutoencoderStage(config, options, toy_pictures)
    model = train(stage, config, progress=False)
    losses = [json.loads(line)["plain"] for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert np.mean(losses[-10:]) < 0.2
    pixels = stage.train_set.pixels(torch.arange(len(stage.train_set)))
    with torch.no_grad():
        latents = SCALE * model.moments(pixels)[0]
    assert latents.shape[1:] == (4, SIDE // 4, SIDE // 4)
    matrix, mean = stage.colours
    small = reduced(pixels, 4)
    wanted = torch.einsum("ij,bjhw->bihw", matrix, small - mean.view(-1, 1, 1))
    for channel in range(3):
        together = torch.stack([latents[:, channel].flatten(), wanted[:, channel].flatten()])
        assert torch.corrcoef(together)[0, 1] > 0.9
    assert latents[:, 3].any()
    # The preview's linear map of the latents is close to the reduced picture.
    preview = json.loads((tmp_path / "autoencoder.json").read_text())["vae"]["preview_rgb"]
    seen = torch.einsum("bchw,cr->brhw", latents, torch.tensor(preview["factors"])) + torch.tensor(preview["bias"]).view(
        3, 1, 1
    )
    assert (seen - small).abs().mean() < 0.1
    kept = torch.load(tmp_path / "autoencoder.pt", weights_only=True)
    assert all(value.isfinite().all() for value in kept.values())


def test_a_fitted_palette_recognises_its_styles(toy_pictures: Path) -> None:
    images = ImageFolder(toy_pictures, SIDE)
    palette = fitted_palette(images, ["red", "blue"], 4, seed=0)
    kinds = torch.tensor([["red", "blue", "green", "yellow"].index(record["style"]) for record in images.records])
    known = palette.recognise(images.pixels(torch.arange(len(images))))
    assert (known.argmax(1)[kinds < 2] == kinds[kinds < 2]).all()
    with pytest.raises(ValueError, match="style 1 has no pictures"):
        fitted_palette(images, ["red", "mauve"], 4, seed=0)


def test_the_decoder_doubles_the_pictures_and_the_latents_stay(toy_run: Path, toy_pictures: Path) -> None:
    """The last section's model encodes a large picture as the one before encodes it at half its sides."""
    small, large = (
        Autoencoder.from_checkpoint(load_checkpoint(toy_run / name), dtype=torch.float32)
        for name in ("network/model.safetensors", "model.safetensors")
    )
    assert large.config.upsampler == {"features": 4, "width": 8}
    assert (small.config.downscale, large.config.downscale) == (4, 8)
    pixels = ImageFolder(toy_pictures, 2 * SIDE).pixels(torch.arange(4))
    halved = nn.functional.avg_pool2d(pixels, 2)
    small_gate = small.palette.gate.detach().clone()
    small.palette.load_state_dict(large.palette.state_dict())  # whose classifier is trained on
    torch.testing.assert_close(large.posterior(pixels)[0], small.posterior(halved)[0], rtol=0, atol=1e-4)
    assert large.decode(large.posterior(pixels)[0]).shape == pixels.shape
    assert (large.palette.gate.detach() - small_gate > 3).all()  # 4 is added; the training moves them by little


def test_a_crop_is_the_same_square_at_every_resolution() -> None:
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    crop = Crop(top=2, left=1, side=3)
    assert torch.equal(crop(x, 8), x[..., 16:40, 8:32])
    assert torch.equal(crop(x, 8, margin=1), x[..., 24:32, 16:24])
    seen = [random_crop(3, torch.empty(1, 4, 8, 8), torch.Generator().manual_seed(k)) for k in range(200)]
    assert {c.top for c in seen} == {c.left for c in seen} == set(range(6))


# --- encoders --------------------------------------------------------------------------------------------------------


def test_tokens_of_augmented_pictures_are_nearest_to_their_concept(toy_run: Path, toy_pictures: Path) -> None:
    sizes = json.loads((toy_run / "encoders/image/image.json").read_text())
    tower = clip_image_model(sizes).eval()
    tower.load_state_dict(torch.load(toy_run / "encoders/image/image.pt", weights_only=True))
    images = ImageFolder(toy_pictures, SIDE)
    pixels = images.pixels(torch.arange(len(images)))
    moved = augmented(pixels, torch.Generator().manual_seed(5), place=0.4, colour=0.1)
    with torch.no_grad():
        tokens, asked = (nn.functional.normalize(image_tokens(tower, x), dim=1) for x in (pixels, moved))
    similarity = (asked @ tokens.T).fill_diagonal_(-1)
    labels = [record["label"] for record in images.records]
    right = [labels[i] == labels[k] for i, k in enumerate(similarity.argmax(1).tolist())]
    assert np.mean(right) > 0.5  # by chance, 3 in 11


def test_a_text_encoder_is_loaded_with_its_vocabulary(toy_run: Path) -> None:
    model, tokenizer, sizes = load_text_encoder(toy_run / "encoders/text")
    hidden = model(input_ids=tokenizer(["circle, red", "bar"], 8)).last_hidden_state
    assert hidden.shape == (2, sizes["max_position_embeddings"], sizes["hidden_size"])
    assert not torch.allclose(hidden[0], hidden[1], atol=0.1)


def test_restyled_features_have_statistics_between_two_pictures():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, 5, 5, generator=generator) * torch.arange(1.0, 7.0).view(6, 1, 1, 1) + torch.randn(
        6, 4, 1, 1, generator=generator
    )
    assert torch.allclose(exchanged(x, 0.0, generator), x, atol=1e-5)
    y = exchanged(x, 1.0, generator)
    means, deviations = x.mean((2, 3)), x.std((2, 3))

    def shape(z):
        return (z - z.mean((2, 3), keepdim=True)) / z.std((2, 3), keepdim=True)

    assert torch.allclose(shape(y), shape(x), atol=1e-3)  # the layout stays
    for k in range(6):  # one other, one fraction for both, in all channels
        fits = []
        for other in range(6):
            own = ((y.mean((2, 3)) - means[other]) / (means - means[other]))[k] if other != k else torch.ones(4)
            mixed = own * deviations[k] + (1 - own) * deviations[other]
            fits.append(bool(own.std() < 1e-3 and torch.allclose(mixed, y.std((2, 3))[k], rtol=1e-2)))
        assert any(fits)
    assert (y.mean((2, 3)) - means).abs().max() > 0.1


def test_features_are_restyled_during_the_loss_only():
    restyle, layer = Restyle(), nn.Identity()
    layer.register_forward_hook(restyle)
    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    with restyle.during(1.0, torch.Generator().manual_seed(2)):
        assert not torch.allclose(layer(x), x, atol=0.1)
    with restyle.during(0.0, torch.Generator().manual_seed(2)):
        assert torch.equal(layer(x), x)
    assert torch.equal(layer(x), x)
