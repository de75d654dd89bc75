"""Latent shards: files of encoded pairs, and the order in which training reads them.

A shard is one safetensors file, so that single rows can be read and truncation is detected from the header:

    mean, std   (N, C, H/8, W/8) fp16   the autoencoder's posterior, scaled; a sample is mean + std * noise
    clip_img    (N, 1, D)        fp16   CLIP image tokens
    text        (T, L, text_dim) fp16   text latents, those of one picture next to each other
    first       (N + 1,)         int64  the captions of picture i are rows first[i] .. first[i + 1] - 1 of `text`

The header contains the keys of the pictures, their captions, and the counts of dropped ones. `manifest.json` beside the shards
is written when all of them are finished, and lists what training reads.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.weights import disk_errors
from ..media.files import is_plain_name, replacing
from ..media.json_files import parse_object
from ..streams import draw_normal

MANIFEST = "manifest.json"
MOST_PAIRS = 1_000_000  # of a shard; the order of a window of shards is made in memory
WINDOW = 16  # shards that are shuffled together; more shuffle better and keep more files open


def write_shard(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
    """Write one shard atomically; `notes` are JSON values for its header."""
    with replacing(path) as temporary, disk_errors():
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"notes": json.dumps(notes)})


def read_notes(path: Path) -> dict[str, Any]:
    """The notes in a shard's header.

    Raises:
        ValueError: the file is damaged or truncated.
    """
    try:
        with safe_open(path, "pt") as file:
            return parse_object((file.metadata() or {})["notes"], "its header", "")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a whole latent shard ({str(error)[:200]}); remove it and encode again") from error


def posterior_sample(row: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    """An image latent (C, h, w) drawn from the posterior of a pair, see `LatentShards.read`."""
    return row["mean"] + row["std"] * draw_normal(row["mean"].shape, generator)


def _is_entry(shard: Any) -> bool:
    """Whether an entry of the manifest is one."""
    if not isinstance(shard, dict) or not is_plain_name(shard.get("name")):
        return False
    for count, most in (("samples", MOST_PAIRS), ("bytes", 1 << 62)):
        if type(number := shard.get(count)) is not int or not 0 <= number <= most:
            return False
    return True


class LatentShards:
    """Encoded pairs of a folder, numbered through all shards in the manifest's order.

    Args:
        folder: contains `manifest.json` and the shards, as written by `unidiffuser data encode`.
        window: shards whose pairs are shuffled together in an epoch.

    Attributes:
        manifest: content of the manifest.
        fingerprint: digest of the manifest.

    Raises:
        FileNotFoundError: no manifest, so encoding was not started or not finished.
        ValueError: a manifest without pairs.
    """

    def __init__(self, folder: str | Path, window: int = WINDOW):
        self.folder, self.window = Path(folder), window
        if window < 1:
            raise ValueError(f"window must be at least 1 shard, got {window}")
        path = self.folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"no {MANIFEST} in {self.folder}: run `unidiffuser data encode` until all parts are encoded"
            )
        text = path.read_bytes()
        self.manifest: dict[str, Any] = parse_object(text, str(path), "encode again")
        self.fingerprint = hashlib.sha256(text).hexdigest()[:16]
        listed = self.manifest.get("shards")
        if not isinstance(listed, list) or not all(map(_is_entry, listed)):
            raise ValueError(f"{path} is damaged: its shards must have a name, samples and bytes; encode again")
        self.shards: list[dict[str, Any]] = [shard for shard in listed if shard["samples"]]
        if not self.shards:
            raise ValueError(f"{path} lists no encoded pair; see its counts of dropped ones")
        self.sizes = np.array([shard["samples"] for shard in self.shards])
        self.starts = np.concatenate([[0], self.sizes.cumsum()])
        self._open = functools.lru_cache(maxsize=2 * window)(self._open_file)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:  # open files cannot be pickled for other processes
        return {k: v for k, v in self.__dict__.items() if k != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open = functools.lru_cache(maxsize=2 * self.window)(self._open_file)

    def order(self, batch_size: int, seed: int, step: int) -> Tensor:
        """Indices (batch_size,) of the pairs of one training step, a function of the arguments alone.

        An epoch contains every pair once. Its shards are shuffled and cut into windows, and the pairs of each window are
        shuffled, so that memory and open files stay bounded for any number of shards.
        """
        out: list[np.ndarray] = []
        have, first = 0, step * batch_size
        while have < batch_size:
            epoch, offset = divmod(first + have, len(self))
            ends = _epoch(tuple(self.sizes.tolist()), self.window, seed, epoch)[1]
            number = int(np.searchsorted(ends, offset, side="right"))
            begin = int(ends[number - 1]) if number else 0
            rows = _window(tuple(self.sizes.tolist()), self.window, seed, epoch, number)
            part = rows[offset - begin : offset - begin + batch_size - have]
            out.append(part)
            have += len(part)
        return torch.from_numpy(np.concatenate(out))

    def locate(self, index: int) -> tuple[int, int]:
        """Number of the shard that contains the pair of an index, and its row there."""
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return shard, index - int(self.starts[shard])

    def name_of(self, index: int) -> str:
        """File name of the shard, and key of the pair, for error messages."""
        shard, row = self.locate(index)
        path = self.folder / self.shards[shard]["name"]
        keys = read_notes(path).get("keys") if path.is_file() else None
        return f"{path.name}:{keys[row]}" if isinstance(keys, list) and row < len(keys) else f"{path.name}:row {row}"

    def captions(self) -> list[tuple[str, ...]]:
        """The captions of every pair.

        Raises:
            ValueError: shards of an older version, which did not keep them.
        """
        found: list[tuple[str, ...]] = []
        for shard in self.shards:
            path = self.folder / shard["name"]
            notes = read_notes(path)
            if "captions" not in notes:
                raise ValueError(f"{path} holds no captions, as it is of an older version; remove it and encode again")
            found += [tuple(captions) for captions in notes["captions"]]
        return found

    def read(self, indices: Tensor) -> list[dict[str, Tensor]]:
        """Read pairs in float32: each has "mean", "std" (C, h, w), "clip_img" (1, D) and "text" (captions, L, D).

        Raises:
            FileNotFoundError: a shard is missing.
            ValueError: a shard has changed since it was encoded.
        """
        rows = []
        for index in indices.tolist():
            number, row = self.locate(index)
            file, first = self._open(number)
            row_of = {name: file.get_slice(name)[row : row + 1][0].float() for name in ("mean", "std", "clip_img")}
            row_of["text"] = file.get_slice("text")[int(first[row]) : int(first[row + 1])].float()
            rows.append(row_of)
        return rows

    def _open_file(self, number: int) -> tuple[Any, Tensor]:
        shard = self.shards[number]
        path = self.folder / shard["name"]
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} has vanished; restore it, or encode it again and start a new training run, since without it every "
                "later step would have other pairs"
            )
        if path.stat().st_size != shard["bytes"]:
            raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {shard['bytes']}: remove it and encode again")
        try:
            file = safe_open(path, "pt").__enter__()  # closed when the cache drops it
            first = file.get_tensor("first")
            sizes = {name: list(file.get_slice(name).get_shape()) for name in ("mean", "std", "clip_img", "text")}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole latent shard ({str(error)[:200]}); remove it and encode again") from error
        count = shard["samples"]
        rows = {name: size[0] for name, size in sizes.items() if len(size) == (4 if name in ("mean", "std") else 3)}
        whole = first.dtype == torch.int64 and first.shape == (count + 1,) and rows.pop("text", -1) == int(first[-1])
        if not whole or first[0] != 0 or (first.diff() < 0).any() or rows != dict.fromkeys(("mean", "std", "clip_img"), count):
            raise ValueError(f"{path} does not hold the {count} pairs that {MANIFEST} lists; remove it and encode again")
        return file, first


@functools.lru_cache(maxsize=4)
def _epoch(sizes: tuple[int, ...], window: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Shuffled shard numbers of an epoch, and the position in the epoch at which each window ends."""
    order = np.random.default_rng([seed, epoch]).permutation(len(sizes))
    ends = np.add.reduceat(np.asarray(sizes)[order], np.arange(0, len(sizes), window)).cumsum()
    return order, ends


@functools.lru_cache(maxsize=4)
def _window(sizes: tuple[int, ...], window: int, seed: int, epoch: int, number: int) -> np.ndarray:
    """Shuffled indices of the pairs of one window."""
    shards = _epoch(sizes, window, seed, epoch)[0][number * window : (number + 1) * window]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    rows = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards])
    return np.random.default_rng([seed, epoch, number]).permutation(rows)
