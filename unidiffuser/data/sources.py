"""Where captioned pictures come from: webdataset shards as img2dataset writes them, folders, COCO captions.

All become the same thing: numbered parts of (key, bytes or path, captions). A part is the unit of encoding: it becomes one
latent shard, or is done again as a whole.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")


@dataclass(frozen=True)
class Pair:
    """A picture, encoded as it was found, and its captions."""

    key: str
    picture: bytes | Path
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """A named piece of a source; ``size`` changes when its content does (bytes of a shard, a count of pictures)."""

    name: str
    size: int
    read: Callable[[], Iterator[Pair]]


class DamagedShard(ValueError):
    """A shard that ends before its end."""


def find_parts(source: Path, captions: Path | None = None, per_part: int = 4096) -> list[Part]:
    """The parts of a source, in order.

    Args:
        source: a folder of webdataset ``.tar`` shards; of pictures with ``metadata.jsonl``; of pictures with a ``.txt`` of the
            same name beside each; or of COCO's pictures.
        captions: COCO's annotations (``captions_train2017.json``) for the last.
        per_part: pictures in a part, for folders.

    Raises:
        FileNotFoundError: no such folder, or nothing in it that is known.
        ValueError: a list of captions that cannot be read.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"no folder {source}")
    tars = sorted(source.glob("*.tar"))
    if captions is None and tars:
        return [Part(tar.stem, tar.stat().st_size, partial(_read_tar, tar)) for tar in tars]
    if captions is not None:
        pairs = _coco(source, captions)
    elif (source / "metadata.jsonl").is_file():
        pairs = _listed(source)
    else:
        pairs = [
            Pair(str(path.relative_to(source)), path, (path.with_suffix(".txt").read_text(encoding="utf-8", errors="replace"),))
            for path in sorted(source.rglob("*"))
            if path.suffix[1:].lower() in PICTURES and path.with_suffix(".txt").is_file()
        ]
    if not pairs:
        raise FileNotFoundError(
            f"{source} has no .tar shards, no metadata.jsonl and no picture with a .txt of the same name; for COCO name the "
            "annotations with --captions"
        )
    cuts = [pairs[i : i + per_part] for i in range(0, len(pairs), per_part)]
    return [Part(f"{number:05d}", len(cut), partial(iter, cut)) for number, cut in enumerate(cuts)]


def _read_tar(path: Path) -> Iterator[Pair]:
    """The pairs of one webdataset shard; those without a picture or caption come too, and are counted by the encoder.

    Raises:
        DamagedShard: empty, cut off or overwritten. Checked first, since readers of archives take what they cannot read after
            the first member for the end.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    try:
        with tarfile.open(path, "r:") as tar, path.open("rb") as file:
            for _ in tar:  # headers only
                pass
            file.seek(tar.offset)
            end = file.read(1024)
        if len(end) < 1024 or any(end):
            raise DamagedShard(f"{path} is cut off or damaged at byte {tar.offset}")
    except tarfile.TarError as error:
        raise DamagedShard(f"{path} is no whole archive ({error})") from error

    def stop(error: Exception) -> bool:
        raise DamagedShard(f"{path} is damaged ({error})") from error

    with path.open("rb") as file:  # opened here: webdataset takes names for addresses, and runs "pipe:..." in a shell
        files = tar_file_expander([{"url": str(path), "stream": file}], handler=stop)
        for sample in group_by_keys(files, handler=stop):
            yield _pair(sample)


def _pair(sample: Mapping[str, Any]) -> Pair:
    picture = next((sample[kind] for kind in PICTURES if kind in sample), b"")
    caption = sample.get("txt")
    if caption is None:  # img2dataset keeps the caption in the json too; others only there
        try:
            meta = json.loads(sample.get("json", b"{}"))
            caption = str(meta.get("caption") or "").encode() if isinstance(meta, dict) else b""
        except (json.JSONDecodeError, UnicodeDecodeError):
            caption = b""
    return Pair(sample["__key__"], picture, (caption.decode("utf-8", errors="replace"),))


def _listed(source: Path) -> list[Pair]:
    pairs = []
    index = source / "metadata.jsonl"
    for number, line in enumerate(index.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            texts = [record["text"]] if isinstance(record["text"], str) else list(record["text"])
            pairs.append(Pair(record["file_name"], source / record["file_name"], tuple(map(str, texts))))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{index}:{number} is not a record with file_name and text ({error})") from error
    return pairs


def _coco(source: Path, captions: Path) -> list[Pair]:
    if not captions.is_file():
        raise FileNotFoundError(f"no annotations at {captions}")
    try:
        whole = json.loads(captions.read_text(encoding="utf-8"))
        names = {image["id"]: image["file_name"] for image in whole["images"]}
        texts: dict[int, list[str]] = {}
        for annotation in whole["annotations"]:
            texts.setdefault(annotation["image_id"], []).append(str(annotation["caption"]))
        return [Pair(names[i], source / names[i], tuple(texts.get(i, ()))) for i in sorted(names)]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{captions} is not a file of COCO captions ({error})") from error
