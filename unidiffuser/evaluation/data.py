"""The pictures that a model is judged on: an image folder with labels, styles and splits.

The folder is the one that ``unidiffuser.training.emoji`` writes: ``metadata.jsonl`` beside the pictures, one JSON object a
line with at least ``file_name``, ``label``, ``style``, ``base``, ``tone`` and ``split``.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One real picture with what it shows."""

    path: Path
    label: str
    style: str
    split: str

    @property
    def caption(self) -> str:
        """The caption that a model is asked with, ``"label, style"``."""
        return f"{self.label}, {self.style}"

    def image(self) -> Image.Image:
        with Image.open(self.path) as file:
            return file.convert("RGB")


def read_examples(folder: str | Path, concepts: Collection[str] | None = None) -> list[Example]:
    """Every picture of an image folder, in the order of its ``metadata.jsonl``.

    Args:
        folder: the image folder.
        concepts: base hexcodes to keep; pictures of other concepts and with a skin tone are left out. None keeps all.

    Raises:
        FileNotFoundError: if there is no ``metadata.jsonl``.
        ValueError: if a line lacks a field, or nothing is left.
    """
    metadata = Path(folder) / "metadata.jsonl"
    if not metadata.is_file():
        raise FileNotFoundError(
            f"{metadata} does not exist: name the image folder made by `python -m unidiffuser.training.emoji`"
        )
    kept = None if concepts is None else set(concepts)
    examples = []
    for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if kept is None or (row["tone"] == 0 and row["base"] in kept):
                examples.append(Example(Path(folder) / row["file_name"], row["label"], row["style"], row["split"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{metadata}, line {number} is not a labelled picture: {error!r}") from error
    if not examples:
        raise ValueError(f"{metadata} lists no picture of the concepts that are asked for")
    return examples


def in_split(examples: Iterable[Example], split: str) -> list[Example]:
    """The examples of one split; ValueError naming the known splits if there are none."""
    examples = list(examples)
    found = [example for example in examples if example.split == split]
    if not found:
        known = ", ".join(sorted({example.split for example in examples}))
        raise ValueError(f"no picture belongs to the split {split!r}; this folder has: {known}")
    return found


def pixels(images: Iterable[Image.Image]) -> Tensor:
    """Pictures of one size as (B, 3, H, W) float in [-1, 1]."""
    arrays = [np.asarray(image.convert("RGB")) for image in images]
    if len({array.shape for array in arrays}) > 1:
        raise ValueError("the pictures differ in size: resize them to one size first")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
