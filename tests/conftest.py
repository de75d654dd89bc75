"""Fixtures that several files share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import write_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint file with every part at toy size and random weights: 128 px, 16 x 16 latents, steps 4, guidance 2."""
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    write_tiny_checkpoint(path)
    return path
