"""The commands beyond plain generation, inputs as they come, and what is answered before torch is imported."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from unidiffuser.cli import app, application
from unidiffuser.cli.data import app as data_app
from unidiffuser.data import encode as data_encode
from unidiffuser.data.captioned import read_beside, read_listed
from unidiffuser.pipeline import UniDiffuser

ROOT = Path(__file__).parents[1]
COMMANDS = {info.name: info for info in app.registered_commands} | {
    f"data {info.name}": info for info in data_app.registered_commands
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: cat.png, mask.png, and photos/ with two pictures and one that is none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in ("cat.png", "photos/0.png", "photos/1.png"):
        Image.effect_noise((90, 70), 90).convert("RGB").save(name)
    (tmp_path / "photos/bad.png").write_text("no picture")
    (tmp_path / "photos/._0.png").write_text("of macOS")
    mask = Image.new("L", (90, 70))
    mask.paste(255, (0, 0, 45, 70))
    mask.save("mask.png")
    return tmp_path


@pytest.fixture
def run(tiny_checkpoint: Path) -> Any:
    def call(line: str, stdin: bytes | None = None, steps: str = "--steps 2") -> Result:
        more = f" --model {tiny_checkpoint} --device cpu --dtype float32 {steps}"
        return CliRunner().invoke(app, shlex.split(line + more), input=stdin)

    return call


def names(folder: Path = Path("out")) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("line", "files"),
    [
        ("img2img cat.png --prompt red -n 2 --strength 0.5", ["img2img-red-seed0-00.png", "img2img-red-seed0-01.png"]),
        ("inpaint cat.png mask.png --prompt red -n 1", ["inpaint-red-seed0-00.png"]),
        ('rewrite "ab cd" --change ab --picture cat.png', ["rewrite-ab-cd-seed0.json"]),
        ('rewrite "ab cd" --keep 1 --captions txt -n 3', ["rewrite-ab-cd-seed0.txt"]),
        ("score cat.png ab cd --shuffled 2 --levels 2", ["score-cat.json"]),
        ("invert cat.png --prompt red", ["invert-cat.safetensors"]),
        ("reconstruct cat.png", ["reconstruct-cat-seed0-00.png"]),
        ('sample --path "1000,1000 0,0" -n 1 --latents', [f"sample-seed0{e}" for e in ("-00.png", ".json", ".safetensors")]),
        ('sample --path "700,0 0,0" --picture cat.png --prompt red -n 1', ["sample-red-seed0-00.png"]),
        ("caption cat.png --candidates 2 --top-p 0.9 --temperature 2", ["caption-cat-seed0.json"]),
    ],
)  # fmt: skip
def test_each_command_writes_its_files(run: Any, line: str, files: list[str]) -> None:
    done = run(line)
    assert done.exit_code == 0, done.output
    assert [name for name in names() if "sheet" not in name] == files
    again = run(line + (" --quiet" if "invert" in line else " --json --quiet"))
    assert again.exit_code == 0, again.output
    assert "invert" in line or json.loads(again.stdout)["task"] == line.split()[0]
    assert [name for name in names() if "sheet" not in name] == files  # the same run


@pytest.mark.usefixtures("folder")
def test_latents_are_decoded_and_reconstructed(run: Any, tiny_checkpoint: Path) -> None:
    assert run("sample --path '1000,1000 0,0' -n 2 --latents --quiet").exit_code == 0
    decoded = CliRunner().invoke(
        app, ["decode", "out/sample-seed0.safetensors", "--model", str(tiny_checkpoint), "-o", "decoded"]
    )
    assert decoded.exit_code == 0, decoded.output
    assert len(decoded.stdout.splitlines()) == 2
    assert len([name for name in names(Path("decoded")) if re.search(r"\d\d\.png", name)]) == 2
    assert run("invert cat.png --prompt red -q").exit_code == 0
    done = run("reconstruct out/invert-cat.safetensors --prompt blue -q")
    assert done.exit_code == 0, done.output
    assert run("decode cat.png", steps="").exit_code == 2


@pytest.mark.usefixtures("folder")
def test_a_path_is_drawn_and_its_levels_printed() -> None:
    done = CliRunner().invoke(app, ["path", "1000,1000 400,0 0,0", "--steps", "4", "--size", "128"])
    assert done.exit_code == 0, done.output
    assert [line.split() for line in done.stdout.splitlines()][-2:] == [["400.00", "0.00"], ["0.00", "0.00"]]
    assert Image.open("out/path.png").size == (128, 128)
    assert CliRunner().invoke(app, ["path", "1000,0 0,0"]).exit_code == 0
    assert CliRunner().invoke(app, ["path", "1000,0 0,0"]).exit_code == 0
    assert names() == ["path-2.png", "path.png"]  # another path replaces nothing
    wrong = CliRunner().invoke(app, ["path", "1000,0 1000,500"])
    assert wrong.exit_code == 2
    assert "rises" in wrong.stderr


@pytest.mark.usefixtures("folder")
def test_folders_and_stdin(run: Any) -> None:
    bad = run("image-to-text photos")
    assert bad.exit_code == 2
    assert "picture 3 of 3: photos/bad.png is not a picture" in bad.stderr
    skipped = run("image-to-text photos cat.png gone.png --on-error skip --json --quiet")
    assert skipped.exit_code == 0, skipped.output
    assert [row["picture"] for row in json.loads(skipped.stdout)["results"]] == ["photos/0.png", "photos/1.png", "cat.png"]
    given = run("vary-image - -n 1", stdin=Path("cat.png").read_bytes())
    assert given.exit_code == 0, given.output
    prompts = run("text-to-image - -n 1 --json -q", stdin="red\n\nblue\u2028sky\n".encode())
    assert [row["prompt"] for row in json.loads(prompts.stdout)["results"]] == ["red", "blue\u2028sky"]
    assert "stdin holds no prompt" in run("vary-text -", stdin=b"\n").stderr
    assert "stdin holds no picture" in run("image-to-text -", stdin=b"").stderr


@pytest.mark.usefixtures("folder")
def test_a_prompt_that_is_not_utf8_does_not_end_a_list(run: Any) -> None:
    lines = b"red\ncaf\xe9\nblue\n"
    Path("prompts.txt").write_bytes(lines)
    done = run("generate prompts.txt --out generated --batch-size 2")
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in Path("generated/manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["source"] for row in rows] == ["red", "caf\\udce9", "blue"]
    assert [row.get("error") for row in rows] == [
        None, "prompt 1, 'caf\\udce9', is not valid text: it holds bytes that are not UTF-8", None
    ]  # fmt: skip
    assert names(Path("generated")) == [".parts", "000000.png", "000002.png", "manifest.jsonl", "settings.json"]
    bad = run("text-to-image - -n 1", stdin=lines)
    assert bad.exit_code == 2
    assert "prompt 2 of 3, 'caf\\udce9', is not valid text" in bad.stderr
    skipped = run("text-to-image - -n 1 --on-error skip --json -q", stdin=lines)
    assert skipped.exit_code == 0, skipped.output
    assert [row["prompt"] for row in json.loads(skipped.stdout)["results"]] == ["red", "blue"]
    assert "stdin is not UTF-8 text" in run("vary-text -", stdin="red".encode("utf-16")).stderr


@pytest.mark.usefixtures("folder")
def test_captions_of_a_folder_are_training_data(run: Any) -> None:
    Path("photos/1.txt").write_text("my own words", encoding="utf-8")
    done = run("caption photos --out captions --beside --candidates 2")
    assert done.exit_code == 0, done.output
    listed = {Path(pair.path).resolve().name: pair.caption for pair in read_listed(Path("captions"))}
    assert listed.keys() == {"0.png", "1.png"}
    assert Path("captions/0.png.txt").read_text(encoding="utf-8").strip() == listed["0.png"]
    assert len(json.loads(Path("captions/0.png.json").read_text(encoding="utf-8"))) == 2
    beside = {pair.key: pair.captions for pair in read_beside(Path("photos"))}
    assert beside["0.png"][0].strip() == listed["0.png"]
    assert beside["1.png"] == ("my own words",)


@pytest.mark.usefixtures("folder")
@pytest.mark.skipif(sys.platform != "linux", reason="names that are no UTF-8")
def test_a_name_that_is_not_utf8_does_not_end_a_folder(run: Any) -> None:
    os.rename(b"photos/0.png", b"photos/caf\xe9.png")
    done = run("caption photos --out captions")
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in Path("captions/manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["source"] for row in rows] == ["1.png", "bad.png", "caf\\udce9.png"]
    assert [("error" in row) for row in rows] == [False, True, False]


@pytest.mark.usefixtures("folder")
def test_what_takes_long_says_so(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UniDiffuser, "step_seconds", lambda *_: 2.0)
    monkeypatch.setattr(UniDiffuser, "joint", lambda *_, count, **__: [(Image.new("RGB", (8, 8)), "a")] * count)
    assert "this takes about 13 minutes on cpu" in run("joint -n 20", steps="--steps 20").stderr
    assert "this takes" not in run("joint -n 20 -q", steps="--steps 20").stderr
    assert "this takes" not in run("joint -n 1", steps="--steps 20").stderr
    assert "6.7 hours" in run("joint -n 600", steps="--steps 20").stderr


def test_encoding_and_evaluation_that_take_long_say_so(
    folder: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("photos/bad.png").unlink()
    for name in ("0", "1"):
        Path(f"photos/{name}.txt").write_text("ab cd", encoding="utf-8")
    encode = ["data", "encode", "photos", "latents", "-m", str(tiny_checkpoint), "--device", "cpu", "--batch-size", "2"]
    monkeypatch.setattr(application, "LONG", -1)
    monkeypatch.setattr(data_encode, "FEW", 0)
    assert "encoding takes about" in CliRunner().invoke(app, encode).stderr
    again = CliRunner().invoke(app, encode)
    assert again.exit_code == 0, again.output
    lines = [
        f"model: {tiny_checkpoint}",
        "data: {format: folder, path: photos}",
        "steps: 2",
        "pairs: 3",
        "tasks: [joint, image]",
    ]
    Path("evaluate.yaml").write_text("\n".join([*lines, "device: cpu", "batch: 2", "splits: [all]", "limit: 2"]))
    monkeypatch.setattr(sys.modules["unidiffuser.cli.evaluate"], "SHORT", 0)  # its function has the same name
    monkeypatch.setattr(UniDiffuser, "step_seconds", lambda *_: 10.0)
    done = CliRunner().invoke(app, ["evaluate", "evaluate.yaml", "--out", "evaluated"])
    assert done.exit_code == 0, done.output
    assert "the whole evaluation takes about 2 minutes on cpu" in done.stderr  # 2 tasks x 3 pairs x 2 steps x 10 s


# --- help and mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_two_examples_that_can_be_read(name: str) -> None:
    examples = [line.strip() for line in (COMMANDS[name].epilog or "").split("\n\n")][1:]
    assert len(examples) >= 2
    for example in examples:
        words = shlex.split(example.split(" < ")[0].replace("torchrun --nproc-per-node 8 -m ", ""))
        assert words[: 1 + len(name.split())] == ["unidiffuser", *name.split()]
        shown = CliRunner().invoke(app, [*words[1:], "--help"])
        assert shown.exit_code == 0, (example, shown.output)


def options_of(name: str) -> set[str]:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    return {option for parameter in command.params for option in parameter.opts}


def test_commands_have_only_options_that_matter() -> None:
    assert "--guidance" in options_of("text-to-image")
    assert not {"--guidance", "--captions"} & options_of("image")
    assert "--width" not in options_of("text")
    assert "--count" not in options_of("interpolate") | options_of("caption") | options_of("invert")
    assert "--on-error" not in options_of("joint")
    assert {"--candidates", "--beams", "--top-p", "--temperature", "--beside"} <= options_of("caption")


MISTAKES = [
    ("text-to-image a --steps 0", "steps must be"),
    ("text-to-image a --guidance strong", "--guidance is one number, or two"),
    ("text-to-image a --guidance nan", "finite"),
    ("text-to-image a --sampler magic", "dpmpp_2m"),
    ("text-to-image a --spacing odd", "logsnr"),
    ("text-to-image a --preset slow", "exact, fast"),
    ("text-to-image a --data-type 5", "data_type must be 1 (curated) or 0 (web)"),
    ("text-to-image a --guidance-interval 9,1", "low <= high"),
    ("text-to-image a --count 0", "--count"),
    ("text-to-image a --device 'to aster'", "--device is cpu, cuda"),
    ("text-to-image a --lora gone.safetensors", "gone.safetensors"),
    ("text-to-image a --compile fast", "max-autotune"),
    ("text-to-image a --out mask.png/out", "mask.png"),
    ("image-to-text gone.png", "no picture at gone.png"),
    ("vary-image empty", "holds no pictures"),
    ("img2img cat.png --strength 2", "strength"),
    ("inpaint cat.png gone.png", "gone.png"),
    ("gibbs --prompt cat.png", "use --picture for it"),
    ("gibbs --prompt a --picture cat.png", "not from both"),
    ("gibbs --hold 2000", "hold"),
    ("interpolate cat.png cat.png --frames 1", "frames"),
    ("joint --speeds 1", "--speeds is two"),
    ("joint --speeds 1,-1", "positive"),
    ("score cat.png a --levels 0", "levels"),
    ("sample --path 1000", "point 1 of the path"),
    ("sample --path '700,0 0,0' --prompt a", "noise level 700 of the picture, not from pure noise: give one with --picture"),
    ("sample --path '1000,20 0,0'", "give one with --prompt"),
    ("path 1000,0", "at least 2 points"),
    ("path '1000,0 0,0' --spacing odd", "logsnr"),
    ("caption cat.png --beside", "--beside is for one folder"),
    ("fine-tune gone", "there is no folder gone"),
    ("fine-tune empty", "holds no picture"),
    ("train-lora empty --word zorbi", "holds no picture"),
    ("fine-tune photos --out mask.png/out", "mask.png"),
]
WITHOUT_TORCH = """
import json, shlex, sys
from typer.testing import CliRunner
from unidiffuser.cli import app
heavy = [name for name in ("torch", "numpy", "PIL", "transformers") if name in sys.modules]
assert not heavy, heavy
sys.modules["torch"] = None  # importing it fails
lines = json.loads(sys.stdin.read())
found = [CliRunner().invoke(app, shlex.split(line)) for line in lines]
print(json.dumps([(done.exit_code, done.stderr, done.stdout, repr(done.exception)) for done in found]))
"""


def test_mistakes_are_answered_before_torch_is_imported(folder: Path) -> None:
    (folder / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        input=json.dumps([line for line, _ in MISTAKES]),
        capture_output=True, text=True, check=False, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for (line, words), (code, error, out, exception) in zip(MISTAKES, json.loads(done.stdout), strict=True):
        assert code == 2, (line, exception, error)
        assert words in error, (line, error)
        assert len(error.strip().splitlines()) == 1, error
        assert out == ""


# --- streams that cannot be written -----------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full and closed streams of a shell")
@pytest.mark.parametrize(
    ("ending", "code"),
    [("-q 2>&- | true", 0), ("> /dev/full", 2), ("2> /dev/full > /dev/null", 0)],
    ids=["pipe", "full", "bar"],
)
def test_results_are_saved_whatever_becomes_of_the_output(
    tiny_checkpoint: Path, tmp_path: Path, ending: str, code: int
) -> None:
    options = f"--model {tiny_checkpoint} --steps 1 --device cpu --out {tmp_path / 'out'}"
    line = f"{sys.executable} -m unidiffuser text -n 2 {options} {ending}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == code, done.stderr
    (path,) = (tmp_path / "out").iterdir()
    assert len(json.loads(path.read_text(encoding="utf-8"))["captions"]) == 2
    if ending.startswith(">"):
        assert "stdout cannot be written (No space left on device); the results are in" in done.stderr
        assert "Traceback" not in done.stderr
