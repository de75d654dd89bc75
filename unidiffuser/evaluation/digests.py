"""SHA-256 digests of models, files and data; finished work is kept under them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..checkpoints.checkpoint import Checkpoint
    from ..data.captioned import Pair


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, as hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def weights_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 over the names and weights of all parts: independent of the file layout."""
    digest = hashlib.sha256()
    for part in sorted(checkpoint.parts()):
        for name, value in sorted(checkpoint.state_dict(part).items()):
            digest.update(f"{part}.{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pairs_digest(pairs: Iterable[Pair]) -> str:
    """SHA-256 over keys and captions, in order, independent of where the files are."""
    return settings_digest([[pair.key, *pair.captions] for pair in pairs])


def settings_digest(settings: Any) -> str:
    """SHA-256 of any JSON value."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
