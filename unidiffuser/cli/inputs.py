"""Pictures and prompts as arguments of a command: files, folders, and `-` for stdin. Nothing here imports torch."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..media.files import decoded, lines_of, shown
from ..media.formats import PICTURE_FORMATS, PICTURE_SUFFIXES, is_picture_name

STDIN = "-"
PURE_NOISE = 1000  # highest noise level of a path

Prompt = Annotated[
    str,
    typer.Argument(
        metavar="PROMPT",
        help='The prompt; "" is the empty caption, - reads prompts from stdin, one a line.',
        show_default=False,
    ),
]
Picture = Annotated[
    Path,
    typer.Argument(
        metavar="PICTURE",
        help="A picture of any size, cropped to the model's shape; - reads it from stdin.",
        show_default=False,
    ),
]
Pictures = Annotated[
    list[Path],
    typer.Argument(metavar="PICTURES", help="Pictures, or folders of them; - reads one from stdin."),
]
PathText = Annotated[
    str,
    typer.Option(
        "--path",
        help='Points "image noise,caption noise" from noise to clean, 0 to 1000, as in "1000,1000 400,0 0,0".',
        show_default=False,
    ),
]


@dataclass(frozen=True)
class Source:
    """A picture that was named on the command line: its name for the results, and its path or content."""

    name: str
    given: Path | bytes


def picture(path: Path) -> Source:
    """One picture, that exists or comes from stdin.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, or nothing on stdin.
    """
    if str(path) == STDIN:
        content = sys.stdin.buffer.read()
        if not content:
            raise ValueError("stdin holds no picture; pipe a picture file into this command")
        return Source("stdin", content)
    if path.is_dir():
        raise ValueError(f"{shown(path)} is a folder; name one picture in it")
    if not path.exists():
        raise FileNotFoundError(f"no picture at {shown(path)}; check the path")
    return Source(str(path), path)


def pictures(paths: list[Path], on_error: str = "raise") -> list[Source]:
    """The pictures of files and folders, those of a folder sorted by name; a missing file is left to `on_error` "skip".

    Raises:
        FileNotFoundError: no such file, or a folder without pictures.
    """
    found: list[Source] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if is_picture_name(file) and file.is_file())
            if not inside:
                raise FileNotFoundError(f"{shown(path)} holds no pictures ({', '.join(PICTURE_FORMATS)})")
            found += [Source(str(file), file) for file in inside]
        elif on_error == "skip" and str(path) != STDIN:
            found.append(Source(str(path), path))
        else:
            found.append(picture(path))
    return found


def prompts(text: str) -> list[str]:
    """The prompt, or those of stdin, one a line without blank lines.

    Raises:
        ValueError: stdin is no text or holds no prompt. Single lines that are not UTF-8 are left to the task.
    """
    if text != STDIN:
        return [text]
    found = [line for line in lines_of(decoded(sys.stdin.buffer.read(), "stdin", each=True)) if line]
    if not found:
        raise ValueError("stdin holds no prompt; pipe one or more lines into this command")
    return found


def prompt_not_picture(option: str, text: str | None) -> None:
    """Refuse a prompt that reads as the file name of a picture; ValueError names the `option`."""
    if text is not None and Path(text).suffix.lower() in PICTURE_SUFFIXES:
        raise ValueError(f"{option} {text!r} reads as the file name of a picture; use --picture for it")


def check_points(text: str) -> str:
    """Points of a path as text, as far as they can be checked without torch; see `path.NoisePath.from_points`."""
    points = text.replace(";", " ").split()
    for number, point in enumerate(points, start=1):
        if not re.fullmatch(r"[^,]+,[^,]+", point):
            raise ValueError(f"point {number} of the path is {point!r}; write image noise,caption noise, as in 400,0")
    if len(points) < 2:
        raise ValueError('a path needs at least 2 points, as in "1000,1000 400,0 0,0"')
    return text


def check_start(points: str, picture: Path | None, prompt: str | None) -> None:
    """Refuse a path that starts below pure noise without what it starts from; ValueError names the option."""
    levels = re.split(r"[ ;,]+", points.strip())[:2]
    for level, given, name, option in zip(
        levels, (picture, prompt), ("picture", "caption"), ("--picture", "--prompt"), strict=True
    ):
        if given is None and re.fullmatch(r"\d+(\.\d*)?", level) and float(level) < PURE_NOISE:
            raise ValueError(
                f"the path starts at noise level {level} of the {name}, not from pure noise: give one with {option}"
            )


def words(text: str | None, of: str) -> list[str | int] | None:
    """Words of an option; a number that is no word of the text `of` is a position."""
    if text is None:
        return None
    there = of.split()
    return [int(word) if re.fullmatch(r"-?\d+", word) and word not in there else word for word in text.split()]
