"""Opening pictures of every kind, cropping, tensors and files."""

from __future__ import annotations

import errno
import re
import struct
import subprocess
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import EPS
from PIL import EpsImagePlugin, Image, ImageFile

import unidiffuser
from unidiffuser.media.files import lines_of
from unidiffuser.media.formats import PICTURE_FORMATS, PICTURE_SUFFIXES
from unidiffuser.media.images import (
    contact_sheet,
    fit,
    open_image,
    readable_formats,
    save_png,
    to_images,
    to_tensor,
)


def gradient(width: int = 40, height: int = 30) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".webp", ".tiff"])
def test_plain_pictures_come_back(tmp_path: Path, suffix: str) -> None:
    options = {"lossless": True} if suffix == ".webp" else {}
    gradient().save(tmp_path / f"a{suffix}", **options)
    opened = open_image(tmp_path / f"a{suffix}")
    assert opened.mode == "RGB"
    assert difference(opened, gradient()) == 0


def test_transparency_goes_onto_white(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))
    for mode in ("RGBA", "LA"):
        image = rgba.convert(mode)
        image.save(tmp_path / f"{mode}.png")
        assert open_image(tmp_path / f"{mode}.png").getpixel((1, 0)) == (255, 255, 255)
    assert open_image(rgba).getpixel((0, 0)) == (255, 0, 0)
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 0, 128, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.gif", transparency=0)
    opened = open_image(tmp_path / "p.gif")
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 128, 0)]


def test_palette_and_bilevel(tmp_path: Path) -> None:
    gradient().quantize(200).save(tmp_path / "p.png")
    assert difference(open_image(tmp_path / "p.png"), gradient()) < 40
    Image.new("1", (3, 3), 1).save(tmp_path / "b.png")
    assert open_image(tmp_path / "b.png").getpixel((1, 1)) == (255, 255, 255)


def test_sixteen_bits_keep_their_brightness(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    opened = np.asarray(open_image(tmp_path / "deep.png"))[..., 0]
    assert np.abs(opened.astype(int) - levels // 257).max() <= 1
    wide = Image.fromarray(levels.astype(np.int32))
    assert wide.mode == "I"
    assert np.abs(np.asarray(open_image(wide))[..., 0].astype(int) - levels // 257).max() <= 1
    unit = Image.fromarray((levels / 65535).astype(np.float32))
    assert unit.mode == "F"
    assert np.abs(np.asarray(open_image(unit))[..., 0].astype(int) - levels // 257).max() <= 1


def test_cmyk(tmp_path: Path) -> None:
    gradient().convert("CMYK").save(tmp_path / "print.jpg", quality=100)
    assert difference(open_image(tmp_path / "print.jpg"), gradient()) < 16


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (2, 1)), (6, (1, 0)), (8, (0, 2))])
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int, corner: tuple[int, int]) -> None:
    image = Image.new("RGB", (3, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    opened = open_image(tmp_path / "turned.png")
    assert opened.size == ((3, 2) if orientation in (1, 3) else (2, 3))
    assert opened.getpixel(corner) == (255, 255, 255)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_no_reason_to_fail(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gradient().save(tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff broken")
    assert open_image(tmp_path / "a.jpg").size == (40, 30)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 3), (3, 20_000), (7, 5)])
def test_extreme_shapes_fit_a_square(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "odd.png")
    fitted = fit(open_image(tmp_path / "odd.png"), 64, 64)
    assert fitted.size == (64, 64)
    assert fitted.getcolors() == [(64 * 64, (10, 200, 30))]


def test_unusable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        open_image(tmp_path / "nothing.png")
    for name in ("x" * 5000, "a\0b.png"):
        with pytest.raises(FileNotFoundError, match="no picture at"):
            open_image(name)
    with pytest.raises(ValueError, match="folder"):
        open_image(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("text.png", "empty.png"):
        with pytest.raises(ValueError, match="not a picture"):
            open_image(tmp_path / name)
    with pytest.raises(ValueError, match="empty"):
        open_image(Image.new("RGB", (0, 5)))
    gradient(400, 300).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"bomb\.png has too many pixels"):
        open_image(tmp_path / "bomb.png")


def no_program_may_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*command: object, **_: object) -> None:
        pytest.fail(f"started {command}")

    for name in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, started)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)


@pytest.mark.parametrize("source", ["path", "bytes"])
@pytest.mark.parametrize("data", [EPS, EPS[: len(EPS) // 2], b"\xc5\xd0\xd3\xc6" + EPS], ids=["whole", "broken", "DOS"])
def test_an_eps_under_another_name_starts_no_ghostscript(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, source: str
) -> None:
    no_program_may_start(monkeypatch)
    path = tmp_path / "x.png"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.png is not a picture in a known format"):
        open_image(path if source == "path" else data, "x.png")


def test_formats_are_a_closed_list_of_what_pillow_has(tmp_path: Path) -> None:
    assert set(readable_formats()) <= set(Image.OPEN) & set(PICTURE_FORMATS)
    assert {"PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"} <= set(readable_formats())
    for kind in readable_formats():
        Image.new("RGB", (32, 32), (10, 200, 30)).save(tmp_path / "any", kind)
        assert open_image(tmp_path / "any").size == (32, 32), kind
    for kind in ("EPS", "PDF", "DDS", "TGA"):
        gradient().save(tmp_path / "other.png", kind)
        with pytest.raises(ValueError, match=r"other\.png is not a picture in a known format"):
            open_image(tmp_path / "other.png")


def test_suffixes_are_those_of_the_formats_whatever_is_saved_later(tmp_path: Path) -> None:
    assert {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".ppm"} <= set(PICTURE_SUFFIXES)
    assert not {".eps", ".pdf", ".dds", ".spider", ".mpg"} & set(PICTURE_SUFFIXES)
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in PICTURE_SUFFIXES)
    registered = dict(Image.EXTENSION)
    assert {suffix for suffix, kind in registered.items() if kind in readable_formats()} <= set(PICTURE_SUFFIXES)
    try:
        Image.new("F", (4, 4)).save(tmp_path / "a.png", "SPIDER")  # registers ".png" as SPIDER's
        assert Image.EXTENSION[".png"] == "SPIDER"
        assert ".png" in PICTURE_SUFFIXES
    finally:
        Image.EXTENSION.update(registered)


def test_suffixes_of_pictures_are_listed_in_one_place() -> None:
    root = Path(unidiffuser.__file__).parent
    files = [*root.rglob("*.py"), *(root.parent / "nodes").rglob("*.py")]
    listed = [file.name for file in files if re.search(r"['\"]\.?jpe?g['\"]", file.read_text(encoding="utf-8"))]
    assert listed == ["formats.py"]


def test_lines_end_at_line_feeds_only() -> None:
    assert lines_of("a\u2028b\x85c \r\n\n d\x0ce") == ["a\u2028b\x85c", "", "d\x0ce"]


def test_pictures_are_opened_in_one_place() -> None:
    root = Path(unidiffuser.__file__).parent
    files = [*root.rglob("*.py"), *(root.parent / "nodes").rglob("*.py")]
    openers = {file.name for file in files if re.search(r"\bImage\.open\((?!path\)\.text)", file.read_text(encoding="utf-8"))}
    assert openers == {"images.py"}


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to decode frame 0"),  # AVIF
        NotImplementedError(),  # DDS
        SyntaxError("not a TIFF file"),
        struct.error("unpack requires 4 bytes"),
        KeyError(258),
        TypeError("NoneType"),
        EOFError(),
        AssertionError(),
        MemoryError(),
        subprocess.CalledProcessError(1, "gs"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("where", ["open", "load", "lazy"])
def test_whatever_a_decoder_raises_names_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    gradient().save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as lazy:
        monkeypatch.setattr(*((Image, "open") if where == "open" else (ImageFile.ImageFile, "load")), fails)
        with pytest.raises(ValueError, match=r"a\.png is damaged or incomplete \(.+\); save it again"):
            open_image(lazy if where == "lazy" else tmp_path / "a.png", "a.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".tiff", ".bmp"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_files(tmp_path: Path, suffix: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"whole{suffix}")
    data = (tmp_path / f"whole{suffix}").read_bytes()
    (tmp_path / f"part{suffix}").write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match="part"):
        open_image(tmp_path / f"part{suffix}")


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 40))
def test_fit_has_the_asked_size(width: int, height: int, to_width: int, to_height: int) -> None:
    assert fit(gradient(width, height), to_width, to_height).size == (to_width, to_height)


@pytest.mark.parametrize("size", [(64, 64), (65, 64), (64, 99), (101, 40)])
def test_square_crop_takes_the_reference_rows(size: tuple[int, int]) -> None:
    image = gradient(*size)
    array, crop = np.asarray(image), min(size)
    h, w = array.shape[:2]
    expected = array[(h - crop) // 2 : (h + crop) // 2, (w - crop) // 2 : (w + crop) // 2]
    assert np.array_equal(np.asarray(fit(image, crop, crop)), expected)


def test_tensors_are_exact_both_ways() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    tensor = to_tensor([Image.fromarray(levels)] * 2)
    assert tensor.shape == (2, 3, 16, 16)
    assert float(tensor.min()) == -1
    assert float(tensor.max()) == 1
    assert np.array_equal(np.asarray(to_images(tensor)[1]), levels)
    assert to_images(3 * tensor)[0].getpixel((0, 0)) == (0, 0, 0)
    with pytest.raises(ValueError, match="one size"):
        to_tensor([gradient(4, 4), gradient(4, 5)])
    with pytest.raises(ValueError, match="NaN"):
        to_images(torch.full((1, 3, 2, 2), float("nan")))
    with pytest.raises(ValueError, match="shape"):
        to_images(torch.zeros(3, 2, 2))


def test_png_carries_its_metadata(tmp_path: Path) -> None:
    metadata = {"prompt": "ein roter Apfel, 红苹果 🍎\n" + "x" * 5000, "seed": "0"}
    save_png(gradient(), tmp_path / "new" / "a.png", metadata)
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.text == metadata
        assert difference(image, gradient()) == 0
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]


def test_interrupted_writing_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_png(gradient(), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def interrupted(image: Image.Image, target: IO[bytes], **_: object) -> None:
        target.write(b"half")
        raise failure

    monkeypatch.setattr(Image.Image, "save", interrupted)
    for failure, message in (
        (KeyboardInterrupt(), None),
        (OSError(errno.ENOSPC, "No space left on device"), r"a\.png.*No space left|No space left.*a\.png"),
    ):
        with pytest.raises(type(failure), match=message):
            save_png(gradient(3, 3), tmp_path / "a.png")
        assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
        assert (tmp_path / "a.png").read_bytes() == before


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save_png(gradient(), tmp_path / "file" / "a.png")


def test_contact_sheet_shows_every_picture() -> None:
    colours = ["red", "green", "blue", "black", "yellow"]
    pictures = [Image.new("RGB", (32, 32), colour) for colour in colours]
    sheet = contact_sheet(pictures)
    assert {sheet.getpixel((4 + 16 + (i % 3) * 36, 4 + 16 + (i // 3) * 36)) for i in range(5)} == {
        picture.getpixel((0, 0)) for picture in pictures
    }
    captioned = contact_sheet(pictures, ["a red square", "", "a very long caption " * 9, "b", "c"], columns=5)
    assert captioned.height > 32 + 8
    assert np.asarray(captioned)[40:].min() < 128
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])
