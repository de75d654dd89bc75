"""Diagram of a noise path in the (t_img, t_text) square."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from ..schedule import NUM_LABELS

PAPER, GRID, AXIS, INK, CURVE = "#ffffff", "#e6e8ee", "#8a90a0", "#3c4250", "#d6336c"
OVERSAMPLING = 3  # drawn larger and scaled down, for smooth lines
LEAST_SIZE = 64


def draw(t_img: Sequence[float], t_text: Sequence[float], size: int) -> Image.Image:
    """Draw a path of timestep labels as an RGB image, image noise to the right and text noise upwards.

    A ring marks the start, an arrow the end, and a dot each network call between them.

    Args:
        t_img, t_text: labels from 0 (clean) to 1000 (noise), one pair for each point of the path.
        size: side of the image in pixels.

    Raises:
        ValueError: a size below 64.
    """
    if size < LEAST_SIZE:
        raise ValueError(f"The picture of a path needs at least {LEAST_SIZE} pixels a side, not {size}.")
    full = size * OVERSAMPLING
    margin, unit = full * 0.14, max(full / 256, 0.6 * OVERSAMPLING)  # keeps the lines of a small picture visible
    span = full - 2 * margin

    def place(x: float, y: float) -> tuple[float, float]:
        return margin + span * x / NUM_LABELS, full - margin - span * y / NUM_LABELS

    picture = Image.new("RGB", (full, full), PAPER)
    pen = ImageDraw.Draw(picture)
    for level in range(0, NUM_LABELS + 1, NUM_LABELS // 4):
        pen.line([place(level, 0), place(level, NUM_LABELS)], fill=GRID, width=round(unit))
        pen.line([place(0, level), place(NUM_LABELS, level)], fill=GRID, width=round(unit))
    pen.line([place(0, NUM_LABELS), place(0, 0), place(NUM_LABELS, 0)], fill=AXIS, width=round(2 * unit))

    points = [place(a, b) for a, b in zip(t_img, t_text, strict=True)]
    pen.line(points, fill=CURVE, width=round(3 * unit), joint="curve")
    for x, y in points[1:-1]:
        _disc(pen, x, y, 2.5 * unit, fill=CURVE)
    _disc(pen, *points[0], 5 * unit, fill=PAPER, outline=CURVE, width=round(2.5 * unit))
    _arrow(pen, points, 9 * unit)

    # NOTE: load_default is the only font on every installation; it is scalable since Pillow 10.1.
    font = ImageFont.load_default(11 * unit)
    pen.text((full / 2, full - margin / 2), "image noise", fill=INK, font=font, anchor="mm")
    side = Image.new("L", (round(span), round(margin)), 0)
    ImageDraw.Draw(side).text((span / 2, margin / 2), "text noise", fill=255, font=font, anchor="mm")
    side = side.rotate(90, expand=True)
    picture.paste(Image.new("RGB", side.size, INK), (0, round(margin)), side)
    return picture.resize((size, size), Image.Resampling.LANCZOS)


def _disc(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, **style: str | int) -> None:
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), **style)  # type: ignore[arg-type]


def _arrow(pen: ImageDraw.ImageDraw, points: list[tuple[float, float]], length: float) -> None:
    """Draw an arrow head at the last point, along the last segment longer than a pixel."""
    x, y = points[-1]
    before = next((p for p in reversed(points) if math.dist(p, (x, y)) > 1), (x, y))
    angle = math.atan2(y - before[1], x - before[0])
    wings = [(x - length * math.cos(angle + a), y - length * math.sin(angle + a)) for a in (0.45, -0.45)]
    pen.polygon([(x, y), *wings], fill=CURVE)
