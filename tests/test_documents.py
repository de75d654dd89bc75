"""The Python and shell snippets of the guides run as they stand, on a toy checkpoint in place of the bundled model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import unidiffuser
from unidiffuser.cli import app
from unidiffuser.options import DIFFUSERS, DIFFUSERS_METHODS
from unidiffuser.pipeline import UniDiffuser, load

ROOT = Path(__file__).parents[1]
GUIDES = ("library.md", "coming-from-diffusers.md")


def snippets(guide: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / guide).read_text("utf-8"), re.DOTALL)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what the guides name."""
    (tmp_path / "unidiffuser").symlink_to(ROOT / "unidiffuser", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("guide", GUIDES)
def test_python_of_the_guides_runs(guide: str, here: Path, tiny_checkpoint: Path) -> None:
    found: dict[str, Any] = {}
    for code in snippets(guide, "python"):
        code = code.replace('unidiffuser.load("emoji")', f'unidiffuser.load({str(tiny_checkpoint)!r}, device="cpu")')
        exec(re.sub(r"steps=\d+|(?<=\()20(?=[,)])", lambda m: "steps=2" if "=" in m[0] else "2", code), found)
    assert found["picture"].size == (128, 128)


def test_commands_of_the_guides_run(here: Path, tiny_checkpoint: Path) -> None:
    lines = [line for code in snippets("library.md", "sh") for line in code.splitlines() if line]
    assert len(lines) == 5
    for line in lines:
        words = shlex.split(re.sub(r"--steps 20", "--steps 1", line))
        own = ["--model", str(tiny_checkpoint), "--device", "cpu"] if words[1] != "path" else []
        done = CliRunner().invoke(app, [*words[1:], *own])
        assert done.exit_code == 0, (line, done.output)
    assert (here / "captions/metadata.jsonl").is_file()


def test_the_table_of_the_library_is_whole() -> None:
    text = (ROOT / "docs/library.md").read_text("utf-8")
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 15
    assert all(len(row) == 4 and all(cell.strip() for cell in row) for row in rows)
    tasks = {name for name in vars(UniDiffuser) if not name.startswith("_")}
    for parent in UniDiffuser.__mro__[1:3]:
        tasks |= {name for name in vars(parent) if not name.startswith("_")}
    assert {"img2img", "inpaint", "rewrite", "score", "caption", "invert", "reconstruct", "sample", "decode"} <= tasks
    for name in tasks:
        assert f"`model.{name}(" in text, name
        command = name.replace("_", "-")
        assert re.search(rf"`(unidiffuser )?{command}\b", text), command
        assert command in {info.name for info in app.registered_commands}


@pytest.mark.parametrize("name", DIFFUSERS)
def test_names_of_diffusers_meet_ours(tiny_checkpoint: Path, name: str) -> None:
    model = load(tiny_checkpoint, device="cpu")
    with pytest.raises(TypeError, match=rf"'{name}' is diffusers' name; here it is ") as error:
        model.text_to_image("a", **{name: 1})  # type: ignore[arg-type]
    for option in re.findall(r"(\w+)=", str(error.value).split("here it is")[1]):
        assert option in {
            *unidiffuser.Options.__annotations__,
            "count",
            "negative",
            "mask",
            "latents",
            "img",
            "clip_img",
            "text",
        }


@pytest.mark.parametrize("name", DIFFUSERS_METHODS)
def test_methods_of_diffusers_meet_ours(tiny_checkpoint: Path, name: str) -> None:
    model = load(tiny_checkpoint, device="cpu")
    with pytest.raises(AttributeError, match=rf"'{name}' is diffusers' name; here it is "):
        getattr(model, name)
    for call in re.findall(r"model\.(\w+)\(", DIFFUSERS_METHODS[name]):
        assert callable(getattr(model, call))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        model.nothing  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(AttributeError, match=r"here it is unidiffuser\.load"):
        unidiffuser.UniDiffuserPipeline  # noqa: B018


def test_the_page_for_users_of_diffusers_names_each_of_theirs() -> None:
    page = (ROOT / "docs/coming-from-diffusers.md").read_text("utf-8")
    named = (
        "num_inference_steps guidance_scale negative_prompt num_images_per_prompt generator output_type callback_on_step_end"
    )
    for name in named.split():
        assert f"`{name}=" in page
        assert name in DIFFUSERS
    with pytest.raises(TypeError, match=r"each task is a method|not called"):
        load("emoji", device="cpu")(prompt="a")
