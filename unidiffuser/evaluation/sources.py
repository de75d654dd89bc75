"""Captioned pictures to evaluate on: folders, COCO captions and webdataset shards, as a list of pairs.

    {format: folder, path: pictures, where: {license: cc0}}       metadata.jsonl beside the pictures, or cat.png with cat.txt
    {format: coco, path: val2014, captions: captions_val2014.json}
    {format: shards, path: "laion/{00000..00009}.tar"}            key.jpg with key.txt, or with key.json and its "caption"

See `unidiffuser.data.captioned` for the readers.
"""

from __future__ import annotations

import glob
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data import captioned
from ..data.captioned import INDEX, Pair, matches, read_beside, read_listed, read_shard
from ..media.files import lines_of


def read_source(source: Mapping[str, Any]) -> list[Pair]:
    """The pairs of a source with a caption, in the source's order.

    Args:
        source: "format", "path" and the other settings of the format, as above; "where" maps a field to its accepted value, or
            list of values.

    Raises:
        FileNotFoundError: a missing file or folder.
        ValueError: an unknown format or setting, damaged contents, or no pair left.
    """
    readers: dict[str, tuple[Callable[..., Iterable[Pair]], set[str]]] = {
        "folder": (read_folder, set()),
        "coco": (read_coco, {"captions"}),
        "shards": (read_shards, set()),
    }
    given = dict(source)
    where = dict(given.pop("where", None) or {})
    name = str(given.pop("format", None))
    reader, more = readers.get(name, (None, set()))
    if reader is None or set(given) != {"path"} | more:
        needs = "; ".join(f"{key} with {', '.join(sorted({'path'} | extra))}" for key, (_, extra) in readers.items())
        raise ValueError(f"{dict(source)} describes no pictures: give a format and its settings ({needs}; all may have where)")
    pairs = [pair for pair in reader(**given) if pair.captions and matches(pair.fields, where)]
    if not pairs:
        raise ValueError(f"{dict(source)} holds no picture with a caption{' for this where' if where else ''}")
    return pairs


def read_folder(path: str | Path) -> Iterator[Pair]:
    """Pictures listed in a folder's `metadata.jsonl`, or each with a `.txt` beside it that has one caption per line."""
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder of pictures; check the path")
    pairs = read_listed(folder) if (folder / INDEX).is_file() else map(_per_line, read_beside(folder))
    yield from (pair for pair in pairs if pair.captions)


def read_coco(path: str | Path, captions: str | Path) -> Iterator[Pair]:
    """Pictures of a COCO captions file, in the order of its `images`, with their ids as keys."""
    for pair in captioned.read_coco(Path(path), Path(captions)):
        yield replace(pair, key=str(pair.fields["id"]))


def read_shards(path: str | Path) -> Iterator[Pair]:
    """Samples of webdataset shards, in the order of the shards; `path` may contain `{000..009}` and `*`."""
    names = [name for pattern in expand(str(path)) for name in sorted(glob.glob(pattern))]
    if not names:
        raise FileNotFoundError(f"no shard matches {path}; check the path and its pattern")
    for shard in map(Path, names):
        for pair in read_shard(shard):
            if pair.has_picture:
                yield _per_line(replace(pair, key=f"{shard.name}/{pair.key}"))


def _per_line(pair: Pair) -> Pair:
    """The pair with each line of its text as a caption."""
    return replace(pair, captions=tuple(line for text in pair.captions for line in lines_of(text) if line))


def expand(pattern: str) -> list[str]:
    """Expand "x-{08..10}.tar" to ["x-08.tar", "x-09.tar", "x-10.tar"]; other patterns stay as they are."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [name for n in numbers for name in expand(pattern[: found.start()] + n + pattern[found.end() :])]


def in_split(pairs: Sequence[Pair], split: str) -> list[Pair]:
    """The pairs of one split, or every pair for "all"; ValueError naming the known splits if there are none."""
    found = [pair for pair in pairs if split == "all" or pair.split == split]
    if not found:
        known = ", ".join(sorted({pair.split for pair in pairs if pair.split} | {"all"}))
        raise ValueError(f"no picture belongs to the split {split!r}; this source has: {known}")
    return found


def fixed_order(pairs: Sequence[Pair], limit: int | None) -> list[Pair]:
    """A shuffle that is the same in every run, cut to `limit` pairs: a uniform sample and an uncurated grid."""
    return random.Random(0).sample(list(pairs), len(pairs))[:limit]
