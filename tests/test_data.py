"""Filtering of tables, reading of sources, encoding to latent shards: counts, resuming, and every kind of bad input."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import EPS, SIDE, encoded, latent_folder, picture, tar_samples, write_tar
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from unidiffuser.checkpoints.checkpoint import load_checkpoint
from unidiffuser.cli import app
from unidiffuser.data.captioned import DamagedShard, picture_files, read_beside, read_listed, read_shard
from unidiffuser.data.columns import find_columns
from unidiffuser.data.download import img2dataset_command
from unidiffuser.data.encode import Encoders, Encoding, encode
from unidiffuser.data.filter import PRESETS, Rules, filter_tables
from unidiffuser.data.shards import LatentShards, read_notes
from unidiffuser.data.sources import find_parts
from unidiffuser.distributed import World
from unidiffuser.media.files import locked

ALONE = World(0, 1, torch.device("cpu"))


# --- tables ----------------------------------------------------------------------------------------------------------


def laion(rows: int, seed: int = 0, language: bool = True) -> pa.Table:
    """Rows with LAION's columns, some values missing."""
    rng = np.random.default_rng(seed)

    def some(values: np.ndarray) -> pa.Array:
        return pa.array(values.tolist(), mask=rng.random(rows) < 0.05)

    columns = {
        "URL": pa.array([f"http://h/{k}.jpg" if k % 29 else "ftp://h/x" for k in range(rows)]),
        "TEXT": some(np.array(["a cat", " ", "x" * 40, "ein Hund"])[rng.integers(0, 4, rows)]),
        "WIDTH": some(rng.integers(100, 2000, rows)),
        "HEIGHT": some(rng.integers(100, 2000, rows)),
        "similarity": some(rng.uniform(0.2, 0.4, rows)),
        "hash": pa.array(rng.integers(0, 2**60, rows)),
        "punsafe": some(rng.random(rows).astype(np.float32)),
        "pwatermark": some(rng.random(rows).astype(np.float32)),
        "AESTHETIC_SCORE": some(rng.uniform(3, 8, rows)),
    }
    if language:
        columns["LANGUAGE"] = some(np.array(["en", "de"])[rng.integers(0, 2, rows)])
    return pa.table(columns)


def passes(row: dict, rules: Rules) -> str | None:
    """The first rule that a row breaks, in plain Python."""
    side = None if row["WIDTH"] is None or row["HEIGHT"] is None else min(row["WIDTH"], row["HEIGHT"])
    long = None if side is None else max(row["WIDTH"], row["HEIGHT"])
    length = None if row["TEXT"] is None else len(row["TEXT"].strip())
    checks = [("url", row["URL"].startswith("http")), ("min_caption", length is not None and length >= rules.min_caption)]
    if "LANGUAGE" in row and rules.language:
        checks.append(("language", row["LANGUAGE"] == rules.language))
    if rules.min_side:
        checks.append(("min_side", side is not None and side >= rules.min_side))
    if rules.max_ratio:
        checks.append(("max_ratio", side is not None and long <= side * rules.max_ratio))
    for rule, name, least in (("min_similarity", "similarity", True), ("max_watermark", "pwatermark", False),
                              ("max_unsafe", "punsafe", False), ("min_aesthetic", "AESTHETIC_SCORE", True)):  # fmt: skip
        limit, value = getattr(rules, rule), row[name]
        if limit is not None:
            checks.append((rule, value is not None and (value >= limit if least else value <= limit)))
    return next((name for name, good in checks if not good), None)


@pytest.mark.parametrize("rules", [*PRESETS.values(), Rules(max_ratio=2.0, max_unsafe=0.5)])
@pytest.mark.parametrize("language", [True, False])
def test_counts_agree_with_plain_python(tmp_path, rules, language):
    (tmp_path / "in").mkdir()
    tables = [laion(500, seed, language) for seed in (1, 2)]
    for number, table in enumerate(tables):
        pq.write_table(table, tmp_path / f"in/part-{number}.parquet", row_group_size=97)
    count = filter_tables(tmp_path / "in", tmp_path / "out", rules, batch_rows=64)
    broken = [passes(row, rules) for table in tables for row in table.to_pylist()]
    assert count.read == 1000
    assert count.kept == broken.count(None)
    assert count.dropped == {name: broken.count(name) for name in count.dropped}
    assert count.kept + sum(count.dropped.values()) == count.read
    kept = [row for n in (0, 1) for row in pq.read_table(tmp_path / f"out/part-{n}.parquet").to_pylist()]
    rows = [row for table in tables for row in table.to_pylist()]
    assert kept == [row for row, reason in zip(rows, broken, strict=True) if reason is None]
    assert json.loads((tmp_path / "out/filter.json").read_text())["count"]["kept"] == count.kept


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["SAMPLE_ID", "URL", "TEXT", "HEIGHT", "WIDTH", "LICENSE", "NSFW", "similarity"], {"width": "WIDTH"}),
        (["url", "caption", "similarity", "punsafe", "pwatermark", "key"], {"caption": "caption", "punsafe": "punsafe"}),
        (["URL", "TEXT", "aesthetic", "hash"], {"aesthetic": "aesthetic"}),
        (["URL", "TEXT", "AESTHETIC_SCORE"], {"aesthetic": "AESTHETIC_SCORE"}),
        (["url", "text", "clip_similarity_vitb32", "watermark_score", "aesthetic_score_laion_v2"],
         {"similarity": "clip_similarity_vitb32", "pwatermark": "watermark_score"}),
        (["uid", "url", "text", "original_width", "original_height", "clip_b32_similarity_score"], {"width": "original_width"}),
    ],
)  # fmt: skip
def test_columns_of_published_sets(names, expected):
    found = find_columns(names)
    assert found["url"].lower() == "url"
    assert "caption" in found
    assert expected.items() <= found.items()


def test_missing_and_renamed_columns(tmp_path):
    table = laion(50).rename_columns(["link", *laion(1).column_names[1:]])
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"'url'.*--rename"):
        filter_tables(tmp_path / "t.parquet", tmp_path / "out", Rules())
    assert filter_tables(tmp_path / "t.parquet", tmp_path / "out", Rules(), renamed={"url": "link"}).read == 50
    with pytest.raises(ValueError, match="no column 'nothing'"):
        filter_tables(tmp_path / "t.parquet", tmp_path / "out", Rules(), renamed={"url": "nothing"})
    pq.write_table(laion(50).drop_columns(["punsafe"]), tmp_path / "u.parquet")
    with pytest.raises(ValueError, match=r"punsafe.*max_unsafe"):
        filter_tables(tmp_path / "u.parquet", tmp_path / "out", PRESETS["aesthetics-512"])


def test_tables_that_cannot_be_read_are_reported_and_tried_again(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    pq.write_table(laion(100), source / "a.parquet")
    (source / "b.parquet").write_bytes(b"")
    (source / "c.parquet").write_bytes((source / "a.parquet").read_bytes()[:-200])
    whole = bytearray((source / "a.parquet").read_bytes())
    whole[40:400] = bytes(360)
    (source / "d.parquet").write_bytes(whole)
    (source / "e.parquet").write_bytes((source / "a.parquet").read_bytes().replace(b"similarity", b"\xff" * 10))
    count = filter_tables(source, out, Rules())
    assert count.read == 100
    assert set(count.unreadable) == {"b.parquet", "c.parquet", "d.parquet", "e.parquet"}
    assert {p.name for p in out.glob("*.parquet")} == {"a.parquet"}
    before = (out / "a.parquet").stat().st_mtime_ns
    pq.write_table(laion(60), source / "b.parquet")
    count = filter_tables(source, out, Rules())
    assert count.read == 160
    assert (out / "a.parquet").stat().st_mtime_ns == before  # done is done
    result = CliRunner().invoke(app, ["data", "filter", str(source), str(out)])
    assert result.exit_code == 1  # c and d are still damaged
    assert "unreadable: c.parquet" in result.output
    with pytest.raises(FileNotFoundError, match=r"no \.parquet"):
        filter_tables(tmp_path / "nowhere", out, Rules())


def test_the_download_command_names_the_columns(tmp_path):
    pq.write_table(laion(5), tmp_path / "t.parquet")
    command = img2dataset_command(tmp_path, tmp_path / "shards", 256)
    assert command[0] == "img2dataset"
    assert "--url_col=URL" in command
    assert "--caption_col=TEXT" in command
    extra = json.loads(next(a for a in command if a.startswith("--save_additional_columns")).partition("=")[2])
    assert extra == ["WIDTH", "HEIGHT", "similarity", "hash", "punsafe", "pwatermark", "AESTHETIC_SCORE", "LANGUAGE"]


# --- sources ---------------------------------------------------------------------------------------------------------


def test_every_truncation_of_a_shard_is_noticed(tmp_path):
    write_tar(tmp_path / "00000.tar", tar_samples(0, 3))
    whole = (tmp_path / "00000.tar").read_bytes()
    end = len(whole.rstrip(b"\0"))
    pairs = list(find_parts(tmp_path)[0].read())
    assert [p.captions for p in pairs] == [(picture(k)[1],) for k in range(3)]
    for cut in (0, 1, 511, 512, 1024, *range(1536, end, 512), end - 7):
        (tmp_path / "00000.tar").write_bytes(whole[:cut])
        with pytest.raises(DamagedShard):
            list(find_parts(tmp_path)[0].read())
    damaged = bytearray(whole)
    header = whole.index(b"000000001.jpg")  # of a member in the middle
    damaged[header : header + 512] = b"\xff" * 512
    (tmp_path / "00000.tar").write_bytes(damaged)
    with pytest.raises(DamagedShard):
        list(find_parts(tmp_path)[0].read())


@pytest.mark.parametrize(
    "name", ["pipe:touch ran #.tar", "pipe:touch ran; cat whole.tar", "http:x.tar", "file:x.tar", "{0..1}.tar", "a::b.tar"]
)
def test_the_name_of_a_shard_is_no_command(tmp_path, monkeypatch, name):
    """The webdataset library takes names for addresses, and runs those that begin with "pipe:" in a shell."""
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / name, tar_samples(0, 2))
    pairs = [pair for part in find_parts(Path()) for pair in part.read()]
    assert [pair.key for pair in pairs] == ["000000000", "000000001"]
    assert not (tmp_path / "ran").exists()


def test_folders_and_coco(tmp_path):
    with pytest.raises(FileNotFoundError, match="--captions"):
        find_parts(tmp_path)
    for k in range(3):
        image, caption = picture(k)
        image.save(tmp_path / f"{k}.png")
        if k < 2:
            (tmp_path / f"{k}.txt").write_text(caption)
    plain = find_parts(tmp_path, per_part=1)
    assert [part.name for part in plain] == ["00000", "00001"]
    assert [pair.captions for part in plain for pair in part.read()] == [("red circle",), ("green circle",)]
    coco = {
        "images": [{"id": 7, "file_name": "1.png"}, {"id": 3, "file_name": "0.png"}],
        "annotations": [{"image_id": 7, "caption": "a"}, {"image_id": 3, "caption": "b"}, {"image_id": 7, "caption": "c"}],
    }
    (tmp_path / "captions.json").write_text(json.dumps(coco))
    pairs = list(find_parts(tmp_path, tmp_path / "captions.json")[0].read())
    assert [(pair.key, pair.captions) for pair in pairs] == [("0.png", ("b",)), ("1.png", ("a", "c"))]
    (tmp_path / "captions.json").write_text("[]")
    with pytest.raises(ValueError, match="COCO"):
        find_parts(tmp_path, tmp_path / "captions.json")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": ["x", "y"]}\n\n')
    assert [pair.captions for pair in find_parts(tmp_path)[0].read()] == [("x", "y")]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png"}\n')
    with pytest.raises(ValueError, match=r"metadata\.jsonl:1"):
        find_parts(tmp_path)


def test_captions_may_contain_what_unicode_calls_a_line_end(tmp_path):
    for name in ("a.png", "b.PNG"):
        picture(0)[0].save(tmp_path / name, "PNG")
    lines = [json.dumps({"file_name": name, "text": f"one\u2028{name}\x85"}, ensure_ascii=False) for name in ("a.png", "b.PNG")]
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    assert [pair.captions for pair in read_listed(tmp_path)] == [("one\u2028a.png\x85",), ("one\u2028b.PNG\x85",)]
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"metadata\.jsonl:1 is not a record .*\(it is not UTF-8\)"):
        list(read_listed(tmp_path))
    (tmp_path / "metadata.jsonl").write_text(lines[0], encoding="utf-16")
    with pytest.raises(ValueError, match=r"metadata\.jsonl is not UTF-8 text .*save it as UTF-8"):
        list(read_listed(tmp_path))
    whole = json.dumps({"file_name": "c.png", "text": "café"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_bytes(lines[0].encode() + b"\n" + whole.encode("latin-1") + b"\n" + lines[1].encode())
    assert [pair.key for pair in read_listed(tmp_path)] == ["a.png", "b.PNG"]
    assert [pair.problem for pair in read_listed(tmp_path, keep_bad=True)] == ["", "bad line in metadata.jsonl", ""]


def test_pictures_of_a_folder_with_and_without_text(tmp_path, caplog):
    (tmp_path / "deep").mkdir()
    for name in ("a.JPG", "b.png", "deep/c.gif", "notes.md"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa cat\r\na dog\r\n")
    (tmp_path / "deep/c.txt").write_bytes(b"caf\xe9")
    pairs = list(read_beside(tmp_path))
    assert [(pair.key, pair.captions) for pair in pairs] == [
        ("a.JPG", ("a cat\na dog\n",)), ("b.png", ()), (str(Path("deep/c.gif")), ("caf\ufffd",))
    ]  # fmt: skip
    assert "c.txt is not UTF-8" in caplog.text
    assert [pair.key for pair in read_beside(tmp_path, recursive=False)] == ["a.JPG", "b.png"]


def test_files_of_a_sample_are_found_wherever_they_lie_in_the_shard(tmp_path):
    """Members are given in this order; a key that occurs again with a second picture is another sample."""
    image = encoded(picture(0)[0])
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("s/0.JPG", image), ("1.png", image), (".2.png", image), ("readme", b"x"), ("1.txt", b"one"),
                           ("s/0.txt", b"zero"), ("1.png", image + b"again"), ("3.seg.png", image)):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    pairs = list(read_shard(tmp_path / "a.tar"))
    assert [(pair.key, pair.captions, pair.has_picture) for pair in pairs] == [
        ("s/0", ("zero",), True), ("1", ("one",), True), ("1", ("",), True), ("3", ("",), False)
    ]  # fmt: skip
    assert pairs[0].image().size == (SIDE, SIDE)
    assert pairs[2].place[1] == len(image) + 5
    with pytest.raises(FileNotFoundError, match=r"3 in .*a\.tar has no picture"):
        pairs[3].image()


# --- encoding --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return Encoders(load_checkpoint("emoji"), torch.device("cpu"))


def bomb() -> bytes:
    """A PNG of a few KB that would unfold to 1.2 GB."""
    return encoded(Image.new("1", (20000, 20000)))


SMALL = Encoding(SIDE, batch_size=4, readers=2)


def test_bad_pictures_and_captions_are_counted_and_the_rest_is_encoded(tmp_path, encoders):
    samples = tar_samples(0, 10)
    samples["000000001"]["jpg"] = b""
    samples["000000002"]["jpg"] = b"<html>not found</html>"
    samples["000000003"]["jpg"] = samples["000000003"]["jpg"][:-300]
    samples["000000004"]["jpg"] = bomb()
    samples["000000005"] |= {"txt": b" \n", "json": b"{}"}
    del samples["000000006"]["txt"]  # the json has it too
    samples["000000007"]["txt"] = b"long " * 2000
    samples["000000008"]["txt"] = b"\xff\xfe not utf-8"
    samples["000000009"] = {"json": b"{not json"}
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in/00000.tar", samples)
    manifest = encode(find_parts(tmp_path / "in"), tmp_path / "out", encoders, SMALL, ALONE)
    assert manifest["read"] == 10
    assert manifest["samples"] == 4
    assert manifest["dropped"] == {"no caption": 2, "no picture": 1, "unreadable picture": 3}
    assert read_notes(tmp_path / "out/00000.safetensors")["keys"] == ["000000000", "000000006", "000000007", "000000008"]
    assert LatentShards(tmp_path / "out").name_of(1) == "00000.safetensors:000000006"


@pytest.mark.parametrize("packed", [True, False])
def test_a_broken_picture_does_not_stop_the_others(tmp_path, encoders, monkeypatch, packed):
    """An EPS, for which Pillow would start Ghostscript, and an AVIF whose decoder raises an error of its own."""
    from PIL import EpsImagePlugin, ImageFile

    load = ImageFile.ImageFile.load

    def decoder(self):
        if self.size == (9, 9):
            raise RuntimeError("Failed to decode frame 0")
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoder)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **options: pytest.fail("Ghostscript was started"))
    samples = tar_samples(0, 5)
    samples["000000001"]["jpg"] = EPS
    samples["000000002"]["jpg"] = EPS[:60]
    samples["000000003"]["jpg"] = encoded(Image.new("RGB", (9, 9)))
    (tmp_path / "in").mkdir()
    if packed:
        write_tar(tmp_path / "in/00000.tar", samples)
    else:
        for key, files in samples.items():
            (tmp_path / f"in/{key}.png").write_bytes(files["jpg"])
            (tmp_path / f"in/{key}.txt").write_bytes(files["txt"])
    manifest = encode(find_parts(tmp_path / "in"), tmp_path / "out", encoders, SMALL, ALONE)
    assert manifest["samples"] == 2
    assert manifest["dropped"] == {"unreadable picture": 3}


def test_latents_are_the_models_own(tmp_path, encoders):
    image, caption = picture(3)
    (tmp_path / "in").mkdir()
    image.save(tmp_path / "in/a.png")
    (tmp_path / "in/a.txt").write_text(caption)
    encode(find_parts(tmp_path / "in"), tmp_path / "out", encoders, SMALL, ALONE)
    row = LatentShards(tmp_path / "out").read(torch.tensor([0]))[0]
    from unidiffuser.media.images import to_tensor

    generator = torch.Generator().manual_seed(0)
    drawn = encoders.autoencoder.encode(to_tensor([image]), generator)[0]
    noise = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(row["mean"] + row["std"] * noise, drawn, atol=5e-3)  # fp16 on disk
    assert torch.allclose(row["clip_img"], encoders.image_tokens([image])[0], atol=5e-3)
    assert torch.allclose(row["text"], encoders.texts([caption]), atol=5e-3)


def test_a_killed_run_continues_and_encodes_nothing_twice(tmp_path, encoders, monkeypatch):
    (tmp_path / "in").mkdir()
    for number in range(3):
        write_tar(tmp_path / f"in/{number:05d}.tar", tar_samples(6 * number, 6))
    parts = find_parts(tmp_path / "in")
    encode(parts, tmp_path / "whole", encoders, SMALL, ALONE)
    import unidiffuser.data.shards as shards

    save = shards.save_file

    def dies(tensors, path, **kwargs):
        if len(list((tmp_path / "out").glob("0*.safetensors"))) == 1:
            Path(path).write_bytes(b"half of it")
            raise KeyboardInterrupt
        save(tensors, path, **kwargs)

    monkeypatch.setattr(shards, "save_file", dies)
    with pytest.raises(KeyboardInterrupt):
        encode(parts, tmp_path / "out", encoders, SMALL, ALONE)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == ["00000.safetensors"]
    with pytest.raises(FileNotFoundError, match="until all parts are encoded"):
        LatentShards(tmp_path / "out")
    monkeypatch.setattr(shards, "save_file", save)
    done: list[int] = []
    manifest = encode(parts, tmp_path / "out", encoders, SMALL, ALONE, done.append)
    assert done == [6, 6]
    assert manifest == json.loads((tmp_path / "whole/manifest.json").read_text())
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_damaged_shards_are_reported_and_encoded_once_repaired(tmp_path, encoders):
    (tmp_path / "in").mkdir()
    for number in range(3):
        write_tar(tmp_path / f"in/{number:05d}.tar", tar_samples(4 * number, 4))
    whole = (tmp_path / "in/00001.tar").read_bytes()
    (tmp_path / "in/00001.tar").write_bytes(whole[:2048])
    (tmp_path / "in/00002.tar").write_bytes(b"")
    command = ["data", "encode", str(tmp_path / "in"), str(tmp_path / "out"), "--image-size", str(SIDE), "--device", "cpu"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "not encoded: 00001" in result.output
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert set(manifest["damaged"]) == {"00001", "00002"}
    assert manifest["samples"] == 4
    (tmp_path / "in/00001.tar").write_bytes(whole)
    (tmp_path / "in/00002.tar").unlink()
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out/manifest.json").read_text())["samples"] == 8


def test_a_shard_that_vanishes_while_encoding_is_reported(tmp_path, encoders):
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in/00000.tar", tar_samples(0, 4))
    write_tar(tmp_path / "in/00001.tar", tar_samples(4, 4))
    parts = find_parts(tmp_path / "in")
    (tmp_path / "in/00000.tar").unlink()
    manifest = encode(parts, tmp_path / "out", encoders, SMALL, ALONE)
    assert "vanished" in manifest["damaged"]["00000"]
    assert manifest["samples"] == 4

    def half(read):  # the shard is removed after its first pair
        for k, pair in enumerate(read()):
            yield pair
            if k == 0:
                pair.path.unlink()

    write_tar(tmp_path / "in/00000.tar", tar_samples(0, 4))
    parts[0] = replace(parts[0], read=partial(half, parts[0].read))
    one = Encoding(SIDE, batch_size=1, readers=1)
    assert "vanished" in encode(parts, tmp_path / "out", encoders, one, ALONE)["damaged"]["00000"]
    assert not (tmp_path / "out/00000.safetensors").exists()


def test_a_second_encoding_into_one_folder_is_refused(tmp_path, encoders):
    """It would remove the manifest that the first one, or a training, is about to read."""
    (tmp_path / "in").mkdir()
    picture(0)[0].save(tmp_path / "in/a.png")
    (tmp_path / "in/a.txt").write_text("a cat")
    parts = find_parts(tmp_path / "in")
    encode(parts, tmp_path / "out", encoders, SMALL, ALONE)
    message = r"the folder .*out is in use by process \d+ on"
    with locked(tmp_path / "out/.lock", "the folder"), pytest.raises(ValueError, match=message):
        encode(parts, tmp_path / "out", encoders, SMALL, ALONE)
    assert len(LatentShards(tmp_path / "out")) == 1
    assert encode(parts, tmp_path / "out", encoders, SMALL, ALONE)["samples"] == 1


def test_other_settings_need_another_folder(tmp_path, encoders):
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in/00000.tar", tar_samples(0, 2))
    parts = find_parts(tmp_path / "in")
    encode(parts, tmp_path / "out", encoders, SMALL, ALONE)
    with pytest.raises(ValueError, match=f"image_size {SIDE} there, {2 * SIDE} here"):
        encode(parts, tmp_path / "out", encoders, Encoding(2 * SIDE), ALONE)


# --- latent shards ---------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(any),
    batch=st.integers(1, 40),
    window=st.integers(1, 4),
    seed=st.integers(0, 5),
)
@settings(max_examples=40, deadline=None)
def test_every_epoch_shows_every_pair_once(tmp_path_factory, sizes, batch, window, seed):
    folder = tmp_path_factory.mktemp("shards")
    listed = [{"name": f"{k}", "samples": size, "bytes": 1} for k, size in enumerate(sizes)]
    (folder / "manifest.json").write_text(json.dumps({"shards": listed}))
    shards = LatentShards(folder, window)
    total, epochs = len(shards), 2
    steps = -(-total * epochs // batch)
    seen = torch.cat([shards.order(batch, seed, step) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(seen[epoch * total : (epoch + 1) * total].tolist()) == list(range(total))
    assert torch.equal(shards.order(batch, seed, steps - 1), seen[-batch:])  # any step alone


def test_shards_that_are_not_as_they_were(tmp_path):
    latent_folder(tmp_path)
    shards = LatentShards(tmp_path)
    assert len(shards) == 35
    assert shards.name_of(8) == "00001.safetensors:1-1"
    (tmp_path / "00000.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="vanished"):
        shards.read(torch.tensor([2]))
    path = tmp_path / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="bytes instead of"):
        shards.read(torch.tensor([8]))
    with pytest.raises(ValueError, match="not a whole latent shard"):
        read_notes(path)
    (tmp_path / "manifest.json").write_text('{"shards": []}')
    with pytest.raises(ValueError, match="no encoded pair"):
        LatentShards(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        5, {}, {"name": "../0.safetensors", "samples": 1, "bytes": 9}, {"name": "0", "samples": -1, "bytes": 9},
        {"name": "0", "samples": 10**12, "bytes": 9},
        {"name": "x" * 5000, "samples": 1, "bytes": 9}, {"name": "0", "samples": True, "bytes": 9}, {"name": "0", "samples": 1},
    ],
)  # fmt: skip
def test_a_damaged_manifest_is_named(tmp_path: Path, entry: object) -> None:
    for text in (json.dumps({"shards": [entry]}), "[" * 100_000, "[]"):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"manifest\.json (is damaged|is not valid|holds no).*encode again"):
            LatentShards(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {**t, "first": t["first"].float()},
        lambda t: {**t, "first": t["first"].flip(0)},
        lambda t: {**t, "first": t["first"] + 1},
        lambda t: {**t, "first": t["first"] * 1000},
        lambda t: {**t, "mean": t["mean"][:2]},
        lambda t: {**t, "std": t["std"][0]},
        lambda t: {k: v for k, v in t.items() if k != "text"},
    ],
)
def test_a_shard_with_other_tensors_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    latent_folder(tmp_path, shards=1, per_shard=3)
    path = tmp_path / "00000.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"][0]["bytes"] = path.stat().st_size
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"00000\.safetensors (does not hold the 3 pairs|is not a whole latent shard)"):
        LatentShards(tmp_path).read(torch.tensor([0, 1, 2]))


GOOD = '{"file_name": "a.png", "text": "a cat"}'
BAD = [
    '{"file_name": "b.png", "text": null}',
    '{"file_name": 5, "text": "x"}',
    '{"file_name": "", "text": "x"}',
    '{"file_name": "b.png", "text": ["x", 5]}',
    '{"file_name": "b.png", "text": {"en": "x"}}',
    '{"file_name": "b.png"}',
    '["b.png", "x"]',
    "5",
    "not json",
    "[" * 100_000,
]


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_a_bad_line_of_a_list_is_left_out_and_counted(tmp_path: Path, line: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + "\n".join([GOOD, line, line]), encoding="utf-8")
    assert [pair.key for pair in read_listed(tmp_path)] == ["a.png"]
    message = "metadata.jsonl:2 is not a record with file_name and text"
    assert message in caplog.text
    assert "2 such lines are left out, 1 are read" in caplog.text
    (part,) = find_parts(tmp_path)
    assert [(pair.key, pair.problem) for pair in part.read()] == [
        ("a.png", ""),
        ("metadata.jsonl:2", "bad line in metadata.jsonl"),
        ("metadata.jsonl:3", "bad line in metadata.jsonl"),
    ]
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(ValueError, match=r"metadata\.jsonl:1 is not a record"):
        list(read_listed(tmp_path))


def test_names_and_captions_that_no_program_takes_are_counted(tmp_path: Path, encoders: Encoders) -> None:
    """A name longer than the system allows, one with a NUL, and halves of surrogate pairs, which JSON can hold."""
    (tmp_path / "in").mkdir()
    for name in "ab":
        picture(0)[0].save(tmp_path / f"in/{name}.png")
    names = ["a.png", "x" * 300 + ".png", "y" * 5000, "n\0.png", "b.png", "a.png", "b.png"]
    texts: list[Any] = ["a cat", "a", "b", "c", "\ud800 lone", ["\udfff", "a dog"], "a fox"]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in zip(names, texts, strict=True)]
    (tmp_path / "in/metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    manifest = encode(find_parts(tmp_path / "in"), tmp_path / "out", encoders, SMALL, ALONE)
    assert manifest["dropped"] == {"bad line in metadata.jsonl": 2, "no picture": 1, "unreadable caption": 1}
    assert LatentShards(tmp_path / "out").captions() == [("a cat",), ("a dog",), ("a fox",)]
    images = [{"id": k, "file_name": f"{name}.png"} for k, name in enumerate("ab")]
    notes = [{"image_id": 0, "caption": "a \ud800 cat"}, {"image_id": 1, "caption": "a dog"}]
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": notes}))
    parts = find_parts(tmp_path / "in", tmp_path / "coco.json")
    assert encode(parts, tmp_path / "coco", encoders, SMALL, ALONE)["dropped"] == {"unreadable caption": 1}


def test_separators_inside_a_caption_end_no_line(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c\x0cd\u2029e"
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": text}, ensure_ascii=False), "utf-8")
    assert [pair.captions for pair in read_listed(tmp_path)] == [(text,)]


def test_what_macos_leaves_beside_shards_and_tables_is_skipped(tmp_path: Path) -> None:
    """A "._name" file, with what its file system cannot keep."""
    pq.write_table(pa.table({"URL": ["http://a"], "TEXT": ["a cat"]}), tmp_path / "a.parquet")
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    for name in ("._a.parquet", "._a.tar"):
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07")
    assert [part.name for part in find_parts(tmp_path)] == ["a"]
    count = filter_tables(tmp_path, tmp_path / "out", Rules(min_caption=1))
    assert (count.files, count.kept, count.unreadable) == (1, 1, {})
    assert img2dataset_command(tmp_path, tmp_path / "shards", 256)[0] == "img2dataset"  # reads the columns of the first table


def test_what_macos_leaves_beside_pictures_is_skipped(tmp_path: Path) -> None:
    names = ["1.jfif", "2.jpe", "3.AVIF", "4.png", "5.webp"]
    for name in [*names, "._4.png", ".hidden.jpg", "notes.txt", "4.svg"]:
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in picture_files(tmp_path)] == names
