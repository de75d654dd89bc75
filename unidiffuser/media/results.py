"""What a command leaves behind: PNG files that know how they were made, captions as JSON or text, a contact sheet."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..version import __version__
from .files import write_text
from .images import contact_sheet, save_png


@dataclass(frozen=True)
class Result:
    """One result: a picture, a caption or both, the seed that makes it alone, and the prompt or file it came from."""

    seed: int
    image: Image.Image | None = None
    caption: str | None = None
    prompt: str | None = None
    picture: str | None = None


def check_folder(folder: Path) -> None:
    """Make the folder and see whether it takes files, before minutes are spent on what could not be written.

    Raises:
        OSError: it cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def save_results(
    results: Sequence[Result], folder: Path, task: str, settings: Mapping[str, Any], text_format: str = "json"
) -> list[Path]:
    """Write results to `folder` under names made of task, origin and seed; a repeated run replaces its own files.

    Args:
        results: at least one, in order.
        folder: made if absent.
        task: such as "text-to-image".
        settings: all that is needed to make the results again; plain values.
        text_format: of the captions: "json" holds seeds, origins and settings as well, "txt" is a caption a line.

    Returns:
        The files: pictures, then the contact sheet if there are several, then the captions if there are any.

    Raises:
        OSError: a file cannot be written; each file is complete or absent.
        ValueError: an unknown text format.
    """
    if text_format not in ("json", "txt"):
        raise ValueError(f'captions are written as "json" or "txt", not {text_format!r}')
    first = results[0]
    stem = "-".join(filter(None, (task, _slug(first.prompt or Path(first.picture or "").stem), f"seed{first.seed}")))
    written: list[Path] = []
    names: list[str | None] = []
    for number, result in enumerate(results):
        names.append(None if result.image is None else f"{stem}-{number:02d}.png")
        if result.image is not None:
            path = folder / f"{stem}-{number:02d}.png"
            save_png(result.image, path, metadata(result, task, settings))
            written.append(path)
    pictures = [result.image for result in results if result.image is not None]
    captions = [result.caption for result in results if result.caption is not None]
    if len(pictures) > 1:
        path = folder / f"{stem}-sheet.png"
        save_png(contact_sheet(pictures, captions), path, {"settings": _json({"task": task, **settings})})
        written.append(path)
    if captions:
        path = folder / f"{stem}.{text_format}"
        rows = [{**_origin(result), "seed": result.seed, "file": name} for result, name in zip(results, names, strict=True)]
        whole = json.dumps({"task": task, "settings": dict(settings), "captions": rows}, ensure_ascii=False, indent=1)
        write_text(path, (whole if text_format == "json" else "\n".join(captions)) + "\n")
        written.append(path)
    return written


def metadata(result: Result, task: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """The text entries of a result's PNG: where it came from, its seed, and all that is needed to make it again."""
    origin = _origin(result)
    if "prompt" in origin:  # ComfyUI takes a PNG's "prompt" for a graph in JSON and fails on words
        origin["Description"] = origin.pop("prompt")
    made = {"seed": str(result.seed), "settings": _json({"task": task, **settings})}
    return {**origin, **made, "Software": f"UniDiffuser {__version__}"}


def _origin(result: Result) -> dict[str, str]:
    entries = {"prompt": result.prompt, "picture": result.picture, "caption": result.caption}
    return {name: text for name, text in entries.items() if text is not None}


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)


def _slug(text: str, length: int = 40) -> str:
    """Letters and digits of any script, joined by dashes: a name for every file system."""
    return re.sub(r"[\W_]+", "-", text).strip("-").lower()[:length].rstrip("-")
