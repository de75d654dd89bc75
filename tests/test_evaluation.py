"""The yardstick itself: known intervals, and a full run with models whose score is known beforehand."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from unidiffuser.evaluation.data import Example, in_split, pixels, read_examples
from unidiffuser.evaluation.emoji import Settings, chunks, evaluate, fixed_order
from unidiffuser.evaluation.judge import BUNDLED, SIDE, Judge, file_digest, load_judge
from unidiffuser.evaluation.judge_training import augment, train_judge
from unidiffuser.evaluation.metrics import nearest, nearest_by_caption, parse_caption, psnr, share, shuffled, thumbnails, wilson
from unidiffuser.evaluation.report import markdown_table

STYLES = ("noto", "twemoji", "flat", "fluent")
CONCEPTS = 12
SETTINGS = Settings(model="m", judge="j", pairs=48, batch=7)


def draw(concept: int, style: int) -> Image.Image:
    """A concept is where a block stands and how wide it is; a style is its ink and its outline."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    x, y, wide = 6 + 14 * (concept % 4), 6 + 18 * (concept // 4), 8 + 2 * (concept % 3)
    ink = ["red", "green", "blue", "black"][style]
    ImageDraw.Draw(image).rectangle((x, y, x + wide, y + wide), fill=ink, outline="black", width=1 + style)
    return image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled image folder: concept k is held out in style k mod 4, every third concept validates in the next style."""
    root = tmp_path_factory.mktemp("pictures")
    lines = []
    for concept in range(CONCEPTS):
        for index, style in enumerate(STYLES):
            name = f"{style}-{concept}.png"
            draw(concept, index).save(root / name)
            split = "heldout" if concept % 4 == index else "train"
            if concept % 3 == 0 and (concept + 1) % 4 == index:
                split = "validation"
            lines.append(
                {"file_name": name, "label": f"thing, {concept}", "style": style, "base": f"A{concept}", "tone": 0}
                | {"split": split}
            )
    root.joinpath("metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return root


class Oracle(Judge):
    """A judge that is never wrong about the synthetic pictures: it compares with every one of them."""

    def __init__(self, examples: list[Example]) -> None:
        super().__init__(sorted({e.label for e in examples}), STYLES, (1, 1, 1))
        self.known, self.images = examples, pixels(e.image() for e in examples)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = [self.known[k] for k in nearest(images, self.images).tolist()]
        concepts = torch.tensor([[20.0 * (e.label == c) for c in self.concepts] for e in found])
        return concepts, torch.tensor([[20.0 * (e.style == s) for s in self.styles] for e in found])


class Painter:
    """A model that answers with real pictures and captions; ``answer`` chooses whose."""

    def __init__(self, examples: list[Example], answer: str) -> None:
        self.examples, self.answer = examples, answer
        self.by_caption = {e.caption: e for e in examples}
        self.by_pixels = {e.image().tobytes(): e for e in examples}
        self.calls: list[tuple[str, int, dict]] = []
        self.autoencoder = self

    def encode(self, images, generator):
        return images

    def decode(self, latents):
        return latents if self.answer == "right" else latents.roll(1, 0)

    def other(self, example: Example, seed: int) -> Example:
        return example if self.answer == "right" else random.Random(f"{seed} {example.caption}").choice(self.examples)

    def text_to_image(self, prompt, *, seed, **options):
        self.calls.append(("text_to_image", seed, options))
        return [self.other(self.by_caption[caption], seed).image() for caption in prompt]

    def image_to_text(self, image, *, seed, **options):
        self.calls.append(("image_to_text", seed, options))
        return [self.other(self.by_pixels[picture.tobytes()], seed).caption for picture in image]

    def joint(self, *, count, seed, **options):
        self.calls.append(("joint", seed, options))
        chosen = random.Random(seed).choices(self.examples, k=count)
        return [(self.other(example, seed).image(), example.caption) for example in chosen]


def run(model, folder, out, asked=SETTINGS, **options):
    judge = Oracle(read_examples(folder))
    report = evaluate(model, folder, out, judge, asked, progress=False, **options)
    return {(r["task"], r["split"], r["measure"]): r for r in report["rows"]}


# Statistics


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    # Brown, Cai and DasGupta's and textbook values, to four places; 0 of 10 and 10 of 10 have closed forms.
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(successes: int, total: int, low: float, high: float) -> None:
    assert wilson(successes, total) == pytest.approx((low, high), abs=6e-5)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_solve_the_score_equation(case: tuple[int, int]) -> None:
    successes, total = case
    rate = successes / total
    for bound in wilson(successes, total):
        assert 0 <= bound <= 1
        spread = 1.959963984540054 * math.sqrt(bound * (1 - bound) / total)
        assert abs(abs(rate - bound) - spread) < 1e-7


@pytest.mark.parametrize(("successes", "total"), [(1, 0), (-1, 5), (6, 5), (float("nan"), 5)])
def test_wilson_refuses_what_is_no_share(successes: float, total: float) -> None:
    with pytest.raises(ValueError, match="successes"):
        wilson(successes, total)


def test_share_of_repeated_runs_is_no_narrower_than_one_run_and_of_independent_runs_is_pooled() -> None:
    trials = [True] * 30 + [False] * 20
    once, thrice = share([trials]), share([trials] * 3)
    assert (once.low, once.high) == wilson(30, 50)
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))
    assert thrice.total == 150

    rng = random.Random(1)
    runs = [[rng.random() < 0.6 for _ in range(2000)] for _ in range(3)]
    pooled = share(runs)
    assert (pooled.low, pooled.high) == pytest.approx(wilson(sum(map(sum, runs)), 6000), abs=2e-3)


def test_share_refuses_nothing_and_unequal_runs() -> None:
    for outcomes in ([], [[]], [[True], [True, False]]):
        with pytest.raises(ValueError, match=r"outcomes|length"):
            share(outcomes)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("red apple, noto", ("red apple", "noto")),
        ("red apple", ("red apple", None)),
        ("  red apple ,flat ", ("red apple", "flat")),
        ("keycap: 1, 2", ("keycap: 1, 2", None)),
        ("man, woman, fluent", ("man, woman", "fluent")),
        ("noto", ("noto", None)),
        ("", ("", None)),
        ("Red apple, noto", ("Red apple", "noto")),
    ],
)
def test_captions_are_taken_apart_at_a_known_style_only(caption: str, expected: tuple) -> None:
    assert parse_caption(caption, STYLES) == expected


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(2, 60), st.integers(0, 5))
def test_shuffling_leaves_nothing_in_place(count: int, seed: int) -> None:
    order = shuffled(count, seed)
    assert sorted(order) == list(range(count))
    assert all(place != item for place, item in enumerate(order))


def test_nearest_picture_is_found_in_spite_of_noise() -> None:
    images = torch.rand(9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    noisy = images.flip(0) + 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    assert nearest(thumbnails(noisy), thumbnails(images)).tolist() == list(range(8, -1, -1))


def test_psnr_of_a_constant_offset() -> None:
    grey, lighter = Image.new("RGB", (8, 8), (100, 100, 100)), Image.new("RGB", (8, 8), (110, 110, 110))
    assert psnr(grey, lighter) == pytest.approx(20 * math.log10(255 / 10))
    assert psnr(grey, grey) == 100.0


def test_memory_shows_the_pair_itself_or_its_concept_in_another_style(folder: Path) -> None:
    examples = read_examples(folder)
    training = in_split(examples, "train")
    assert nearest_by_caption(training, training) == training
    held = in_split(examples, "heldout")
    for target, found in zip(held, nearest_by_caption(held, training), strict=True):
        assert (found.label, found.split) == (target.label, "train")
        assert found.style != target.style
    with pytest.raises(ValueError, match="thing, 3"):
        nearest_by_caption([e for e in held if e.label == "thing, 3"], [e for e in training if e.label != "thing, 3"])


# Data


def test_missing_and_foreign_data_are_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metadata\.jsonl"):
        read_examples(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_examples(tmp_path)
    with pytest.raises(ValueError, match="heldout, train, validation"):
        in_split(read_examples(folder), "test")
    with pytest.raises(ValueError, match="no picture"):
        read_examples(folder, {"1F600"})


def test_fixed_order_is_a_fair_and_repeatable_sample(folder: Path) -> None:
    examples = read_examples(folder)
    assert fixed_order(examples, None) != examples
    assert sorted(fixed_order(examples, None), key=str) == sorted(examples, key=str)
    assert fixed_order(examples, 5) == fixed_order(examples, None)[:5]
    assert [count for _, count in chunks(10, 4)] == [4, 4, 2]


# The run


def test_a_model_that_shows_the_real_thing_scores_the_ceiling(folder: Path, tmp_path: Path) -> None:
    rows = run(Painter(read_examples(folder), "right"), folder, tmp_path)
    assert len(rows) == (2 + 2 + 2) * 3 + 3
    for row in rows.values():
        assert row["rate"] == row.get("ceiling", 1.0) == 1.0
        assert row["high"] == pytest.approx(1.0)
    concept = rows["text_to_image", "heldout", "concept"]
    assert concept["total"] == CONCEPTS
    assert (concept["nearest"], rows["text_to_image", "heldout", "style"]["nearest"]) == (1.0, 0.0)
    assert concept["shuffled"] == 0.0  # each held-out concept is asked for once
    assert rows["joint", "all", "caption is a known label"]["distinct"] == CONCEPTS
    assert rows["autoencode", "heldout", "concept"]["psnr"] == 100.0


def test_a_model_that_answers_at_random_scores_chance(folder: Path, tmp_path: Path) -> None:
    rows = run(Painter(read_examples(folder), "random"), folder, tmp_path, seeds=range(12))
    for key, chance in {
        ("text_to_image", "train", "concept"): 1 / CONCEPTS,
        ("text_to_image", "train", "style"): 1 / 4,
        ("image_to_text", "train", "label"): 1 / CONCEPTS,
        ("image_to_text", "heldout", "style"): 1 / 4,
        ("joint", "all", "agreed concept"): 1 / CONCEPTS,
    }.items():
        deviation = math.sqrt(chance * (1 - chance) / rows[key]["total"])
        assert rows[key]["rate"] == pytest.approx(chance, abs=4 * deviation), key
    assert rows["text_to_image", "train", "concept"]["ceiling"] == 1.0
    assert rows["joint", "all", "caption is a known label"]["rate"] == 1.0


def test_captions_that_are_no_label_count_as_wrong(folder: Path, tmp_path: Path) -> None:
    model = Painter(read_examples(folder), "right")
    model.joint = lambda *, count, **_: [(draw(0, 0), "nonsense")] * count
    rows = run(model, folder, tmp_path, tasks=["joint"])
    assert rows["joint", "all", "caption is a known label"]["rate"] == 0.0
    assert rows["joint", "all", "agreed concept"]["rate"] == 0.0


def test_a_finished_cell_is_kept_and_a_killed_run_ends_with_the_same_numbers(folder: Path, tmp_path: Path) -> None:
    examples = read_examples(folder)
    whole = run(Painter(examples, "random"), folder, tmp_path / "whole", seeds=(0, 1))

    class Killed(Painter):
        def image_to_text(self, image, *, seed, **options):
            if len(self.calls) == 20:
                raise KeyboardInterrupt
            return super().image_to_text(image, seed=seed, **options)

    with pytest.raises(KeyboardInterrupt):
        run(Killed(examples, "random"), folder, tmp_path / "cut", seeds=(0, 1))
    done = set(json.loads((tmp_path / "cut" / "cells.json").read_text()))
    assert "text_to_image/heldout/1" in done
    assert "joint/all/0" not in done
    second = Painter(examples, "random")
    assert run(second, folder, tmp_path / "cut", seeds=(0, 1)) == whole
    assert {task for task, _, _ in second.calls} == {"image_to_text", "joint"}

    third = Painter(examples, "random")
    run(third, folder, tmp_path / "cut", seeds=(0, 1))
    assert third.calls == []
    run(third, folder, tmp_path / "cut", Settings(model="m", judge="j", pairs=48, batch=7, steps=3), seeds=(0, 1))
    assert {options["steps"] for _, _, options in third.calls} == {3}


def test_every_call_has_a_seed_of_its_own_and_grids_are_drawn(folder: Path, tmp_path: Path) -> None:
    model = Painter(read_examples(folder), "right")
    run(model, folder, tmp_path, Settings("m", "j", guidance=2.0, limit=5, pairs=9, batch=4), splits=["train"], seeds=(3, 4))
    for task in ("text_to_image", "image_to_text", "joint"):
        seeds = [seed for name, seed, _ in model.calls if name == task]
        assert len(seeds) == len(set(seeds))
    assert model.calls[0][2] == {"guidance": 2.0}
    with Image.open(tmp_path / "text_to_image-train-3.png") as sheet:
        assert min(sheet.size) >= 2 * SIDE
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".json") == ["cells.json", "scores.json"]


def test_bad_requests_are_refused_before_any_work(folder: Path, tmp_path: Path) -> None:
    model = Painter(read_examples(folder), "right")
    for wrong, options in [
        (SETTINGS, {"tasks": ["fly"]}),
        (SETTINGS, {"splits": ["test"]}),
        (SETTINGS, {"seeds": []}),
        (Settings("m", "j", pairs=1), {}),
        (Settings("m", "j", batch=0), {}),
    ]:
        with pytest.raises(ValueError, match=r"."):
            run(model, folder, tmp_path, wrong, **options)
    (tmp_path / "cells.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        run(model, folder, tmp_path)
    assert model.calls == []


def test_the_table_has_a_line_for_each_row(folder: Path, tmp_path: Path) -> None:
    rows = list(
        run(Painter(read_examples(folder), "right"), folder, tmp_path, splits=["heldout"], tasks=["text_to_image"]).values()
    )
    lines = markdown_table(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| text_to_image | heldout | concept | 100.0 (75.8 to 100.0) | 12 | 100.0 | 100.0 | 0.0 |")


# The judge


def test_the_judge_learns_real_pictures_and_its_file_judges_alike(folder: Path, tmp_path: Path) -> None:
    concepts = frozenset(f"A{k}" for k in range(CONCEPTS))
    judge = train_judge(folder, concepts=concepts, steps=40, concept_batch=24, style_batch=8, progress=False)
    train = in_split(read_examples(folder), "train")
    right = [v.concept == e.label for v, e in zip(judge.judge_pictures([e.image() for e in train]), train, strict=True)]
    assert sum(right) / len(right) > 0.8  # chance is 1 / 12

    judge.save(tmp_path / "judge.safetensors")
    again = load_judge(tmp_path / "judge.safetensors")
    images = torch.rand(4, 3, 100, 100, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for ours, theirs in zip(judge.eval()(images), again(images), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.05)
    assert [p.name for p in tmp_path.iterdir()] == ["judge.safetensors"]


def test_training_the_judge_is_repeatable_and_leaves_the_global_generator_alone(folder: Path) -> None:
    concepts = frozenset(f"A{k}" for k in range(CONCEPTS))
    state = torch.get_rng_state()
    one, two = (
        train_judge(folder, concepts=concepts, steps=2, concept_batch=4, style_batch=4, seed=5, progress=False)
        for _ in range(2)
    )
    torch.testing.assert_close(one.state_dict(), two.state_dict(), rtol=0, atol=0)
    assert torch.equal(state, torch.get_rng_state())


def test_augmented_pictures_stay_pictures_and_no_change_is_no_change() -> None:
    images = torch.rand(6, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    changed = augment(images, torch.Generator().manual_seed(1))
    assert changed.shape == images.shape
    assert changed.abs().max() <= 1
    assert (changed - images).abs().mean() > 0.05
    white = torch.ones(4, 3, SIDE, SIDE)
    assert augment(white, torch.Generator().manual_seed(1), colour=0.0).min() > 0.5  # nothing black comes in from outside


def test_files_that_are_no_judge_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train a judge"):
        load_judge(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not a judge at all")
    with pytest.raises(ValueError, match="damaged"):
        load_judge(tmp_path / "bad.safetensors")


def test_the_bundled_judge_is_small_and_knows_the_bundled_concepts() -> None:
    from unidiffuser.training.emoji import CONCEPTS_FILE

    judge = load_judge()
    labels = [line.split(maxsplit=1)[1] for line in CONCEPTS_FILE.read_text("utf-8").splitlines() if line[:1] not in "#"]
    assert set(judge.concepts) == set(labels)
    assert set(judge.styles) == set(STYLES)
    assert BUNDLED.stat().st_size <= 1_500_000
    assert len(file_digest(BUNDLED)) == 64
    plain = judge.judge(torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 128, 128))[0]
    assert plain.concept in labels
    assert plain.style in STYLES
