"""Scores of the judge's verdicts for samplers whose scores are known beforehand, their baselines and their report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_pictures import CONCEPTS, STYLES, Painter, evaluation, labelled_folder, measured
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unidiffuser.emoji.baselines import nearest, nearest_by_caption, parse_caption, shuffled, thumbnails
from unidiffuser.emoji.evaluation import JudgedConfig
from unidiffuser.emoji.scores import score, tables
from unidiffuser.evaluation.report import html_report, markdown_report
from unidiffuser.evaluation.sources import in_split, read_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled_folder(tmp_path_factory.mktemp("pictures"))


def judged(report: dict[str, Any]) -> dict[tuple[str, str, str], Any]:
    return {(r["task"], r["split"], r["measure"]): r for r in report["judged"]}


# What is known beforehand


def test_a_model_that_shows_the_real_thing_scores_the_ceiling(folder: Path, tmp_path: Path) -> None:
    pairs = read_source({"format": "folder", "path": str(folder)})
    report = evaluation(Painter(pairs, "right"), folder, tmp_path, score).run()
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
    report = evaluation(Painter(pairs, "random"), folder, tmp_path, score, seeds=list(range(6)), batch=48).run()
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
    rows = judged(evaluation(painter, folder, tmp_path, score, tasks=["joint"]).run())
    assert rows["joint", "all", "caption is a known label"]["rate"] == 0.0
    assert rows["joint", "all", "agreed concept"]["rate"] == 0.0


def test_sweeps_retrieval_and_diversity(folder: Path, tmp_path: Path) -> None:
    painter = Painter(read_source({"format": "folder", "path": str(folder)}), "right")
    report = evaluation(
        painter,
        folder,
        tmp_path,
        score,
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


# Report


def test_the_report_holds_tables_curves_and_pictures(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    painter = Painter(read_source({"format": "folder", "path": str(folder)}), "right")
    sweep = {"values": [1, 4], "split": "train"}
    run = evaluation(
        painter, folder, tmp_path, score, tasks=["text_to_image", "joint"], splits=["heldout"], guidance_sweep=sweep
    )
    report = run.run()
    assert json.loads((tmp_path / "scores.json").read_text())["judged"] == report["judged"]
    cells = tables(report)
    page = html_report(report, cells, run.runs, run.chosen)
    assert page.count("<img") == 3  # one curve sheet, two grids
    assert "http" not in page.replace("http-equiv", "")
    for title in ("Judged", "Measured", "Guidance sweep", "Timing"):
        assert f"<h2>{title}</h2>" in page
    table = markdown_report(cells)
    assert "| text_to_image | heldout | concept | 100.0 (75.8 to 100.0) | 12 | 100.0 | 100.0 | 0.0 |" in table
    assert "Timing" not in table


# Config


def test_the_shipped_config_is_valid() -> None:
    config = JudgedConfig.from_file(Path(__file__).parents[1] / "unidiffuser" / "emoji" / "evaluation.yaml")
    assert config.seeds == [0, 1, 2]
    assert config.judge == "bundled"


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


def test_memory_shows_the_pair_itself_or_its_concept_in_another_style(folder: Path) -> None:
    pairs = read_source({"format": "folder", "path": str(folder)})
    training, held = in_split(pairs, "train"), in_split(pairs, "heldout")
    assert nearest_by_caption(training, training) == training
    for target, found in zip(held, nearest_by_caption(held, training), strict=True):
        assert (found.label, found.split) == (target.label, "train")
        assert found.style != target.style
    with pytest.raises(ValueError, match="thing, 3"):
        nearest_by_caption([p for p in held if p.label == "thing, 3"], [p for p in training if p.label != "thing, 3"])
