"""Files of named tensors: safe reading by memory map, and atomic writing.

Two formats are read, recognised by content, not by name: safetensors, and files of torch.save (with `weights_only`, so that a
pickle cannot run code). Both are memory-mapped: a tensor takes memory once it is touched, as pages of the file that the system
may drop again.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..media.files import atomic_write, is_plain_name
from ..media.json_files import brief, read_object

# Touched pages of a mapped file stay resident until it is unmapped, so long copies map each window of tensors anew.
WINDOW_BYTES = 32 << 20

_SAFETENSORS_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class WeightFiles:
    """Named tensors of one file, or of all shards of a sharded checkpoint.

    Args:
        *paths: the files; if a name occurs twice, the later file wins.

    Attributes:
        shapes: for each name, a tensor on "meta" of its shape and dtype.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is damaged, unsafe or no file of tensors; the text says what it is.
    """

    def __init__(self, *paths: Path):
        self.paths = paths
        self.shapes = {name: shape_of(tensor) for name, tensor in self.open().items()}

    @property
    def name(self) -> str:
        """Path for error texts."""
        return str(self.paths[0]) if len(self.paths) == 1 else f"{self.paths[0].parent} ({len(self.paths)} shards)"

    def open(self) -> dict[str, Tensor]:
        """All tensors through a new memory map, which lives as long as any of them.

        Writing to a tensor does not change the file.
        """
        tensors: dict[str, Tensor] = {}
        for path in self.paths:
            tensors |= _open_without_code(path)
        return tensors

    def metadata(self) -> dict[str, str]:
        """Metadata of a safetensors header; {} for other files."""
        if not is_safetensors(self.paths[0]):
            return {}
        with safe_open(self.paths[0], framework="pt") as file:
            return dict(file.metadata() or {})


def shape_of(tensor: Tensor) -> Tensor:
    """A tensor on "meta" of the same shape and dtype."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def is_safetensors(path: Path) -> bool:
    """Whether a file begins like safetensors, with a length and a JSON object."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] < 100 << 20


def find_weights(folder: Path, stem: str) -> WeightFiles | None:
    """Find `stem`.safetensors or `stem`.bin in a folder, in one file or in shards.

    Returns:
        The files, safetensors preferred; None if there are none.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: a file is damaged.
    """
    for suffix in (".safetensors", ".bin"):
        path = folder / (stem + suffix)
        if path.is_file():
            return WeightFiles(path)
        index = folder / (stem + suffix + ".index.json")
        if index.is_file():
            return WeightFiles(*(folder / name for name in _shard_names(index)))
    return None


def _shard_names(index: Path) -> list[str]:
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} has no weight_map, so its shards are unknown; download it again.")
    strange = [name for name in names.values() if not is_plain_name(name)]
    if strange:
        raise ValueError(f"{index} names {brief(strange[0])}, which is no file beside it; download it again.")
    shards = sorted(set(names.values()))
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{index} lists {len(shards)} shards and {missing[0]} is missing; download it too.")
    return shards


_written_out = torch.storage.TypedStorage.__str__


@contextmanager
def _short_messages() -> Iterator[None]:
    """Keep torch's unpickler from writing a storage into its error, number by number: a large one takes minutes.

    Whichever thread leaves last restores torch's own method, as none restores what another has set.
    """
    kind = torch.storage.TypedStorage
    kind.__str__ = lambda storage: f"a storage of {storage.dtype}"  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.__str__ = _written_out  # type: ignore[method-assign]


def _open_without_code(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    if is_safetensors(path):
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged or incomplete ({_first_line(error)}); download or convert it again."
            ) from error
    _refuse_text_content(path)
    try:
        # NOTE: files of torch < 1.6 are plain pickles, which cannot be mapped.
        with _short_messages():
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise ValueError(
                f"{path} is refused: it is damaged, or a pickle of something other than tensors; download it again."
            ) from error
        raise ValueError(
            f"{path} is refused: its pickle asks for {code[1]}, which could run code when loaded. "
            "Use a safetensors file, or one that holds a plain state dict."
        ) from error
    except Exception as error:  # damaged pickles make the unpickler raise almost anything
        raise ValueError(
            f"{path} is damaged, incomplete or no weights file ({_first_line(error)}); download it again."
        ) from error
    if not isinstance(value, dict) or not all(isinstance(tensor, Tensor) for tensor in value.values()):
        raise ValueError(f"{path} holds no plain state dict of named tensors; save its state dict alone.")
    return value


def _refuse_text_content(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(256).lstrip().lower()
    if not head:
        raise ValueError(f"{path} is empty; download it again.")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is a git-lfs pointer, not the weights; run `git lfs pull` in its folder or download the file."
        )
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{path} is a web page, not weights; use the download link of the file itself.")
    if not head.startswith((b"pk", b"\x80")):  # zip, and the pickles of old torch
        raise ValueError(
            f"{path} is neither a safetensors nor a PyTorch weights file, or its beginning is damaged; download it again."
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def windows(sizes: Mapping[str, int], limit: int = WINDOW_BYTES) -> Iterator[list[str]]:
    """Split names into groups of at most `limit` bytes, or of one larger tensor."""
    group: list[str] = []
    total = 0
    for name, size in sizes.items():
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    if group:
        yield group


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn the error that the safetensors library raises for a full disk into the OSError that it is."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code) if number else _first_line(error)) from error


def write_safetensors(
    path: Path, shapes: Mapping[str, Tensor], tensors: Callable[[], Iterable[tuple[str, Tensor]]], metadata: dict[str, str]
) -> None:
    """Write a safetensors file atomically, with one tensor in memory at a time.

    Args:
        path: the file; replaced if it exists.
        shapes: for each name a tensor, possibly on "meta", of the shape and dtype to write.
        tensors: called once; yields (name, tensor) for every name, in the order of `shapes`.
        metadata: strings for the header.

    Raises:
        OSError: the disk is full or the folder not writable; an existing file stays as it is.
        ValueError: a tensor differs from its entry in `shapes`; likewise.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, shape in shapes.items():
        end = offset + shape.numel() * shape.element_size()
        header[name] = {"dtype": _SAFETENSORS_NAMES[shape.dtype], "shape": list(shape.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # aligned data can be mapped
    with atomic_write(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (name, shape), (given, tensor) in zip(shapes.items(), tensors(), strict=True):
            if given != name or tensor.shape != shape.shape or tensor.dtype != shape.dtype:
                raise ValueError(
                    f"{name} is {given} {tuple(tensor.shape)} {tensor.dtype}, not as announced; nothing was written."
                )
            data = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(data.view(torch.uint8).numpy().data)
