"""Formats of picture files. Importing this needs neither Pillow nor torch."""

from __future__ import annotations

import os
from pathlib import Path

SUFFIXES_OF = {  # a table of its own: Pillow's loads every plugin, and changes when a SPIDER image is saved as ".png"
    "PNG": (".png", ".apng"),
    "JPEG": (".jfif", ".jpe", ".jpg", ".jpeg"),
    "WEBP": (".webp",),
    "AVIF": (".avif", ".avifs"),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    "PPM": (".pbm", ".pgm", ".ppm", ".pnm", ".pfm"),
    "QOI": (".qoi",),
    "ICO": (".ico",),
}
PICTURE_FORMATS = tuple(SUFFIXES_OF)
"""Formats that files are opened as, whatever their names. Only pixel formats: Pillow would start Ghostscript for an EPS."""
PICTURE_SUFFIXES = tuple(suffix for suffixes in SUFFIXES_OF.values() for suffix in suffixes)
"""Suffixes of the `PICTURE_FORMATS` in lower case, such as ".png": which files of a folder or shard are images."""


def files_ending(folder: Path, suffix: str) -> list[Path]:
    """Files of a folder with a suffix such as ".tar", sorted, without dot files: macOS leaves a "._a.tar" beside "a.tar"."""
    return sorted(path for path in folder.glob(f"*{suffix}") if not path.name.startswith("."))


def is_picture_name(name: str | os.PathLike[str]) -> bool:
    """Whether a file is a picture by its name; the "._" files that macOS leaves beside pictures are not."""
    path = Path(name)
    return path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".")
