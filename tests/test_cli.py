"""The command line on a toy checkpoint: files, their metadata, exit codes, messages."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import unidiffuser
from unidiffuser.cli import app

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tiny_checkpoint: Path, tmp_path: Path) -> Any:
    def call(*args: str, model: Path = tiny_checkpoint, out: Path = tmp_path / "out") -> Result:
        return CliRunner().invoke(app, [*args, "--model", str(model), "--out", str(out), "--steps", "2", "--device", "cpu"])

    return call


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "red square.png")
    return str(tmp_path / "red square.png")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_to_image_files_know_how_they_were_made(run: Any, tmp_path: Path, tiny_checkpoint: Path) -> None:
    done = run("text-to-image", "Red apple, 红!", "--count", "2", "--seed", "7", "--guidance", "3,1", "--negative", "blue")
    assert done.exit_code == 0, done.output
    stem = "text-to-image-red-apple-红-seed7"
    assert names(tmp_path / "out") == [f"{stem}-00.png", f"{stem}-01.png", f"{stem}-sheet.png"]
    with Image.open(tmp_path / "out" / f"{stem}-01.png") as image:
        assert image.size == (128, 128)
        assert image.text["Description"] == "Red apple, 红!"
        assert "prompt" not in image.text  # where ComfyUI expects JSON
        assert image.text["seed"] == "8"
        settings = json.loads(image.text["settings"])
    expected = {"task": "text-to-image", "steps": 2, "guidance": [3.0, 1.0], "negative": "blue", "width": 128}
    assert expected.items() <= settings.items()
    alone = run("text-to-image", "Red apple, 红!", "--count", "1", "--seed", "8", "--guidance", "3,1", "--negative", "blue")
    assert alone.exit_code == 0
    with (
        Image.open(tmp_path / "out" / f"{stem}-01.png") as batched,
        Image.open(tmp_path / "out" / "text-to-image-red-apple-红-seed8-00.png") as single,
    ):
        worst = max(abs(a - b) for a, b in zip(batched.tobytes(), single.tobytes(), strict=True))
    assert worst <= 1


def test_captions_go_to_stdout_and_json(run: Any, tmp_path: Path, picture: str) -> None:
    done = run("image-to-text", picture, picture, "--count", "2")
    assert done.exit_code == 0, done.output
    (path,) = (tmp_path / "out").iterdir()
    written = json.loads(path.read_text(encoding="utf-8"))
    assert [row["seed"] for row in written["captions"]] == [0, 1, 0, 1]
    assert {row["picture"] for row in written["captions"]} == {picture}
    assert done.stdout.splitlines() == [row["caption"] for row in written["captions"]]


def test_captions_as_text(run: Any, tmp_path: Path) -> None:
    done = run("text", "--count", "3", "--captions", "txt", "--quiet")
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    assert (tmp_path / "out" / "text-seed0.txt").read_text(encoding="utf-8") == done.stdout


@pytest.mark.parametrize(
    ("arguments", "pictures", "sheet"),
    [
        (["joint", "-n", "2"], 2, True),
        (["joint", "-n", "1", "--speeds", "1,3"], 1, False),
        (["image", "-n", "1"], 1, False),
        (["vary-image", "PICTURE", "-n", "2"], 2, True),
        (["vary-text", "red"], 0, False),
        (["gibbs", "--rounds", "2", "--picture", "PICTURE"], 2, True),
        (["gibbs", "--rounds", "1", "--prompt", "red", "--hold", "100"], 1, False),
        (["interpolate", "PICTURE", "PICTURE", "--frames", "3"], 3, True),
        (["demo", "-n", "2"], 2, True),
    ],
)
def test_every_task(run: Any, tmp_path: Path, picture: str, arguments: list[str], pictures: int, sheet: bool) -> None:
    done = run(*(picture if argument == "PICTURE" else argument for argument in arguments))
    assert done.exit_code == 0, done.output
    found = names(tmp_path / "out")
    assert sum(bool(re.search(r"-\d\d\.png$", name)) for name in found) == pictures
    assert any(name.endswith("sheet.png") for name in found) == sheet
    if arguments[0] in ("joint", "vary-text", "gibbs", "demo"):
        assert any(name.endswith(".json") for name in found)
    if arguments[0] == "gibbs" and sheet:
        with Image.open(tmp_path / "out" / next(n for n in found if n.endswith("00.png"))) as image:
            assert {"picture", "caption", "seed", "settings"} <= image.text.keys()


def test_unknown_words_are_one_line_on_stderr(tmp_path: Path) -> None:
    task = ["text-to-image", "castle in the mountains", "--count", "2", "--steps", "1", "--quiet", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "unidiffuser", *task], cwd=ROOT, capture_output=True, text=True, check=True)
    expected = 'prompt "castle in the mountains": the model does not know "mountains" (nearest: volcano)'
    assert done.stderr == f"WARNING: {expected}\n"
    assert done.stdout == ""


def test_info_and_convert(tiny_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "half.safetensors"
    done = CliRunner().invoke(app, ["convert", str(tiny_checkpoint), str(target), "--dtype", "float16"])
    assert done.exit_code == 0, done.output
    told = CliRunner().invoke(app, ["info", str(target)])
    assert "vocabulary" not in told.output
    words = re.sub(r"[\s│]+", " ", CliRunner().invoke(app, ["info", "emoji"]).output)
    assert "vocabulary 240 concepts: monkey, gorilla, dog," in words
    assert "and 228 more; 4 styles: noto, twemoji, flat, fluent" in words
    assert told.exit_code == 0, told.output
    for word in ("uvit", "vae", "clip_text", "clip_image", "caption", "float16", "128 x 128 pixels", "8 tokens, 6 of a prompt"):
        assert word in told.output
    whole = json.loads(CliRunner().invoke(app, ["info", str(target), "--json"]).stdout)
    assert [part["part"] for part in whole["parts"]] == ["uvit", "vae", "clip_text", "clip_image", "caption"]
    assert whole["config"]["image_size"] == 128


def test_help_and_version_are_cheap() -> None:
    code = (
        "import sys; from unidiffuser.cli import app\n"
        "try: app(['text-to-image', '--help'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules and 'PIL' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "--guidance" in done.stdout
    assert CliRunner().invoke(app, ["--version"]).stdout.strip() == unidiffuser.__version__


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["text-to-image", "a", "--steps", "0"], "steps"),
        (["text-to-image", "a", "--count", "0"], "count"),
        (["text-to-image", "a", "--guidance", "nan"], "guidance"),
        (["joint", "--speeds", "3"], "--speeds is two for image and text as in 4,2"),
        (["text-to-image", "a", "--guidance", "strong"], "guidance"),
        (["text-to-image", "a", "--sampler", "magic"], "dpmpp_2m"),
        (["text-to-image", "a", "--width", "100"], "multiple of 32"),
        (["text-to-image", "a", "--device", "toaster"], "toaster"),
        (["text-to-image", "a", "--batch-size", "0"], "batch_size"),
        (["image-to-text", "nowhere.png"], "nowhere.png"),
        (["gibbs", "--prompt", "a", "--picture", "b.png"], "both"),
        (["gibbs", "--rounds", "0"], "rounds"),
        (["gibbs", "--hold", "-1"], "hold must be"),
        (["interpolate", "a.png", "b.png"], "a.png"),
        (["info", "nonsense"], "nonsense"),
        (["convert", "nonsense", "a.safetensors"], "nonsense"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tiny_checkpoint: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    task = [] if arguments[0] in ("info", "convert") else ["--model", str(tiny_checkpoint), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*arguments, *task])
    assert done.exit_code == 2, done.output
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.output
    assert done.stdout == ""


def test_a_folder_that_cannot_be_written_is_told_before_any_work(run: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = run("text-to-image", "a", out=tmp_path / "file" / "out", model=tmp_path / "no model is looked for")
    assert done.exit_code == 2
    assert "file" in done.stderr
    assert "no model" not in done.stderr


def test_a_full_disk_leaves_whole_files_only(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, saved = Image.Image.save, []

    def filling(image: Image.Image, target: Any, **options: Any) -> None:
        if saved:
            target.write(b"half a picture")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(image, target, **options)
        saved.append(image)

    monkeypatch.setattr(Image.Image, "save", filling)
    done = run("text-to-image", "a", "-n", "3")
    assert done.exit_code == 2
    assert "No space left on device" in done.stderr
    assert [re.sub(r".*-", "", name) for name in names(tmp_path / "out")] == ["00.png"]
    Image.open(next((tmp_path / "out").iterdir())).load()


@pytest.mark.skipif(sys.platform == "win32", reason="signals are another matter there")
def test_ctrl_c_in_the_middle(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["text-to-image", "a", "--model", str(tiny_checkpoint), "--steps", "1000", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "unidiffuser", *arguments, "-n", "8", "--device", "cpu"],
        stderr=subprocess.PIPE, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background has it ignored
    )  # fmt: skip
    assert process.stderr is not None
    text = b""
    while b"/1000" not in text:  # the bar: sampling has begun
        chunk = os.read(process.stderr.fileno(), 4096)
        assert chunk, text.decode()
        text += chunk
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    rest = process.communicate()[1].decode()
    assert process.returncode == 130, rest
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert names(out) == []
