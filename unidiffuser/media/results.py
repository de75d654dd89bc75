"""Output files of a command: PNGs with their settings, captions as JSON, text or training data, a contact sheet.

Files are named after task, input and seed. A file is replaced only by the same run, one with the same inputs and settings;
another run whose names are taken gets the next free ones.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..version import __version__
from .files import read_lines, shown, write_text
from .images import contact_sheet, png_texts, save_png
from .json_files import parse_json

TEXT_FORMATS = ("json", "txt", "metadata")
METADATA = "metadata.jsonl"  # where `train` and `train-lora` read captions


@dataclass(frozen=True)
class Result:
    """One generated picture, caption or both.

    Attributes:
        seed: generates this result alone with the same settings.
        image: the generated picture.
        caption: the generated caption.
        prompt: the text that it was conditioned on.
        picture: the picture file that it was conditioned on.
        score: of the caption, if there is one.
    """

    seed: int
    image: Image.Image | None = None
    caption: str | None = None
    prompt: str | None = None
    picture: str | None = None
    score: float | None = None


def save_results(
    results: Sequence[Result], folder: Path, task: str, settings: Mapping[str, Any], text_format: str = "json"
) -> list[Path]:
    """Write results to `folder`.

    Args:
        results: at least one, in order.
        folder: created if missing.
        task: such as "text-to-image".
        settings: everything that reproduces the results, as JSON values.
        text_format: of the captions: "json" with seeds, inputs and settings; "txt" with one caption per line; or "metadata", a
            line for each picture in the folder's metadata.jsonl, with its caption or else its prompt, as training reads it.

    Returns:
        Paths of the pictures, of the contact sheet if there are several, and of the captions if there are any.

    Raises:
        OSError: a file cannot be written; every file is complete or absent.
        ValueError: an unknown text format.
    """
    if text_format not in TEXT_FORMATS:
        raise ValueError(f"text format must be one of {', '.join(TEXT_FORMATS)}, not {text_format!r}")
    first = results[0]
    name = "-".join(filter(None, (task, _slug(first.prompt or Path(first.picture or "").stem), f"seed{first.seed}")))
    stem = next(stem for stem in _stems(name) if _is_free(folder / stem, results, task, settings, text_format))
    written: list[Path] = []
    for number, result in enumerate(results):
        if result.image is not None:
            written.append(folder / _file(stem, number))
            save_png(result.image, written[-1], metadata(result, task, settings))
    pictures = [result.image for result in results if result.image is not None]
    captions = [result.caption for result in results if result.caption is not None]
    if len(pictures) > 1:
        written.append(folder / f"{stem}-sheet.png")
        save_png(contact_sheet(pictures, captions), written[-1], _sheet_texts(results, task, settings))
    if text_format == "metadata" and pictures:
        written.append(_add_metadata(folder, stem, results))
    elif captions:
        written.append(folder / f"{stem}.{'txt' if text_format == 'txt' else 'json'}")
        write_text(written[-1], _captions(stem, results, task, settings, text_format))
    return written


def _stems(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}-{number}" for number in itertools.count(2))


def _is_free(base: Path, results: Sequence[Result], task: str, settings: Mapping[str, Any], text_format: str) -> bool:
    """Whether every file that the results would replace is there from the same run, or not there at all."""
    stem = base.name
    for number, result in enumerate(results):
        path = base.with_name(_file(stem, number))
        if result.image is not None and path.exists() and _run_of(png_texts(path)) != _run_of(metadata(result, task, settings)):
            return False
    sheet, text = base.with_name(f"{stem}-sheet.png"), base.with_name(f"{stem}.json")
    if sheet.exists() and png_texts(sheet) != _sheet_texts(results, task, settings):
        return False
    whole = _captions(stem, results, task, settings, "txt" if text_format == "txt" else "json")
    if text_format == "txt":
        text = text.with_suffix(".txt")
        return not text.exists() or text.read_bytes() == whole.encode()
    return not text.exists() or _without_captions(text.read_bytes()) == _without_captions(whole.encode())


def _run_of(texts: Mapping[str, str] | None) -> dict[str, str] | None:
    """The text entries of a PNG that tell one run from another."""
    return None if texts is None else {name: text for name, text in texts.items() if name not in ("caption", "Software")}


def _file(stem: str, number: int) -> str:
    return f"{stem}-{number:02d}.png"


def _captions(stem: str, results: Sequence[Result], task: str, settings: Mapping[str, Any], text_format: str) -> str:
    """Content of the file of captions."""
    if text_format == "txt":
        return "".join(f"{result.caption}\n" for result in results if result.caption is not None)
    rows = [
        {**described(result), "file": None if result.image is None else _file(stem, number)}
        for number, result in enumerate(results)
    ]
    return json.dumps({"task": task, "settings": dict(settings), "captions": rows}, ensure_ascii=False, indent=1) + "\n"


def _without_captions(content: bytes) -> Any:
    """What a file of captions says of its run: all but the captions and their scores."""
    try:
        whole = json.loads(content)
        rows = [{name: row[name] for name in row.keys() - {"caption", "score"}} for row in whole["captions"]]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None  # another program's file
    return {**whole, "captions": rows}


def _add_metadata(folder: Path, stem: str, results: Sequence[Result]) -> Path:
    """Add the pictures to the folder's metadata.jsonl; rows of the same pictures are replaced."""
    path = folder / METADATA
    rows = {}
    for number, result in enumerate(results):
        if result.image is not None and (text := result.caption or result.prompt) is not None:
            row = {"file_name": _file(stem, number), "text": text, "seed": result.seed}
            rows[row["file_name"]] = json.dumps(row, ensure_ascii=False)
    kept = [line for line in (read_lines(path) if path.is_file() else []) if line and _file_name(line) not in rows]
    write_text(path, "".join(f"{line}\n" for line in [*kept, *rows.values()]))
    return path


def _file_name(line: str) -> Any:
    try:
        row = parse_json(line, "the line")
    except ValueError:
        return None
    return row.get("file_name") if isinstance(row, dict) else None


def metadata(result: Result, task: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """Text entries for the PNG of a result: its input, seed and settings, which reproduce it."""
    origin = _origin(result)
    if "prompt" in origin:  # ComfyUI parses the entry "prompt" as a graph in JSON
        origin["Description"] = origin.pop("prompt")
    made = {"seed": str(result.seed), "settings": _json({"task": task, **settings})}
    return {**origin, **made, "Software": f"UniDiffuser {__version__}"}


def _sheet_texts(results: Sequence[Result], task: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """Text entries of the contact sheet: the settings, and the inputs and seeds of its pictures."""
    inputs = [{name: text for name, text in _origin(result).items() if name != "caption"} for result in results]
    rows = [{**origin, "seed": result.seed} for origin, result in zip(inputs, results, strict=True)]
    return {"settings": _json({"task": task, **settings}), "results": _json(rows)}


def described(result: Result) -> dict[str, Any]:
    """A result as JSON values, without its picture."""
    score = {} if result.score is None else {"score": round(result.score, 6)}
    return {**_origin(result), "seed": result.seed, **score}


def _origin(result: Result) -> dict[str, str]:
    entries = {"prompt": result.prompt, "picture": result.picture, "caption": result.caption}
    return {name: shown(text) for name, text in entries.items() if text is not None}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _slug(text: str, length: int = 40) -> str:
    """Letters and digits of any script joined by dashes, valid on every file system."""
    return re.sub(r"[\W_]+", "-", text).strip("-").lower()[:length].rstrip("-")
