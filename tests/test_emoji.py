"""The workshop of the bundled model: copies among the demonstration data, names of icons, and that nothing else needs it."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import unidiffuser
from unidiffuser.emoji.packages import LABELS_PACKAGE, MORE_PACKAGES, PACKAGES, STYLES, normalise_hex
from unidiffuser.emoji.prepare import COPY_DISTANCE, assign_splits, near_copies, prepare, thumbnail

ROOT = Path(unidiffuser.__file__).parents[1]


def disc(path: Path, colour: tuple[int, int, int], radius: int = 40) -> Path:
    image = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(image).ellipse((64 - radius, 64 - radius, 64 + radius, 64 + radius), fill=colour)
    image.save(path)
    return path


def test_a_copy_of_a_hidden_picture_is_found(tmp_path: Path) -> None:
    labels = {"A": {"base": "A"}, "B": {"base": "B"}}
    hidden = [("noto", "A", disc(tmp_path / "hidden.png", (200, 30, 30)))]
    same = disc(tmp_path / "same.png", (190, 40, 30))  # a slightly other red
    other = disc(tmp_path / "other.png", (30, 30, 200))
    elsewhere = disc(tmp_path / "elsewhere.png", (200, 30, 30))  # the same picture of another thing
    rows = [("noto-v1", "A", same), ("noto-v1", "A", other), ("noto-v1", "B", elsewhere)]
    assert near_copies(rows, hidden, labels) == {same}
    assert np.abs(thumbnail(same) - thumbnail(hidden[0][2])).mean() < COPY_DISTANCE


def test_thumbnails_are_small_and_between_zero_and_one(tmp_path: Path) -> None:
    small = thumbnail(disc(tmp_path / "a.png", (0, 0, 0)))
    assert small.shape == (32, 32, 3)
    assert small.min() == 0
    assert small.max() == 1


def test_other_sets_are_no_styles_and_change_no_split() -> None:
    assert not set(MORE_PACKAGES) & set(PACKAGES)
    assert set(STYLES) == set(PACKAGES)
    pairs = {(f"{k:X}", style) for k in range(200) for style in STYLES}
    splits = assign_splits(pairs, demo=set())
    assert splits == assign_splits(pairs, demo=set())
    assert {"train", "validation", "heldout", "heldout_concept"} == set(splits.values())


@pytest.mark.parametrize(("code", "plain"), [("2764-fe0f", "2764"), ("0023-20E3", "23-20E3"), ("1F34E", "1F34E")])
def test_code_points_are_spelt_alike(code: str, plain: str) -> None:
    assert normalise_hex(code) == plain


def test_finished_pictures_are_left_and_others_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is fetched or rendered again; a folder of another size, or made otherwise, is not mixed with new pictures."""
    monkeypatch.setattr("unidiffuser.emoji.prepare.download", None)
    packages = [*PACKAGES.values(), *MORE_PACKAGES.values(), LABELS_PACKAGE]
    (tmp_path / "metadata.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"pictures made otherwise, not 64 px .*; remove it, or name another folder"):
        prepare(tmp_path, 64)
    (tmp_path / "prepared.json").write_text(json.dumps({"size": 64, "packages": packages, "pictures": 7}))
    assert prepare(tmp_path, 64) == 7
    with pytest.raises(ValueError, match="pictures of 64 px, not 32 px"):
        prepare(tmp_path, 32)


# ---- The workshop stands apart --------------------------------------------------------------------------------------

MAY_SAY = {  # beside the name of the bundled model in quotes, and the prompt of the examples
    "unidiffuser/evaluation/config.py": ["python -m unidiffuser.emoji evaluate"],  # where an option of the judge belongs
    "nodes/nodes_examples.py": ["emoji from Google's"],  # the attribution of the example pictures
}


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            if "emoji" not in path.relative_to(ROOT).parts:
                yield path


def imported(path: Path) -> set[str]:
    """Full names of the modules, and of the names in them, that a file imports."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def test_nothing_outside_imports_it() -> None:
    outside = {path: imported(path) for path in sources("unidiffuser", "nodes", "benchmarks", "docs")}
    assert any("unidiffuser.uvit" in names for names in outside.values())
    wrong = {path.name: name for path, names in outside.items() for name in names if name.startswith("unidiffuser.emoji")}
    assert wrong == {}


def test_nothing_outside_speaks_of_it() -> None:
    wrong = []
    for path in sources("unidiffuser", "nodes"):
        name = path.relative_to(ROOT).as_posix()
        for line in path.read_text("utf-8").splitlines():
            for phrase in ('"emoji"', "'emoji'", "red apple, twemoji", *MAY_SAY.get(name, [])):
                line = line.replace(phrase, "")
            if "emoji" in line.lower():
                wrong.append(f"{name}: {line.strip()}")
    assert wrong == []
