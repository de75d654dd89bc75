"""Finished work on disk, so that a run that is killed goes on where it stopped and ends with the same numbers.

The work of an evaluation is cut into *cells* (a task, a split, a seed and its settings), and a cell into parts of a batch
each. A part is one file, complete or absent; the boundaries of the parts are fixed, so a resumed run makes the missing ones
just as an unbroken run would. A cell's folder carries a digest of all that its answers depend on: changed settings are
another cell, and the old one stays for when they are changed back.
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

from ..media.files import replacing
from ..media.images import open_image
from ..media.resume import check_settings, run_parts
from .digests import settings_digest

SHOWN = 64  # pictures of a cell that are kept for the report: the first of a fixed order, so nobody chooses them


@dataclass
class Outputs:
    """What came out for consecutive items.

    Attributes:
        items: one dict of plain values an item (captions, verdicts).
        arrays: name -> (N, ...) numbers, row k of item k (features, embeddings).
        shown: the first pictures.
        seconds: wall time of each part and its number of items; not the same in two runs, unlike all else.
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
    make: Callable[[range], Outputs],
    progress: bool = True,
) -> Outputs:
    """All answers of a cell: those on disk, and the missing ones made and written part by part.

    Args:
        folder: of the run; the cell gets ``folder/name-digest/``.
        settings: all that the answers depend on.
        total: items of the cell; size: items of a part.
        make: answers of a range of items; the time it takes is recorded, its own ``seconds`` are not read.
        progress: a bar on stderr.

    Raises:
        ValueError: a part on disk that is damaged.
    """
    cell = folder / f"{name}-{settings_digest([settings, total, size])[:12]}"
    check_settings(cell / "settings.json", settings)
    ranges = [range(first, min(first + size, total)) for first in range(0, total, size)]
    files = [cell / f"{items.start:08d}.safetensors" for items in ranges]
    parts = []

    def make_part(number: int) -> None:
        items = ranges[number]
        begun = time.perf_counter()
        made = make(items)
        made.seconds = [(time.perf_counter() - begun, len(items))]
        made.shown = made.shown[: max(0, SHOWN - items.start)]
        write_part(files[number], made)

    with tqdm(total=total, desc=name, disable=not progress) as bar:

        def finished(number: int) -> None:
            parts.append(read_part(files[number]))  # reads new parts too, so that a resumed run has the same numbers
            bar.update(len(ranges[number]))

        run_parts(files, make_part, finished=finished)
    return join(parts)


def write_part(file: Path, answers: Outputs) -> None:
    """One safetensors file: the arrays, the pictures as PNG bytes, all else as JSON in the header."""
    tensors = {f"array.{name}": np.ascontiguousarray(array) for name, array in answers.arrays.items()}
    for k, image in enumerate(answers.shown):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        tensors[f"shown.{k:04d}"] = np.frombuffer(buffer.getvalue(), dtype=np.uint8)
    metadata = {"items": json.dumps(answers.items, ensure_ascii=False), "seconds": json.dumps(answers.seconds)}
    with replacing(file) as temporary:
        save_file(tensors, temporary, metadata)


def read_part(file: Path) -> Outputs:
    """What :func:`write_part` wrote; ValueError if it is damaged."""
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
        raise ValueError(f"{file} is damaged ({error}); delete it and start again, only this part is made anew") from error


def join(parts: Sequence[Outputs]) -> Outputs:
    """Consecutive parts as one."""
    whole = Outputs()
    for part in parts:
        whole.items += part.items
        whole.shown += part.shown
        whole.seconds += part.seconds
    names = parts[0].arrays if parts else {}
    whole.arrays = {name: np.concatenate([part.arrays[name] for part in parts]) for name in names}
    return whole
