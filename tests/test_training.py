"""The objective, the loop's exact resume, and every stage on a small set of coloured shapes."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional as F

from unidiffuser.checkpoints.checkpoint import Checkpoint, load_checkpoint
from unidiffuser.emoji.assemble import assemble
from unidiffuser.emoji.autoencoder import SCALE, PatchedAutoencoder, principal_colours, reduced, vae_config
from unidiffuser.emoji.decoder import Crop
from unidiffuser.emoji.groups import GroupSampler
from unidiffuser.emoji.image_folder import ImageFolder
from unidiffuser.emoji.pairs import noise_of_another, shifted
from unidiffuser.emoji.restyle import Restyle, exchanged
from unidiffuser.emoji.stages import make_stage
from unidiffuser.emoji.towers import image_tokens, load_clip
from unidiffuser.encoders.autoencoder import Autoencoder
from unidiffuser.evaluation.metrics import psnr
from unidiffuser.schedule import add_noise, alphas_cumprod, half_logsnr
from unidiffuser.small.palette import Palette
from unidiffuser.streams import Streams
from unidiffuser.training.augment import augmented
from unidiffuser.training.config import TrainConfig
from unidiffuser.training.loop import train
from unidiffuser.training.objective import diffusion_loss, draw_labels
from unidiffuser.training.saving import checkpoints
from unidiffuser.training.stage import TrainingStage, seeded_init, step_indices

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (240, 200, 30)}
SHAPES = ("circle", "square", "bar")
SIDE = 32


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures, each with two captions: "red circle, drawn" and "red circle"."""
    folder = tmp_path_factory.mktemp("shapes")
    rows = []
    for colour, rgb in COLOURS.items():
        for shape in SHAPES:
            image = Image.new("RGB", (SIDE, SIDE), "white")
            draw = ImageDraw.Draw(image)
            box = {"circle": (6, 6, 26, 26), "square": (8, 8, 24, 24), "bar": (4, 13, 28, 19)}[shape]
            (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=rgb)
            name = f"{colour}-{shape}.png"
            image.save(folder / name)
            texts = [f"{colour} {shape}, drawn", f"{colour} {shape}"]
            rows.append(
                {"file_name": name, "text": texts, "split": "train", "shape": shape, "colour": colour, "red": colour == "red"}
            )
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def config(stage: str, out: Path, **values) -> TrainConfig:
    options = values.pop("options")
    defaults = {"steps": 60, "batch_size": 12, "learning_rate": 2e-3, "warmup_steps": 5, "precision": "no"}
    return TrainConfig(stage=stage, out=str(out), options=options, **(defaults | values))


def fell(out: Path) -> float:
    """Mean loss of the last ten steps over that of the first ten."""
    losses = [json.loads(line)["loss"] for line in (out / "losses.jsonl").read_text().splitlines()]
    return float(np.mean(losses[-10:]) / np.mean(losses[:10]))


def nearest_agrees(run: Path, folder: Path, fields: tuple[str, ...]) -> float:
    """Fraction of slightly augmented pictures whose token is nearest to that of a picture with the same fields."""
    clip, _, _ = load_clip(run)
    images = ImageFolder(folder, SIDE)
    pixels = images.pixels(torch.arange(len(images)))
    changed = augmented(pixels, torch.Generator().manual_seed(5), place=0.4, colour=0.1)
    tokens, asked = (torch.nn.functional.normalize(image_tokens(clip, x), dim=1) for x in (pixels, changed))
    found = (asked @ tokens.T).argmax(1).tolist()
    pairs = [(images.records[i], images.records[j]) for i, j in enumerate(found)]
    return sum(all(a[name] == b[name] for name in fields) for a, b in pairs) / len(pairs)


# --- objective -----------------------------------------------------------------------------------------------------


def test_paper_objective_draws_independent_uniform_labels():
    labels = draw_labels(20000, {"independent": 1.0}, torch.Generator().manual_seed(0))
    for t in labels.values():
        assert t.min() >= 1
        assert t.max() <= 1000
        assert abs(t.double().mean() - 500.5) < 6  # standard error 2.0
    correlation = np.corrcoef(labels["img"].numpy(), labels["text"].numpy())[0, 1]
    assert abs(correlation) < 0.03


def test_mix_shares_are_kept():
    labels = draw_labels(10000, {"independent": 1, "clean_text": 1, "equal": 2}, torch.Generator().manual_seed(0))
    assert abs((labels["text"] == 0).double().mean() - 0.25) < 0.02
    assert (labels["img"] == 0).sum() == 0
    alone = draw_labels(10000, {"no_text": 1, "independent": 3}, torch.Generator().manual_seed(0))
    assert abs((alone["text"] == 1000).double().mean() - 0.25) < 0.02
    assert len(alone["img"][alone["text"] == 1000].unique()) > 500
    assert abs((labels["img"] == labels["text"]).double().mean() - 0.5) < 0.02
    with pytest.raises(ValueError, match="unknown regions"):
        draw_labels(4, {"clean": 1}, torch.Generator())
    with pytest.raises(ValueError, match="positive"):
        draw_labels(4, {"equal": 0}, torch.Generator())


def test_lean_sees_labels_in_proportion_to_a_power_of_noise_over_signal():
    count, lean = 200_000, 0.5
    labels = draw_labels(count, {"independent": 1.0}, torch.Generator().manual_seed(0), lean)
    alpha = alphas_cumprod().sqrt()
    expected = ((1 - alpha**2).sqrt() / alpha) ** lean
    expected = (expected / expected.sum()).view(10, 100).sum(1)  # ten ranges of 100 labels
    for drawn in labels.values():
        assert drawn.min() >= 1
        assert drawn.max() == 1000
        seen = torch.bincount((drawn - 1) // 100, minlength=10) / count
        assert torch.allclose(seen.double(), expected, atol=5 * 0.5 / count**0.5)  # five standard errors
    edges = draw_labels(1000, {"clean_text": 1, "equal": 1}, torch.Generator().manual_seed(0), lean)
    assert ((edges["text"] == 0) | (edges["text"] == edges["img"])).all()


def test_logit_normal_labels_of_images_are_normal_in_the_logarithm_of_noise_over_signal():
    drawing = torch.Generator().manual_seed(0)
    labels = draw_labels(100_000, {"independent": 1.0}, drawing, logit_normal=[0.5, 0.4])  # no end of the schedule is near
    log_noise = -half_logsnr(labels["img"].double())
    assert abs(log_noise.mean() - 0.5) < 0.01  # standard error 0.0013
    assert abs(log_noise.std() - 0.4) < 0.01
    below = (log_noise < 0.5 + 0.4).double().mean()
    assert abs(below - 0.8413) < 0.01  # of a normal distribution, below one standard deviation
    assert abs(labels["text"].double().mean() - 500.5) < 5  # texts have a lean of their own, here none


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


def check_captioning_pairs(stage: TrainingStage) -> None:
    """Captions belong to the token's picture, the image latent to one of the same shape; nothing else is mixed."""
    seen = []
    for latents in (stage.latents, stage.captioning.latents):
        latents.std.zero_()  # so that a latent tells its picture
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "unidiffuser.emoji.network.diffusion_loss",
            lambda net, clean, generator, labels, noise, **_: seen.append((clean, labels)),
        )
        stage.loss(None, {"index": torch.arange(200) % stage.size}, torch.Generator().manual_seed(0))
    clean, labels = seen[0]
    latents, records = stage.captioning.latents, stage.captioning.latents.records
    given = labels["img"] == 0
    of_token = torch.cdist(clean.clip_img.flatten(1), latents.clip_img.flatten(1)).argmin(1)
    of_latent = torch.cdist(clean.img.flatten(1), latents.mean.flatten(1)).argmin(1)
    of_text = torch.cdist(clean.text.flatten(1), latents.text.flatten(1)).argmin(1)
    assert given.any()
    assert (~given).any()
    assert (of_token != of_latent)[given].any()
    assert (of_token == of_latent)[~given].all()
    for token, latent, text, learnt in zip(*(x.tolist() for x in (of_token, of_latent, of_text, given)), strict=True):
        assert records[token]["shape"] == records[latent]["shape"]
        assert text in (latents.captions[token][:1] if learnt else latents.captions[token])


def seen_by_the_loss(stage: TrainingStage, count: int) -> tuple[Streams, dict[str, torch.Tensor]]:
    """Pairs, as the means of their latents, and labels of one batch of a network's stage with `drawing`."""
    seen = []
    for latents in (stage.latents, stage.drawing.latents):
        latents.std.zero_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "unidiffuser.emoji.network.diffusion_loss",
            lambda net, clean, generator, labels, noise, **_: seen.append((clean, labels)),
        )
        stage.loss(None, {"index": torch.arange(count) % stage.size}, torch.Generator().manual_seed(0))
    return seen[0]


def check_drawing_pairs(stage: TrainingStage) -> None:
    """Pictures of clean captions are those of `drawing`, with their first caption; all others are the stage's own."""
    clean, labels = seen_by_the_loss(stage, 400)
    drawn = labels["text"] == 0
    assert 0 < drawn.sum() < len(drawn)
    for rows, latents, forms in ((drawn, stage.drawing.latents, 1), (~drawn, stage.latents, 2)):
        far = torch.cdist(clean.img.flatten(1)[rows], latents.mean.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
        distance, picture = far.min(1)
        assert distance.max() < 1e-3
        said = torch.cdist(clean.text.flatten(1)[rows], latents.text.flatten(1)).argmin(1)
        assert all(text in latents.captions[k][:forms] for k, text in zip(picture.tolist(), said.tolist(), strict=True))


def check_repainting(stage: TrainingStage) -> None:
    """From label 3 on, the noisy picture is that of another with the same shape; the picture to reach stays the caption's.

    Pictures are augmented below label 2 only. Where another picture is mixed in, only the first caption is used.
    """
    seen = []
    stage.drawing.latents.std.zero_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "unidiffuser.emoji.network.diffusion_loss",
            lambda net, clean, generator, labels, noise, **_: seen.append((clean, labels, noise)),
        )
        stage.loss(None, {"index": torch.arange(40000) % stage.size}, torch.Generator().manual_seed(0))
    clean, labels, noise = seen[0]
    at, records = labels["img"], stage.drawing.latents.records
    assert (labels["text"] == 0).all()

    def shown(x: torch.Tensor) -> torch.Tensor:
        far = torch.cdist(x.flatten(1), stage.drawing.latents.mean.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
        return far.argmin(1)

    rows = shown(clean.img), shown(add_noise(clean.img, noise.img, at.float()))
    (goal, version), (begun, other) = ((x // stage.drawing.latents.versions, x % stage.drawing.latents.versions) for x in rows)
    # There is next to no noise at the labels that are looked at.
    assert set(version[at < 2].tolist()) == set(range(stage.drawing.latents.versions))
    assert not version[at >= 2].any()
    early, late = at < 3, (at >= 3) & (at < 5)
    assert not other[late].any()
    assert (goal == begun)[early].all()
    assert 0.2 < (goal != begun)[late].float().mean() < 1
    for a, b in zip(goal[late].tolist(), begun[late].tolist(), strict=True):
        assert records[a]["shape"] == records[b]["shape"]
    of_text = torch.cdist(clean.text.flatten(1), stage.drawing.latents.text.flatten(1)).argmin(1)
    captions = stage.drawing.latents.captions[goal]
    assert (captions == of_text[:, None]).any(1).all()
    first = captions[:, 0] == of_text
    assert first[~early].all()
    assert 0 < first[early].sum() < early.sum()


def check_shifts(stage: TrainingStage) -> None:
    """Below label 500 all pictures are of `drawing`, moved by two cells at most; above it a fifth is, and none is moved."""
    clean, labels = seen_by_the_loss(stage, 4000)
    below, side = labels["img"] < 500, clean.img.shape[-1]
    places = [(torch.arange(side) + move).clamp(0, side - 1) for move in (-2, 0, 2)]
    moves = torch.stack([stage.drawing.latents.mean[:, :, rows][..., columns] for rows in places for columns in places])
    far = (clean.img[:, None, None] - moves.transpose(0, 1)).flatten(3).abs().amax(3)  # (pairs, pictures, moves)
    as_moved = far.amin(1) < 1e-5
    assert as_moved.any(1)[below].all()
    assert all((as_moved[:, move] & below).any() for move in range(len(moves)))
    other = as_moved[:, [k for k in range(len(moves)) if k != len(moves) // 2]].any(1) & ~as_moved[:, len(moves) // 2]
    assert not other[~below].any()
    assert 0.15 < as_moved[~below, len(moves) // 2].float().mean() < 0.25


def check_borrowing(stage: TrainingStage, palette: Palette) -> None:
    """Some captions are shown with another picture of the same shape, in the code of the colour they name; moved or not."""
    clean, labels = seen_by_the_loss(stage, 2000)
    latents, records = stage.drawing.latents, stage.drawing.latents.records
    of_text = torch.cdist(clean.text.flatten(1), latents.text.flatten(1)).argmin(1)
    pictures = {int(text): row for row, (text, *_) in enumerate(latents.captions.tolist())}
    wanted = torch.tensor([pictures[text] for text in of_text.tolist()])
    torch.testing.assert_close(palette.write_code(clean.img, latents.styles[wanted]), clean.img, rtol=0, atol=1e-4)
    whole = labels["img"] >= 500  # the others are moved
    bare, known = palette.remove_code(clean.img[whole]), palette.remove_code(latents.mean)
    far = torch.cdist(bare.flatten(1), known.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    assert far.amin(1).max() < 1e-2
    wanted, shown = wanted[whole].tolist(), far.argmin(1).tolist()
    assert {records[a]["shape"] == records[b]["shape"] for a, b in zip(wanted, shown, strict=True)} == {True}
    lent = {row for row, given in zip(wanted, shown, strict=True) if row != given}
    assert lent == set(stage.drawing.aside.nonzero()[:, 0].tolist()) & set(wanted)
    assert 0 < len(lent) < len(set(wanted))


def check_palette(decoder: TrainConfig, network: TrainConfig) -> None:
    """The autoencoder gets a palette of the field `colour`, keeps it in further runs, and networks learn its latents."""
    import unidiffuser

    named = {"field": "colour", "manners": ["red", "blue"], "colours": 4}
    decoder = replace(decoder, options=decoder.options | {"palette": named, "strange": 0.2})
    stage = make_stage(decoder)
    assert set(stage.styles.tolist()) == {0, 1, 2}  # there are other colours, too
    train(stage, decoder, progress=False)
    path = Path(decoder.out) / "model.safetensors"
    model = unidiffuser.load(path)
    assert model.config.vae.palette == {"manners": ["red", "blue"], "colours": 4}
    palette = model.autoencoder.palette
    images = ImageFolder(decoder.options["data"], SIDE, {"colour": ["red", "blue"]})
    kinds = torch.tensor([["red", "blue"].index(record["colour"]) for record in images.records])
    latents = model.autoencoder.encode(images.pixels(torch.arange(len(images))), torch.Generator().manual_seed(0))
    assert (palette.read_code(latents.float()).argmax(1) == kinds).float().mean() > 0.9
    with pytest.raises(ValueError, match="gate is of a palette"):
        make_stage(replace(decoder, options={k: v for k, v in decoder.options.items() if k != "palette"} | {"gate": 3.0}))
    again = replace(
        decoder, out=decoder.out + "_again", steps=2, options=decoder.options | {"checkpoint": str(path), "gate": 3.0}
    )
    trained = train(make_stage(again), again, progress=False)
    written = load_checkpoint(Path(again.out) / "model.safetensors")
    assert written.config.vae.palette == model.config.vae.palette
    torch.testing.assert_close(
        written.state_dict("vae")["palette.gate"].float(), trained.palette.gate.data + 3, rtol=0, atol=1e-2
    )
    learnt = replace(network, out=decoder.out + "_network", steps=2, options=network.options | {"network_of": None})
    learnt.options.pop("network_of")
    learnt.options["checkpoint"] = str(path)
    train(make_stage(learnt), learnt, progress=False)
    assert unidiffuser.load(Path(learnt.out) / "model.safetensors").config.vae.palette == model.config.vae.palette
    drawing = {"borrow": 0.5, "repaint_within": "shape", "caption_shares": [1, 0], "shift": 2, "changed_below": 500}
    told = {"mix": {"clean_text": 1}, "captioning": None, "drawing": drawing, "manner_of": "colour"}
    check_borrowing(make_stage(replace(learnt, options=learnt.options | told)), palette)
    with pytest.raises(ValueError, match="style 1 has no pictures"):
        make_stage(replace(decoder, options=decoder.options | {"palette": named | {"manners": ["red", "mauve"]}}))


def check_upsampler(decoder: TrainConfig, before: Checkpoint) -> None:
    """The autoencoder gets an upsampler: the same latents become pictures of twice the sides; squares of them are trained."""
    import unidiffuser

    options = {"image_size": 2 * SIDE, "upsampler": {"features": 4, "width": 8}, "crop": 3, "psnr": 0.05}
    decoder = replace(decoder, options=decoder.options | options)
    train(make_stage(decoder), decoder, progress=False)
    assert fell(Path(decoder.out)) < 0.98
    model = unidiffuser.load(Path(decoder.out) / "model.safetensors")
    assert model.config.vae.upsampler == options["upsampler"]
    assert model.text_to_image("red circle", steps=2)[0].size == (2 * SIDE,) * 2
    large = ImageFolder(decoder.options["data"], 2 * SIDE).pixels(torch.arange(4))
    small = Autoencoder.from_checkpoint(before, dtype=torch.float32).posterior(F.avg_pool2d(large, 2))[0]
    ours = Autoencoder.from_checkpoint(model.checkpoint, dtype=torch.float32).posterior(large)[0]
    torch.testing.assert_close(ours, small, rtol=0, atol=5e-3)  # float16 weights
    crop = Crop(top=2, left=1, side=3)
    assert torch.equal(crop(large, 8), large[..., 16:40, 8:32])
    assert torch.equal(crop(large, 8, margin=1), large[..., 24:32, 16:24])


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


def test_a_lean_below_zero_is_refused():
    with pytest.raises(ValueError, match="lean"):
        draw_labels(4, {"equal": 1}, torch.Generator(), lean=-1.0)


@pytest.mark.parametrize("mean_and_std", [[0.8, 0.0], [0.8]])
def test_a_logit_normal_without_width_is_refused(mean_and_std):
    with pytest.raises(ValueError, match="logit_normal must be a mean and a std above 0"):
        draw_labels(4, {"equal": 1}, torch.Generator(), logit_normal=mean_and_std)


def test_loss_is_the_plain_mean_over_noised_elements():
    """A network that predicts zero has as its loss the mean square of the noise, which the generator repeats."""
    clean = Streams(torch.randn(6, 4, 4, 4), torch.randn(6, 1, 8), torch.randn(6, 3, 5))

    def zero(img, clip_img, text, t_img, t_text, data_type):
        return torch.zeros_like(img), torch.zeros_like(clip_img), torch.zeros_like(text)

    generator = torch.Generator().manual_seed(3)
    labels = draw_labels(6, {"clean_text": 1}, generator)
    noise = clean.map(lambda x: torch.randn(x.shape, generator=generator))
    expected = torch.cat([noise.img.flatten(), noise.clip_img.flatten()]).square().mean()
    drawing = torch.Generator().manual_seed(3)
    got = diffusion_loss(zero, clean, drawing, labels=draw_labels(6, {"clean_text": 1}, drawing))
    assert torch.isclose(got["loss"], expected)
    assert got["text"] == 0  # a clean stream has no noise to predict
    assert (labels["text"] == 0).all()


def test_a_weight_counts_the_elements_of_a_stream_so_many_times():
    clean = Streams(torch.randn(6, 4, 4, 4), torch.randn(6, 1, 8), torch.randn(6, 3, 5))

    def zero(img, clip_img, text, t_img, t_text, data_type):
        return torch.zeros_like(img), torch.zeros_like(clip_img), torch.zeros_like(text)

    plain, none, weighted = (
        diffusion_loss(zero, clean, torch.Generator().manual_seed(0), weights=w)
        for w in (None, {}, {"text": 5.0, "clip_img": 2})
    )
    assert plain == none
    assert {name: plain[name] for name in ("img", "clip_img", "text")} == {
        name: weighted[name] for name in plain if name != "loss"
    }
    sizes = {"img": 64, "clip_img": 8, "text": 15}
    added = (4 * sizes["text"] * plain["text"] + sizes["clip_img"] * plain["clip_img"]) / sum(sizes.values())
    assert torch.isclose(weighted["loss"], plain["loss"] + added)


def test_a_network_that_knows_the_data_has_no_loss():
    clean = Streams(torch.randn(5, 4, 4, 4), torch.randn(5, 1, 8), torch.randn(5, 3, 5))

    def oracle(img, clip_img, text, t_img, t_text, data_type):
        def eps(noised, x0, t):
            alpha_x0 = add_noise(x0, torch.zeros_like(x0), t.float())
            sigma = add_noise(torch.zeros_like(x0), torch.ones_like(x0), t.float())
            return (noised - alpha_x0) / sigma

        return eps(img, clean.img, t_img), eps(clip_img, clean.clip_img, t_img), eps(text, clean.text, t_text)

    assert diffusion_loss(oracle, clean, torch.Generator().manual_seed(0))["loss"] < 1e-6


# --- data ----------------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 50), batch=st.integers(1, 64), seed=st.integers(0, 9), epochs=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_every_epoch_shows_every_picture_once(size, batch, seed, epochs):
    steps = -(-size * epochs // batch)
    seen = torch.cat([step_indices(size, batch, seed, k) for k in range(steps)])[: size * epochs]
    assert torch.equal(seen.bincount(minlength=size), torch.full((size,), epochs))


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


def test_augmentation_keeps_white_and_repeats():
    pixels = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    same = augmented(pixels, torch.Generator().manual_seed(1), place=0.0, colour=0.0)
    assert torch.allclose(same, pixels, atol=1e-5)
    first, second = (augmented(pixels, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.abs().max() <= 1
    assert ((first - pixels).flatten(1).abs().mean(1) > 0.05).all()  # each picture is changed
    assert torch.allclose(augmented(torch.ones(3, 3, 8, 8), torch.Generator()), torch.ones(3, 3, 8, 8), atol=1e-5)


# --- the loop ------------------------------------------------------------------------------------------------------


class Line(TrainingStage):
    """A tiny regression, with noise from the step's generator so that a resume must restore that too."""

    def __init__(self, out: Path, slow: float = 0.0, poison: int = -1):
        with seeded_init(0):
            self.model = nn.Linear(4, 1)
        self.size, self.out, self.slow, self.poison, self.calls = 32, out, slow, poison, 0
        self.x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))

    def examples(self, indices, seeds):
        return {"x": self.x[indices]}

    def loss(self, model, batch, generator):
        time.sleep(self.slow)
        self.calls += 1
        noise = torch.randn(len(batch["x"]), 1, generator=generator)
        loss = (model(batch["x"]) - batch["x"].sum(1, keepdim=True) - 0.1 * noise).square().mean()
        return {"loss": loss * float("nan") if self.calls == self.poison else loss}

    def export(self, model):
        torch.save(model.state_dict(), self.out / "line.pt")


def line_config(out: Path) -> TrainConfig:
    return TrainConfig("line", str(out), steps=40, batch_size=8, save_every=7, sample_every=100, precision="no")


def losses_of(out: Path, term: str = "loss") -> list[float]:
    return [json.loads(line)[term] for line in (out / "losses.jsonl").read_text().splitlines()]


def test_resume_after_sigkill_gives_the_same_losses(tmp_path):
    whole = tmp_path / "whole"
    train(Line(whole), line_config(whole), progress=False)
    killed = tmp_path / "killed"
    program = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}\n"
        "from pathlib import Path\nimport test_training as t\n"
        f"out = Path({str(killed)!r})\n"
        "t.train(t.Line(out, slow=0.02), t.line_config(out), progress=False)\n"
    )
    chance = random.Random(0)
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        limit = time.monotonic() + 120
        before = checkpoints(killed)
        while time.monotonic() < limit and process.poll() is None:  # wait for a checkpoint of this process, then strike
            if checkpoints(killed) != before:
                break
            time.sleep(0.01)
        time.sleep(chance.random() * 0.1)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert int(checkpoints(killed)[-1].name) % 7 == 0
    train(Line(killed), line_config(killed), progress=False)
    assert losses_of(killed) == losses_of(whole)
    for a, b in zip(torch.load(whole / "line.pt").values(), torch.load(killed / "line.pt").values(), strict=True):
        assert torch.equal(a, b)


def test_nan_loss_names_the_step_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError, match=r"at step 9 \(process 0, pass 0: 8 examples"):
        train(Line(tmp_path, poison=10), line_config(tmp_path), progress=False)
    assert [p.name for p in checkpoints(tmp_path)] == ["00000007"]


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which file is written")
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    config = line_config(tmp_path)
    config.steps = 7
    train(Line(tmp_path), config, progress=False)

    flush = os.fsync

    def full(fd):
        if ".partial" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(28, "No space left on device")
        flush(fd)

    monkeypatch.setattr(os, "fsync", full)
    config.steps = 14
    with pytest.raises(OSError, match=r"No space left.*00000007"):
        train(Line(tmp_path), config, progress=False)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["00000007"]


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
    config = line_config(tmp_path)
    train(Line(tmp_path), config, progress=False)
    config.batch_size = 4
    with pytest.raises(ValueError, match="batch_size 8 there, 4 here"):
        train(Line(tmp_path), config, progress=False)
    config.batch_size = 8
    other = Line(tmp_path)
    other.model = nn.Linear(4, 2)
    with pytest.raises(ValueError, match=r"2 weights, as bias: \[1\] there, \[2\] here"):
        train(other, config, progress=False)


def test_a_gradient_that_is_not_finite_stops_too(tmp_path):
    class Steep(Line):
        def loss(self, model, batch, generator):
            loss = super().loss(model, batch, generator)["loss"]
            if self.calls == 10:
                loss.register_hook(lambda g: g * float("inf"))
            return {"loss": loss}

    with pytest.raises(FloatingPointError, match=r"gradient is (nan|inf) at step 9"):
        train(Steep(tmp_path), line_config(tmp_path), progress=False)


def test_accumulated_passes_are_one_batch(tmp_path):
    """The same steps in passes of 3, 3 and 2 examples, with the random numbers made for each example."""

    class Each(Line):
        def examples(self, indices, seeds):
            noise = [torch.randn(1, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            return super().examples(indices, seeds) | {"noise": torch.stack(noise)}

        def loss(self, model, batch, generator):
            return {"loss": (model(batch["x"]) - batch["x"].sum(1, keepdim=True) - 0.1 * batch["noise"]).square().mean()}

    one, many = line_config(tmp_path / "one"), line_config(tmp_path / "many")
    many.micro_batch = 3
    train(Each(tmp_path / "one"), one, progress=False)
    train(Each(tmp_path / "many"), many, progress=False)
    assert np.allclose(losses_of(tmp_path / "one"), losses_of(tmp_path / "many"), rtol=1e-5)


METADATA, FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"


@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        ("os", "system", "S'touch ran'\n"),
        ("builtins", "exec", 'S\'open("ran", "w")\'\n'),
        ("builtins", "getattr", "S'ran'\nS'upper'\n"),
        (METADATA, "os", None),
        (METADATA, "os.system", "S'touch ran'\n"),
        (METADATA, "torch.save", "S'x'\nS'ran'\n"),
        (METADATA, "dataclass", None),
        (FILES, "os", None),
        (FILES, "os.system", "S'touch ran'\n"),
        (FILES, "pickle", None),
        (FILES, "pickle.loads", "C\x05cos\n."),
        (FILES, "io.open", "S'ran'\nS'w'\n"),
        (FILES, "Path", "S'ran'\n"),
        (FILES, "Path.touch", "S'ran'\n"),
        (FILES, "FileSystem", ""),
        (FILES, "FileSystemWriter", "S'ran'\n"),
        ("torch", "save", "S'x'\nS'ran'\n"),
        ("torch", "load", "S'ran'\n"),
        ("torch", "from_file", "S'ran'\nI01\nI8\n"),
        ("torch", "os", None),
        ("torch", "compile", "S'x'\n"),
        ("torch", "float32.__reduce__", ""),
        ("torch", "serialization", None),
        ("torch.serialization", "load", "S'ran'\n"),
        ("torch.serialization", "os", None),
        ("collections", "abc", None),
        ("pathlib", "os", None),
        ("pathlib", "PosixPath.touch", "S'ran'\n"),
    ],
)
def test_the_index_of_a_checkpoint_cannot_call_anything(tmp_path, monkeypatch, module, name, arguments):
    """Only what an index consists of is found: no call, and no module from which one could be fetched."""
    from unidiffuser.training.saving import load_average

    monkeypatch.chdir(tmp_path)
    config = line_config(tmp_path)
    config.steps = 7
    train(Line(tmp_path), config, progress=False)
    index = checkpoints(tmp_path)[-1] / ".metadata"
    call = "" if arguments is None else f"({arguments}tR"
    text = f"\x80\x04c{module}\n{name}\n{call}."
    index.write_bytes(text.encode("latin-1"))
    refused = rf"00000007 cannot be read.*index names {re.escape(module)}\.{re.escape(name)}, which no index needs.*remove it"
    with pytest.raises(ValueError, match=refused):
        load_average(tmp_path, nn.Linear(4, 1))
    config.steps = 14
    with pytest.raises(ValueError, match=refused):
        train(Line(tmp_path), config, progress=False)
    assert not Path("ran").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64])
def test_the_index_of_a_run_of_any_dtype_is_read(tmp_path, dtype):
    from unidiffuser.training.saving import load_average

    line = Line(tmp_path)
    line.model.to(dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.float32)
    line.x = line.x.to(line.model.weight.dtype)
    line.loss = lambda model, batch, generator: {"loss": model(batch["x"]).float().square().mean()}
    line.model.register_buffer("kept", torch.ones(3).to(dtype))
    config = line_config(tmp_path)
    config.steps = 7
    train(line, config, progress=False)
    config.steps = 14
    train(line, config, progress=False)
    assert [p.name for p in checkpoints(tmp_path)][-1] == "00000014"
    assert load_average(tmp_path, nn.Linear(4, 1).to(line.model.weight.dtype)).weight.isfinite().all()


class Call:
    """Unpickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("call", [Call(os.system, "touch ran"), Call(exec, "open('ran', 'w')"), Call(torch.save, [1], "ran")])
def test_the_values_of_a_checkpoint_cannot_call_anything(tmp_path, monkeypatch, call):
    """torch's load planner reads what is no tensor, such as a learning rate, with ``weights_only=False``."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    from unidiffuser.training import saving

    class Hostile(DefaultSavePlanner):
        def resolve_data(self, write_item):
            data = super().resolve_data(write_item)
            if write_item.index.fqn != "optimizer.param_groups.0.lr":
                return data
            torch.save(call, file := io.BytesIO())
            return file

    monkeypatch.chdir(tmp_path)
    config, save = line_config(tmp_path), saving.dcp_save
    config.steps = 7
    with monkeypatch.context() as patched:
        patched.setattr(saving, "dcp_save", lambda *args, **options: save(*args, planner=Hostile(), **options))
        train(Line(tmp_path), config, progress=False)
    config.steps = 14
    with pytest.raises(ValueError, match=r"00000007 cannot be read.*param_groups\.0\.lr asks for \S+ and could run.*remove"):
        train(Line(tmp_path), config, progress=False)
    assert not Path("ran").exists()


def test_a_damaged_value_of_a_checkpoint_is_named(tmp_path):
    config = line_config(tmp_path)
    config.steps = 7
    train(Line(tmp_path), config, progress=False)
    for file in checkpoints(tmp_path)[-1].glob("*.distcp"):
        data = file.read_bytes()
        file.write_bytes(data.replace(b"data.pkl", b"data.pkx"))
    with pytest.raises(ValueError, match="00000007 cannot be read"):
        train(Line(tmp_path), config, progress=False)


def test_training_leaves_the_global_generator_alone(tmp_path):
    state = torch.random.get_rng_state()
    train(Line(tmp_path), line_config(tmp_path), progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_config_files(tmp_path):
    path = tmp_path / "c.yaml"
    with pytest.raises(FileNotFoundError):
        TrainConfig.from_file(path)
    path.write_text("stage: uvit\nout: x\nlearning_rte: 1\n")
    with pytest.raises(ValueError, match="learning_rte"):
        TrainConfig.from_file(path)
    path.write_text("stage: nothing\nout: x\nsteps: 5\n")
    with pytest.raises(ValueError, match="unknown stage"):
        make_stage(TrainConfig.from_file(path))
    assert TrainConfig.from_file(path, steps=3).steps == 3
    for shipped in (Path(__file__).parents[1] / "unidiffuser/training/configs").rglob("*.yaml"):
        TrainConfig.from_file(shipped)


def test_learning_rate_rises_and_falls():
    c = TrainConfig("x", "y", steps=100, warmup_steps=10, decay=0.2, learning_rate=1.0)
    assert c.rate(0) == pytest.approx(0.1)
    assert c.rate(50) == 1.0
    assert c.rate(90) == pytest.approx(0.5)


# --- the stages ----------------------------------------------------------------------------------------------------


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


def test_a_silenced_channel_is_zero_whatever_the_noise_and_changes_nothing_else():
    model = PatchedAutoencoder(vae_config(64, 4, (32, 32), 1)).eval()
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        mean, logvar = model.moments(pixels)
        model.silence(1)
        quiet, quiet_logvar = model.moments(pixels)
        others = [0, 2, 3]
        assert torch.equal(quiet[:, others], mean[:, others])
        assert torch.equal(quiet_logvar[:, others], logvar[:, others])
        assert not quiet[:, 1].any()
        assert (0.5 * quiet_logvar[:, 1]).exp().max() < 1e-6
        loud = quiet.clone()
        loud[:, 1] = 5.0
        assert torch.equal(model.decode(loud), model.decode(quiet))


@pytest.mark.parametrize(
    "missing",
    [{"tell": {"nothing": {"share": 1}}}, {"tell": {"shape": {"share": 1, "restyle": 0.5}}}],
    ids=["tell", "stem"],
)
def test_an_image_tower_needs_fields_that_exist(shapes, tmp_path, missing):
    options = {"data": str(shapes), "image_size": SIDE, "encoders_of": str(tmp_path), "tell": {"shape": {"share": 1}},
               "image": {"hidden_size": 32, "num_attention_heads": 2, "patch_size": 8, "projection_dim": 16}}  # fmt: skip
    with pytest.raises(ValueError, match=r"nothing|give `image` a `stem`"):
        make_stage(config("image_tower", tmp_path / "tower", options=options | missing))


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
    for k in range(6):  # one other, one share for both, in all channels
        fits = []
        for other in range(6):
            own = ((y.mean((2, 3)) - means[other]) / (means - means[other]))[k] if other != k else torch.ones(4)
            mixed = own * deviations[k] + (1 - own) * deviations[other]
            fits.append(bool(own.std() < 1e-3 and torch.allclose(mixed, y.std((2, 3))[k], rtol=1e-2)))
        assert any(fits)
    assert (y.mean((2, 3)) - means).abs().max() > 0.1


def test_features_are_restyled_in_their_part_of_a_batch_only():
    restyle, layer = Restyle(), nn.Identity()
    layer.register_forward_hook(restyle)
    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    with restyle.during([(slice(0, 5), 1.0), (slice(5, 8), 0.0)], torch.Generator().manual_seed(2)):
        y = layer(x)
    assert not torch.allclose(y[:5], x[:5], atol=0.1)
    assert torch.equal(y[5:], x[5:])
    assert torch.equal(layer(x), x)


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


def test_plain_latents_are_the_reduced_picture(shapes, tmp_path):
    stage = config(
        "autoencoder", tmp_path / "plain", steps=200, batch_size=6, learning_rate=3e-3, precision="no",
        options={"data": str(shapes), "image_size": SIDE, "patch_size": 4, "channels": [32], "layers": 1,
                 "plain": 1.0, "noise": 0.2, "test": {"split": "train"}},
    )  # fmt: skip
    made = make_stage(stage)
    model = train(made, stage, progress=False)
    assert np.mean(losses_of(tmp_path / "plain", "plain")[-10:]) < 0.2
    pixels = made.train_set.pixels(torch.arange(len(made.train_set)))
    with torch.no_grad():
        latents = SCALE * model.moments(pixels)[0]
    assert latents.shape[1:] == (4, SIDE // 4, SIDE // 4)
    matrix, mean = made.colours
    wanted = torch.einsum("ij,bjhw->bihw", matrix, reduced(pixels, 4) - mean.view(-1, 1, 1))
    for channel in range(3):
        together = torch.stack([latents[:, channel].flatten(), wanted[:, channel].flatten()])
        assert torch.corrcoef(together)[0, 1] > 0.9
    assert latents[:, 3].any()
    kept = torch.load(tmp_path / "plain" / "autoencoder.pt", weights_only=True)
    assert all(value.isfinite().all() for value in kept.values())
    with pytest.raises(ValueError, match="noise needs plain"):
        make_stage(replace(stage, options=stage.options | {"plain": 0.0}))


def test_psnr_of_a_known_error():
    pixels = torch.zeros(1, 3, 4, 4)
    assert psnr(pixels + 0.2, pixels).item() == pytest.approx(20.0)  # 0.1 of the range: -10 log10(0.01)


def test_every_stage_learns_and_the_result_loads_and_fine_tunes(shapes, tmp_path):
    """All stages on twelve pictures, one file, its use as a model, and a fine-tuning that resumes from it."""
    runs, precision = tmp_path / "runs", "auto"
    data = {"data": str(shapes), "image_size": SIDE}

    autoencoder = config(
        "autoencoder", runs / "autoencoder", precision=precision, steps=80,
        options=data | {"patch_size": 4, "channels": [32, 64], "layers": 1},
    )  # fmt: skip
    train(make_stage(autoencoder), autoencoder, progress=False)
    assert fell(runs / "autoencoder") < 0.6

    longer = config(
        "autoencoder", runs / "autoencoder_longer", precision=precision, steps=20,
        options=autoencoder.options | {"start_of": str(runs / "autoencoder"), "mse_weight": 2.0, "test": {"split": "train"}},
    )  # fmt: skip
    train(make_stage(longer), longer, progress=False)
    begun, gone_on = (losses_of(runs / name, "pixel")[:10] for name in ("autoencoder", "autoencoder_longer"))
    assert np.mean(gone_on) < 0.7 * np.mean(begun)

    encoders = config(
        "encoders", runs / "encoders", precision=precision, steps=60,
        options=data | {"vocabulary_size": 560, "text_tokens": 8, "width": 64, "layers": 1, "image_patch": 16,
                        "projection": 16},
    )  # fmt: skip
    train(make_stage(encoders), encoders, progress=False)
    assert fell(runs / "encoders") < 0.8

    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8,
             "projection_dim": 16, "stem": {"unshuffle": 4, "channels": [16, 32]}}  # fmt: skip
    image_tower = config(
        "image_tower", runs / "image_tower", precision=precision, batch_size=24, steps=60,
        options=data | {"encoders_of": str(runs / "encoders"), "image": tower,
                        "tell": {"shape": {"share": 2, "place": 0.5, "colour": 1.0, "mirror": True,
                                           "noise": 0.1, "restyle": 0.3},
                                 "colour": {"share": 1, "place": 1.0, "colour": 0.2, "shade": 0.1}}},
    )  # fmt: skip
    train(make_stage(image_tower), image_tower, progress=False)
    assert fell(runs / "image_tower") < 0.5
    assert nearest_agrees(runs / "image_tower", shapes, ("shape", "colour")) > 0.7  # by chance, one in twelve
    other = dict(torch.load(runs / "encoders/clip.pt", weights_only=True))
    made = torch.load(runs / "image_tower/clip.pt", weights_only=True)
    assert all(torch.equal(made[name], value) for name, value in other.items() if name.startswith("text_model."))

    captioner = config(
        "captioner", runs / "captioner", precision=precision, batch_size=24, steps=80, learning_rate=4e-3,
        options=data | {"encoders": str(runs / "encoders"), "vocabulary_size": 300, "hidden_dim": 16, "width": 64, "layers": 1,
                        "max_new_tokens": 8, "noise": 0.3},
    )  # fmt: skip
    train(make_stage(captioner), captioner, progress=False)
    assert fell(runs / "captioner") < 0.5

    mix = {"mix": {"independent": 2, "clean_image": 1}, "where": {"split": "train"},
           "captioning": {"where": {}, "versions": 2, "place": 0.3, "swap": 0.5, "swap_within": "shape"},
           "drawing": {"where": {}, "share": 0.5}}  # fmt: skip
    parts = assemble(runs, runs / "encoders.safetensors")
    sizes = {"img_size": 4, "patch_size": 2, "embed_dim": 64, "depth": 3, "num_heads": 2, "text_dim": 16, "num_text_tokens": 8,
             "clip_img_dim": 16, "data_types": 2}  # fmt: skip
    network = config(
        "uvit", runs / "uvit", precision=precision, batch_size=48, steps=100,
        options=data | mix | {"checkpoint": str(parts), "uvit": sizes, "sample_prompts": ["red circle"],
                              "defaults": {"steps": 5, "guidance": 2.0}},
    )  # fmt: skip
    train(make_stage(network), network, progress=False)
    assert fell(runs / "uvit") < 0.9
    assert (runs / "uvit/samples/0000100.png").is_file()
    assert (runs / "uvit/losses.png").is_file()

    import unidiffuser

    model = unidiffuser.load(runs / "uvit/model.safetensors")
    assert model.checkpoint.config.clip_image["stem"] == tower["stem"]
    pictures = model.text_to_image("red circle", count=2, steps=3, seed=0)
    assert [p.size for p in pictures] == [(SIDE, SIDE)] * 2
    assert all(isinstance(text, str) for text in model.image_to_text(pictures, steps=3))

    # The same trainer goes on from a complete model: it starts where the network stands, not from scratch.
    tuned = config(
        "uvit", runs / "tuned", precision=precision, batch_size=48, steps=20, learning_rate=5e-4,
        options=data | mix | {"checkpoint": str(runs / "uvit/model.safetensors")},
    )  # fmt: skip
    train(make_stage(tuned), tuned, progress=False)
    first = np.mean(losses_of(runs / "tuned")[:10])
    assert first < 1.1 * np.mean(losses_of(runs / "uvit")[-10:])
    assert unidiffuser.load(runs / "tuned/model.safetensors") is not None

    # Or a network goes on with other encoders of the same shapes.
    moved = config(
        "uvit", runs / "moved", precision=precision, batch_size=48, steps=5, learning_rate=0.0,
        options=data | mix | {"checkpoint": str(parts), "network_of": str(runs / "uvit/model.safetensors")},
    )  # fmt: skip
    train(make_stage(moved), moved, progress=False)
    theirs, ours = (load_checkpoint(runs / name / "model.safetensors").state_dict("uvit") for name in ("uvit", "moved"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    check_captioning_pairs(
        make_stage(
            replace(
                moved, options=moved.options | {"captioning": {"swap": 1.0, "swap_within": "shape", "caption_shares": [1, 0]}}
            )
        )
    )
    apart = {"mix": {"clean_text": 2, "equal": 1}, "captioning": None, "where": {"colour": "red"}}
    drawing = {"where": {"colour": "blue"}, "caption_shares": [1, 0]}
    check_drawing_pairs(make_stage(replace(moved, options=moved.options | apart | {"drawing": drawing})))
    again = {"where": {}, "repaint": 1.0, "repaint_within": "shape", "repaint_from": 3,
             "versions": 3, "place": 1.0, "colour": 0.0, "changed_below": 2, "mixed_shares": [1, 0]}  # fmt: skip
    check_repainting(make_stage(replace(moved, options=moved.options | apart | {"mix": {"clean_text": 1}, "drawing": again})))
    below = {"where": {"colour": "blue"}, "share": 0.2, "share_below": 1.0, "changed_below": 500, "shift": 2}
    check_shifts(make_stage(replace(moved, options=moved.options | apart | {"mix": {"clean_text": 1}, "drawing": below})))
    left = make_stage(replace(moved, options=moved.options | {"checkpoint": str(runs / "tuned/model.safetensors")}))
    torch.testing.assert_close(dict(left.model.state_dict()), dict(theirs), rtol=0, atol=0, check_dtype=False)

    # The decoder learns to draw what the network makes; all other parts stay as they are.
    decoder = config(
        "decoder", runs / "decoder", precision=precision, batch_size=10, steps=40, learning_rate=2e-3,
        options=data | {"checkpoint": str(runs / "uvit/model.safetensors"), "noise": 0.5, "clean": 0.2, "denoised": 0.4,
                        "labels": [50, 500], "known": {"split": "train"}, "test": {"split": "train"}},
    )  # fmt: skip
    train(make_stage(decoder), decoder, progress=False)
    assert fell(runs / "decoder") < 0.95
    clean, noisy, made = map(float, (runs / "decoder/psnr.txt").read_text().split())
    assert clean > noisy > 5
    assert made > 5
    check_palette(replace(decoder, out=str(runs / "palette"), steps=12), moved)
    check_upsampler(replace(decoder, out=str(runs / "upsampler"), steps=20), load_checkpoint(runs / "uvit/model.safetensors"))
    before, after = (load_checkpoint(runs / name / "model.safetensors") for name in ("uvit", "decoder"))
    for part in before.parts():
        old, new = before.state_dict(part), after.state_dict(part)
        changed = {name for name in old if not torch.equal(old[name], new[name])}
        assert changed if part == "vae" else not changed, part
        assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)
    assert unidiffuser.load(runs / "decoder/model.safetensors").text_to_image("red circle", steps=2)[0].size == (SIDE, SIDE)
    with pytest.raises(ValueError, match=r"img_size 4, .* takes 32"):
        make_stage(replace(moved, options=moved.options | {"network_of": "emoji"}))
    for weights in ({"caption": 2}, {"text": -1}):
        with pytest.raises(ValueError, match="weights has"):
            make_stage(replace(moved, options=moved.options | {"weights": weights}))

    # And on latents of another kind: only what reads and writes them is new.
    finer = config(
        "autoencoder", runs / "autoencoder_plain", precision=precision, steps=20, seed=1,
        options=data | {"patch_size": 4, "channels": [32], "layers": 1, "plain": 0.1},
    )  # fmt: skip
    train(make_stage(finer), finer, progress=False)
    parts = assemble(runs, runs / "finer.safetensors")
    onto = moved.options | {"checkpoint": str(parts), "uvit": {"img_size": SIDE // 4, "patch_size": 4}, "weights": {"text": 5}}
    transplant = replace(moved, out=str(runs / "transplant"), options=onto)
    train(make_stage(transplant), transplant, progress=False)
    ours = load_checkpoint(runs / "transplant/model.safetensors").state_dict("uvit")
    changed = {name for name in theirs if theirs[name].shape != ours[name].shape or not torch.equal(theirs[name], ours[name])}
    assert changed == {"patch_embed.proj.weight", "patch_embed.proj.bias", "decoder_pred.weight", "decoder_pred.bias"}
    assert unidiffuser.load(runs / "transplant/model.safetensors").text_to_image("red circle", steps=2)[0].size == (SIDE, SIDE)

    # Asked for the picture instead of the noise, it writes anew and still reads as before.
    head = {"sigma_data": 0.3, "detail_width": 8, "detail_blocks": 1, "detail_features": 4}
    asked = replace(moved, out=str(runs / "asked"), options=moved.options | {"uvit": head})
    train(make_stage(asked), asked, progress=False)
    made = load_checkpoint(runs / "asked/model.safetensors")
    assert {name: getattr(made.config.uvit, name) for name in head} == head
    ours = made.state_dict("uvit")
    changed = {n for n in theirs if theirs[n].shape != ours[n].shape or not torch.equal(theirs[n], ours[n])}
    assert changed == {"decoder_pred.weight", "decoder_pred.bias"}
    assert all(name.startswith("detail.") for name in ours.keys() - theirs.keys())
    assert unidiffuser.load(made.path).text_to_image("red circle", steps=2)[0].size == (SIDE, SIDE)
    further = replace(moved, out=str(runs / "further"), options=moved.options | {"network_of": str(made.path)})
    train(make_stage(further), further, progress=False)
    kept = load_checkpoint(runs / "further/model.safetensors").state_dict("uvit")
    assert all(torch.equal(value, ours[name]) for name, value in kept.items())
