"""Download of the authors' checkpoints from the Hugging Face Hub, or from the mirror in HF_ENDPOINT.

A file is written under a temporary name, continued after a break, and gets its own name once its size and checksum are those of
the repository's listing.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..media.files import take_lock
from .published import LICENCE, REPOSITORIES, needed_files

RECORD = "LICENCE.txt"
"""Written into the folder when the licence is accepted; names the repository."""
_PARTIAL = ".partial"
_BAR = "huggingface_hub.http_get"  # the hub's name for the bar of a file


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository.

    Attributes:
        name: path in the repository, with "/".
        size: in bytes.
        algorithm: "sha256", or "git" for the SHA-1 of a git blob.
        checksum: hexadecimal.
    """

    name: str
    size: int
    algorithm: str
    checksum: str

    def matches(self, path: Path) -> bool:
        """Whether a local file exists and has this size and checksum."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        digest = hashlib.sha256()
        if self.algorithm == "git":
            digest = hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest() == self.checksum


def licence_notice(version: str) -> str:
    """What a user should know before the download; `version` is "v1" or "v0"."""
    return (
        f"The weights of {REPOSITORIES[version]} are the work of its authors and published under {LICENCE}\n"
        "(https://www.gnu.org/licenses/agpl-3.0.html); this program's Apache-2.0 does not cover them. Among other things the\n"
        f"{LICENCE} asks for the source code of changed versions that are passed on or offered over a network. Their page,\n"
        f"https://huggingface.co/{REPOSITORIES[version]}, names intended uses and limits."
    )


def is_accepted(version: str, folder: Path) -> bool:
    """Whether the licence was accepted for this folder.

    Raises:
        ValueError: the folder is another checkpoint's.
    """
    record = folder / RECORD
    if not record.is_file():
        return False
    text = record.read_text(encoding="utf-8", errors="replace")
    if REPOSITORIES[version] in text:
        return True
    if other := next((name for name in REPOSITORIES.values() if name in text), None):
        raise ValueError(f"{folder} is the folder of {other}; choose another one for {REPOSITORIES[version]}.")
    return False


def download(
    version: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    accept_licence: bool = False,
    progress: bool = True,
    report: Callable[[str], object] = lambda line: None,
) -> Path:
    """Download a published checkpoint into a folder that `unidiffuser.load` takes.

    Files that are complete are kept, a broken one is continued. Needs the extra "download".

    Args:
        version: "v1" or "v0".
        folder: None for unidiffuser-v1 or unidiffuser-v0 in the working directory.
        accept_licence: whether the licence in `licence_notice` is accepted; asked for once per folder.
        progress: a bar for each file on stderr.
        report: called with a line about each file.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: a needed file or the repository does not exist at the endpoint.
        OSError: no connection, a full disk, or a file of wrong size or checksum; complete files stay.
        ValueError: an unknown version, the licence is not accepted, the extra is missing, or the folder has other files.
    """
    if version not in REPOSITORIES:
        raise ValueError(f"there is no published checkpoint {version!r}; use one of {', '.join(REPOSITORIES)}.")
    folder = Path(f"unidiffuser-{version}" if folder is None else folder)
    accepted = is_accepted(version, folder)
    if not (accepted or accept_licence):
        raise ValueError(f"{licence_notice(version)}\nAccept the licence (--accept-licence, accept_licence=True) to download.")
    hub = _hub()
    repository, endpoint = REPOSITORIES[version], os.environ.get("HF_ENDPOINT", "").rstrip("/") or hub.constants.ENDPOINT
    revision, files = _listing(hub, repository, endpoint)
    missing = []
    for file in files:
        path = folder / file.name
        if file.matches(path):
            report(f"{file.name}: already there")
            continue
        if path.exists() and not accepted:
            raise ValueError(f"{path} exists and is not {repository}'s; choose an empty folder.")
        missing.append(file)
    _check_space(folder, missing)
    if not accepted:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).write_text(f"{licence_notice(version)}\n\nAccepted before the download.\n", encoding="utf-8")
    with _bars(hub, progress):
        for number, file in enumerate(missing, 1):
            report(f"{number} of {len(missing)}: {file.name} ({_size(file.size)})")
            url = hub.hf_hub_url(repository, file.name, revision=revision, endpoint=endpoint)
            _fetch(hub, url, file, folder / file.name, f"{repository} at {endpoint}")
    return folder


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.file_download
        import huggingface_hub.utils
    except ImportError as error:
        raise ValueError(
            f"downloading needs the package huggingface_hub, which cannot be imported ({error}): "
            'install it with `pip install "unidiffuser[download]"`.'
        ) from error
    return huggingface_hub


def _listing(hub: Any, repository: str, endpoint: str) -> tuple[str, list[RemoteFile]]:
    """Commit of the newest version, and its needed files."""
    with _clear_errors(hub, "the list of files", f"{repository} at {endpoint}"):
        info = hub.HfApi(endpoint=endpoint).model_info(repository, files_metadata=True)
        entries = {entry.rfilename: entry for entry in info.siblings or []}
    try:
        names = needed_files(entries.keys())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{repository} at {endpoint} is no complete diffusers folder: {error}.") from None
    files = []
    for name in names:
        entry = entries[name]
        algorithm, checksum = ("sha256", entry.lfs["sha256"]) if entry.lfs else ("git", entry.blob_id)
        if entry.size is None or checksum is None:
            raise ValueError(
                f"{endpoint} lists {name} without size or checksum, so it can't be checked; use another HF_ENDPOINT."
            )
        files.append(RemoteFile(name, entry.size, algorithm, checksum))
    return info.sha, files


def _check_space(folder: Path, missing: list[RemoteFile]) -> None:
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    partial = sum(path.stat().st_size for file in missing if (path := _partial(folder / file.name, file)).is_file())
    needed, free = sum(file.size for file in missing) - partial, shutil.disk_usage(there).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{_size(needed)} are needed in {folder}, and {_size(free)} are free; make room")


def _partial(path: Path, file: RemoteFile) -> Path:
    """The temporary name, which holds the checksum so that another version is never continued."""
    return path.with_name(f"{path.name}.{file.checksum[:16]}{_PARTIAL}")


def _fetch(hub: Any, url: str, file: RemoteFile, path: Path, where: str) -> None:
    """Download one file, from where the last attempt ended.

    Raises:
        FileNotFoundError: the server does not have it.
        OSError: as for `download`.
        ValueError: another process downloads it.
    """
    partial = _partial(path, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("ab") as held:
        if not take_lock(held):
            raise ValueError(f"{file.name} is being downloaded by another process; wait until that one ends.")
        with _clear_errors(hub, file.name, where):
            _append(hub, url, partial, file)
    size = partial.stat().st_size
    if not file.matches(partial):
        partial.unlink()
        found = "another checksum than" if size == file.size else f"{size} bytes, not the {file.size} of"
        raise OSError(f"{file.name} of {where} has {found} the listing, and was removed; run the command again.")
    partial.replace(path)
    for old in path.parent.glob(f"{path.name}.*{_PARTIAL}"):  # of other versions
        old.unlink(missing_ok=True)


def _append(hub: Any, url: str, partial: Path, file: RemoteFile) -> None:
    """Add the rest of a file to its beginning; a transfer that breaks is continued as long as data arrive."""
    while True:
        with partial.open("ab") as output:
            there = output.tell()
            if there >= file.size:
                return
            try:
                headers = hub.utils.build_hf_headers()
                hub.file_download.http_get(url, output, resume_size=there, headers=headers, displayed_filename=file.name)
                return
            except Exception as error:
                # NOTE: the hub's client continues some broken transfers itself; a reset connection is not among them.
                if not _is_network(hub, error) or output.tell() <= there:
                    raise


def _is_network(hub: Any, error: Exception) -> bool:
    """Whether a transfer broke, as opposed to a refusal by the server or trouble with the local disk."""
    if isinstance(error, hub.errors.HfHubHTTPError):
        return False
    return isinstance(error, hub.errors.HTTPError) or (isinstance(error, OSError) and error.errno is None)


@contextmanager
def _clear_errors(hub: Any, what: str, where: str) -> Iterator[None]:
    """Turn errors of the hub's client into one line: FileNotFoundError for what does not exist, else OSError."""
    again = "complete files stay, and the next run continues"
    try:
        yield
    except hub.errors.EntryNotFoundError:
        raise FileNotFoundError(f"{what} is missing in {where}; try again later, or another HF_ENDPOINT.") from None
    except hub.errors.RepositoryNotFoundError:
        raise FileNotFoundError(f"{where} does not exist or is not public; check HF_ENDPOINT.") from None
    except hub.errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise OSError(f"cannot get {what} of {where}: the server answered {status}; {again}.") from None
    except hub.errors.OfflineModeIsEnabled:
        raise OSError(f"cannot get {what} of {where}: HF_HUB_OFFLINE forbids it; unset it.") from None
    except (hub.errors.HTTPError, OSError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise OSError(errno.ENOSPC, f"the disk is full; make room and run the command again: {again}") from None
        if getattr(error, "errno", None) is not None:
            raise  # names the local file
        raise OSError(f"cannot get {what} of {where}: no connection, or it broke ({_first_line(error)}); {again}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{where} does not answer like the Hugging Face Hub ({_first_line(error)}); check HF_ENDPOINT.") from None


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


@contextmanager
def _bars(hub: Any, shown: bool) -> Iterator[None]:
    if shown or hub.utils.are_progress_bars_disabled(_BAR):
        yield
        return
    hub.utils.disable_progress_bars(_BAR)
    try:
        yield
    finally:
        hub.utils.enable_progress_bars(_BAR)


def _size(count: int) -> str:
    """Bytes in decimal units."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"
