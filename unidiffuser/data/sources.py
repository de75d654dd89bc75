"""The parts of a source of captioned pictures; each part becomes one latent shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..media.formats import files_ending
from .captioned import INDEX, Pair, read_beside, read_coco, read_listed, read_shard


@dataclass(frozen=True)
class Part:
    """A named piece of a source.

    Attributes:
        name: of the part and its latent shard.
        size: changes when the content does: bytes of a tar file, or number of pictures.
        read: iterates over the pairs.
    """

    name: str
    size: int
    read: Callable[[], Iterator[Pair]]


def find_parts(source: Path, captions: Path | None = None, per_part: int = 4096) -> list[Part]:
    """The parts of a source, in order.

    Args:
        source: a folder of webdataset `.tar` shards; of pictures with `metadata.jsonl`; of pictures with a `.txt` of the same
            name beside each; or of COCO's pictures.
        captions: COCO's annotations (`captions_train2017.json`) for the last.
        per_part: pictures in a part, for folders.

    Raises:
        FileNotFoundError: no such folder, or nothing in it that can be read.
        ValueError: a list of captions that cannot be read.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"no folder {source}")
    if captions is None and (tars := files_ending(source, ".tar")):
        return [Part(tar.stem, tar.stat().st_size, partial(read_shard, tar)) for tar in tars]
    if captions is not None:
        pairs = sorted(read_coco(source, captions), key=lambda pair: pair.fields["id"])
    elif (source / INDEX).is_file():
        pairs = list(read_listed(source, keep_bad=True))
    else:
        pairs = [pair for pair in read_beside(source) if pair.captions or pair.problem]
    if not pairs:
        raise FileNotFoundError(
            f"{source} has no .tar shards, no {INDEX} and no picture with a .txt of the same name; for COCO name the "
            "annotations with --captions"
        )
    cuts = [pairs[i : i + per_part] for i in range(0, len(pairs), per_part)]
    return [Part(f"{number:05d}", len(cut), partial(iter, cut)) for number, cut in enumerate(cuts)]
