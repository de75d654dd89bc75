"""Files of named tensors: opened safely, mapped instead of read, written whole or not at all.

Two kinds are read, told apart by their content and never by their name: safetensors, and what torch.save wrote (with
weights_only, so that no code in a pickle runs). Both are memory-mapped: a tensor costs memory once it is touched, and only
as pages of the file that the system may drop again.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..media.files import atomic_write

# Pages of a mapped file count as resident until the mapping goes, so long copies are made through one mapping per window.
WINDOW_BYTES = 32 << 20

_SAFETENSORS_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class WeightFiles:
    """The tensors of one file, or of the several that a sharded checkpoint consists of.

    Args:
        *paths: files that together hold the tensors; a later one wins where a name occurs twice.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is not a safe, whole file of tensors; the text says what it is instead.
    """

    def __init__(self, *paths: Path):
        self.paths = paths
        self.shapes = {name: shape_of(tensor) for name, tensor in self.open().items()}

    @property
    def name(self) -> str:
        """The file for use in messages."""
        return str(self.paths[0]) if len(self.paths) == 1 else f"{self.paths[0].parent} ({len(self.paths)} shards)"

    def open(self) -> dict[str, Tensor]:
        """All tensors through a fresh memory map, which lives as long as any of them. Writing to one changes no file."""
        tensors: dict[str, Tensor] = {}
        for path in self.paths:
            tensors |= _open(path)
        return tensors

    def metadata(self) -> dict[str, str]:
        """The texts in a safetensors header; none in other files."""
        if not is_safetensors(self.paths[0]):
            return {}
        with safe_open(self.paths[0], framework="pt") as file:
            return dict(file.metadata() or {})


def shape_of(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and dtype on "meta"."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def is_safetensors(path: Path) -> bool:
    """Whether a file begins like safetensors: a length, then a JSON object of at most that length."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] < 100 << 20


def find_weights(folder: Path, stem: str) -> WeightFiles | None:
    """`stem` as .safetensors or .bin in a folder, whole or as the shards of an index; safetensors first; None if absent."""
    for suffix in (".safetensors", ".bin"):
        path = folder / (stem + suffix)
        if path.is_file():
            return WeightFiles(path)
        index = folder / (stem + suffix + ".index.json")
        if index.is_file():
            return WeightFiles(*(folder / name for name in _shard_names(index)))
    return None


def _shard_names(index: Path) -> list[str]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} has no weight_map; download it again.")
    shards = sorted(set(names.values()))
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{index} lists {len(shards)} shards and {missing[0]} is not there; download it too.")
    return shards


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError that names the file when it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object; download it again.")
    return value


def _open(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    if is_safetensors(path):
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or incomplete ({error}); download or convert it again.") from error
    _refuse_what_is_no_weights(path)
    try:
        # NOTE: files of torch < 1.6 are plain pickles, which cannot be mapped.
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise ValueError(f"{path} is refused: it is damaged, or a pickle of something other than tensors.") from error
        raise ValueError(
            f"{path} is refused: its pickle asks for {code[1]}, and what is not a plain tensor could run code when loaded. "
            "Use a safetensors version, or a file that holds a plain state dict."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged, incomplete or no weights file ({_first_line(error)}).") from error
    if not isinstance(value, dict) or not all(isinstance(tensor, Tensor) for tensor in value.values()):
        raise ValueError(f"{path} holds no plain state dict of named tensors.")
    return value


def _refuse_what_is_no_weights(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(256).lstrip().lower()
    if not head:
        raise ValueError(f"{path} is empty; download it again.")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-lfs pointer, not the weights; run `git lfs pull` there or download the file.")
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{path} is a web page, not weights; use the site's download link for the file itself.")
    if not head.startswith((b"pk", b"\x80")):  # zip, and the pickles of old torch
        raise ValueError(f"{path} is neither a safetensors nor a PyTorch weights file, or its beginning is damaged.")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def windows(sizes: Mapping[str, int], limit: int = WINDOW_BYTES) -> Iterator[list[str]]:
    """Split names, kept in order, into groups of at most `limit` bytes (or of one name that is larger)."""
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


def write_safetensors(
    path: Path, shapes: Mapping[str, Tensor], tensors: Callable[[], Iterable[tuple[str, Tensor]]], metadata: dict[str, str]
) -> None:
    """Write safetensors one tensor at a time, so that no more than one of them need be in memory.

    Args:
        path: the file to make or replace.
        shapes: for each name a tensor, possibly on "meta", of the shape and dtype to write.
        tensors: called once; gives (name, tensor) for every name, in the order of `shapes`.
        metadata: texts for the header.

    Raises:
        OSError: the file cannot be written (no room, no right); there is none then.
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
                raise ValueError(f"{name} came as {given} {tuple(tensor.shape)} {tensor.dtype}; nothing was written.")
            data = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(data.view(torch.uint8).numpy().data)
