"""Many prompts or pictures on any number of processes, with the same output files as on one.

Items are numbered, and item k has the seed + k. Groups of fixed size are computed as one batch each, so that rounding does not
depend on the number of processes. A finished group leaves a record in the folder `.parts`, and a run that is started again
skips it. The manifest joins the records, one line per item.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..media.files import read_lines, shown, write_text
from ..media.formats import PICTURE_FORMATS, is_picture_name
from ..media.images import fit, open_image, save_png
from ..media.results import METADATA, Result, metadata
from ..media.resume import check_settings, run_parts
from ..options import Options
from ..path import NoisePath
from ..runtime.fast_lora import IMAGE_TO_TEXT, TEXT_TO_IMAGE
from ..streams import Streams
from ..tasks.inputs import valid_prompt

if TYPE_CHECKING:
    from PIL import Image

    from ..distributed import World
    from ..pipeline import UniDiffuser

log = logging.getLogger(__name__)

T = TypeVar("T")

MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class Item:
    """One result to make.

    Attributes:
        number: position in the list of items.
        source: a prompt, or the path of a picture in its folder.
        seed: seed of this item alone.
        file: path of the result in the output folder.
    """

    number: int
    source: str
    seed: int
    file: str


Work = Callable[[Sequence[Item]], "list[str | None]"]
"""Computes a group and writes its files; returns None for each item, or the reason why it failed."""


def prompt_items(path: Path, seed: int, count: int) -> list[Item]:
    """Items for the prompts of a text file, one per line without blank lines, each `count` times.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8 text, or no prompt in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file of prompts at {path}")
    prompts = [line for line in read_lines(path, each=True) if line]
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write one on each line")
    sources = [prompt for prompt in prompts for _ in range(count)]
    return [Item(k, source, seed + k, f"{k:06d}.png") for k, source in enumerate(sources)]


def picture_items(folder: Path, seed: int) -> list[Item]:
    """Items for the pictures of a folder and those below it, by name; `a/b.png` is captioned in `a/b.png.txt`.

    Raises:
        FileNotFoundError: no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of pictures at {folder}")
    files = (path for path in folder.rglob("*") if is_picture_name(path) and path.is_file())
    names = sorted(path.relative_to(folder).as_posix() for path in files)
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
    progress: Callable[[int], Any],
) -> Path:
    """Compute the unfinished groups of this process, and write the manifest when all processes are done.

    Args:
        group_size: items in a group, computed as one batch.
        out: folder of the results.
        settings: everything that the results depend on, as JSON values.
        work: computes a group.
        progress: called with the number of items after each group.

    Returns:
        The manifest: a line for each item, in order, with "number", "source", "seed", and "file" with its "sha256" or "error".

    Raises:
        ValueError: the folder contains results of other settings or other items.
        OSError: a file cannot be written.
    """
    digest = hashlib.sha256("\n".join(shown(item.source) for item in items).encode()).hexdigest()
    check_settings(out / "settings.json", {**settings, "items": len(items), "sources": digest, "group": group_size}, world)
    groups = [items[first : first + group_size] for first in range(0, len(items), group_size)]
    records = [out / ".parts" / f"{number:06d}.jsonl" for number in range(len(groups))]

    def make(number: int) -> None:
        errors = work(groups[number])
        rows = [_row(item, error, out) for item, error in zip(groups[number], errors, strict=True)]
        write_text(records[number], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    run_parts(records, make, world, finished=lambda number: progress(len(groups[number])))
    world.barrier()
    if world.main:
        write_text(out / MANIFEST, "".join(record.read_text(encoding="utf-8") for record in records))
    world.barrier()
    return out / MANIFEST


def _row(item: Item, error: str | None, out: Path) -> dict[str, Any]:
    row = {"number": item.number, "source": shown(item.source), "seed": item.seed}
    if error is not None:
        return {**row, "error": error}
    return {**row, "file": shown(item.file), "sha256": hashlib.sha256((out / item.file).read_bytes()).hexdigest()}


def _usable(group: Sequence[Item], read: Callable[[Item], T]) -> tuple[list[Item], list[T], list[str | None]]:
    """The items of a group that `read` takes, what it returns for them, and for each item of the group its error or None."""
    usable, values = [], []
    errors: list[str | None] = []
    for item in group:
        try:
            values.append(read(item))
        except (ValueError, FileNotFoundError) as error:
            log.warning("%s", error)
            errors.append(str(error))
            continue
        usable.append(item)
        errors.append(None)
    return usable, values, errors


def pictures_of(model: UniDiffuser, out: Path, options: Options, settings: Mapping[str, Any]) -> Work:
    """The work of `unidiffuser generate`: a PNG for each prompt that is UTF-8."""
    chosen = model.resolve(options, TEXT_TO_IMAGE)

    def work(group: Sequence[Item]) -> list[str | None]:
        usable, prompts, errors = _usable(group, lambda item: valid_prompt(item.source, f"prompt {item.number}"))
        if usable:
            text = model.encode_texts(prompts)
            path = NoisePath.text_to_image(chosen["steps"], spacing=chosen["spacing"])
            state = model.run(path, Streams(text=text), chosen, _generators(usable))
            for item, image in zip(usable, model.decode_images(state, chosen), strict=True):
                result = Result(item.seed, image, prompt=item.source)
                save_png(image, out / item.file, metadata(result, "generate", settings))
        return errors

    return work


def captions_of(model: UniDiffuser, folder: Path, out: Path, options: Options, search: Mapping[str, Any]) -> Work:
    """The work of `unidiffuser caption`: a text file for each picture that can be opened.

    With several candidates a JSON file beside it lists them and their scores. `search` is that of `decode_candidates`.
    """
    chosen = model.resolve(options, IMAGE_TO_TEXT)

    def square(item: Item) -> Image.Image:
        return fit(open_image(folder / item.source), chosen["width"], chosen["height"])

    def work(group: Sequence[Item]) -> list[str | None]:
        readable, squares, errors = _usable(group, square)
        if readable:
            generators = _generators(readable)
            given = model.encode_images(squares, 1, chosen, generators)
            path = NoisePath.image_to_text(chosen["steps"], spacing=chosen["spacing"])
            state = model.run(path, given, chosen, generators)
            found = model.decode_candidates(state, chosen, **search, generator=generators)
            for item, candidates in zip(readable, found, strict=True):
                if len(candidates) > 1:
                    rows = [{"caption": each.text, "score": each.score} for each in candidates]
                    write_text((out / item.file).with_suffix(".json"), json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
                write_text(out / item.file, candidates[0].text + "\n")
        return errors

    return work


def write_metadata(folder: Path, out: Path, manifest: Path) -> Path:
    """List the captioned pictures in a metadata.jsonl of the output folder, as `train-lora` and `data encode` read them."""
    path = out / METADATA
    lines = []
    for row in _captioned(manifest):
        name = Path(os.path.relpath(folder / row["source"], out)).as_posix()
        caption = (out / row["file"]).read_text(encoding="utf-8").strip()
        lines.append(json.dumps({"file_name": name, "text": caption}, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))
    return path


def write_beside(folder: Path, out: Path, manifest: Path) -> list[Path]:
    """Write each caption beside its picture, `a.txt` for `a.png`, where there is no such file yet."""
    written = []
    for row in _captioned(manifest):
        path = (folder / row["source"]).with_suffix(".txt")
        if path.exists():
            log.warning("%s is there already and stays as it is", path)
            continue
        write_text(path, (out / row["file"]).read_text(encoding="utf-8"))
        written.append(path)
    return written


def _captioned(manifest: Path) -> list[dict[str, Any]]:
    """The rows of a manifest whose caption was written; without those of names that are no UTF-8, which JSON cannot hold."""
    rows = [json.loads(line) for line in read_lines(manifest) if line]
    return [row for row in rows if "error" not in row and (manifest.parent / row["file"]).is_file()]


def _generators(group: Sequence[Item]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(item.seed % 2**63) for item in group]
