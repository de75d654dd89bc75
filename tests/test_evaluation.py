"""A whole evaluation of samplers whose figures are known beforehand: measures, restarts, reports, configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_pictures import Painter, evaluation, label_accuracy, labelled_folder, measured
from PIL import Image

from unidiffuser.evaluation.config import EvaluationConfig
from unidiffuser.evaluation.parts import Outputs, collect
from unidiffuser.evaluation.report import markdown
from unidiffuser.evaluation.sources import read_source
from unidiffuser.evaluation.tasks import SEEDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled_folder(tmp_path_factory.mktemp("pictures"))


def numbers(report: dict[str, Any]) -> dict[str, Any]:
    """All but the time it took."""
    return {key: value for key, value in report.items() if key != "timing"}


def test_a_classifier_needs_no_more_than_its_interface(folder: Path, tmp_path: Path) -> None:
    pairs = read_source({"format": "folder", "path": str(folder)})
    sweep = {"values": [1, 4], "split": "train", "limit": 12}
    report = evaluation(Painter(pairs, "right"), folder, tmp_path, label_accuracy, guidance_sweep=sweep).run()
    assert [row["rate"] for row in report["judged"]] == [1.0] * 6
    assert report["sweeps"]["guidance"][0]["judge: label"] == 1.0
    assert report["eyes"] == {"features": "thumbnails", "side": 64, "clip": None, "judge": "oracle"}


def test_without_a_classifier_nothing_is_judged(folder: Path, tmp_path: Path) -> None:
    pairs = read_source({"format": "folder", "path": str(folder)})
    report = evaluation(Painter(pairs, "right"), folder, tmp_path, None, tasks=["text_to_image"]).run()
    assert (report["judged"], report["styles"], report["style_confusion"]) == ([], [], {})
    assert measured(report)["text_to_image", "train", "FID"]["value"] == pytest.approx(0.0, abs=1e-5)


# Restarts


def test_a_killed_run_ends_with_the_same_numbers_and_asks_nothing_twice(folder: Path, tmp_path: Path) -> None:
    pairs = read_source({"format": "folder", "path": str(folder)})
    first = Painter(pairs, "random")
    whole = evaluation(first, folder, tmp_path / "whole", label_accuracy, seeds=[0, 1]).run()

    class Killed(Painter):
        def image_to_text(self, images, seeds):
            if len(self.calls) > 200:
                raise KeyboardInterrupt
            return super().image_to_text(images, seeds)

    killed = Killed(pairs, "random")
    with pytest.raises(KeyboardInterrupt):
        evaluation(killed, folder, tmp_path / "cut", label_accuracy, seeds=[0, 1]).run()
    second = Painter(pairs, "random")
    assert numbers(evaluation(second, folder, tmp_path / "cut", label_accuracy, seeds=[0, 1]).run()) == numbers(whole)
    assert sorted(killed.calls + second.calls) == sorted(first.calls)

    third = Painter(pairs, "random")
    evaluation(third, folder, tmp_path / "cut", label_accuracy, seeds=[0, 1]).run()
    assert third.calls == []
    evaluation(third, folder, tmp_path / "cut", label_accuracy, seeds=[0], steps=3, tasks=["joint"]).run()
    assert third.options[-1] == {"steps": 3}
    assert len(third.calls) == 48


def test_every_item_of_every_seed_has_a_seed_of_its_own(folder: Path, tmp_path: Path) -> None:
    painter = Painter(read_source({"format": "folder", "path": str(folder)}), "right")
    evaluation(painter, folder, tmp_path, label_accuracy, splits=["train"], seeds=[3, 4], limit=10, pairs=9, batch=4).run()
    for task in ("autoencode", "text_to_image", "image_to_text", "joint", "image"):
        seeds = [seed for name, seed in painter.calls if name == task]
        assert len(seeds) == len(set(seeds))
        assert min(seeds) == 3 * SEEDS


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    def make(items: range) -> Outputs:
        return Outputs([{"k": k} for k in items], {"a": np.array(items)}, [Image.new("RGB", (3, 2), "red")] * len(items))

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
        evaluation(painter, folder, tmp_path, None, splits=["test"])
    assert painter.calls == []


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("data: {format: folder, path: x}\nsteps: 5\n")
    config = EvaluationConfig.from_file(tmp_path / "a.yaml", ["steps=7", "seeds=[1, 2]", "guidance=[3, 1]"])
    assert (config.steps, config.seeds) == (7, [1, 2])
    assert config.options(steps=9) == {"steps": 9, "guidance": (3, 1)}
    (tmp_path / "a.yaml").write_text("[1]")
    with pytest.raises(ValueError, match="not a YAML mapping"):
        EvaluationConfig.from_file(tmp_path / "a.yaml")


def test_a_judge_is_refused_with_the_command_that_takes_it(folder: Path) -> None:
    good = {"data": {"format": "folder", "path": str(folder)}}
    for judge in ("bundled", "judge.safetensors"):
        with pytest.raises(ValueError, match=r"python -m unidiffuser\.emoji evaluate"):
            EvaluationConfig.of(good | {"judge": judge})
    assert EvaluationConfig.of(good | {"judge": None}) == EvaluationConfig.of(good)


def test_the_shipped_configs_are_valid() -> None:
    folder = Path(__file__).parents[1] / "unidiffuser" / "evaluation" / "configs"
    configs = {path.name: EvaluationConfig.from_file(path) for path in sorted(folder.glob("*.yaml"))}
    assert set(configs) == {"coco.yaml"}
