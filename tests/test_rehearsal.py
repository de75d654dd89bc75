"""The data path rehearsed: needs img2dataset (IMG2DATASET names the program where it is not on the PATH)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from rehearsal import rehearse

PROGRAM = os.environ.get("IMG2DATASET") or shutil.which("img2dataset")


@pytest.mark.slow
@pytest.mark.skipif(PROGRAM is None, reason="img2dataset is not installed; it needs an environment of its own")
def test_every_count_is_the_expected_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    report = rehearse(tmp_path / "out", PROGRAM, 1200, 20)
    for part in ("filter", "download", "encode"):
        assert report[part]["counted"] == report[part]["expected"], part
    assert report["encode"]["done twice"] == 0
    assert report["agreed"], report
