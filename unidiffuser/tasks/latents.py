"""Files of latents: the streams of a sample in one safetensors file, (B, ...) each under its own name."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save

from ..checkpoints.weights import WeightFiles
from ..media.files import atomic_write
from ..streams import MODALITY_OF, Streams


def write_latents(folder: Path, stem: str, latents: Streams, origin: Mapping[str, str]) -> Path:
    """Write latents under the first name from `stem` that is free, or taken by the same run.

    Args:
        folder: created if missing.
        stem: name of the file without its suffix.
        latents: the streams.
        origin: what they were made from and with, for the header; tells one run from another.

    Raises:
        OSError: the file cannot be written.
    """
    content = save({name: value.detach().cpu().contiguous() for name, value in latents.items()}, dict(origin))
    for number in itertools.count(1):
        path = folder / f"{stem}{'' if number == 1 else f'-{number}'}.safetensors"
        if not path.exists() or WeightFiles(path).metadata() == dict(origin):
            break
    with atomic_write(path) as file:
        file.write(content)
    return path


def read_latents(path: Path) -> Streams:
    """Read latents.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or one of something else.
    """
    tensors = WeightFiles(path).open()
    if not tensors or tensors.keys() - MODALITY_OF.keys():
        raise ValueError(f"{path} holds no latents ({', '.join(MODALITY_OF)}); `unidiffuser invert` writes such a file")
    streams = Streams(**{name: value.float().clone() for name, value in tensors.items()})
    if not streams.batch:  # raises if the sizes differ
        raise ValueError(f"{path} holds no items")
    return streams
