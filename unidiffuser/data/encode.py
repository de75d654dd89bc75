"""Encoding of captioned pictures to latent shards with the frozen encoders of a checkpoint.

A part of the source becomes one shard. Work is divided among the processes of torchrun or `accelerate launch`; finished shards
are skipped and interrupted ones redone. The manifest is written when all parts are done. It lists what could not be read with
the reason, and the next run tries those again.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..distributed import World
from ..encoders.autoencoder import Autoencoder
from ..encoders.clip import ImageTokenEncoder, TextEncoder
from ..media.files import locked, shown, write_text
from ..media.images import fit, to_tensor
from ..media.resume import check_settings, run_parts
from .captioned import DamagedShard, Pair
from .fingerprint import fingerprint
from .shards import MANIFEST, read_notes, write_shard
from .sources import Part

log = logging.getLogger(__name__)

FEW = 64  # pairs below which the time of encoding is not measured
LONGEST = 2000  # characters of a caption that are tokenized; the text encoder reads 77 tokens


@dataclass(frozen=True)
class Encoding:
    """Settings of the encoding.

    Attributes:
        image_size: side of the square in pixels.
        min_side: pictures with a shorter side are dropped; the paper's data sets have none that would be enlarged much.
        batch_size: pictures in a batch of the encoders.
        readers: threads that decode pictures.
    """

    image_size: int
    min_side: int = 1
    batch_size: int = 32
    readers: int = 4


class Encoders:
    """The three frozen encoders of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device):
        low = torch.float16 if device.type == "cuda" else torch.float32
        self.checkpoint, self.device = checkpoint, device
        # The autoencoder of SD 1 overflows in fp16 on some pictures.
        self.autoencoder = Autoencoder.from_checkpoint(checkpoint, device=device, dtype=torch.float32)
        self.image_tokens = ImageTokenEncoder.from_checkpoint(checkpoint, device=device, dtype=low)
        self.texts = TextEncoder.from_checkpoint(checkpoint, device=device, dtype=low)

    def fingerprint(self) -> str:
        """Digest of the weights that latents depend on."""
        return fingerprint(self.checkpoint)

    @torch.inference_mode()
    def pictures(self, images: list[Image.Image]) -> dict[str, Tensor]:
        """Encode squares of one size to "mean", "std" (B, C, h, w) and "clip_img" (B, 1, D), fp16 on the CPU."""
        mean, std = self.autoencoder.posterior(to_tensor(images).to(self.device))
        values = {"mean": mean, "std": std, "clip_img": self.image_tokens(images)}
        return {name: value.to("cpu", torch.float16) for name, value in values.items()}

    def captions(self, texts: list[str]) -> Tensor:
        """Encode captions to (B, L, text_dim), fp16 on the CPU."""
        return self.texts(texts).to("cpu", torch.float16)


def encode(
    parts: list[Part],
    out: Path,
    encoders: Encoders,
    encoding: Encoding,
    world: World,
    report: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Encode the unfinished parts of this process, and write the manifest when all processes are done.

    Args:
        parts: the parts of the source, see `find_parts`.
        out: folder of the shards.
        report: called after each part that was encoded, with its number of pairs.

    Returns:
        The manifest: "encoding", "samples", "read", "dropped" (reason -> pairs), "damaged" (part -> reason), "shards".

    Raises:
        ValueError: the folder contains shards of other weights or another size, or another process encodes into it.
        OSError: the disk is full; the shards that exist are complete.
    """
    with locked(out / ".lock", f"the folder {out}") if world.main else nullcontext():
        return _encode(parts, out, encoders, encoding, world, report)


def _encode(
    parts: list[Part],
    out: Path,
    encoders: Encoders,
    encoding: Encoding,
    world: World,
    report: Callable[[int], None] | None,
) -> dict[str, Any]:
    settings = {
        "encoders": encoders.fingerprint(),
        "image_size": encoding.image_size,
        "min_side": encoding.min_side,
        "text_tokens": encoders.texts.length,
    }
    if world.main:
        (out / MANIFEST).unlink(missing_ok=True)  # an old one is wrong as soon as parts are added
    check_settings(out / "encoding.json", settings, world)
    shards = [out / f"{part.name}.safetensors" for part in parts]
    damaged: dict[str, str] = {}

    def make(number: int) -> None:
        part, shard = parts[number], shards[number]
        try:
            kept = _encode_part(part, shard, encoders, encoding)
        except DamagedShard as error:
            shard.unlink(missing_ok=True)  # encoded from an earlier, undamaged file of this name
            damaged[part.name] = str(error)
        except FileNotFoundError as error:
            damaged[part.name] = f"vanished: {error.filename or error}"
        else:
            if report is not None:
                report(kept)
            return
        log.warning("%s; skipped", damaged[part.name])

    run_parts(shards, make, world, valid=lambda number: read_notes(shards[number]).get("source_size") == parts[number].size)
    gathered = world.gather(damaged)
    if world.main:
        _write_manifest(out, parts, settings, {name: reason for found in gathered for name, reason in found.items()})
    world.barrier()
    return dict(json.loads((out / MANIFEST).read_text(encoding="utf-8")))


def seconds_left(parts: list[Part], out: Path, encoders: Encoders, encoding: Encoding) -> float:
    """Seconds that one process needs for the parts that are not encoded yet; 0 for a few pictures, which are not measured.

    The pairs of a tar file are counted in the first one; that of the others is in proportion to their bytes.
    """
    left = [part for part in parts if not (out / f"{part.name}.safetensors").is_file()]
    if not left:
        return 0.0
    try:
        known = sum(1 for _ in left[0].read())
    except (DamagedShard, FileNotFoundError):  # reported when it is encoded
        return 0.0
    pairs = known * sum(part.size for part in left) / max(1, left[0].size)
    if pairs < FEW:
        return 0.0
    blank, seconds = Image.new("RGB", (encoding.image_size, encoding.image_size)), 0.0
    for _ in range(2):  # the first one warms up
        began = time.perf_counter()
        encoders.pictures([blank] * encoding.batch_size)
        encoders.captions(["a picture"] * encoding.batch_size)
        seconds = time.perf_counter() - began
    return seconds * pairs / encoding.batch_size


def _encode_part(part: Part, target: Path, encoders: Encoders, encoding: Encoding) -> int:
    counts: Counter[str] = Counter()
    keys: list[str] = []
    texts_of: list[list[str]] = []
    latents: dict[str, list[Tensor]] = {"mean": [], "std": [], "clip_img": [], "text": []}
    first = [0]
    for batch in _decoded(part, encoding, counts):
        for name, value in encoders.pictures([image for _, _, image in batch]).items():
            latents[name].append(value)
        texts = [caption for _, captions, _ in batch for caption in captions]
        latents["text"].append(encoders.captions(texts))
        for key, captions, _ in batch:
            keys.append(key)
            texts_of.append([shown(caption) for caption in captions])
            first.append(first[-1] + len(captions))
    tensors = {name: torch.cat(parts) if parts else torch.zeros(0) for name, parts in latents.items()}
    read, dropped = counts.pop("read", 0), dict(sorted(counts.items()))
    notes = {"keys": keys, "captions": texts_of, "read": read, "dropped": dropped, "source_size": part.size}
    write_shard(target, tensors | {"first": torch.tensor(first)}, notes)
    return len(keys)


def _decoded(part: Part, encoding: Encoding, counts: Counter[str]) -> Iterator[list[tuple[str, list[str], Image.Image]]]:
    """Batches of (key, captions, square); threads decode the next batch while the caller encodes this one."""

    def decode(pair: Pair) -> tuple[str, list[str], Image.Image] | str:
        if pair.problem:
            return pair.problem
        captions = [" ".join(caption[:LONGEST].split()) for caption in pair.captions]
        captions = [caption for caption in captions if caption]
        if not captions:
            return "no caption"
        try:
            image = pair.image()
        except FileNotFoundError:
            if pair.place is not None and not pair.path.is_file():
                raise  # the whole shard, not one picture
            return "no picture"
        except (ValueError, OSError):
            return "unreadable picture"
        if min(image.size) < encoding.min_side:
            return "too small"
        return shown(pair.key), captions, fit(image, encoding.image_size, encoding.image_size)

    pairs = part.read()
    with ThreadPoolExecutor(encoding.readers) as pool:
        ahead: list[Any] = []
        waiting: list[tuple[str, list[str], Image.Image]] = []
        while True:
            chunk = list(islice(pairs, encoding.batch_size))
            counts["read"] += len(chunk)
            done, ahead = ahead, [pool.submit(decode, pair) for pair in chunk]
            for future in done:
                result = future.result()
                if isinstance(result, str):
                    counts[result] += 1
                else:
                    waiting.append(result)
            while len(waiting) >= encoding.batch_size:
                yield waiting[: encoding.batch_size]
                waiting = waiting[encoding.batch_size :]
            if not chunk and not ahead:
                break
        if waiting:
            yield waiting


def _write_manifest(out: Path, parts: list[Part], settings: dict[str, Any], damaged: dict[str, str]) -> None:
    shards: list[dict[str, Any]] = []
    dropped, read = Counter[str](), 0
    for part in parts:
        path = out / f"{part.name}.safetensors"
        if part.name in damaged:
            continue
        notes = read_notes(path)
        shards.append({"name": path.name, "samples": len(notes["keys"]), "bytes": path.stat().st_size})
        dropped.update(notes["dropped"])
        read += notes["read"]
    samples = sum(shard["samples"] for shard in shards)
    manifest = {
        "encoding": settings,
        "samples": samples,
        "read": read,
        "dropped": dict(sorted(dropped.items())),
        "damaged": dict(sorted(damaged.items())),
        "shards": shards,
    }
    write_text(out / MANIFEST, json.dumps(manifest, indent=1))
