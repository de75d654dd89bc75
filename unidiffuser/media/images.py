"""Images in and out: opening as RGB, cropping and resizing, tensors, PNG files, contact sheets."""

from __future__ import annotations

import io
import logging
import math
import os
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from .arrays import FORMS, is_array, picture_of
from .files import atomic_write, shown
from .formats import PICTURE_FORMATS
from .large import converted, prepare, strips

log = logging.getLogger(__name__)

ImageSource = Image.Image | str | os.PathLike[str] | bytes | BinaryIO | np.ndarray | Tensor
"""A picture: PIL image, path, bytes or open file of a picture file, numpy uint8 (H, W, 3 or 4), torch (3, H, W) in [0, 1]."""


def open_image(source: ImageSource, name: str = "the picture") -> Image.Image:
    """Open an image as 8-bit RGB, upright, on white where it is transparent; only the first frame of an animation.

    Args:
        source: see `ImageSource`.
        name: name in error messages, for a source without a path.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not one of the `PICTURE_FORMATS`, damaged, empty, or so large that it looks like a decompression bomb.
            Whatever else Pillow's decoders raise becomes a ValueError too.
    """
    if isinstance(source, Image.Image):
        with _read(name):
            source.load()  # decodes an image that was only opened
        return _rgb(source, name)
    if is_array(source):
        return _rgb(picture_of(source, name), name)  # type: ignore[arg-type]
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(source), name)
    if hasattr(source, "read"):
        return _decode(_content(source, name), name)
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"{name} is {_described(source)}; give a PIL image, a path, bytes, an open file, {FORMS}")
    path = Path(source)
    try:
        there = path.exists()
    except (OSError, ValueError):  # longer than a name can be, or with a NUL
        there = False
    if not there:
        raise FileNotFoundError(f"no picture at {shown(path)[:300]}; check the path")
    if path.is_dir():
        raise ValueError(f"{shown(path)} is a folder; name one picture in it, or use `unidiffuser caption` for all of them")
    return _decode(path, shown(path))


def _content(file: Any, name: str) -> io.BytesIO:
    """The rest of an open file."""
    data = file.read()
    if not isinstance(data, bytes):
        raise ValueError(f'{name} is a file opened as text; open it with "rb"')
    return io.BytesIO(data)


def _described(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def readable_formats() -> list[str]:
    """The `PICTURE_FORMATS` that the installed Pillow can read."""
    Image.init()  # loads all plugins on the first call, which takes 0.2 s
    return [name for name in PICTURE_FORMATS if name in Image.OPEN]


def _decode(file: Path | io.BytesIO, name: str) -> Image.Image:
    with _read(name), warnings.catch_warnings():
        # The warning stops nothing; Pillow raises an error at twice its limit, and that stays.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(file, formats=readable_formats())
    with image:
        try:
            factor = prepare(image)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
        with _read(name):
            image.load()
        orientation = _orientation(image, name)
    result = _converted(image, name, factor)
    del image  # its pixels go before the copy that is turned
    return _upright(result, orientation)


@contextmanager
def _read(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises into a ValueError that names the picture."""
    try:
        yield
    except PermissionError as error:
        raise ValueError(f"{name} may not be read; check its permissions") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not a picture in a known format; use PNG, JPEG or WebP") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has too many pixels to be opened safely; shrink it first ({error})") from error
    except Exception as error:  # each decoder raises its own errors: SyntaxError, struct.error, RuntimeError, ...
        reason = str(error) or type(error).__name__
        raise ValueError(f"{name} is damaged or incomplete ({reason}); save it again or use another picture") from error


def _rgb(image: Image.Image, name: str) -> Image.Image:
    return _upright(_converted(image, name), _orientation(image, name))


_TURNS = {  # EXIF orientation -> what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def _orientation(image: Image.Image, name: str) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception as error:
        log.warning("%s: EXIF data unreadable, orientation ignored (%s)", name, error)
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _converted(image: Image.Image, name: str, factor: int = 1) -> Image.Image:
    """RGB with the sides divided by `factor`, on white where the picture is transparent."""
    if 0 in image.size:
        raise ValueError(f"{name} is empty: {image.width} x {image.height} pixels")
    if image.mode.startswith("I") or image.mode == "F":
        peak = max(float(_numbers(strip).max()) for _, strip in strips(image))
        return converted(image, factor, partial(_from_deep_gray, peak=peak))
    try:
        return converted(image, factor, _on_white)
    except Exception as error:
        raise ValueError(f"{name} has colour mode {image.mode}, which cannot be converted; save it as RGB") from error


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _numbers(image: Image.Image) -> np.ndarray:
    return np.nan_to_num(np.asarray(image, dtype=np.float64))


def _from_deep_gray(image: Image.Image, peak: float) -> Image.Image:
    """Scale 16-bit, 32-bit and float grey to 8 bits; Pillow's own conversion clips at 255. `peak`: of the whole picture."""
    # The mode does not define white: it is 1 for floats, 255 or 65535 for integers, or the largest value if that is more.
    integer_white = 65535.0 if image.mode.startswith("I;16") or peak > 255 else 255.0
    white = 1.0 if image.mode == "F" and peak <= 1 else max(integer_white, peak if peak > 65535 else 0.0)
    levels = np.clip(_numbers(image) * (255.0 / white) + 0.5, 0, 255).astype(np.uint8)
    return Image.fromarray(levels, "L").convert("RGB")


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Centre-crop to the aspect ratio of width x height pixels and resize with Lanczos, as in the authors' code."""
    if width < 1 or height < 1:
        raise ValueError(f"width and height must be at least 1, got {width} x {height}")
    scale = min(image.width / width, image.height / height)
    crop_w = min(image.width, max(1, round(width * scale)))
    crop_h = min(image.height, max(1, round(height * scale)))
    left, top = (image.width - crop_w) // 2, (image.height - crop_h) // 2
    cropped = image.crop((left, top, left + crop_w, top + crop_h))
    return cropped.resize((width, height), Image.Resampling.LANCZOS)


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size as (B, 3, H, W) float32 in [-1, 1]."""
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise ValueError(f"a batch needs pictures of one size, got {sorted(sizes) or 'none'}")
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])  # (B, H, W, 3)
    return from_levels(torch.from_numpy(pixels))


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1], clamped, as RGB images."""
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels must have shape (B, 3, H, W), got {tuple(pixels.shape)}")
    if not torch.isfinite(pixels).all():
        raise ValueError("the decoded pixels hold NaN or infinite values; use dtype float32 or lower the guidance")
    return [Image.fromarray(array) for array in to_levels(pixels).cpu().numpy()]


def _to_numpy(pixels: Tensor) -> np.ndarray:
    return to_levels(pixels).cpu().numpy()


def _to_unit(pixels: Tensor) -> Tensor:
    return ((pixels.float() + 1) / 2).clamp(0, 1)


PIXEL_FORMS: Mapping[str, Callable[[Tensor], Any]] = {"pil": to_images, "numpy": _to_numpy, "tensor": _to_unit}
"""From (B, 3, H, W) in [-1, 1] to PIL images, numpy uint8 (B, H, W, 3), or float32 (B, 3, H, W) in [0, 1]."""


def from_levels(levels: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 as (B, 3, H, W) float32 in [-1, 1], on the same device."""
    return levels.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_levels(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1], clamped, as (B, H, W, 3) uint8 on the same device."""
    return ((pixels.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def save_png(image: Image.Image, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Write a PNG atomically; `metadata` becomes its text entries (`Image.open(path).text`)."""
    info = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        info.add_text(key, value)
    with atomic_write(Path(path)) as file:
        image.save(file, format="PNG", pnginfo=info)


def png_texts(path: str | os.PathLike[str]) -> dict[str, str] | None:
    """The text entries of a PNG; None for a file that is none, or is damaged."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # texts may follow the pixels
            return dict(getattr(image, "text", {}))
    except Exception:  # as in `_read`
        return None


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str] | None = None, columns: int | None = None
) -> Image.Image:
    """Grid of images on white, row by row, each above its caption; nearly square unless `columns` is given."""
    if not images:
        raise ValueError("a contact sheet needs at least one picture, got none")
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    gap = 4  # pixels between cells
    width, height = max(i.width for i in images), max(i.height for i in images)
    size = max(10, width // 16)  # font size in pixels
    font = ImageFont.load_default(size=size)
    lines = [textwrap.wrap(c, max(1, int(width / (0.55 * size))))[:3] for c in captions or []]
    line_height = round(1.25 * size)
    cell_height = height + line_height * max((len(text) for text in lines), default=0)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (cell_height + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        x, y = gap + column * (width + gap), gap + row * (cell_height + gap)
        sheet.paste(image, (x, y))
        for k, line in enumerate(lines[i] if i < len(lines) else []):
            draw.text((x, y + height + k * line_height), line, fill="black", font=font)
    return sheet
