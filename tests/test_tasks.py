"""Editing and captioning on a toy checkpoint: any path, masks, words, candidates, scores, inversion, forms of the results."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rounding import assert_same
from torch import Tensor

import unidiffuser
from unidiffuser import NoisePath, Streams
from unidiffuser.options import resolve
from unidiffuser.pipeline import UniDiffuser
from unidiffuser.schedule import alpha_sigma, log_alpha
from unidiffuser.scoring import HIGH, LOW, Errors, caption_fit, caption_scores, denoising_errors
from unidiffuser.streams import item_generators
from unidiffuser.tasks.inputs import read_mask
from unidiffuser.tasks.words import token_mask

STEPS = {"steps": 2}


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> UniDiffuser:
    return unidiffuser.load(tiny_checkpoint, device="cpu")


def picture(seed: int = 0, size: tuple[int, int] = (128, 128)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def notes(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said of the inputs, whatever the toy network's latents look like."""
    return [record.getMessage() for record in caplog.records if record.name == "unidiffuser.tasks.inputs"]


def far(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


# --- any path ---------------------------------------------------------------------------------------------------------


def test_a_path_of_a_task_gives_the_results_of_the_task(model: UniDiffuser) -> None:
    images, captions = model.sample(NoisePath.text_to_image(2), text="red", count=2)
    assert captions is None
    assert [far(*pair) for pair in zip(images, model.text_to_image("red", count=2, **STEPS), strict=True)] == [0, 0]
    found = model.sample(NoisePath.image_to_text(2), image=[picture(), picture(1)])
    assert found.images is None
    assert found.captions == model.image_to_text([picture(), picture(1)], **STEPS)
    pairs = model.sample(NoisePath.joint(2), count=2, seed=5)
    assert list(zip(*pairs, strict=True)) == model.joint(count=2, seed=5, **STEPS)


def test_held_levels_and_starts_reach_the_network(model: UniDiffuser) -> None:
    """What is given is noised to the path's first point; the rest of a curve goes on from latents that are noisy already."""
    path = NoisePath.from_points("1000,300 500,100 0,0", steps=4)
    whole = model.sample(path, text="red", seed=3, output="latent")
    with pytest.raises(ValueError, match=r"starts the text at noise level 300.*'text'"):
        model.sample(path, seed=3)
    clean = model.encode_texts(["red"])
    alpha, sigma = alpha_sigma(torch.tensor(300.0))
    noise = torch.randn(clean.shape[1:], generator=item_generators(3, 1)[0])
    start = Streams(text=alpha * clean + sigma * noise)
    again = model.sample(path, latents=start, noised=True, seed=3, output="latent")
    assert torch.isfinite(again.need("img")).all()
    assert whole.need("img").shape == again.need("img").shape == (1, 4, 16, 16)
    with pytest.raises(ValueError, match="got 2 pictures and 3 captions"):
        model.sample(path, image=[picture()] * 2, text=["a", "b", "c"])


def test_latents_go_in_and_out(model: UniDiffuser) -> None:
    latents = model.text_to_image("red", output="latent", **STEPS)
    assert isinstance(latents, Streams)
    images, captions = model.decode(latents)
    assert far(images[0], model.text_to_image("red", **STEPS)[0]) == 0
    assert captions is not None
    out = model.sample(NoisePath.image_to_text(2), latents=Streams(latents.img, latents.clip_img), count=2)
    assert len(out.captions) == 2
    assert model.decode(Streams(text=latents.text)).images is None


def test_results_in_other_forms(model: UniDiffuser) -> None:
    images = model.text_to_image("red", count=2, **STEPS)
    array: Any = model.text_to_image("red", count=2, output="numpy", **STEPS)
    assert array.shape == (2, 128, 128, 3)
    assert np.array_equal(array, np.stack([np.asarray(image) for image in images]))
    tensor: Any = model.text_to_image("red", count=2, output="tensor", **STEPS)
    assert tensor.shape == (2, 3, 128, 128)
    assert np.abs(tensor.permute(0, 2, 3, 1).numpy() * 255 - array).max() < 0.51
    assert model.image_to_text(tensor[0], **STEPS) == model.image_to_text(images[0], **STEPS)
    first, caption = model.joint(output="numpy", **STEPS)[0]
    assert first.shape == (128, 128, 3)
    assert isinstance(caption, str)
    rounds: Any = model.gibbs("red", rounds=2, count=3, output="latent", **STEPS)
    assert [state.need("text").shape[0] for state in rounds] == [3, 3]
    with pytest.raises(ValueError, match="output must be one of pil, numpy, tensor, latent, got 'np'"):
        model.image(output="np")


def test_a_step_is_timed(model: UniDiffuser) -> None:
    state = torch.get_rng_state()
    assert 0 < model.step_seconds(resolve({"steps": 5}, model.config)) < 60
    assert torch.equal(torch.get_rng_state(), state)


# --- editing ----------------------------------------------------------------------------------------------------------


def test_img2img_stays_closer_the_weaker_it_is(model: UniDiffuser) -> None:
    chosen = resolve({}, model.config)
    clean = model.encode_images([picture()], 1, chosen, item_generators(0, 1)).need("img")
    away = []
    for strength in (0.05, 0.4, 1.0):
        out: Any = model.img2img(picture(), "red", strength=strength, output="latent", steps=4)
        away.append(float((out.need("img") - clean).square().mean()))
    assert away == sorted(away)
    assert (
        far(model.img2img(picture(), strength=0.5, **STEPS)[0], model.img2img(picture(), "red", strength=0.5, **STEPS)[0]) > 0
    )
    for strength in (0, -1, 1.5, "strong"):
        with pytest.raises(ValueError, match="strength must be"):
            model.img2img(picture(), strength=strength)  # type: ignore[arg-type]


def test_inpainting_keeps_what_the_mask_keeps(model: UniDiffuser, tmp_path: Path) -> None:
    mask = np.zeros((128, 128), dtype=bool)
    mask[:64] = True
    chosen = resolve({}, model.config)
    clean = model.encode_images([picture()], 1, chosen, item_generators(0, 1)).need("img")
    out: Any = model.inpaint(picture(), mask, "red", output="latent", **STEPS)
    assert torch.equal(out.need("img")[:, :, 8:], clean[:, :, 8:])
    assert (out.need("img")[:, :, :8] != clean[:, :, :8]).all()
    given = Image.fromarray(mask)
    given.save(tmp_path / "mask.png")
    for form in (given, tmp_path / "mask.png", mask.astype(np.uint8) * 255, torch.from_numpy(mask).float()):
        same: Any = model.inpaint(picture(), form, "red", output="latent", **STEPS)
        assert torch.equal(same.need("img"), out.need("img"))
    weak: Any = model.inpaint(picture(), mask, strength=0.3, output="latent", count=2, **STEPS)
    alone = model.encode_images([picture()], 1, chosen, item_generators(1, 1)).need("img")
    assert_same(weak.need("img")[1:, :, 8:], alone[:, :, 8:])


def test_masks(tmp_path: Path) -> None:
    painted = Image.new("L", (200, 100))
    painted.paste(255, (50, 0, 100, 50))  # the centre square is 50..150
    cells = read_mask(painted, 64, 64, 8)[0, 0]
    assert cells[:4, :4].all()
    assert cells.sum() == 16
    with pytest.raises(ValueError, match="generates nothing: paint white"):
        read_mask(Image.new("L", (64, 64)), 64, 64, 8)
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        read_mask(tmp_path / "gone.png", 64, 64, 8)
    with pytest.raises(ValueError, match="the mask is None"):
        read_mask(None, 64, 64, 8)
    with pytest.raises(ValueError, match="the mask has values from 0 to 255; give bool, uint8 or numbers from 0 to 1"):
        read_mask(np.full((64, 64), 255.0) * np.eye(64), 64, 64, 8)


def test_a_mask_of_another_shape_than_the_picture_is_noticed(model: UniDiffuser, caplog: pytest.LogCaptureFixture) -> None:
    white = Image.new("L", (64, 64), 255)
    with caplog.at_level(logging.WARNING):
        model.inpaint(Image.new("RGB", (80, 80)), white, steps=1)
        assert notes(caplog) == []
        model.inpaint(Image.new("RGB", (80, 60)), white, steps=1)
    (note,) = notes(caplog)
    assert "the mask is 64 x 64 and the picture 80 x 60" in note


def test_an_inverted_picture_comes_back(model: UniDiffuser) -> None:
    smooth = picture(0, (16, 16)).resize((128, 128))
    noise = model.invert(smooth, "red", steps=20)
    assert {name for name, _ in noise.items()} == {"img", "clip_img", "text"}
    plan = resolve({}, model.config)
    latent = model.encode_images([smooth], 1, plan, item_generators(0, 1))
    expected = model.decode_images(latent, plan)[0]
    back = model.reconstruct(noise, steps=20)[0]
    assert np.abs(np.asarray(back, dtype=float) - np.asarray(expected, dtype=float)).mean() < 6  # of 255
    assert far(model.reconstruct(smooth, steps=4)[0], model.reconstruct(smooth, "blue", steps=4)[0]) > 0


# --- words ------------------------------------------------------------------------------------------------------------


def test_masks_of_words() -> None:
    def chosen(**which: Any) -> list[int]:
        return token_mask("A red, red apple", len, 16, **which).flatten().int().tolist()

    # start, A(1), red,(4), red(3), apple(5), rest(2)
    assert chosen(change="RED", rest=False) == [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert chosen(change=1, rest=False) == [0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    assert chosen(keep=["apple", 0]) == [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1]
    assert chosen(change=-1) == [0] * 9 + [1] * 7
    for wrong, words in (
        ({}, "one of change= and keep="),
        ({"change": "a", "keep": "red"}, "one of change= and keep="),
        ({"change": "blue"}, "change contains blue, which the text does not contain; its words are: A red, red apple"),
        ({"keep": [9]}, "keep contains position 9"),
        ({"change": ""}, "change is empty"),
    ):
        with pytest.raises(ValueError, match=words):
            chosen(**wrong)


def test_rewriting_keeps_the_latents_of_the_other_words(model: UniDiffuser) -> None:
    clean = model.encode_texts(["ab cd"])
    out: Any = model.rewrite("ab cd", picture(), change="cd", count=2, output="latent", **STEPS)
    text = out.need("text")
    assert torch.equal(text[:, :3], clean[:, :3].expand(2, -1, -1))  # the start token and two letters
    assert (text[:, 3:] != clean[:, 3:]).all()
    assert not torch.equal(text[0], text[1])
    fixed: Any = model.rewrite("ab cd", keep=0, rest=False, output="latent", **STEPS)
    assert torch.equal(fixed.need("text")[:, 5:], clean[:, 5:])
    assert len(model.rewrite(["ab", "cd"], [picture(), picture(1)], change=0, **STEPS)) == 2


# --- captions ---------------------------------------------------------------------------------------------------------


def test_captions_have_candidates_and_scores(model: UniDiffuser) -> None:
    found = model.caption([picture(), picture(1)], candidates=3, **STEPS)
    assert [len(item) for item in found] == [3, 3]
    assert [item[0].text for item in found] == model.image_to_text([picture(), picture(1)], **STEPS)
    assert all(item[0].score >= item[1].score >= item[2].score for item in found)
    one = model.caption(picture(), beams=1, **STEPS)[0][0]
    assert one.score <= found[0][0].score
    drawn = model.caption(picture(), candidates=4, top_p=0.9, temperature=2.0, count=2, seed=1, **STEPS)
    assert [len(item) for item in drawn] == [4, 4]
    assert_same(drawn[1], model.caption(picture(), candidates=4, top_p=0.9, temperature=2.0, seed=2, **STEPS)[0])
    wrong = [({"candidates": 0}, "candidates"), ({"candidates": 9, "beams": 2}, "raise beams"), ({"top_p": 2}, "top_p")]
    for options, word in [*wrong, ({"temperature": 0}, "temperature")]:
        with pytest.raises(ValueError, match=word):
            model.caption(picture(), **options)


class Gaussian:
    """The exact noise prediction for pictures drawn from N(mean of their text, 1)."""

    def __call__(self, img: Tensor, clip_img: Tensor, text: Tensor, t_img: Tensor, t_text: Tensor, *_: Tensor) -> Any:
        alpha, sigma = alpha_sigma(t_img)
        means = text[:, 0, 0]
        eps = [s * (x - a * m) for x, a, s, m in zip(img, alpha, sigma, means, strict=True)]
        tokens = [s * (x - a * m) for x, a, s, m in zip(clip_img, alpha, sigma, means, strict=True)]
        return torch.stack(eps), torch.stack(tokens), None


def test_log_odds_are_those_of_a_known_distribution() -> None:
    """log p(x | a) - log p(x | b) of two normal distributions, as far as the noise levels that are looked at go."""
    x = Streams(img=torch.full((1, 4, 8, 8), 1.0), clip_img=torch.full((1, 1, 16), 1.0))
    texts = torch.tensor([1.0, 0.0, 3.0])[:, None, None].expand(3, 2, 2)
    found = []
    for seed in range(8):
        errors = denoising_errors(Gaussian(), x, texts, levels=64, generator=torch.Generator().manual_seed(seed))
        found.append(errors.log_likelihood() - errors.log_likelihood()[0])
    elements = 4 * 8 * 8 + 16
    kept = torch.exp(2 * log_alpha(torch.tensor(LOW))) - torch.exp(2 * log_alpha(torch.tensor(HIGH)))
    expected = -0.5 * elements * kept * torch.tensor([0.0, 1.0, 4.0])
    torch.testing.assert_close(torch.stack(found).mean(0).float(), expected, rtol=0.05, atol=0.1)
    assert errors.elements == elements


def test_scores_have_a_scale() -> None:
    errors = Errors(torch.tensor([100.0, 900.0]), torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.5, 4.0]] * 2, dtype=torch.float64), 10)
    best, worst = caption_scores(["worse", "better"][::-1], errors, 2)
    assert (best.caption, best.rank, worst.rank) == ("better", 1, 2)
    likelihood = errors.log_likelihood()
    assert best.log_odds_empty == pytest.approx(float(likelihood[0] - likelihood[2]))
    assert best.log_odds_empty > 0 > worst.log_odds_empty
    others = likelihood[3:].exp().mean().log()
    assert best.log_odds_shuffled == pytest.approx(float(likelihood[0] - others))
    assert best.fit == pytest.approx(3.0)


def test_a_picture_scores_captions(model: UniDiffuser) -> None:
    captions = ["red", "blue", "green"]
    found = model.score(picture(), captions, levels=4, shuffled=["a", "b"])
    assert sorted(score.caption for score in found) == sorted(captions)
    assert [score.rank for score in found] == [1, 2, 3]
    assert found[0].log_odds_empty >= found[1].log_odds_empty >= found[2].log_odds_empty
    again = model.score(picture(), captions, levels=4, shuffled=["a", "b"], batch_size=2)
    assert [score.log_odds_shuffled for score in again] == pytest.approx([score.log_odds_shuffled for score in found], abs=1e-2)
    empty = model.score(picture(), "", levels=2, shuffled=2, **STEPS)[0]
    assert empty.log_odds_empty == pytest.approx(0, abs=1e-3)
    for wrong, word in (({"levels": 0}, "levels"), ({"shuffled": 0}, "shuffled"), ({"shuffled": []}, "empty list")):
        with pytest.raises(ValueError, match=word):
            model.score(picture(), "a", **wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scoring_adapts_to_the_format_of_the_network(tiny_checkpoint: Path, model: UniDiffuser, dtype: torch.dtype) -> None:
    half = unidiffuser.load(tiny_checkpoint, device="cpu", dtype=dtype)
    image = Streams(img=torch.randn(1, 4, 16, 16), clip_img=torch.randn(1, 1, 24))
    texts = model.encode_texts(["red", "blue"])
    scores = [caption_fit(m.net, image, texts, generator=torch.Generator().manual_seed(0)) for m in (half, model)]
    assert scores[0].dtype == torch.float32
    torch.testing.assert_close(scores[0], scores[1], atol=0.02, rtol=0.2)
    assert half.score(picture(), ["red"], levels=2, shuffled=["a"])[0].rank == 1


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_one_bad_item_need_not_end_a_list(model: UniDiffuser, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "broken.png").write_text("no picture")
    given = [picture(), tmp_path / "broken.png", tmp_path / "gone.png", picture(1)]
    good = model.image_to_text([picture(), picture(1)], count=2, **STEPS)
    with caplog.at_level(logging.WARNING):
        found = model.image_to_text(given, count=2, on_error="skip", **STEPS)
    assert found == [*good[:2], None, None, None, None, *good[2:]]
    assert [note.split(": ")[:2] for note in notes(caplog)] == [["skipped", f"picture {k} of 4"] for k in (2, 3)]
    seen: list[tuple[int, str]] = []
    model.vary_image(given, on_error=lambda place, error: seen.append((place, type(error).__name__)), **STEPS)
    assert seen == [(1, "ValueError"), (2, "FileNotFoundError")]
    with pytest.raises(ValueError, match=r"picture 2 of 4: .*broken\.png is not a picture"):
        model.image_to_text(given, **STEPS)
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        model.image_to_text([tmp_path / "gone.png"] * 2, on_error="skip", **STEPS)
    images = model.text_to_image(["red", "bad \udcff", "blue"], on_error="skip", negative=["a", "b", "c"], **STEPS)
    assert images[1] is None
    assert far(images[2], model.text_to_image("blue", negative="c", **STEPS)[0]) <= 1
    with pytest.raises(ValueError, match=r"prompt 2 of 2, 'bad \\udcff', is not valid text"):
        model.text_to_image(["red", "bad \udcff"])


def test_negative_prompts_for_all_or_for_each(model: UniDiffuser, caplog: pytest.LogCaptureFixture) -> None:
    together = model.text_to_image(["red", "blue"], negative=["a", "b"], count=2, guidance=3.0, batch_size=3, **STEPS)
    assert far(together[3], model.text_to_image("blue", negative="b", seed=1, guidance=3.0, **STEPS)[0]) <= 1
    shared = model.text_to_image(["red", "blue"], negative=["a"], guidance=3.0, **STEPS)
    assert far(shared[1], model.text_to_image("blue", negative="a", guidance=3.0, **STEPS)[0]) <= 1
    with pytest.raises(ValueError, match="negative must be one text or one for each prompt, got 2 for 3"):
        model.text_to_image(["a", "b", "c"], negative=["d", "e"])
    assert not notes(caplog)
    with caplog.at_level(logging.WARNING):
        model.text_to_image("red", negative="a", guidance=(1.0, 4.0), **STEPS)
    assert "the negative prompt has no effect, since guidance is 1" in caplog.text
