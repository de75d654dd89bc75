"""Resumable parts: what is skipped, divided, refused, and what older runs left on the disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from unidiffuser.cli.bulk import Item, run_items
from unidiffuser.distributed import World
from unidiffuser.evaluation.digests import settings_digest
from unidiffuser.evaluation.parts import Outputs, collect, write_part
from unidiffuser.media.files import write_text
from unidiffuser.media.resume import check_settings, run_parts
from unidiffuser.training.record import LossLog


@pytest.mark.parametrize("processes", [1, 2, 3, 9])
def test_every_part_is_made_once_whatever_the_number_of_processes(tmp_path: Path, processes: int) -> None:
    files = [tmp_path / f"{number}.txt" for number in range(7)]
    write_text(files[3], "there")
    made: list[int] = []
    finished: list[int] = []

    def make(number: int) -> None:
        made.append(number)
        write_text(files[number], str(number))

    for rank in range(processes):
        before = len(finished)
        run_parts(files, make, World(rank, processes, torch.device("cpu")), finished=finished.append)
        assert finished[before:] == list(range(rank, 7, processes))
    assert sorted(made) == [0, 1, 2, 4, 5, 6]
    assert files[3].read_text() == "there"
    run_parts(files, make, valid=lambda number: number != 3)
    assert made[6:] == [3]


def test_settings_must_agree_and_differences_are_named(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    check_settings(file, {"steps": 20, "size": (64, 32), "text": "x" * 50})
    check_settings(file, {"steps": 20, "size": [64, 32], "text": "x" * 50, "new": None})
    with pytest.raises(ValueError, match=r"other settings \(steps 20 there, 10 here, text\); use another folder"):
        check_settings(file, {"steps": 10, "size": [64, 32], "text": "y" * 50})


def test_folders_of_older_runs_go_on(tmp_path: Path) -> None:
    """The names and formats of the files, spelled out."""
    out, items = tmp_path / "out", [Item(k, f"prompt {k}", k, f"{k}.png") for k in range(3)]
    (out / ".parts").mkdir(parents=True)
    (out / ".parts/000000.jsonl").write_text('{"number": 0, "source": "prompt 0", "seed": 0, "error": "of an older run"}\n')
    digest = hashlib.sha256(b"prompt 0\nprompt 1\nprompt 2").hexdigest()
    old = {"task": "generate", "steps": 1, "items": 3, "sources": digest, "group": 1}
    (out / "settings.json").write_text(json.dumps(old, indent=1, ensure_ascii=False) + "\n")

    def work(group: Sequence[Item]) -> list[str | None]:
        return [f"made {item.number}" for item in group]

    alone = World(0, 1, torch.device("cpu"))
    manifest = run_items(items, 1, out, {"task": "generate", "steps": 1}, work, alone, lambda count: None)
    errors = [json.loads(line)["error"] for line in manifest.read_text().splitlines()]
    assert errors == ["of an older run", "made 1", "made 2"]

    cell = tmp_path / f"cell-{settings_digest([{'x': 1}, 5, 2])[:12]}"
    write_text(cell / "settings.json", json.dumps({"x": 1}, indent=1))
    write_part(cell / "00000002.safetensors", Outputs([{"k": "old"}] * 2, {"a": np.array([7, 7])}))
    outputs = collect(tmp_path, "cell", {"x": 1}, 5, 2, lambda some: Outputs([{"k": k} for k in some], {"a": np.array(some)}))
    assert outputs.arrays["a"].tolist() == [0, 1, 7, 7, 4]


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, ""])
def test_damaged_settings_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(ValueError, match=r"settings\.json .*JSON.*use another folder"):
        check_settings(tmp_path / "settings.json", {"steps": 20})


def test_half_a_line_of_the_losses_is_dropped(tmp_path: Path) -> None:
    """A killed process may leave one; the step that it belongs to is done again."""
    lines = [
        '{"step": 0, "loss": 2.0}',
        '{"step": 1, "loss": NaN}',
        '{"loss": 1.0}',
        '{"step": 9, "loss": 1.0}',
        '{"step": 2, "lo',
    ]
    (tmp_path / "losses.jsonl").write_text("\n".join(lines))
    assert [row["step"] for row in LossLog(tmp_path, 5).rows] == [0, 1]
    assert (tmp_path / "losses.jsonl").read_text().count("\n") == 2
