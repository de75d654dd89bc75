"""A whole evaluation with models whose score is known beforehand: judged rows, measures, restarts, reports."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_pictures import CONCEPTS, STYLES, Oracle, labelled_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from unidiffuser.data.captioned import Pair
from unidiffuser.evaluation.config import EvaluationConfig
from unidiffuser.evaluation.eyes import Eyes
from unidiffuser.evaluation.metrics import nearest, nearest_by_caption, parse_caption, psnr, shuffled, thumbnails
from unidiffuser.evaluation.parts import Answers, collect
from unidiffuser.evaluation.report import html_report, markdown, markdown_report
from unidiffuser.evaluation.run import Evaluation, Subject
from unidiffuser.evaluation.sources import in_split, read_source
from unidiffuser.evaluation.tasks import SEEDS
from unidiffuser.media.images import to_tensor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled_folder(tmp_path_factory.mktemp("pictures"))


class Thumbnails:
    """Features for tests: 4 x 4 pixels."""

    name = "thumbnails"

    def __call__(self, images: Any) -> Any:
        return thumbnails(to_tensor(images), 4).flatten(1).numpy()


class Painter:
    """A sampler that answers with real pictures and captions; ``answer`` chooses whose."""

    def __init__(self, pairs: list[Pair], answer: str) -> None:
        self.pairs, self.answer = pairs, answer
        self.by_caption = {p.caption: p for p in pairs}
        self.by_pixels = {p.image().tobytes(): p for p in pairs}
        self.calls: list[tuple[str, int]] = []
        self.options: list[dict[str, Any]] = []

    def __call__(self, **options: Any) -> Painter:  # as Subject.sampler
        self.options.append(options)
        return self

    def other(self, pair: Pair, task: str, seed: int) -> Pair:
        self.calls.append((task, seed))
        return pair if self.answer == "right" else random.Random(f"{seed} {task}").choice(self.pairs)

    def autoencode(self, images, seeds):
        return [self.other(self.by_pixels[i.tobytes()], "autoencode", s).image() for i, s in zip(images, seeds, strict=True)]

    def text_to_image(self, captions, seeds):
        return [self.other(self.by_caption[c], "text_to_image", s).image() for c, s in zip(captions, seeds, strict=True)]

    def image_to_text(self, images, seeds):
        return [self.other(self.by_pixels[i.tobytes()], "image_to_text", s).caption for i, s in zip(images, seeds, strict=True)]

    def joint(self, seeds):
        chosen = [random.Random(seed).choice(self.pairs) for seed in seeds]
        return [(self.other(p, "joint", s).image(), p.caption) for p, s in zip(chosen, seeds, strict=True)]

    def image(self, seeds):
        return [self.other(random.Random(s).choice(self.pairs), "image", s).image() for s in seeds]


def fit(images, captions, levels, seed):
    """A network that knows nothing."""
    return np.zeros((len(images), len(captions)), np.float32)


def evaluation(painter: Painter, folder: Path, out: Path, **changed: Any) -> Evaluation:
    values = {
        "data": {"format": "folder", "path": str(folder)},
        "training": {"format": "folder", "path": str(folder), "where": {"split": "train"}},
        "splits": ["train", "validation", "heldout"],
        "out": str(out),
        "pairs": 48,
        "batch": 16,
    }
    config = EvaluationConfig.of(values | changed)
    eyes = Eyes(Thumbnails(), 64, judge=Oracle(read_source(config.data)))
    return Evaluation(config, Subject("m", painter, fit), eyes, progress=False)


def judged(report: dict[str, Any]) -> dict[tuple[str, str, str], Any]:
    return {(r["task"], r["split"], r["measure"]): r for r in report["judged"]}


def measured(report: dict[str, Any]) -> dict[tuple[str, str, str], Any]:
    return {(r["task"], r["split"], r["measure"]): r for r in report["measures"]}


def numbers(report: dict[str, Any]) -> dict[str, Any]:
    """All but the time it took."""
    return {key: value for key, value in report.items() if key != "timing"}


# What is known beforehand


def test_a_model_that_shows_the_real_thing_scores_the_ceiling(folder: Path, tmp_path: Path) -> None:
    pairs = read_source({"format": "folder", "path": str(folder)})
    report = evaluation(Painter(pairs, "right"), folder, tmp_path).run()
    rows = judged(report)
    assert len(rows) == (2 + 2 + 2) * 3 + 3
    for row in rows.values():
        assert row["rate"] == row.get("ceiling", 1.0) == 1.0
        assert row["high"] == pytest.approx(1.0)
    concept = rows["text_to_image", "heldout", "concept"]
    assert concept["total"] == CONCEPTS
    assert (concept["nearest"], rows["text_to_image", "heldout", "style"]["nearest"]) == (1.0, 0.0)
    assert concept["shuffled"] == 0.0  # each held-out concept is asked for once
    assert rows["autoencode", "heldout", "concept"]["psnr"] == 100.0

    per_style = CONCEPTS // 4
    confusion = report["style_confusion"]["text_to_image/heldout"]
    assert confusion == {s: [per_style * (s == seen) for seen in STYLES] for s in STYLES}

    found = measured(report)
    for split in ("train", "validation", "heldout"):
        assert found["text_to_image", split, "FID"]["value"] == pytest.approx(0.0, abs=1e-5)
        assert found["image_to_text", split, "exact"]["value"] == 1.0
        assert found["image_to_text", split, "BLEU-4"]["value"] == 0.0  # captions of three words hold no 4-gram
    assert found["text_to_image", "train", "nearer than real"]["value"] == 1.0  # it copies
    assert found["text_to_image", "train", "distance to training"]["value"] == pytest.approx(0.0, abs=1e-6)


def test_a_model_that_answers_at_random_scores_chance(folder: Path, tmp_path: Path) -> None:
    pairs = read_source({"format": "folder", "path": str(folder)})
    report = evaluation(Painter(pairs, "random"), folder, tmp_path, seeds=list(range(6)), batch=48).run()
    rows = judged(report)
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
    exact = measured(report)["image_to_text", "train", "exact"]
    assert exact["value"] == pytest.approx(1 / (4 * CONCEPTS), abs=0.05)
    assert len(exact["values"]) == 6


def test_captions_that_are_no_label_count_as_wrong(folder: Path, tmp_path: Path) -> None:
    painter = Painter(read_source({"format": "folder", "path": str(folder)}), "right")
    picture = painter.pairs[0].image()
    painter.joint = lambda seeds: [(picture, "nonsense")] * len(seeds)
    rows = judged(evaluation(painter, folder, tmp_path, tasks=["joint"]).run())
    assert rows["joint", "all", "caption is a known label"]["rate"] == 0.0
    assert rows["joint", "all", "agreed concept"]["rate"] == 0.0


def test_sweeps_retrieval_and_diversity(folder: Path, tmp_path: Path) -> None:
    painter = Painter(read_source({"format": "folder", "path": str(folder)}), "right")
    report = evaluation(
        painter,
        folder,
        tmp_path,
        tasks=["text_to_image"],
        splits=["validation"],
        guidance_sweep={"values": [1, 4], "split": "train", "limit": 12},
        steps_sweep={"values": [5], "split": "train"},
        retrieval={"split": "heldout", "count": 8, "levels": 1},
        diversity={"split": "heldout", "captions": 3, "count": 4},
    ).run()
    assert [point["value"] for point in report["sweeps"]["guidance"]] == [1, 4]
    assert report["sweeps"]["guidance"][0]["n"] == 12
    assert report["sweeps"]["guidance"][0]["judge: concept"] == 1.0
    assert {"guidance": 4} in painter.options
    assert {"steps": 5} in painter.options
    found = measured(report)
    assert found["retrieval", "heldout", "of 8, image to text R@1"]["value"] == 0.0  # constant scores find nothing
    # A painter with one picture for a caption has none of it.
    assert found["diversity", "heldout", "distance among pictures of one caption"]["value"] == pytest.approx(0.0, abs=1e-7)


# Restarts


def test_a_killed_run_ends_with_the_same_numbers_and_asks_nothing_twice(folder: Path, tmp_path: Path) -> None:
    pairs = read_source({"format": "folder", "path": str(folder)})
    first = Painter(pairs, "random")
    whole = evaluation(first, folder, tmp_path / "whole", seeds=[0, 1]).run()

    class Killed(Painter):
        def image_to_text(self, images, seeds):
            if len(self.calls) > 200:
                raise KeyboardInterrupt
            return super().image_to_text(images, seeds)

    killed = Killed(pairs, "random")
    with pytest.raises(KeyboardInterrupt):
        evaluation(killed, folder, tmp_path / "cut", seeds=[0, 1]).run()
    second = Painter(pairs, "random")
    assert numbers(evaluation(second, folder, tmp_path / "cut", seeds=[0, 1]).run()) == numbers(whole)
    assert sorted(killed.calls + second.calls) == sorted(first.calls)

    third = Painter(pairs, "random")
    evaluation(third, folder, tmp_path / "cut", seeds=[0, 1]).run()
    assert third.calls == []
    evaluation(third, folder, tmp_path / "cut", seeds=[0], steps=3, tasks=["joint"]).run()
    assert third.options[-1] == {"steps": 3}
    assert len(third.calls) == 48


def test_every_item_of_every_seed_has_a_seed_of_its_own(folder: Path, tmp_path: Path) -> None:
    painter = Painter(read_source({"format": "folder", "path": str(folder)}), "right")
    evaluation(painter, folder, tmp_path, splits=["train"], seeds=[3, 4], limit=10, pairs=9, batch=4).run()
    for task in ("autoencode", "text_to_image", "image_to_text", "joint", "image"):
        seeds = [seed for name, seed in painter.calls if name == task]
        assert len(seeds) == len(set(seeds))
        assert min(seeds) == 3 * SEEDS


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    def make(items: range) -> Answers:
        return Answers([{"k": k} for k in items], {"a": np.array(items)}, [Image.new("RGB", (3, 2), "red")] * len(items))

    whole = collect(tmp_path, "cell", {"x": 1}, 5, 2, make, progress=False)
    assert [item["k"] for item in whole.items] == whole.arrays["a"].tolist() == list(range(5))
    assert [image.size for image in whole.shown] == [(3, 2)] * 5
    part = next(tmp_path.rglob("00000002.safetensors"))
    part.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"00000002\.safetensors is damaged"):
        collect(tmp_path, "cell", {"x": 1}, 5, 2, make, progress=False)
    assert len(list(tmp_path.glob("cell-*"))) == 1
    collect(tmp_path, "cell", {"x": 2}, 5, 2, make, progress=False)
    assert len(list(tmp_path.glob("cell-*"))) == 2


# Report


def test_the_report_holds_tables_curves_and_pictures(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    painter = Painter(read_source({"format": "folder", "path": str(folder)}), "right")
    sweep = {"values": [1, 4], "split": "train"}
    run = evaluation(painter, folder, tmp_path, tasks=["text_to_image", "joint"], splits=["heldout"], guidance_sweep=sweep)
    report = run.run()
    assert json.loads((tmp_path / "scores.json").read_text())["judged"] == report["judged"]
    page = html_report(report, run.runs, run.chosen)
    assert page.count("<img") == 3  # one curve sheet, two grids
    assert "http" not in page.replace("http-equiv", "")
    for title in ("Judged", "Measured", "Guidance sweep", "Timing"):
        assert f"<h2>{title}</h2>" in page
    table = markdown_report(report)
    assert "| text_to_image | heldout | concept | 100.0 (75.8 to 100.0) | 12 | 100.0 | 100.0 | 0.0 |" in table
    assert "Timing" not in table


def test_a_markdown_table_has_as_many_bars_in_every_line() -> None:
    lines = markdown([["a", "b"], ["1", "2"], ["3", "4"]]).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1


# Configs


def test_bad_configs_are_refused_before_any_work(folder: Path, tmp_path: Path) -> None:
    good = {"data": {"format": "folder", "path": str(folder)}}
    for wrong, message in [
        ({"tasks": ["fly"]}, "unknown tasks fly"),
        ({"seeds": []}, "at least one seed"),
        ({"pairs": 1}, "pairs must be"),
        ({"batch": 0}, "batch must be"),
        ({"limit": True}, "limit must be"),
        ({"speed": 3}, "unknown settings speed"),
        ({"guidance_sweep": {"values": [1]}}, "missing split"),
        ({"guidance_sweep": {"values": [], "split": "all"}}, "no values"),
        ({"diversity": {"split": "all", "count": 1}}, "count of 2"),
        ({"retrieval": 5}, "not a mapping"),
    ]:
        with pytest.raises(ValueError, match=message):
            EvaluationConfig.of(good | wrong)
    with pytest.raises(ValueError, match="missing data"):
        EvaluationConfig.of({})
    with pytest.raises(FileNotFoundError, match="no evaluation config"):
        EvaluationConfig.from_file(tmp_path / "none.yaml")
    painter = Painter(read_source(good["data"]), "right")
    with pytest.raises(ValueError, match="heldout, train, validation"):
        evaluation(painter, folder, tmp_path, splits=["test"])
    assert painter.calls == []


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("data: {format: folder, path: x}\nsteps: 5\n")
    config = EvaluationConfig.from_file(tmp_path / "a.yaml", ["steps=7", "seeds=[1, 2]", "guidance=[3, 1]"])
    assert (config.steps, config.seeds) == (7, [1, 2])
    assert config.options(steps=9) == {"steps": 9, "guidance": (3, 1)}
    (tmp_path / "a.yaml").write_text("[1]")
    with pytest.raises(ValueError, match="not a YAML mapping"):
        EvaluationConfig.from_file(tmp_path / "a.yaml")


def test_the_shipped_configs_are_valid() -> None:
    folder = Path(__file__).parents[1] / "unidiffuser" / "evaluation" / "configs"
    configs = {path.name: EvaluationConfig.from_file(path) for path in sorted(folder.glob("*.yaml"))}
    assert set(configs) == {"coco.yaml", "emoji.yaml"}
    assert configs["emoji.yaml"].seeds == [0, 1, 2]


# Judged captions and baselines


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
    pairs = read_source({"format": "folder", "path": str(folder)})
    training, held = in_split(pairs, "train"), in_split(pairs, "heldout")
    assert nearest_by_caption(training, training) == training
    for target, found in zip(held, nearest_by_caption(held, training), strict=True):
        assert (found.label, found.split) == (target.label, "train")
        assert found.style != target.style
    with pytest.raises(ValueError, match="thing, 3"):
        nearest_by_caption([p for p in held if p.label == "thing, 3"], [p for p in training if p.label != "thing, 3"])
