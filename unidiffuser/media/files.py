"""Atomic writing of files, and the lines of text files.

A file is written under a temporary name in the same folder, flushed to the disk and renamed, so it is complete or absent.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` if the block succeeds; otherwise remove it.

    Missing folders are created.

    Raises:
        OSError: the folder cannot be written or the disk is full; the error names `path`.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:40]}-", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp creates files that only their owner can read
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Like `replacing`, but yield a binary file open for writing."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        yield file


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text atomically, creating missing folders."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def lines_of(text: str) -> list[str]:
    """Lines of a text without the white space around them; blank ones stay, as empty strings.

    A line ends at "\\n" only. `str.splitlines` also cuts at U+2028, U+0085 and others, which JSON and prompts may contain.
    """
    return [line.strip() for line in text.split("\n")]


def write_between(path: Path, text: str, markers: tuple[str, str]) -> None:
    """Replace what stands between two markers of a text file.

    Raises:
        ValueError: the file lacks a marker.
    """
    first, last = markers
    before, begin, rest = path.read_text(encoding="utf-8").partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"{path} lacks the markers {first} and {last}")
    write_text(path, f"{before}{first}\n\n{text}\n{last}{after}")


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Lines of a UTF-8 file, see `lines_of`.

    Raises:
        ValueError: the file is not UTF-8 text.
    """
    try:
        return lines_of(Path(path).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error


def _umask() -> int:
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    return mask
