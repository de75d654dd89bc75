"""A folder of captioned pictures as parts to encode, with variations of each picture."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from ..data.captioned import INDEX, Pair, read_beside, read_listed
from ..data.sources import Part
from ..media.files import shown
from ..media.formats import PICTURE_FORMATS
from ..media.images import fit
from .lora_data import variations

PER_PART = 32  # pictures of a shard: what an interrupted encoding loses at most
STRENGTH = 0.3  # of the variations, see `lora_data.variations`


@dataclass(frozen=True)
class VariedPair(Pair):
    """A pair whose picture is a square of `side` pixels: variation 0 as it is, any other rotated, zoomed and shifted a little.

    Attributes:
        side: in pixels.
        number: of the variation.
        seed: of the changes.
    """

    side: int = 0
    number: int = 0
    seed: int = 0

    def image(self) -> Image.Image:
        square = fit(super().image(), self.side, self.side)
        return variations([square], 2, STRENGTH, self.seed)[1] if self.number else square


def check_captions(folder: Path) -> list[Pair]:
    """The pictures of a folder, those without a caption included.

    Raises:
        FileNotFoundError: no such folder, or no picture in it.
        ValueError: no picture has a caption.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {shown(folder)}; put your pictures and their captions into one")
    listed = (folder / INDEX).is_file()
    pairs = list(read_listed(folder, keep_bad=True) if listed else read_beside(folder))
    if not pairs:
        raise FileNotFoundError(f"{shown(folder)} holds no picture ({', '.join(PICTURE_FORMATS)})")
    if not any(caption.strip() for pair in pairs for caption in pair.captions):
        raise ValueError(
            f"{shown(folder)} holds {len(pairs)} pictures and no caption: write one in cat.txt beside cat.png, or let "
            f"`unidiffuser caption {shown(folder)} --beside` write drafts"
        )
    return pairs


def captioned_parts(pairs: Sequence[Pair], side: int, count: int, seed: int) -> list[Part]:
    """Parts of at most `PER_PART` pictures in `count` variations; the size of a part changes with anything in it."""
    cuts = [pairs[i : i + PER_PART] for i in range(0, len(pairs), PER_PART)]
    return [
        Part(f"{number:05d}", _digest(cut, side, count, seed), partial(_varied, cut, side, count, seed))
        for number, cut in enumerate(cuts)
    ]


def _varied(pairs: Sequence[Pair], side: int, count: int, seed: int) -> Iterator[Pair]:
    for pair in pairs:
        for number in range(count):
            own = _number(f"{seed} {number} {pair.key}")
            yield VariedPair(
                pair.key, pair.captions, pair.path, pair.place, pair.fields, pair.problem, side=side, number=number, seed=own
            )


def _digest(pairs: Sequence[Pair], side: int, count: int, seed: int) -> int:
    files = [(pair.path.stat().st_size, pair.path.stat().st_mtime_ns) if pair.path.is_file() else None for pair in pairs]
    return _number(repr((side, count, seed, STRENGTH, [(pair.key, pair.captions) for pair in pairs], files)))


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:4], "big")
