"""Output files of a command: PNGs with their settings, captions as JSON or text, a contact sheet."""

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
    """One generated picture, caption or both.

    Attributes:
        seed: generates this result alone with the same settings.
        image: the generated picture.
        caption: the generated caption.
        prompt: the text that it was conditioned on.
        picture: the picture file that it was conditioned on.
    """

    seed: int
    image: Image.Image | None = None
    caption: str | None = None
    prompt: str | None = None
    picture: str | None = None


def check_folder(folder: Path) -> None:
    """Create a folder and check that it is writable, before a long computation starts.

    Raises:
        OSError: it cannot be created or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def save_results(
    results: Sequence[Result], folder: Path, task: str, settings: Mapping[str, Any], text_format: str = "json"
) -> list[Path]:
    """Write results to `folder`, named after task, input and seed; repeating a run replaces its files.

    Args:
        results: at least one, in order.
        folder: created if missing.
        task: such as "text-to-image".
        settings: everything that reproduces the results, as JSON values.
        text_format: of the captions: "json" with seeds, inputs and settings, or "txt" with one caption per line.

    Returns:
        Paths of the pictures, of the contact sheet if there are several, and of the captions if there are any.

    Raises:
        OSError: a file cannot be written; every file is complete or absent.
        ValueError: an unknown text format.
    """
    if text_format not in ("json", "txt"):
        raise ValueError(f'text format must be "json" or "txt", not {text_format!r}')
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
    """Text entries for the PNG of a result: its input, seed and settings, which reproduce it."""
    origin = _origin(result)
    if "prompt" in origin:  # ComfyUI parses the entry "prompt" as a graph in JSON
        origin["Description"] = origin.pop("prompt")
    made = {"seed": str(result.seed), "settings": _json({"task": task, **settings})}
    return {**origin, **made, "Software": f"UniDiffuser {__version__}"}


def _origin(result: Result) -> dict[str, str]:
    entries = {"prompt": result.prompt, "picture": result.picture, "caption": result.caption}
    return {name: text for name, text in entries.items() if text is not None}


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)


def _slug(text: str, length: int = 40) -> str:
    """Letters and digits of any script joined by dashes, valid on every file system."""
    return re.sub(r"[\W_]+", "-", text).strip("-").lower()[:length].rstrip("-")
