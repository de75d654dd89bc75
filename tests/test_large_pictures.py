"""Large pictures: bounded memory, a limit before decoding, and the same pixels strip by strip."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from unidiffuser.media import large
from unidiffuser.media.images import open_image

MEMORY = """
import sys
from unidiffuser.media.images import open_image
def status(key):
    return int(open("/proc/self/status").read().split(key)[1].split()[0]) / 1000
for path in sys.argv[1:]:
    open("/proc/self/clear_refs", "w").write("5")  # resets the peak
    before = status("VmRSS:")
    image = open_image(path)
    print(path.split("/")[-1], image.width, image.height, round(status("VmHWM:") - before))
    del image
"""


def saved(path: Path, image: Image.Image, **options: object) -> str:
    image.save(path, **options)
    return str(path)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux")
def test_no_picture_takes_more_than_200_mb(tmp_path: Path) -> None:
    files = [
        saved(tmp_path / "bits.png", Image.new("1", (12000, 12000), 1)),
        saved(tmp_path / "deep.png", Image.new("I;16", (8000, 8000), 30000)),
        saved(tmp_path / "alpha.png", Image.new("RGBA", (6000, 6000), (200, 30, 30, 128)), compress_level=1),
        saved(tmp_path / "photo.jpg", Image.new("RGB", (9000, 8000), (200, 30, 30))),
        saved(tmp_path / "scans.jpg", Image.new("RGB", (5500, 5000), (200, 30, 30)), progressive=True, subsampling=0),
        saved(tmp_path / "wavelets.jp2", Image.new("RGB", (4000, 3000), (200, 30, 30))),
    ]
    done = subprocess.run([sys.executable, "-c", MEMORY, *files], capture_output=True, text=True, check=True)
    found = {name: tuple(map(int, rest)) for name, *rest in map(str.split, done.stdout.splitlines())}
    sizes = {name: (width, height) for name, (width, height, _) in found.items()}
    assert sizes == {
        "bits.png": (3000, 3000),
        "deep.png": (2667, 2667),
        "alpha.png": (3000, 3000),
        "photo.jpg": (4500, 4000),
        "scans.jpg": (1375, 1250),
        "wavelets.jp2": (2000, 1500),
    }
    assert max(peak for _, _, peak in found.values()) < 200, found


def test_progressive_files_are_refused_before_their_scans_are_kept(tmp_path: Path) -> None:
    """The coefficients of all scans are in memory at once, at every scale."""
    path = saved(tmp_path / "scans.jpg", Image.new("RGB", (6000, 5500)), progressive=True, subsampling=0)
    with pytest.raises(ValueError, match=r"scans\.jpg has 33 million pixels \(RGB\), too many"):
        open_image(path)
    assert open_image(saved(tmp_path / "plain.jpg", Image.new("RGB", (6000, 5500)))).size == (3000, 2750)


@pytest.mark.parametrize("levels", [1, 2, 6])
def test_wavelets_are_reduced_as_far_as_the_file_has_levels(
    tmp_path: Path, levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.new("RGB", (1024, 512), (200, 30, 30))
    image.paste((10, 30, 200), (512, 0, 1024, 512))
    path = saved(tmp_path / "a.jp2", image, num_resolutions=levels)
    assert open_image(path).size == (1024, 512)
    monkeypatch.setattr(large, "MOST_BYTES", 1_500_000)
    if levels < 3:
        with pytest.raises(ValueError, match="too many to be opened safely"):
            open_image(path)
    else:
        small = open_image(path)
        assert small.size == (256, 128)
        assert [small.getpixel((x, 64)) for x in (60, 200)] == [(200, 30, 30), (10, 30, 200)]


def test_more_pixels_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "huge.png", Image.new("L", (40, 30)))
    monkeypatch.setattr(large, "MOST_BYTES", 1000)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", None)
    with pytest.raises(ValueError, match=r"huge\.png has 0 million pixels \(L\), too many to be opened safely; shrink"):
        open_image(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F"])
def test_strips_give_the_pixels_of_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    if mode in ("I", "I;16", "F"):
        dtype = {"I": np.int32, "I;16": np.uint16, "F": np.float32}[mode]
        image = Image.fromarray((random.random((50, 37)) * 60000).astype(dtype))
    else:
        image = Image.fromarray(random.integers(0, 256, (50, 37, 4), dtype=np.uint8), "RGBA")
        image = image if mode == "RGBA" else image.convert("RGB").convert(mode)
    assert image.mode == mode
    whole = np.asarray(open_image(image))
    monkeypatch.setattr(large, "STRIP", 100)
    assert np.array_equal(np.asarray(open_image(image)), whole)


def test_a_reduced_picture_is_the_average_of_its_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (41, 31, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    monkeypatch.setattr(large, "SHORTEST", 8)
    monkeypatch.setattr(large, "STRIP", 100)
    monkeypatch.setattr(large, "MOST_BYTES", 41 * 31 * 5)
    found = open_image(file.getvalue())
    assert found.size == (16, 21)
    expected = pixels[:40, :30].reshape(20, 2, 15, 2, 3).mean(axis=(1, 3))
    assert np.abs(np.asarray(found)[:20, :15] - expected).max() <= 0.51


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation: int) -> None:
    from PIL import ImageOps

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(file))
    assert np.array_equal(np.asarray(open_image(file.getvalue())), np.asarray(expected))
