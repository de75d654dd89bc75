"""The demonstration data: what is a copy of a picture that is kept secret, and names of icons."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from unidiffuser.emoji.prepare import (
    COPY_DISTANCE,
    MORE_PACKAGES,
    PACKAGES,
    STYLES,
    assign_splits,
    near_copies,
    normalise_hex,
    thumbnail,
)


def disc(path: Path, colour: tuple[int, int, int], radius: int = 40) -> Path:
    image = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(image).ellipse((64 - radius, 64 - radius, 64 + radius, 64 + radius), fill=colour)
    image.save(path)
    return path


def test_a_drawing_taken_over_from_a_secret_picture_is_found(tmp_path: Path) -> None:
    labels = {"A": {"base": "A"}, "B": {"base": "B"}}
    secret = [("noto", "A", disc(tmp_path / "secret.png", (200, 30, 30)))]
    same = disc(tmp_path / "same.png", (190, 40, 30))  # a slightly other red
    other = disc(tmp_path / "other.png", (30, 30, 200))
    elsewhere = disc(tmp_path / "elsewhere.png", (200, 30, 30))  # the same picture of another thing
    rows = [("noto-v1", "A", same), ("noto-v1", "A", other), ("noto-v1", "B", elsewhere)]
    assert near_copies(rows, secret, labels) == {same}
    assert np.abs(thumbnail(same) - thumbnail(secret[0][2])).mean() < COPY_DISTANCE


def test_thumbnails_are_small_and_between_nought_and_one(tmp_path: Path) -> None:
    small = thumbnail(disc(tmp_path / "a.png", (0, 0, 0)))
    assert small.shape == (32, 32, 3)
    assert small.min() == 0
    assert small.max() == 1


def test_other_houses_are_no_styles_and_change_no_split() -> None:
    assert not set(MORE_PACKAGES) & set(PACKAGES)
    assert set(STYLES) == set(PACKAGES)
    pairs = {(f"{k:X}", style) for k in range(200) for style in STYLES}
    splits = assign_splits(pairs, demo=set())
    assert splits == assign_splits(pairs, demo=set())
    assert {"train", "validation", "heldout", "heldout_concept"} == set(splits.values())


@pytest.mark.parametrize(("code", "plain"), [("2764-fe0f", "2764"), ("0023-20E3", "23-20E3"), ("1F34E", "1F34E")])
def test_code_points_are_spelt_alike(code: str, plain: str) -> None:
    assert normalise_hex(code) == plain
