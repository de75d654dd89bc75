"""Where pictures and captions come from: each format, and what is said of a damaged or missing one."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from unidiffuser.evaluation.sources import expand, fixed_order, in_split, read_source


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def write_shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_coco_captions(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "pictures" / name).write_bytes(png("red"))
    index = tmp_path / "captions.json"
    content = {
        "images": [{"id": 7, "file_name": "b.png"}, {"id": 3, "file_name": "a.png"}, {"id": 4, "file_name": "unsaid.png"}],
        "annotations": [
            {"image_id": 3, "caption": " one  a\n"},
            {"image_id": 7, "caption": "b"},
            {"image_id": 3, "caption": "two a"},
        ],
    }
    index.write_text(json.dumps(content))
    source = {"format": "coco", "path": str(tmp_path / "pictures"), "captions": str(index)}
    pairs = read_source(source)
    assert [(p.key, p.captions) for p in pairs] == [("7", ("b",)), ("3", ("one a", "two a"))]
    assert pairs[1].image().size == (12, 8)
    index.write_text('{"images": [{}], "annotations": []}')
    with pytest.raises(ValueError, match="not a COCO captions file"):
        read_source(source)
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"captions_val2014\.json"):
        read_source(source)


def test_shards_with_text_or_json_captions(tmp_path: Path) -> None:
    said = json.dumps({"caption": "a blue one", "split": "val"}).encode()
    write_shard(
        tmp_path / "x-00.tar", {"000.png": png("red"), "000.txt": b"a red one\nred\n", "001.json": said, "001.png": png("blue")}
    )
    write_shard(tmp_path / "x-01.tar", {"s/002.png": png("lime"), "s/002.txt": b"a green one", "003.png": png("red")})
    pairs = read_source({"format": "shards", "path": str(tmp_path / "x-{00..01}.tar")})
    assert [p.captions for p in pairs] == [("a red one", "red"), ("a blue one",), ("a green one",)]
    assert [p.image().getpixel((3, 3)) for p in pairs] == [(255, 0, 0), (0, 0, 255), (0, 255, 0)]
    assert len({p.key for p in pairs}) == 3
    assert [p.caption for p in read_source({"format": "shards", "path": f"{tmp_path}/x-*.tar", "where": {"split": "val"}})] == [
        "a blue one"
    ]


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "x.tar", {f"{k}.{end}": png("red") if end == "png" else b"a" for k in "01" for end in ("png", "txt")}
    )
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[: 4 * 512])
    with pytest.raises(ValueError, match=r"x\.tar is truncated or damaged"):
        read_source({"format": "shards", "path": str(tmp_path / "x.tar")})


def test_folders_with_metadata_or_text_files(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(png("red"))
    (tmp_path / "cat.txt").write_text("a cat\na small cat\n")
    (tmp_path / "alone.png").write_bytes(png("red"))
    source = {"format": "folder", "path": str(tmp_path)}
    assert [(p.key, p.captions) for p in read_source(source)] == [("cat.png", ("a cat", "a small cat"))]
    lines = [
        {"file_name": "cat.png", "text": "cat", "style": "noto"},
        {"file_name": "gone.png", "text": ["dog", "hound"], "split": "x"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pairs = read_source(source)
    assert [(p.caption, p.style, p.split) for p in pairs] == [("cat", "noto", ""), ("dog", "", "x")]
    assert len(read_source(source | {"where": {"style": ["noto", "flat"]}})) == 1
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        pairs[1].image()
    assert in_split(pairs, "x") == pairs[1:]
    assert in_split(pairs, "all") == pairs
    with pytest.raises(ValueError, match="all, x"):
        in_split(pairs, "train")


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    for source in ({}, {"format": "folder"}, {"format": "ftp", "path": "x"}, {"format": "coco", "path": "x"}):
        with pytest.raises(ValueError, match="describes no pictures"):
            read_source(source)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        read_source({"format": "folder", "path": str(tmp_path / "none")})
    with pytest.raises(FileNotFoundError, match="no shard"):
        read_source({"format": "shards", "path": str(tmp_path / "none-*.tar")})
    with pytest.raises(ValueError, match="no picture"):
        read_source({"format": "folder", "path": str(tmp_path)})
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n')
    with pytest.raises(ValueError, match=r"metadata\.jsonl:1 is not a record"):
        read_source({"format": "folder", "path": str(tmp_path)})
    (tmp_path / "bad.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match="not an uncompressed webdataset shard"):
        read_source({"format": "shards", "path": str(tmp_path / "bad.tar")})


def test_expand_counts_and_keeps_zeros() -> None:
    assert expand("x-{08..10}.tar") == ["x-08.tar", "x-09.tar", "x-10.tar"]
    assert expand("{0..1}/{2..3}") == ["0/2", "0/3", "1/2", "1/3"]
    assert expand("plain.tar") == ["plain.tar"]


def test_fixed_order_is_a_fair_and_repeatable_sample(tmp_path: Path) -> None:
    lines = [json.dumps({"file_name": f"{k}.png", "text": str(k)}) for k in range(30)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    pairs = read_source({"format": "folder", "path": str(tmp_path)})
    assert fixed_order(pairs, None) != pairs
    assert sorted(p.key for p in fixed_order(pairs, None)) == sorted(p.key for p in pairs)
    assert fixed_order(pairs, 5) == fixed_order(pairs, None)[:5]
