"""What tells one model, file or set of pairs from another: digests that finished work is kept under."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from unidiffuser.checkpoints.checkpoint import Checkpoint
    from unidiffuser.data.captioned import Pair


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, as hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def weights_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 over the names and weights of all parts: the same for one model in whichever file layout it lies."""
    digest = hashlib.sha256()
    for part in sorted(checkpoint.parts()):
        for name, value in sorted(checkpoint.state_dict(part).items()):
            digest.update(f"{part}.{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pairs_digest(pairs: Iterable[Pair]) -> str:
    """SHA-256 over keys and captions, in order; where the files lie does not count."""
    return settings_digest([[pair.key, *pair.captions] for pair in pairs])


def settings_digest(settings: Any) -> str:
    """SHA-256 of anything that JSON can say."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
