"""Image folders: pictures and a ``metadata.jsonl`` beside them, the layout that `datasets` calls imagefolder."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..media.images import fit, open_image


class ImageFolder:
    """Square RGB pictures with their captions, held in memory as uint8.

    Args:
        folder: holds ``metadata.jsonl``; every line has ``file_name`` (relative) and ``text`` (a caption or a list of them),
            and may have ``split`` and any other field.
        size: side of the pictures in pixels; others are turned upright, centre-cropped and resized
            (Lanczos); what is transparent becomes white.
        where: field -> accepted values; keeps only the records that match all.

    Raises:
        FileNotFoundError: no ``metadata.jsonl``, or a picture that it names is missing.
        ValueError: a line that is no record, no record left, or (when first used) a picture that is damaged.
    """

    def __init__(self, folder: str | Path, size: int, where: dict[str, Any] | None = None):
        self.folder = Path(folder)
        self.size = size
        index = self.folder / "metadata.jsonl"
        if not index.is_file():
            raise FileNotFoundError(
                f'no metadata.jsonl in {self.folder}; write one line {{"file_name": ..., "text": ...}} for each picture'
            )
        accepted = {k: set(v) if isinstance(v, list | tuple | set) else {v} for k, v in (where or {}).items()}
        self.records: list[dict[str, Any]] = []
        for number, line in enumerate(index.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                captions = record["text"]
                record["file_name"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{index}:{number} is not a record with file_name and text ({error})") from error
            record["text"] = [captions] if isinstance(captions, str) else list(captions)
            if all(record.get(key) in values for key, values in accepted.items()):
                self.records.append(record)
        if not self.records:
            raise ValueError(f"{index} has no record with {where}" if where else f"{index} is empty")
        self._pixels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.records)

    def pixels(self, indices: Tensor) -> Tensor:
        """(B, 3, size, size) in [-1, 1]."""
        return in_floats(self.levels(indices))

    def levels(self, indices: Tensor) -> Tensor:
        """The same as (B, size, size, 3) uint8: a quarter of the bytes, for who makes pixels of them elsewhere."""
        if self._pixels is None:
            with ThreadPoolExecutor() as pool:  # Pillow's decoders let other threads work
                self._pixels = np.stack(list(pool.map(self._open, self.records)))
        return torch.from_numpy(self._pixels[indices.numpy()])

    def _open(self, record: dict[str, Any]) -> np.ndarray:
        path = self.folder / record["file_name"]
        if not path.is_file():
            raise FileNotFoundError(f"{path} is named in metadata.jsonl but is not there")
        image = open_image(path)
        return np.asarray(image if image.size == (self.size,) * 2 else fit(image, self.size, self.size))


def in_floats(levels: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1], where they are."""
    return levels.permute(0, 3, 1, 2).float() / 127.5 - 1


def training_set(options: dict[str, Any]) -> ImageFolder:
    """The pictures a stage learns from: its options ``data``, ``image_size`` and ``where``, of the split "train" or of none."""
    where = {**options.get("where", {}), "split": ["train", None]}
    return ImageFolder(options["data"], options["image_size"], where)
