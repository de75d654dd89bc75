"""The scripts in docs/examples/, as they stand, with few steps."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops

ROOT = Path(__file__).parents[1]


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str | Path) -> None:
    """Run a script as `python docs/examples/NAME.py ARGUMENTS` would, in this process."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "docs" / "examples" / f"{name}.py"), run_name="__main__")


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    """A folder of two pictures, each with a caption beside it."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("red", "blue"):
        Image.new("RGB", (90, 70), name).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"{name} field", encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["text_to_image_and_caption", "curved_path"])
def test_pictures_are_saved_and_captions_printed(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path
) -> None:
    run(monkeypatch, name, "--model", tiny_checkpoint, "--count", 2, "--steps", 2, "--out", tmp_path)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["0.png", "1.png"]
    for file in ("0.png", "1.png"):
        assert Image.open(tmp_path / file).size == (128, 128)


def test_inpainting_follows_the_prompt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_checkpoint: Path) -> None:
    pictures = []
    for number, prompt in enumerate(["lion", "fox"]):
        out = tmp_path / f"{number}.png"
        given = ROOT / "unidiffuser/assets/example.png"
        run(
            monkeypatch,
            "inpainting",
            given,
            prompt,
            "--box",
            0,
            0,
            128,
            64,
            "--model",
            tiny_checkpoint,
            "--steps",
            2,
            "--out",
            out,
        )
        pictures.append(Image.open(out).convert("RGB"))
    assert ImageChops.difference(*pictures).getbbox() is not None


def test_training_from_scratch_writes_a_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, captioned: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import unidiffuser

    out = tmp_path / "model.safetensors"
    options = {"encoders": tiny_checkpoint, "steps": 30, "batch-size": 4, "dim": 64, "depth": 3, "learning-rate": 0.01}
    run(monkeypatch, "train_from_scratch", captioned, "--out", out, *(f"--{k}={v}" for k, v in options.items()))
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0]
    assert unidiffuser.load(out).text_to_image("red field", steps=2)[0].size == (128, 128)


def test_a_lora_is_trained_and_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, captioned: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run(
        monkeypatch,
        "finetune_lora",
        captioned,
        "zor",
        "--out",
        out,
        "--model",
        tiny_checkpoint,
        "--steps=2",
        "--kept=2",
        "--sampling-steps=2",
    )
    assert (out / "lora.safetensors").is_file()
    assert len(list(out.glob("zor-*.png"))) == 4
    assert len(capsys.readouterr().out.splitlines()) == 4
