"""Image folders in memory: pictures and a `metadata.jsonl` beside them, the layout that `datasets` calls imagefolder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.captioned import INDEX, Pair, matches, read_listed
from ..media.images import fit, from_levels

CONCEPT, STYLE = "label", "style"  # fields of the records


class ImageFolder:
    """Square RGB pictures with their captions, held in memory as uint8.

    Args:
        folder: contains `metadata.jsonl`; every line has "file_name" (relative) and "text" (a caption or a list of them), and
            may have "split" and any other field.
        size: side of the pictures in pixels. They are turned upright, centre-cropped and resized (Lanczos), with white where
            they are transparent.
        where: field -> accepted value, or list of them; records that do not match are left out.

    Attributes:
        records: one for each picture, as in the file, "text" always a list.

    Raises:
        FileNotFoundError: no `metadata.jsonl`, or (on first use) a picture that it names is missing.
        ValueError: a line that is not a record, no record left, or (on first use) a picture that is damaged.
    """

    def __init__(self, folder: str | Path, size: int, where: Mapping[str, Any] | None = None):
        self.folder = Path(folder)
        self.size = size
        index = self.folder / INDEX
        if not index.is_file():
            raise FileNotFoundError(
                f'no {INDEX} in {self.folder}; write one line {{"file_name": ..., "text": ...}} for each picture'
            )
        self._pairs = [pair for pair in read_listed(self.folder) if matches(pair.fields, where or {})]
        if not self._pairs:
            raise ValueError(f"{index} has no record with {where}" if where else f"{index} is empty")
        self.records: list[dict[str, Any]] = [{**pair.fields, "text": list(pair.captions)} for pair in self._pairs]
        self._pixels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.records)

    def pixels(self, indices: Tensor) -> Tensor:
        """Pictures of indices (B,) as (B, 3, size, size) in [-1, 1]."""
        return from_levels(self.levels(indices))

    def levels(self, indices: Tensor) -> Tensor:
        """Pictures of indices (B,) as (B, size, size, 3) uint8, to be converted by `from_levels` elsewhere."""
        if self._pixels is None:
            with ThreadPoolExecutor() as pool:  # Pillow's decoders release the interpreter lock
                self._pixels = np.stack(list(pool.map(self._open, self._pairs)))
        return torch.from_numpy(self._pixels[indices.numpy()])

    def _open(self, pair: Pair) -> np.ndarray:
        image = pair.image()
        return np.asarray(image if image.size == (self.size,) * 2 else fit(image, self.size, self.size))


def training_set(folder: str | Path, size: int, where: Mapping[str, Any]) -> ImageFolder:
    """The pictures that a stage trains on: those of the split `train`, or without one, that match the filter."""
    return ImageFolder(folder, size, {**where, "split": ["train", None]})


def unseen_set(folder: str | Path, size: int, styles: Sequence[str]) -> ImageFolder | None:
    """Pictures of concepts that no part is trained on, in these styles; None if the folder has none."""
    try:
        return ImageFolder(folder, size, {"split": "heldout_concept", STYLE: styles})
    except ValueError:
        return None


def field_of(images: ImageFolder, name: str) -> list[str]:
    """A field of all records.

    Raises:
        ValueError: records without it.
    """
    if missing := sum(name not in record for record in images.records):
        raise ValueError(f"{missing} records of {images.folder} have no {name!r}, which the recipe needs; add it to {INDEX}")
    return [record[name] for record in images.records]
