"""The rehearsal of the data path, small: needs img2dataset (IMG2DATASET names the program where it is not on the PATH)."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

PROGRAM = os.environ.get("IMG2DATASET") or shutil.which("img2dataset")


@pytest.mark.skipif(PROGRAM is None, reason="img2dataset is not installed; it wants an environment of its own")
def test_every_count_is_the_expected_one(tmp_path, monkeypatch):
    path = Path(__file__).parents[1] / "benchmarks/data_rehearsal.py"
    spec = importlib.util.spec_from_file_location("data_rehearsal", path)
    rehearsal = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rehearsal)
    monkeypatch.setenv("PYTHONPATH", str(path.parents[1]))
    report = rehearsal.rehearse(tmp_path / "out", PROGRAM, 1200, 20)
    for part in ("filter", "download", "encode"):
        assert report[part]["counted"] == report[part]["expected"], part
    assert report["encode"]["done twice"] == 0
    assert report["agreed"], report
