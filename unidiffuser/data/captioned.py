"""Captioned pictures on disk: the reader of folders, COCO annotations and webdataset shards.

    pictures/metadata.jsonl     {"file_name": "cat.png", "text": "a cat"} on each line; "text" may be a list, and there may be
                                other fields
    pictures/cat.png, cat.txt   a text file beside each picture
    captions_train2017.json     COCO's annotations for a folder of pictures
    00000.tar                   webdataset: 000.jpg with 000.txt, or with 000.json and its "caption"

Only names and captions are read here. A picture is opened by `Pair.image`.
"""

from __future__ import annotations

import json
import logging
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..media.files import is_text, read_lines, shown
from ..media.formats import PICTURE_SUFFIXES, is_picture_name
from ..media.images import open_image
from ..media.json_files import brief, parse_json

log = logging.getLogger(__name__)

INDEX = "metadata.jsonl"
LONGEST_NAME = 1024  # bytes of a path in its folder; longer ones make the system raise errors of its own
END_OF_ARCHIVE = 1024  # zero bytes that close a tar file
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")  # key and suffix; the name of a file is its key up to the first dot


class DamagedShard(ValueError):
    """A tar file that is truncated, overwritten or compressed."""


@dataclass(frozen=True)
class Pair:
    """A picture, not yet opened, and its captions.

    Attributes:
        key: name within its source.
        captions: any number; those of shards and text files are as written there and may be empty strings.
        path: the picture's file, or the shard that contains it.
        place: (first byte, bytes) in the shard, (0, 0) for a sample without a picture; None for a file of its own.
        fields: other values of the source, such as "label", "style" and "split".
        problem: why the captions could not be read; empty if they were. Such a pair has no caption.
    """

    key: str
    captions: tuple[str, ...]
    path: Path
    place: tuple[int, int] | None = None
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False)
    problem: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        """Captions that no tokenizer takes, since JSON may hold half a surrogate pair, are left out."""
        texts = tuple(filter(is_text, self.captions))
        if len(texts) < len(self.captions):
            object.__setattr__(self, "captions", texts)
            object.__setattr__(self, "problem", self.problem if texts else "unreadable caption")

    @property
    def caption(self) -> str:
        """The first caption."""
        return self.captions[0]

    @property
    def label(self) -> str:
        """What the picture shows, from the fields; empty if unknown."""
        return str(self.fields.get("label", ""))

    @property
    def style(self) -> str:
        """Style of the picture, from the fields; empty if unknown."""
        return str(self.fields.get("style", ""))

    @property
    def split(self) -> str:
        """Split of the data set that the pair belongs to, from the fields; empty if unknown."""
        return str(self.fields.get("split", ""))

    @property
    def has_picture(self) -> bool:
        """False for a sample of a shard without a picture, or with an empty one."""
        return self.place is None or self.place[1] > 0

    def image(self) -> Image.Image:
        """Open the picture as RGB.

        Raises:
            FileNotFoundError: no such file, or a sample without a picture.
            ValueError: a picture that cannot be opened.
        """
        if self.place is None:
            return open_image(self.path)
        if not self.has_picture:
            raise FileNotFoundError(f"{self.key} in {self.path} has no picture; remove the sample or download it again")
        first, size = self.place
        with self.path.open("rb") as shard:
            shard.seek(first)
            return open_image(shard.read(size), f"{self.key} in {self.path}")


def matches(fields: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    """Whether each field named in `where` has the value, or one of the list of values, that is given there."""
    return all(
        fields.get(name) in (accepted if isinstance(accepted, list | tuple | set) else [accepted])
        for name, accepted in where.items()
    )


def picture_files(folder: Path, recursive: bool = True) -> list[Path]:
    """Image files of a folder, and of those below it if `recursive`, sorted by path, without dot files."""
    files = folder.rglob("*") if recursive else folder.iterdir()
    return sorted(path for path in files if is_picture_name(path))


def read_listed(folder: Path, keep_bad: bool = False) -> Iterator[Pair]:
    """Pictures listed in the folder's `metadata.jsonl`, in its order; a record is the `fields` of its pair.

    Args:
        folder: the folder.
        keep_bad: yield a line that is no record as a pair with a `problem`, to be counted by the caller. By default such lines
            are left out, with one warning that says how many.

    Raises:
        ValueError: no line with "file_name" and "text".
    """
    index = folder / INDEX
    good, bad, first = 0, 0, ""
    for number, line in enumerate(read_lines(index, each=True), 1):
        if not line:
            continue
        try:
            if not is_text(line):
                raise ValueError("it is not UTF-8")
            pair = _record(line, folder)
        except (ValueError, RecursionError) as error:
            bad, first = bad + 1, first or f"{index}:{number} is not a record with file_name and text ({error})"
            if keep_bad:
                yield Pair(f"{INDEX}:{number}", (), index, problem="bad line in metadata.jsonl")
            continue
        good += 1
        yield pair
    if bad and not good:
        raise ValueError(first)
    if bad:
        log.warning("%s; %d such lines are left out, %d are read", first, bad, good)


def _record(line: str, folder: Path) -> Pair:
    """The pair of a line of `metadata.jsonl`; ValueError with the reason for another line."""
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(name := record.get("file_name"), str) or not name:
        raise ValueError("file_name must be the name of a picture")
    if "\0" in name or len(name.encode("utf-8", "replace")) > LONGEST_NAME:
        raise ValueError(f"file_name cannot be the name of a file: {brief(name)}")
    text = record.get("text")
    captions = [text] if isinstance(text, str) else text
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError("text must be a text or a list of texts")
    return Pair(name, tuple(captions), folder / name, fields=record)


def read_beside(folder: Path, recursive: bool = True) -> Iterator[Pair]:
    """Image files of a folder, each with the content of the `.txt` beside it as its only caption, or with no caption."""
    for path in picture_files(folder, recursive):
        captions, problem = _beside(path.with_suffix(".txt"))
        yield Pair(str(path.relative_to(folder)), captions, path, problem=problem)


def _beside(path: Path) -> tuple[tuple[str, ...], str]:
    """The caption of a text file, and why it could not be read."""
    try:
        return ((_decode(path.read_bytes(), str(path)),) if path.is_file() else ()), ""
    except OSError as error:
        log.warning("%s cannot be read (%s)", shown(path), error.strerror or error)
        return (), "unreadable caption"


def read_coco(folder: Path, annotations: Path) -> Iterator[Pair]:
    """Pictures of a COCO captions file, in the order of its `images`, those without a caption included; field "id".

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: not a COCO captions file.
    """
    if not annotations.is_file():
        raise FileNotFoundError(
            f"{annotations} does not exist; name the captions file, such as annotations/captions_val2014.json"
        )
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; name the one with the pictures of {annotations.name}")
    try:
        content = parse_json(annotations.read_bytes(), "the file", "")
        captions: dict[Any, list[str]] = {image["id"]: [] for image in content["images"]}
        if len({type(number) for number in captions}) > 1:
            raise ValueError("its image ids are of several types")
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(" ".join(annotation["caption"].split()))
        pairs = [
            Pair(image["file_name"], tuple(captions[image["id"]]), folder / image["file_name"], fields={"id": image["id"]})
            for image in content["images"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{annotations} is not a COCO captions file (images and annotations with a caption): {brief(error)}"
        ) from error
    yield from pairs


def read_shard(path: Path) -> Iterator[Pair]:
    """Samples of an uncompressed webdataset shard, each with one caption that may be empty; its json is their `fields`.

    Read with `tarfile` instead of the webdataset library, since a picture's place in the archive is needed to open it later.

    Raises:
        DamagedShard: truncated, overwritten or compressed. Checked before the first pair, because readers of archives take
            anything unreadable after the first member for the end.
        FileNotFoundError: no such file.
    """
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                members = tar.getmembers()
                file.seek(tar.offset)
                end = file.read(END_OF_ARCHIVE)
        except Exception as error:  # damaged headers make tarfile raise more than its own errors
            reason = brief(str(error) or type(error).__name__)
            raise DamagedShard(f"{path} is not an uncompressed webdataset shard, or is damaged ({reason})") from error
        if len(end) < END_OF_ARCHIVE or any(end):
            raise DamagedShard(f"{path} is truncated or damaged at byte {tar.offset}")

        def content(member: tarfile.TarInfo | None) -> bytes:
            if member is None:
                return b""
            file.seek(member.offset_data)
            return file.read(member.size)

        for key, files in _samples(members):
            picture = next((member for suffix, member in files.items() if suffix in PICTURE_SUFFIXES), None)
            place = (0, 0) if picture is None else (picture.offset_data, picture.size)
            fields = _fields(content(files.get(".json")))
            # img2dataset writes the caption to both; other programs write only the json.
            text = _decode(content(files[".txt"]), f"{key} in {path}") if ".txt" in files else str(fields.get("caption") or "")
            yield Pair(key, (text,), path, place, fields)


def _samples(members: list[tarfile.TarInfo]) -> list[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Key and files by suffix of each sample; a key that occurs again with the same suffix begins another sample."""
    samples: list[tuple[str, dict[str, tarfile.TarInfo]]] = []
    latest: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in members:
        name = _MEMBER.fullmatch(member.name)
        if name is None or not member.isfile():
            continue
        key, suffix = name[1], f".{name[2].lower()}"
        if key not in latest or suffix in latest[key]:
            latest[key] = {}
            samples.append((key, latest[key]))
        latest[key][suffix] = member
    return samples


def _fields(data: bytes) -> Mapping[str, Any]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):  # absent, not JSON, not UTF-8 or nested too deeply
        return {}
    return fields if isinstance(fields, dict) else {}


def _decode(data: bytes, name: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        log.warning("%s is not UTF-8 text (%s); unreadable characters are replaced", name, error)
        text = data.decode("utf-8-sig", errors="replace")
    return text.replace("\r\n", "\n")
