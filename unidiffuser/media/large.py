"""Large pictures in little memory: a limit before decoding, and conversion to RGB strip by strip.

A file of 17 kB can hold 144 million pixels, and several threads may decode files at once, so each takes at most `MOST_BYTES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image

MOST_BYTES = 180_000_000
"""For the decoded picture and its RGB copy together; decoders and strips take up to 20 MB more."""
SHORTEST = 1024  # pixels: no picture is reduced below this side
STRIP = 1 << 18  # pixels converted at a time
_STORED = {"1": 1, "L": 1, "P": 1, "LA": 4, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}  # bytes of a pixel; others 4
_BUFFERED = {"WEBP", "AVIF"}  # their decoders keep a second copy


def prepare(image: Image.Image) -> int:
    """Set an opened picture up for decoding in little memory.

    JPEG and JPEG 2000 files are decoded at 1/2, 1/4 or 1/8 of their sides if they are large. Up to 20 megapixels stay as they
    are, of JPEG 2000 up to 9.

    Args:
        image: opened, not yet loaded; changed in place.

    Returns:
        The factor by which `converted` has to reduce its sides.

    Raises:
        ValueError: too many pixels.
    """
    width, height = image.size
    scales = [1 << halvings for halvings in range(_halvings(image) + 1)]
    for scale in scales:
        factor = _factor((-(-width // scale), -(-height // scale)), image, _coefficients(image))
        if factor == 1 or (factor is not None and scale == scales[-1]):
            if image.format == "JPEG2000":
                image.reduce = scale.bit_length() - 1  # type: ignore[method-assign, assignment]
            elif scale > 1:
                image.draft(None, (width // scale, height // scale))
            return factor
    millions = width * height / 1e6
    raise ValueError(f"has {millions:.0f} million pixels ({image.mode}), too many to be opened safely; shrink it first")


def _halvings(image: Any) -> int:
    """How often the decoder can halve the sides of a picture."""
    if image.format == "JPEG":
        return 3
    if image.format != "JPEG2000" or image.fp is None:
        return 0
    place = image.fp.tell()
    image.fp.seek(0)
    head = image.fp.read(1 << 16)
    image.fp.seek(place)
    style = head.find(b"\xff\x52", head.find(b"\xff\x4f\xff\x51"))  # coding style, after the beginning of the code stream
    return min(3, head[style + 9]) if 0 <= style < len(head) - 9 else 0


def _coefficients(image: Any) -> int:
    """Bytes that a decoder keeps for the whole picture, whatever its scale: those of a progressive JPEG until its last scan."""
    layers = getattr(image, "layer", ())
    if image.format != "JPEG" or not image.info.get("progressive") or not layers:
        return 0
    samples = [across * down for _, across, down, _ in layers]
    return 2 * image.width * image.height * sum(samples) // max(samples)


def _factor(size: tuple[int, int], image: Image.Image, kept: int) -> int | None:
    """The smallest reduction that keeps a picture of this size, and `kept` bytes, to `MOST_BYTES`; None if there is none."""
    pixels = size[0] * size[1]
    stored = kept + pixels * _STORED.get(image.mode, 4) * (2 if image.format in _BUFFERED else 1)
    if image.format == "JPEG2000":
        stored += pixels * 4 * len(image.getbands())  # its decoder works on 32-bit numbers
    for factor in range(1, max(1, min(size) // SHORTEST) + 1):
        if stored + 4 * pixels / factor**2 <= MOST_BYTES:
            return factor
    return None


def strips(image: Image.Image, rows: int = 1) -> Iterator[tuple[int, Image.Image]]:
    """First row and crop of each horizontal strip of about `STRIP` pixels; heights are multiples of `rows` but for the last."""
    height = max(1, STRIP // (image.width * rows)) * rows
    for top in range(0, image.height, height):
        yield top, image.crop((0, top, image.width, min(image.height, top + height)))


def converted(image: Image.Image, factor: int, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """A picture as RGB, its sides divided by `factor` (area average).

    Args:
        image: decoded.
        factor: at least 1.
        convert: turns a part of the picture into RGB, pixel by pixel.
    """
    result = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    for top, strip in strips(image, factor):
        part = convert(strip)
        result.paste(part.reduce(factor) if factor > 1 else part, (0, top // factor))
    return result
