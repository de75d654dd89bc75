"""Files of results: what replaces what, what a killed process leaves, locks, and captions as training data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from unidiffuser.data.captioned import read_listed
from unidiffuser.media.files import atomic_write, is_running, locked, replacing, shown, write_text
from unidiffuser.media.results import Result, save_results

SETTINGS = {"steps": 20, "guidance": 3.0, "model": "emoji"}
RED, BLUE = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))


def save(folder: Path, *results: Result, task: str = "text-to-image", form: str = "json", **settings: Any) -> list[str]:
    return [path.name for path in save_results(results, folder, task, {**SETTINGS, **settings}, form)]


def colour(path: Path) -> Any:
    with Image.open(path) as image:
        return image.convert("RGB").getpixel((0, 0))


LONG = "a photograph of a very old red apple tree"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"prompt": f"{LONG} in spring"}, {"prompt": f"{LONG} in autumn"}),
        ({"prompt": "\U0001f34e"}, {"prompt": "\U0001f34c"}),
        ({"picture": "a/cat.png"}, {"picture": "b/cat.png"}),
        ({"prompt": "cat", "picture": "a.png"}, {"prompt": "cat", "picture": "b.png"}),
    ],
    ids=["same beginning", "emoji", "same name", "same prompt"],
)
@pytest.mark.parametrize("form", ["json", "txt"])
def test_another_run_replaces_nothing(tmp_path: Path, first: dict[str, str], second: dict[str, str], form: str) -> None:
    old = save(tmp_path, Result(0, RED, "red", **first), form=form)
    new = save(tmp_path, Result(0, BLUE, "blue", **second), form=form)
    assert not set(old) & set(new)
    assert colour(tmp_path / old[0]) == (255, 0, 0)
    assert colour(tmp_path / new[0]) == (0, 0, 255)
    assert "red" in (tmp_path / old[-1]).read_text(encoding="utf-8")
    third = save(tmp_path, Result(0, BLUE, "blue", **second), form=form)
    assert third == new  # the same run again


def test_other_settings_or_another_number_of_results_are_another_run(tmp_path: Path) -> None:
    once = save(tmp_path, Result(0, RED, prompt="cat"))
    assert save(tmp_path, Result(0, BLUE, prompt="cat"), steps=50) == ["text-to-image-cat-seed0-2-00.png"]
    assert save(tmp_path, Result(0, BLUE, prompt="cat"), steps=51) == ["text-to-image-cat-seed0-3-00.png"]
    assert save(tmp_path, Result(0, RED, prompt="cat")) == once
    four = save(tmp_path, *(Result(k, RED, prompt="dog") for k in range(4)))
    two = save(tmp_path, *(Result(k, RED, prompt="dog") for k in range(2)))
    assert not set(four) & set(two)
    captions = save(tmp_path, Result(0, caption="a"), Result(1, caption="b"), task="text")
    assert save(tmp_path, Result(0, caption="other words"), Result(1, caption="b"), task="text") == captions
    assert save(tmp_path, Result(0, caption="a"), task="text") != captions


def test_files_of_other_programs_are_not_replaced(tmp_path: Path) -> None:
    RED.save(tmp_path / "text-to-image-cat-seed0-00.png")
    (tmp_path / "text-seed0.json").write_text("[1, 2]")
    (tmp_path / "image-seed0-00.png").write_bytes(b"half a picture")
    assert save(tmp_path, Result(0, BLUE, prompt="cat")) == ["text-to-image-cat-seed0-2-00.png"]
    assert save(tmp_path, Result(0, caption="a"), task="text") == ["text-seed0-2.json"]
    assert save(tmp_path, Result(0, BLUE), task="image") == ["image-seed0-2-00.png"]
    assert colour(tmp_path / "text-to-image-cat-seed0-00.png") == (255, 0, 0)


def test_captions_as_training_data(tmp_path: Path) -> None:
    save(tmp_path, Result(0, RED, "a red field"), Result(1, BLUE, "a blue\u2028one"), task="joint", form="metadata")
    save(tmp_path, Result(0, RED, prompt="cat"), form="metadata")
    save(tmp_path, Result(0, RED, "a red field"), Result(1, BLUE, "a blue\u2028one"), task="joint", form="metadata")
    pairs = {pair.key: pair for pair in read_listed(tmp_path)}
    assert {key: pair.caption for key, pair in pairs.items()} == {
        "joint-seed0-00.png": "a red field",
        "joint-seed0-01.png": "a blue\u2028one",
        "text-to-image-cat-seed0-00.png": "cat",
    }
    assert pairs["joint-seed0-01.png"].image().getpixel((0, 0)) == (0, 0, 255)


def test_names_that_are_no_text_are_spelled_out(tmp_path: Path) -> None:
    assert shown("caf\udce9.png") == "caf\\udce9.png"
    (name,) = save(tmp_path, Result(0, caption="a", picture="caf\udce9.png"), task="image-to-text")
    row = json.loads((tmp_path / name).read_text(encoding="utf-8"))["captions"][0]
    assert row["picture"] == "caf\\udce9.png"


# --- what a killed process leaves -------------------------------------------------------------------------------------

KILLED = """
import os, sys
from unidiffuser.media.files import replacing
with replacing(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(os.name != "posix", reason="process numbers")
def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "a.json")], check=False, cwd=Path(__file__).parents[1])
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / ".a-udffffffff-1-x.json").write_text("of another machine")
    (tmp_path / ".hidden.json").write_text("mine")
    with replacing(tmp_path / "b.png") as running, atomic_write(tmp_path / "c.png") as file:
        file.write(b"c")
        assert running.exists()
        names = {path.name for path in tmp_path.iterdir()} - {running.name}
        assert sum(name.startswith(".a-") for name in names) == 1
        running.write_bytes(b"b")
    assert {path.name for path in tmp_path.iterdir()} == {"b.png", "c.png", ".hidden.json", ".a-udffffffff-1-x.json"}
    assert is_running(os.getpid())


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of files there")
def test_a_lock_names_the_process_that_holds_it(tmp_path: Path) -> None:
    lock = tmp_path / "run.lock"
    message = rf"runs/a is in use by process {os.getpid()} on .+; wait until it ends"
    with locked(lock, "runs/a"), pytest.raises(ValueError, match=message), locked(lock, "runs/a"):
        pytest.fail("both hold it")
    with locked(tmp_path / "run.lock", "runs/a"):
        write_text(tmp_path / "a", "free again")
