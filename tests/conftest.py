"""Fixtures that several files share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import write_tiny_checkpoint
from toy_recipe import one_thread, toy, write_pictures


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint file with every part at toy size and random weights: 128 px, 16 x 16 latents, steps 4, guidance 2."""
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    write_tiny_checkpoint(path)
    return path


@pytest.fixture(scope="session")
def toy_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image folder of the toy recipe."""
    return write_pictures(tmp_path_factory.mktemp("toy") / "pictures")


@pytest.fixture(scope="session")
def toy_run(toy_pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of the toy recipe."""
    from unidiffuser.emoji.recipe import Recipe
    from unidiffuser.emoji.sections import train_recipe
    from unidiffuser.emoji.settings import read_settings

    out = tmp_path_factory.mktemp("toy") / "out"
    with one_thread():
        train_recipe(read_settings(Recipe, toy(toy_pictures), "toy"), out, progress=False)
    return out
