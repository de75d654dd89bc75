"""The recipe of the bundled model at toy size: a whole run, kills, changes of what it reads, and mistakes in the YAML file."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_recipe import SHAPES, SIDE, STYLES, one_thread, toy, write_pictures, write_recipe
from typer.testing import CliRunner

import unidiffuser
from unidiffuser.checkpoints.checkpoint import load_checkpoint
from unidiffuser.emoji.__main__ import app
from unidiffuser.emoji.recipe import Recipe
from unidiffuser.emoji.sections import RECORD, SECTIONS, train_recipe
from unidiffuser.emoji.settings import read_settings
from unidiffuser.media.files import locked
from unidiffuser.training.saving import checkpoints

ROOT = Path(unidiffuser.__file__).parents[1]
SHIPPED = ROOT / "unidiffuser/emoji/recipe.yaml"


@pytest.fixture
def copied(toy_run: Path, toy_pictures: Path, tmp_path: Path) -> tuple[Path, Path, dict[str, Any]]:
    """A finished run and its pictures, to be changed, and its recipe."""
    out, data = tmp_path / "out", tmp_path / "pictures"
    shutil.copytree(toy_run, out)
    shutil.copytree(toy_pictures, data)
    return out, data, toy(data)


def recipe(values: dict[str, Any]) -> Recipe:
    return read_settings(Recipe, copy.deepcopy(values), "recipe")


def changed(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The recipe with another value of a setting, named as in "network.drawing.shift"; None removes it."""
    values = copy.deepcopy(values)
    *path, last = key.split(".")
    section = values
    for name in path:
        section = section[name]
    if value is None:
        del section[last]
    else:
        section[last] = value
    return values


# --- the whole run ---------------------------------------------------------------------------------------------------


def test_the_result_is_a_complete_model(toy_run: Path) -> None:
    model = unidiffuser.load(toy_run / "model.safetensors")
    config = model.config
    assert config.vae.palette == {"manners": list(STYLES), "colours": 4}
    assert config.uvit.detail_told == 4
    assert config.defaults == {"steps": 5, "guidance": 2.0, "speeds": [1.0, 2.0]}
    drawn = model.text_to_image("circle, red", count=2, seed=0)
    assert [picture.size for picture in drawn] == [(2 * SIDE, 2 * SIDE)] * 2
    assert set(config.vocabulary.concepts) == set(SHAPES)
    assert set(config.vocabulary.styles) == set(STYLES)
    assert all(isinstance(text, str) for text in model.image_to_text(drawn, steps=3))
    assert len(model.joint(count=1, steps=3)) == 1


def test_every_section_learns(toy_run: Path) -> None:
    for run in ("autoencoder", "encoders/text", "encoders/image", "captioner", "network", "finish"):
        losses = [json.loads(line)["loss"] for line in (toy_run / run / "losses.jsonl").read_text().splitlines()]
        assert len(losses) == 12
        assert np.mean(losses[-3:]) < np.mean(losses[:3]), run


def test_sections_change_only_their_own_parts(toy_run: Path) -> None:
    parts, network, finished = (load_checkpoint(toy_run / name) for name in
                                ("network/encoders.safetensors", "network/model.safetensors", "model.safetensors"))  # fmt: skip
    assert "uvit" not in parts.parts()
    for name in ("vae", "clip_text", "clip_image", "caption", "uvit"):
        before, after = (one.state_dict(name) for one in (network, finished))
        differing = {key for key in after if key not in before or not torch.equal(before[key], after[key])}
        if name == "vae":
            assert differing
            assert all(key.startswith(("decoder.", "post_quant_conv.", "palette.", "upsampler.")) for key in differing)
        else:
            assert not differing
        if name != "uvit":
            given = parts.state_dict(name)
            assert all(torch.equal(given[key], value) for key, value in before.items())


def test_a_finished_recipe_is_not_trained_again(toy_run: Path, toy_pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("unidiffuser.emoji.sections.train", refused)
    before = (toy_run / "model.safetensors").read_bytes()
    (toy_run / "model.safetensors").unlink()
    assert train_recipe(recipe(toy(toy_pictures)), toy_run, progress=False).read_bytes() == before
    free = changed(changed(toy(toy_pictures), "network.save_every", 5), "captioner.compile", True)
    train_recipe(recipe(free), toy_run, progress=False)


# --- kills -----------------------------------------------------------------------------------------------------------


def start(path: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "unidiffuser.emoji", "train", str(path), str(out), "--quiet"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_recipe_killed_in_several_sections_gives_the_same_file(toy_run: Path, toy_pictures: Path, tmp_path: Path) -> None:
    path, out = write_recipe(tmp_path / "recipe.yaml", toy(toy_pictures)), tmp_path / "out"
    steps = toy(toy_pictures)["network"]["steps"]
    for run in ("encoders/image", "network", "finish"):
        process = start(path, out)
        limit = time.monotonic() + 300
        while process.poll() is None and not checkpoints(out / run) and time.monotonic() < limit:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert 0 < int(checkpoints(out / run)[-1].name) < steps, "killed too late to be in the middle"
        record = json.loads((out / run.split("/")[0] / RECORD).read_text())
        assert "results" not in record
    process = start(path, out)
    text, _ = process.communicate()
    assert process.returncode == 0, text
    assert "captioner: finished before" in text
    assert "finish: resumes" in text
    assert (out / "model.safetensors").read_bytes() == (toy_run / "model.safetensors").read_bytes()


def test_a_section_killed_after_its_last_step_writes_its_result_again(
    copied: tuple[Path, Path, dict[str, Any]], toy_run: Path
) -> None:
    out, _, values = copied
    for name in ("finish", "network"):
        record = json.loads((out / name / RECORD).read_text())
        (out / name / RECORD).write_text(json.dumps({key: record[key] for key in ("settings", "inputs")}))
        (out / name / "model.safetensors").write_bytes(b"half of a file")
        with one_thread():
            train_recipe(recipe(values), out, progress=False)
        assert (out / "model.safetensors").read_bytes() == (toy_run / "model.safetensors").read_bytes()
        assert len((out / name / "losses.jsonl").read_text().splitlines()) == 12
        shutil.rmtree(out / "finish")


# --- changes of what it reads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "text", "removed"),
    [
        ("captioner.steps", 13, "captioner was trained with steps 12, the recipe has 13", ["captioner", "network", "finish"]),
        ("network.drawing.shift", 4, "network was trained with drawing.shift 2, the recipe has 4", ["network", "finish"]),
        ("finish.gate", 1.0, "finish was trained with gate 4.0, the recipe has 1.0", ["finish"]),
        ("seed", 7, "autoencoder was trained with seed 0, the recipe has 7", ["autoencoder", "network", "finish"]),
        ("network.captioning", None, "network was trained with captioning", ["network", "finish"]),
    ],
)
def test_a_changed_setting_is_refused(
    copied: tuple[Path, Path, dict[str, Any]], key: str, value: Any, text: str, removed: list[str]
) -> None:
    out, _, values = copied
    with pytest.raises(ValueError, match=text) as raised:
        train_recipe(recipe(changed(values, key, value)), out, progress=False)
    folders = str(raised.value).split("; remove ")[1].split(" to train again")[0]
    assert folders.split(" and ") == [str(out / name) for name in removed]


def test_changed_pictures_and_results_are_noticed(copied: tuple[Path, Path, dict[str, Any]]) -> None:
    out, data, values = copied
    first = next(data.glob("*.png"))
    content = first.read_bytes()
    (data / "red-bar.png").replace(first)
    (data / "red-bar.png").write_bytes(content)
    with pytest.raises(ValueError, match="autoencoder was trained on other pictures or captions; remove"):
        train_recipe(recipe(values), out, progress=False)
    (data / "red-bar.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"lists .*red-bar\.png, which is missing"):
        train_recipe(recipe(values), out, progress=False)


def test_a_changed_or_missing_result_is_noticed(copied: tuple[Path, Path, dict[str, Any]]) -> None:
    out, _, values = copied
    with (out / "captioner/caption.pt").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match=r"caption\.pt is missing or changed .*; remove .*captioner and .*network"):
        train_recipe(recipe(values), out, progress=False)
    shutil.rmtree(out / "captioner")
    with pytest.raises(ValueError, match=r"network was trained on the results of .*captioner, which is not finished"):
        train_recipe(recipe(values), out, progress=False)
    shutil.rmtree(out / "encoders")
    (out / "encoders").mkdir()
    (out / "encoders/clip.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"encoders has no section\.json, so it belongs to no recipe"):
        train_recipe(recipe(values), out, progress=False)


def test_a_removed_section_is_trained_again(copied: tuple[Path, Path, dict[str, Any]], toy_run: Path) -> None:
    out, _, values = copied
    shutil.rmtree(out / "finish")
    with one_thread():
        train_recipe(recipe(values), out, progress=False)
    assert (out / "model.safetensors").read_bytes() == (toy_run / "model.safetensors").read_bytes()
    assert json.loads((out / "finish" / RECORD).read_text())["seconds"] > 0


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("networks", {}, r"recipe\.yaml has no setting 'networks'; did you mean network\?"),
        ("autoencoder.batchsize", 8, r"autoencoder has no setting 'batchsize'; did you mean batch_size\?"),
        ("encoders.image.stem.depth", 8, "stem has no setting 'depth'; it may have unshuffle, channels, pool"),
        ("finish", None, "lacks finish"),
        ("captioner.noise", None, "captioner lacks noise"),
        ("captioner.steps", "many", r"captioner\.steps must be a whole number, not 'many'"),
        ("captioner.steps", True, r"captioner\.steps must be a whole number, not True"),
        ("captioner.steps", 0, r"captioner\.steps must be at least 1, not 0"),
        ("captioner.compile", 1, r"captioner\.compile must be true or false, not 1"),
        ("network.learning_rate", "fast", r"network\.learning_rate must be a number, not 'fast'"),
        ("network.learning_rate", float("nan"), r"network\.learning_rate must be a number, not nan"),
        ("network.optimizer", "sgd", r"network\.optimizer must be one of adamw, muon, not 'sgd'"),
        ("network.betas", [0.9], r"network\.betas must be a list of 2, not \[0\.9\]"),
        ("network.betas", [0.9, "x"], r"network\.betas\[1\] must be a number, not 'x'"),
        ("network.where", {"tone": 0}, r"network\.where\.tone must be a list, not 0"),
        ("network.where", {"tone": [0.5]}, r"where\.tone\[0\] must be text or a whole number or true or false, not 0\.5"),
        ("network.drawing", 3, r"network\.drawing must be a mapping with where, .*, not 3"),
        ("network.drawing.fraction", 1.5, r"network\.drawing\.fraction must be at most 1, not 1\.5"),
        ("network.mix", {"independent": 0}, r"network\.mix is 0 everywhere"),
        ("network.logit_normal", [0.0, 0.0], "logit_normal must be a mean and a std above 0"),
        ("finish.labels", [600, 50], r"finish\.labels must be the lower and the higher label"),
        ("finish.image_size", SIDE, r"finish\.image_size must be 64, from autoencoder\.image_size and finish\.upsampler"),
        ("finish.crop", 9, r"finish\.crop must be at most 8, the side of a latent, not 9"),
        ("network.sizes.patch_size", 3, r"autoencoder\.image_size must be a multiple of 12, which is 4 pixels a latent cell"),
        ("finish.denoised", 1.0, r"finish\.denoised must be between 0 and 1"),
        ("encoders.image.stem.channels", [8], r"stem\.channels needs two widths"),
        ("data.prepare", {"size": "big"}, r"data\.prepare\.size must be a whole number, not 'big'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_it(tmp_path: Path, key: str, value: Any, text: str) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", changed(toy(tmp_path), key, value))
    with pytest.raises(ValueError, match=text) as raised:
        Recipe.from_file(path)
    assert "\n" not in str(raised.value)


def test_mistakes_end_the_command_before_anything_is_written(tmp_path: Path, toy_pictures: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", changed(toy(toy_pictures), "network.steps", "x"))
    result = CliRunner().invoke(app, ["train", str(path), str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "network.steps must be a whole number" in result.output
    missing = CliRunner().invoke(app, ["train", str(tmp_path / "none.yaml"), str(tmp_path / "out")])
    assert missing.exit_code == 2
    assert "no recipe config at" in missing.output
    path.write_text("[")
    assert "is not YAML" in CliRunner().invoke(app, ["train", str(path), str(tmp_path / "out")]).output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("network.drawing.where", {"style": ["mauve"]}, r"network\.drawing\.where: no training picture .* has .*mauve"),
        ("autoencoder.palette.styles", ["red", "mauve"], r"palette\.styles: no picture .* has the style 'mauve'"),
        ("data.folder", "nowhere", r"data\.folder nowhere has no metadata\.jsonl"),
    ],
)
def test_pictures_that_do_not_fit_are_noticed(tmp_path: Path, toy_pictures: Path, key: str, value: Any, text: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        train_recipe(recipe(changed(toy(toy_pictures), key, value)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_records_without_a_style_are_noticed(tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "pictures")
    lines = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    del lines[3]["style"]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=r"1 records of .* lack 'style'"):
        train_recipe(recipe(toy(data)), tmp_path / "out")


def test_a_number_may_be_written_as_yaml_reads_it_for_text(tmp_path: Path) -> None:
    assert recipe(changed(toy(tmp_path), "network.learning_rate", "2e-3")).network.learning_rate == 2e-3


def test_a_folder_in_use_is_refused(toy_pictures: Path, tmp_path: Path) -> None:
    with locked(tmp_path / "out/.lock", "it"), pytest.raises(ValueError, match=r"out is in use by process \d+"):
        train_recipe(recipe(toy(toy_pictures)), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_several_processes_are_refused(toy_pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        train_recipe(recipe(toy(toy_pictures)), tmp_path / "out")


# --- the shipped recipe ----------------------------------------------------------------------------------------------


def test_the_shipped_recipe_is_valid_and_its_help_names_it() -> None:
    shipped = Recipe.from_file(SHIPPED)
    assert set(SECTIONS) < set(vars(shipped))
    assert shipped.network.steps * shipped.network.batch_size > 2_000_000
    shown = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).output
    for line in (
        "unidiffuser/emoji/recipe.yaml OUT",
        "evaluate unidiffuser/emoji/evaluation.yaml --model OUT/model.safetensors",
    ):
        assert line in " ".join(shown.split())


def test_settings_are_read_without_torch() -> None:
    program = "import sys, pathlib; from unidiffuser.emoji.recipe import Recipe; Recipe.from_file(pathlib.Path(sys.argv[1]))"
    program += "; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", program, str(SHIPPED)], env=environment).returncode == 0


def test_the_toy_pictures_have_every_concept_in_every_style(toy_pictures: Path) -> None:
    assert len(list(toy_pictures.glob("*.png"))) == len(SHAPES) * len(STYLES)
