"""Pictures with captions to be judged on: plain folders, COCO captions and webdataset shards, all as a list of pairs.

    {format: folder, path: data/emoji, where: {demo: true}}       metadata.jsonl beside the pictures, or cat.png with cat.txt
    {format: coco, path: val2014, captions: captions_val2014.json}
    {format: shards, path: "laion/{00000..00009}.tar"}            key.jpg with key.txt, or with key.json and its "caption"

Only names and captions are read here; a picture is opened when it is asked for.
"""

from __future__ import annotations

import glob
import json
import random
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from unidiffuser.media.images import open_image

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class Pair:
    """A picture and what is said of it.

    Attributes:
        key: what tells it from all others of its source.
        captions: one or more; the first is the one that a model is asked with.
        path: the file of the picture, or the shard that holds it.
        place: (first byte, bytes) in the shard; None for a file of its own.
        fields: what else the source says, such as ``label``, ``style`` and ``split``.
    """

    key: str
    captions: tuple[str, ...]
    path: Path
    place: tuple[int, int] | None = None
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def caption(self) -> str:
        return self.captions[0]

    @property
    def label(self) -> str:
        return str(self.fields.get("label", ""))

    @property
    def style(self) -> str:
        return str(self.fields.get("style", ""))

    @property
    def split(self) -> str:
        return str(self.fields.get("split", ""))

    def image(self) -> Image.Image:
        """The picture as RGB; ValueError or FileNotFoundError that names it if it cannot be opened."""
        if self.place is None:
            return open_image(self.path)
        first, size = self.place
        with self.path.open("rb") as shard:
            shard.seek(first)
            data = shard.read(size)
        return open_image(data, f"{self.key} in {self.path}")


def read_source(source: Mapping[str, Any]) -> list[Pair]:
    """The pairs of a source that is described as above, in its own order.

    Args:
        source: ``format``, ``path`` and what the format needs besides; ``where`` maps fields to the value, or values, to keep.

    Raises:
        FileNotFoundError: a file or folder that is not there.
        ValueError: an unknown format or setting, damaged contents, or nothing left.
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
    accepted = {key: value if isinstance(value, list) else [value] for key, value in where.items()}
    pairs = [p for p in reader(**given) if all(p.fields.get(key) in values for key, values in accepted.items())]
    if not pairs:
        raise ValueError(f"{dict(source)} holds no picture with a caption{' for this where' if where else ''}")
    return pairs


def read_folder(path: str | Path) -> Iterator[Pair]:
    """Pictures listed in ``metadata.jsonl`` (``file_name`` and ``text``, a caption or a list), or each beside its ``.txt``."""
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder of pictures; `python -m unidiffuser.emoji prepare` makes the demonstration set"
        )
    index = folder / "metadata.jsonl"
    if not index.is_file():
        for file in sorted(folder.rglob("*")):
            caption = file.with_suffix(".txt")
            if file.suffix.lower() in PICTURES and caption.is_file():
                lines = _lines(caption.read_text(encoding="utf-8"))
                if lines:
                    yield Pair(str(file.relative_to(folder)), lines, file)
        return
    for number, line in enumerate(index.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            text, name = record["text"], record["file_name"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{index}, line {number} is not a record with file_name and text: {error!r}") from error
        yield Pair(name, (text,) if isinstance(text, str) else tuple(text), folder / name, fields=record)


def read_coco(path: str | Path, captions: str | Path) -> Iterator[Pair]:
    """Pictures of a COCO caption file, in the order of its ``images``; those without a caption are left out."""
    folder, index = Path(path), Path(captions)
    if not index.is_file():
        raise FileNotFoundError(f"{index} does not exist: name the captions file, such as annotations/captions_val2014.json")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: name the one with the pictures of {index.name}")
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        said: dict[Any, list[str]] = {}
        for annotation in content["annotations"]:
            said.setdefault(annotation["image_id"], []).append(" ".join(annotation["caption"].split()))
        for image in content["images"]:
            if image["id"] in said:
                yield Pair(str(image["id"]), tuple(said[image["id"]]), folder / image["file_name"])
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a COCO captions file (images and annotations with a caption): {error!r}") from error


def read_shards(path: str | Path) -> Iterator[Pair]:
    """Pictures of webdataset shards, in the order of the shards; ``path`` may hold ``{000..009}`` and ``*``."""
    names = [name for pattern in expand(str(path)) for name in sorted(glob.glob(pattern))]
    if not names:
        raise FileNotFoundError(f"no shard matches {path}")
    for name in names:
        members: dict[str, dict[str, tarfile.TarInfo]] = {}
        try:
            with tarfile.open(name, "r:") as tar:
                for member in tar:
                    folder, _, file = member.name.rpartition("/")
                    stem, _, suffix = file.partition(".")
                    if member.isfile():
                        members.setdefault(f"{folder}/{stem}".lstrip("/"), {})[f".{suffix.lower()}"] = member
                for key, parts in members.items():
                    picture = next((m for suffix, m in parts.items() if suffix in PICTURES), None)
                    said, fields = _said(tar, parts)
                    if picture is not None and said:
                        place = (picture.offset_data, picture.size)
                        yield Pair(f"{Path(name).name}/{key}", said, Path(name), place, fields)
        except (tarfile.TarError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{name} is not an uncompressed webdataset shard, or damaged: {error}") from error


def _said(tar: tarfile.TarFile, parts: Mapping[str, tarfile.TarInfo]) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    def content(suffix: str) -> str:
        file = tar.extractfile(parts[suffix])
        return "" if file is None else file.read().decode("utf-8")

    fields = json.loads(content(".json")) if ".json" in parts else {}
    fields = fields if isinstance(fields, dict) else {}
    said = content(".txt") if ".txt" in parts else str(fields.get("caption") or "")
    return _lines(said), fields


def _lines(text: str) -> tuple[str, ...]:
    """One caption a line."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def expand(pattern: str) -> list[str]:
    """``"x-{08..10}.tar"`` -> ``["x-08.tar", "x-09.tar", "x-10.tar"]``; other patterns stay as they are."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [name for n in numbers for name in expand(pattern[: found.start()] + n + pattern[found.end() :])]


def in_split(pairs: Sequence[Pair], split: str) -> list[Pair]:
    """The pairs of one split, "all" being every pair; ValueError naming the known splits if there are none."""
    found = [pair for pair in pairs if split == "all" or pair.split == split]
    if not found:
        known = ", ".join(sorted({pair.split for pair in pairs if pair.split} | {"all"}))
        raise ValueError(f"no picture belongs to the split {split!r}; this source has: {known}")
    return found


def fixed_order(pairs: Sequence[Pair], limit: int | None) -> list[Pair]:
    """A shuffle that is the same in every run, cut to ``limit``: a fair sample and an uncurated grid."""
    return random.Random(0).sample(list(pairs), len(pairs))[:limit]
