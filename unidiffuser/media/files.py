"""Atomic writing of files, locks, and the lines of text files.

A file is written under a temporary name in the same folder, flushed to the disk and renamed, so it is complete or absent. The
temporary name holds the process that writes it, so that what a killed process left behind is removed by the next one.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import platform
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

_TEMPORARY = re.compile(r"\..*-ud([0-9a-f]{8})-(\d+)-[^-]*")
"""A temporary name: of the target, of the machine, of the process, and random letters."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` if the block succeeds; otherwise remove it.

    Missing folders are created, and temporary files that killed processes left in the folder are removed.

    Raises:
        OSError: the folder cannot be written or the disk is full; the error names `path`.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clean(path.parent)
        prefix = f".{path.stem[:40]}-ud{_machine()}-{os.getpid()}-"
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=path.suffix)
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


@functools.lru_cache(maxsize=64)  # a folder once per process: it may hold a million files
def _clean(folder: Path) -> None:
    """Remove the temporary files of processes of this machine that no longer run."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            found = _TEMPORARY.fullmatch(entry.name)
            if found is not None and found[1] == _machine() and not is_running(int(found[2])):
                Path(entry.path).unlink(missing_ok=True)


@functools.lru_cache(maxsize=1)
def _machine() -> str:
    """8 digits for what process numbers are unique in: the machine, and the container on it."""
    with contextlib.suppress(OSError):
        return hashlib.sha256(f"{platform.node()} {os.readlink('/proc/self/ns/pid')}".encode()).hexdigest()[:8]
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def is_running(process: int) -> bool:
    """Whether a process of this machine runs, as far as can be seen; True in doubt."""
    if os.name != "posix":
        return True  # os.kill would end it there
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Hold a lock file for the block; it tells other processes which one holds it, and is free as soon as that one ends.

    Args:
        path: the lock file, which stays.
        what: what is locked, for the message.

    Raises:
        ValueError: another process holds it; names that process.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        if not take_lock(file):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(f"{what} is in use by {holder}; wait until it ends, or use another folder") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)  # it names nobody any more


def take_lock(file: IO[Any]) -> bool:
    """Lock an open file until it is closed; False if another process holds it, True where there are no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)  # another: a file system without locks
    return True


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Like `replacing`, but yield a binary file open for writing."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        yield file


def check_folder(folder: Path) -> None:
    """Create a folder and check that it is writable, before a long computation starts.

    Raises:
        OSError: it cannot be created or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text atomically, creating missing folders."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def shown(name: str | os.PathLike[str]) -> str:
    """A file name or text for messages and files in UTF-8: surrogates, bytes that are no UTF-8, appear as \\udcNN."""
    return os.fspath(name).encode("utf-8", "backslashreplace").decode("utf-8")


def is_plain_name(name: object) -> bool:
    """Whether a value from a file can be the name of a file beside it: no path, and not too long for a file system."""
    if not isinstance(name, str) or not name or "\0" in name or name in (".", ".."):
        return False
    return Path(name).name == name and "\\" not in name and len(name.encode("utf-8", "replace")) <= 255


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


def read_lines(path: str | os.PathLike[str], each: bool = False) -> list[str]:
    """Lines of a UTF-8 file, see `lines_of`.

    Args:
        path: the file.
        each: leave bytes that are not UTF-8 to the caller, who can drop single lines: they become surrogates, see `is_text`.

    Raises:
        ValueError: the file is not UTF-8 text.
    """
    return lines_of(decoded(Path(path).read_bytes(), str(path), each))


def decoded(data: bytes, name: str, each: bool = False) -> str:
    """The text of a file in UTF-8, without its byte order mark; arguments and errors as for `read_lines`."""
    try:
        if each and b"\0" in data:  # UTF-16, not a text with a few bad bytes
            raise ValueError("it has NUL bytes")
        return data.decode("utf-8-sig", "surrogateescape" if each else "strict")
    except ValueError as error:
        raise ValueError(f"{name} is not UTF-8 text ({error}); save it as UTF-8") from error


def is_text(text: str) -> bool:
    """Whether a text can be written as UTF-8: no surrogates, which stand for bytes that are not."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _umask() -> int:
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    return mask
