"""The tasks on a toy checkpoint: what is handed over, what is seeded, what is loaded; not what the pictures show."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rounding import assert_same

import unidiffuser
from unidiffuser.options import Options, resolve
from unidiffuser.path import NoisePath
from unidiffuser.pipeline import UniDiffuser, slerp
from unidiffuser.schedule import alpha_sigma
from unidiffuser.streams import MODALITIES, Streams, item_generators

STEPS = {"steps": 2}


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> UniDiffuser:
    return unidiffuser.load(tiny_checkpoint, device="cpu")


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def far(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


TASKS: dict[str, Callable[..., list[Any]]] = {
    "text_to_image": lambda m, **o: m.text_to_image("red apple", **o),
    "image_to_text": lambda m, **o: m.image_to_text(picture(), **o),
    "joint": lambda m, **o: m.joint(**o),
    "image": lambda m, **o: m.image(**o),
    "text": lambda m, **o: m.text(**o),
    "vary_image": lambda m, **o: m.vary_image(picture(), **o),
    "vary_text": lambda m, **o: m.vary_text("red apple", **o),
    "gibbs": lambda m, **o: m.gibbs(picture(), rounds=1, **o),
}


def same(a: Any, b: Any) -> bool:
    """Equal captions; pictures equal up to a level of rounding, since kernels differ with the batch."""
    if isinstance(a, tuple):
        return all(same(*pair) for pair in zip(a, b, strict=True))
    return far(a, b) <= 1 if isinstance(a, Image.Image) else bool(a == b)


@pytest.mark.parametrize("task", TASKS)
def test_item_k_is_the_item_alone_with_seed_plus_k(model: UniDiffuser, task: str) -> None:
    together = TASKS[task](model, count=3, seed=5, **STEPS)
    assert len(together) == 3
    for k in (0, 2):
        assert same(TASKS[task](model, count=1, seed=5 + k, **STEPS)[0], together[k])


@pytest.mark.parametrize("task", ["text_to_image", "image_to_text", "joint"])
def test_batch_size_changes_nothing(model: UniDiffuser, task: str) -> None:
    whole = TASKS[task](model, count=3, **STEPS)
    assert same(tuple(TASKS[task](model, count=3, batch_size=2, **STEPS)), tuple(whole))


def test_seeds_matter_and_the_global_generator_does_not(model: UniDiffuser) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = model.text_to_image("a", seed=0, **STEPS)[0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert far(model.text_to_image("a", seed=0, **STEPS)[0], first) == 0
    assert far(model.text_to_image("a", seed=1, **STEPS)[0], first) > 8


def test_shapes_and_order_of_lists(model: UniDiffuser) -> None:
    images = model.text_to_image(["red", "blue"], count=2, **STEPS)
    assert [image.size for image in images] == [(128, 128)] * 4
    assert same(images[3], model.text_to_image("blue", seed=1, **STEPS)[0])
    captions = model.image_to_text([picture(0), picture(1)], **STEPS)
    assert captions[1] == model.image_to_text(picture(1), **STEPS)[0]


def test_a_path_is_a_picture_too(model: UniDiffuser, tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    assert model.image_to_text(tmp_path / "a.png", **STEPS) == model.image_to_text(picture(), **STEPS)


def test_other_sizes(model: UniDiffuser) -> None:
    assert model.text_to_image("a", width=64, height=96, **STEPS)[0].size == (64, 96)
    assert model.vary_image(picture(), width=96, height=64, **STEPS)[0].size == (96, 64)
    assert model.joint(width=64, height=64, **STEPS)[0][0].size == (64, 64)
    with pytest.raises(ValueError, match="height must be a multiple of 32 pixels, got 100"):
        model.text_to_image("a", height=100)


def test_pairs_follow_the_speeds_of_the_call_or_of_the_model(model: UniDiffuser, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text first: the picture is drawn with words that are nearly there."""
    options = {"steps": 4, "seed": 3}
    diagonal, first = model.joint(**options)[0], model.joint(speeds=(1, 3), **options)[0]
    assert far(diagonal[0], first[0]) > 0
    plan = resolve(options, model.config)
    out = model.run(NoisePath.joint(4, speeds=(1, 3)), Streams(), plan, item_generators(3, 1))
    assert same((model.decode_images(out, plan)[0], model.decode_texts(out, plan)[0]), first)
    monkeypatch.setitem(model.config.defaults, "speeds", [1, 3])
    assert same(model.joint(**options)[0], first)
    assert same(model.joint(speeds=(1, 1), **options)[0], diagonal)


def test_a_model_suggests_steps_by_task(model: UniDiffuser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model.config.defaults, "steps", 9)
    monkeypatch.setitem(model.config.defaults, "task_steps", {"text_to_image": 3, "image_to_text": 2})
    seen: list[int] = []
    options: Options = {"progress": lambda step, total, x0, x: seen.append(total)}
    for task, steps in {"text_to_image": 3, "image_to_text": 2, "joint": 9, "image": 9}.items():
        seen.clear()
        given = {"text_to_image": ("red",), "image_to_text": (picture(0, (128, 128)),)}.get(task, ())
        getattr(model, task)(*given, **options)
        assert set(seen) == {steps}, task
    seen.clear()
    model.vary_image(picture(0, (128, 128)), **options)  # captions the picture, then draws the caption
    assert set(seen) == {3}
    assert model.resolve({"steps": 5}, "text_to_image")["steps"] == 5
    assert "task_steps" not in model.resolve({})


def test_guidance_negative_and_data_type_reach_the_network(model: UniDiffuser) -> None:
    plain = model.text_to_image("red", guidance=3.0, **STEPS)[0]
    assert far(plain, model.text_to_image("red", guidance=1.0, **STEPS)[0]) > 0
    assert far(plain, model.text_to_image("red", guidance=(3.0, 7.0), **STEPS)[0]) == 0  # the text does not move
    assert far(plain, model.text_to_image("red", guidance=3.0, negative="blue", **STEPS)[0]) > 0
    assert far(plain, model.text_to_image("red", guidance=3.0, data_type=0, **STEPS)[0]) > 0
    # moving away from the prompt itself is no guidance at all
    itself = model.text_to_image("red", guidance=3.0, negative="red", **STEPS)[0]
    assert same(itself, model.text_to_image("red", guidance=1.0, negative="red", **STEPS)[0])


def test_variations_hand_over_latents(model: UniDiffuser, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither words nor pixels are made in between, and the second path starts from exactly what the first ended on."""
    runs: list[tuple[Streams, Streams]] = []
    original = UniDiffuser.run

    def recorded(self: UniDiffuser, path: Any, start: Streams, *args: Any, **kwargs: Any) -> Streams:
        runs.append((start, original(self, path, start, *args, **kwargs)))
        return runs[-1][1]

    monkeypatch.setattr(UniDiffuser, "run", recorded)
    with monkeypatch.context() as patch:
        patch.setattr(UniDiffuser, "decode_texts", lambda *_: pytest.fail("words were made"))
        model.vary_image(picture(), **STEPS)
    (_, first), (start, _) = runs
    assert start.text is first.text
    assert start.img is None
    runs.clear()
    with monkeypatch.context() as patch:
        patch.setattr(UniDiffuser, "decode_images", lambda *_: pytest.fail("pixels were made"))
        model.vary_text("red", **STEPS)
    (_, first), (start, _) = runs
    assert start.img is first.img
    assert start.clip_img is first.clip_img
    runs.clear()
    model.gibbs("red", rounds=2, **STEPS)
    assert len(runs) == 4
    assert runs[1][0].img is runs[0][1].img
    assert runs[2][0].text is runs[1][1].text


def test_what_a_chain_hands_over_can_be_noised(model: UniDiffuser, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other half sees it at that label; the pairs, and the next round, have it clean."""
    runs: list[tuple[Any, Streams, Streams]] = []
    original = UniDiffuser.run

    def recorded(self: UniDiffuser, path: Any, start: Streams, *args: Any, **kwargs: Any) -> Streams:
        runs.append((path, start, original(self, path, start, *args, **kwargs)))
        return runs[-1][2]

    monkeypatch.setattr(UniDiffuser, "run", recorded)
    pairs = model.gibbs("red", rounds=2, hold=400.0, **STEPS)
    alpha, sigma = alpha_sigma(torch.tensor(400.0))
    clean = [Streams(text=model.encode_texts(["red"])), *(made for _, _, made in runs)]
    drawn = torch.randn(clean[0].need("text").shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(runs[0][1].need("text"), alpha * clean[0].need("text") + sigma * drawn)
    for k, (path, start, _) in enumerate(runs):
        held = "img" if k % 2 else "text"
        assert set(path.labels(held)) == {400.0}
        for name in MODALITIES[held]:
            noise = (start.need(name) - alpha * clean[k].need(name)) / sigma
            assert 0.7 < noise.std() < 1.3
    made = model.decode_images(clean[1], resolve(STEPS, model.config))[0]
    assert same(made, pairs[0][0])
    monkeypatch.undo()
    assert same(tuple(model.gibbs("red", rounds=2, hold=0.0, **STEPS)), tuple(model.gibbs("red", rounds=2, **STEPS)))
    both = model.gibbs("red", rounds=2, hold=400.0, count=2, **STEPS)
    assert same(tuple(both[:2]), tuple(pairs))
    with pytest.raises(ValueError, match=r"hold must be .* got 1001"):
        model.gibbs("red", rounds=1, hold=1001.0, **STEPS)


@pytest.mark.parametrize("start", [None, "red apple", picture()])
def test_gibbs_from_anywhere(model: UniDiffuser, start: Any) -> None:
    chains = model.gibbs(start, rounds=2, count=2, **STEPS)
    assert len(chains) == 4
    second = model.gibbs(start, rounds=2, seed=1, **STEPS)
    assert same(tuple(chains[2:]), tuple(second))
    assert far(chains[0][0], chains[1][0]) > 0


def test_interpolation_ends_where_it_should(model: UniDiffuser) -> None:
    a, b = picture(0, (128, 128)).resize((16, 16)).resize((128, 128)), Image.new("RGB", (128, 128), (30, 90, 200))
    frames = model.interpolate(a, b, frames=3, steps=20)
    assert len(frames) == 3
    plan = resolve({}, model.config)
    for frame, given in ((frames[0], a), (frames[2], b)):
        latent = model.encode_images([given], 1, plan, [torch.Generator().manual_seed(0)])
        expected = model.decode_images(latent, plan)[0]
        error = np.abs(np.asarray(frame, dtype=float) - np.asarray(expected, dtype=float)).mean()
        assert error < 6  # of 255: inverted and sampled back
    assert far(frames[1], frames[0]) > 0
    again = model.interpolate(a, b, frames=3, steps=20, batch_size=1)
    assert all(same(*pair) for pair in zip(frames, again, strict=True))


def test_slerp_stays_on_the_sphere() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, 16, 16, generator=generator) for _ in range(2))
    a, b = a / a.norm(), b / b.norm()
    for weight in (0.0, 0.3, 1.0):
        assert slerp(a, b, weight).norm().item() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(slerp(a, b, 0.0), a, atol=1e-6)
    assert torch.allclose(slerp(a, b, 1.0), b, atol=1e-6)
    assert torch.allclose(slerp(a, 2 * a, 0.5), 1.5 * a, atol=1e-5)


def test_parts_are_built_when_needed(tiny_checkpoint: Path) -> None:
    model = unidiffuser.load(tiny_checkpoint, device="cpu")
    parts = {"net", "text_encoder", "image_token_encoder", "autoencoder", "captioner"}
    assert not parts & vars(model).keys()
    model.text_to_image("a", **STEPS)
    assert parts & vars(model).keys() == {"net", "text_encoder", "autoencoder"}
    model.text(**STEPS)
    assert "image_token_encoder" not in vars(model)


def test_progress_counts_every_step_once(model: UniDiffuser) -> None:
    seen: list[tuple[int, int]] = []

    def progress(step: int, total: int, x0: Streams, x: Streams) -> None:
        assert x0.img is not None
        assert x.img is not None
        seen.append((step, total))

    model.text_to_image("a", count=3, batch_size=2, steps=3, progress=progress)
    assert seen == [(step, 6) for step in range(6)]


def test_progress_bar_goes_to_stderr(model: UniDiffuser, capsys: pytest.CaptureFixture[str]) -> None:
    model.text_to_image("a", progress=True, **STEPS)
    out, err = capsys.readouterr()
    assert out == ""
    assert "step" in err


def test_the_default_dtype_changes_no_random_number(model: UniDiffuser) -> None:
    red, blue = (Image.new("RGB", (128, 128), colour) for colour in ("red", "blue"))
    path, options = NoisePath.from_points("1000,1000 400,0 0,0", steps=4), {"steps": 2, "seed": 3}

    def results() -> list[Any]:
        images = [model.vary_image(red, **options), model.img2img(red, "a", **options), model.interpolate(red, blue, **options)]
        images += [
            model.inpaint(red, Image.new("L", red.size, 255), **options),
            [image for image, _ in model.gibbs("a", rounds=1, **options)],
        ]
        captions = model.caption(red, candidates=2, top_p=0.9, **options), model.rewrite("ab cd", red, change=0, **options)
        latents = model.sample(path, seed=3, output="latent"), model.invert(red, "a", steps=2)
        scores = model.score(red, ["a", "b"], levels=2, shuffled=2, seed=3, steps=2)
        return [
            *(image.tobytes() for group in images for image in group),
            *captions,
            *(stream.tolist() for found in latents for _, stream in found.items()),  # type: ignore[union-attr]
            *scores,
            *model.score(red, "a", levels=1, shuffled=["b"], seed=3),
        ]

    expected = results()
    torch.set_default_dtype(torch.float64)
    try:
        assert_same(results(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tiny_checkpoint: Path, dtype: torch.dtype, model: UniDiffuser) -> None:
    half = unidiffuser.load(tiny_checkpoint, device="cpu", dtype=dtype)
    images, captions = half.text_to_image("red", **STEPS), half.image_to_text(picture(), **STEPS)
    assert half.net.pos_embed.dtype == dtype
    assert images[0].size == (128, 128)
    assert isinstance(captions[0], str)
    difference = np.asarray(images[0], dtype=float) - np.asarray(model.text_to_image("red", **STEPS)[0], dtype=float)
    assert np.abs(difference).mean() < 10


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, unidiffuser, unidiffuser.cli.tasks; print({'torch', 'numpy', 'PIL', 'transformers'} & sys.modules.keys())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
    with pytest.raises(AttributeError):
        _ = unidiffuser.nothing
