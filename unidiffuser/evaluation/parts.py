"""Finished work on disk: an interrupted evaluation resumes there and ends with the same figures.

An evaluation consists of *cells* (a task, a split, a seed and its settings), a cell of parts of one batch each. A part is one
file, complete or absent; its items are fixed, so a resumed run computes the missing parts exactly as an uninterrupted one. A
cell's folder name contains a digest of everything its outputs depend on: other settings make another cell, and the old one is
kept for when they are changed back.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm.auto import tqdm

from ..checkpoints.weights import disk_errors
from ..media.files import replacing
from ..media.images import open_image
from ..media.resume import check_settings, run_parts
from .digests import settings_digest

SHOWN = 64  # pictures of a cell kept for the report: the first of a fixed shuffle, so that they are not selected


@dataclass
class Outputs:
    """Outputs of consecutive items.

    Attributes:
        items: one dict of plain values for each item (caption, verdict).
        arrays: name -> (N, ...), entry k of item k (features, embeddings).
        shown: the first pictures, for the report.
        seconds: wall time of each part and its number of items; the only field that differs between runs.
    """

    items: list[dict[str, Any]] = field(default_factory=list)
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    shown: list[Image.Image] = field(default_factory=list)
    seconds: list[tuple[float, int]] = field(default_factory=list)


def collect(
    folder: Path,
    name: str,
    settings: Mapping[str, Any],
    total: int,
    size: int,
    generate: Callable[[range], Outputs],
    progress: bool = True,
) -> Outputs:
    """All outputs of a cell; parts missing on disk are computed and written one by one.

    Args:
        folder: of all cells; this one is kept in `folder/name-digest/`.
        name: of the cell.
        settings: everything the outputs depend on.
        total: items of the cell.
        size: items of a part.
        generate: range of items -> their outputs; its time is recorded as `seconds`.
        progress: a bar on stderr.

    Raises:
        ValueError: a part on disk is damaged.
    """
    cell = folder / f"{name}-{settings_digest([settings, total, size])[:12]}"
    check_settings(cell / "settings.json", settings)
    ranges = [range(first, min(first + size, total)) for first in range(0, total, size)]
    files = [cell / f"{items.start:08d}.safetensors" for items in ranges]
    parts = []

    def make_part(number: int) -> None:
        items = ranges[number]
        begun = time.perf_counter()
        outputs = generate(items)
        outputs.seconds = [(time.perf_counter() - begun, len(items))]
        outputs.shown = outputs.shown[: max(0, SHOWN - items.start)]
        write_part(files[number], outputs)

    with tqdm(total=total, desc=name, disable=not progress) as bar:

        def finished(number: int) -> None:
            parts.append(read_part(files[number]))  # reads new parts too, so that a resumed run has the same numbers
            bar.update(len(ranges[number]))

        run_parts(files, make_part, finished=finished)
    return join(parts)


def write_part(file: Path, outputs: Outputs) -> None:
    """One safetensors file: the arrays, the pictures as PNG bytes, the rest as JSON in the header."""
    tensors = {f"array.{name}": np.ascontiguousarray(array) for name, array in outputs.arrays.items()}
    for k, image in enumerate(outputs.shown):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        tensors[f"shown.{k:04d}"] = np.frombuffer(buffer.getvalue(), dtype=np.uint8)
    metadata = {"items": json.dumps(outputs.items, ensure_ascii=False), "seconds": json.dumps(outputs.seconds)}
    with replacing(file) as temporary, disk_errors():
        save_file(tensors, temporary, metadata)


def read_part(file: Path) -> Outputs:
    """Read a file of `write_part`; ValueError if it is damaged."""
    try:
        with safe_open(file, framework="numpy") as part:
            metadata = part.metadata()
            tensors = {name: part.get_tensor(name) for name in part.keys()}  # noqa: SIM118 (not a mapping)
        arrays = {name.removeprefix("array."): array for name, array in tensors.items() if name.startswith("array.")}
        pictures = [tensors[name].tobytes() for name in sorted(tensors) if name.startswith("shown.")]
        shown = [open_image(data) for data in pictures]
        seconds = [(float(time), int(count)) for time, count in json.loads(metadata["seconds"])]
        return Outputs(json.loads(metadata["items"]), arrays, shown, seconds)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}); delete it and start again: only this part is computed anew") from error


def join(parts: Sequence[Outputs]) -> Outputs:
    """Concatenate consecutive parts."""
    joined = Outputs()
    for part in parts:
        joined.items += part.items
        joined.shown += part.shown
        joined.seconds += part.seconds
    names = parts[0].arrays if parts else {}
    joined.arrays = {name: np.concatenate([part.arrays[name] for part in parts]) for name in names}
    return joined
