"""Many prompts or pictures on any number of processes, the same bytes as on one.

Items are numbered, and item k is drawn from seed + k. They are cut into groups of fixed size; a group is computed together, by
process (group modulo the number of processes), so what its numerical kernels see does not depend on who else is at work. A
group that is finished leaves a record under ``.parts``; a run that is started again does only what has no record. The manifest
is the records, one line an item.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.captioned import picture_files
from ..media.files import read_lines, write_text
from ..media.images import PICTURE_FORMATS, fit, open_image, save_png
from ..media.results import Result, metadata
from ..options import Options, resolve
from ..path import NoisePath
from ..streams import Streams

if TYPE_CHECKING:
    from ..distributed import World
    from ..pipeline import UniDiffuser

log = logging.getLogger(__name__)

MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class Item:
    """One thing to do: its number, what it starts from (a prompt, or the path of a picture), its seed and its file."""

    number: int
    source: str
    seed: int
    file: str


Work = Callable[[Sequence[Item]], "list[str | None]"]
"""Does a group and writes its files; for each item None, or why it could not be done."""


def prompt_items(path: Path, seed: int, count: int) -> list[Item]:
    """The prompts of a text file, one a line, blank lines passed over; ``count`` items each.

    Raises:
        FileNotFoundError, ValueError: no such file, not UTF-8 text, or nothing in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file of prompts at {path}")
    prompts = [line for line in read_lines(path) if line]
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write one a line")
    sources = [prompt for prompt in prompts for _ in range(count)]
    return [Item(k, source, seed + k, f"{k:06d}.png") for k, source in enumerate(sources)]


def picture_items(folder: Path, seed: int) -> list[Item]:
    """The pictures of a folder and those below it, by name; the caption of ``a/b.png`` goes to ``a/b.png.txt``.

    Raises:
        FileNotFoundError: no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of pictures at {folder}")
    names = sorted(path.relative_to(folder).as_posix() for path in picture_files(folder))
    if not names:
        raise FileNotFoundError(f"{folder} holds no pictures ({', '.join(PICTURE_FORMATS)})")
    return [Item(k, name, seed + k, f"{name}.txt") for k, name in enumerate(names)]


def run_items(
    items: Sequence[Item],
    group_size: int,
    out: Path,
    settings: Mapping[str, Any],
    work: Work,
    world: World,
    tell: Callable[[int], Any],
) -> Path:
    """Do what is not done of this process's groups; write the manifest when everybody is done.

    Args:
        settings: all that decides what the results are; plain values.
        tell: called with the number of items after each group.

    Returns:
        the manifest: a line for each item, in order: "number", "source", "seed", and "file" with its "sha256", or "error".

    Raises:
        ValueError: the folder holds results of other settings or other items.
        OSError: a file cannot be written.
    """
    digest = hashlib.sha256("\n".join(item.source for item in items).encode()).hexdigest()
    _agree(out, {**settings, "items": len(items), "sources": digest, "group": group_size}, world)
    groups = [items[first : first + group_size] for first in range(0, len(items), group_size)]
    for number in range(world.rank, len(groups), world.size):
        record = _record(out, number)
        if not record.is_file():
            errors = work(groups[number])
            rows = [_row(item, error, out) for item, error in zip(groups[number], errors, strict=True)]
            write_text(record, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        tell(len(groups[number]))
    world.barrier()
    if world.main:
        lines = [_record(out, number).read_text(encoding="utf-8") for number in range(len(groups))]
        write_text(out / MANIFEST, "".join(lines))
    world.barrier()
    return out / MANIFEST


def _record(out: Path, group: int) -> Path:
    return out / ".parts" / f"{group:06d}.jsonl"


def _row(item: Item, error: str | None, out: Path) -> dict[str, Any]:
    row = {"number": item.number, "source": item.source, "seed": item.seed}
    if error is not None:
        return {**row, "error": error}
    return {**row, "file": item.file, "sha256": hashlib.sha256((out / item.file).read_bytes()).hexdigest()}


def _agree(out: Path, settings: dict[str, Any], world: World) -> None:
    path = out / "settings.json"
    if world.main and not path.is_file():
        write_text(path, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
    world.barrier()
    there = json.loads(path.read_text(encoding="utf-8"))
    if there != json.loads(json.dumps(settings)):
        names = sorted(k for k in there.keys() | settings.keys() if there.get(k) != settings.get(k))
        raise ValueError(f"{out} holds results made with other settings ({', '.join(names)}); name another folder with --out")


def pictures_of(model: UniDiffuser, out: Path, options: Options, settings: Mapping[str, Any]) -> Work:
    """The work of `unidiffuser generate`: a PNG for each prompt."""
    chosen = resolve(options, model.config)

    def work(group: Sequence[Item]) -> list[str | None]:
        text = model.encode_texts([item.source for item in group])
        path = NoisePath.text_to_image(chosen["steps"], spacing=chosen["spacing"])
        state = model.run(path, Streams(text=text), chosen, _generators(group))
        for item, image in zip(group, model.decode_images(state, chosen), strict=True):
            result = Result(item.seed, image, prompt=item.source)
            save_png(image, out / item.file, metadata(result, "generate", settings))
        return [None] * len(group)

    return work


def captions_of(model: UniDiffuser, folder: Path, out: Path, options: Options) -> Work:
    """The work of `unidiffuser caption`: a line of text for each picture that can be read."""
    chosen = resolve(options, model.config)

    def work(group: Sequence[Item]) -> list[str | None]:
        errors: list[str | None] = []
        readable, squares = [], []
        for item in group:
            try:
                squares.append(fit(open_image(folder / item.source), chosen["width"], chosen["height"]))
            except (ValueError, FileNotFoundError) as error:
                log.warning("%s", error)
                errors.append(str(error))
                continue
            readable.append(item)
            errors.append(None)
        if readable:
            generators = _generators(readable)
            given = model.encode_images(squares, 1, chosen, generators)
            path = NoisePath.image_to_text(chosen["steps"], spacing=chosen["spacing"])
            captions = model.decode_texts(model.run(path, given, chosen, generators), chosen)
            for item, caption in zip(readable, captions, strict=True):
                write_text(out / item.file, caption + "\n")
        return errors

    return work


def _generators(group: Sequence[Item]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(item.seed % 2**63) for item in group]
