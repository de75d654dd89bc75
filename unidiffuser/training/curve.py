"""Loss curves of a run as an image.

Drawn with Pillow: ComfyUI, where the training node shows them, does not come with matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#1f4e9c", "#d6336c", "#2b8a3e", "#e8890c", "#7048c8", "#0c8599")
PAPER, GRID, INK = "#ffffff", "#e6e8ee", "#3c4250"
OVERSAMPLING = 2  # drawn larger and scaled down, which smooths the lines
POINTS = 200  # most points of a line; each is the mean of its steps


def draw_curve(rows: Sequence[Mapping[str, float]], width: int = 768, height: int = 432) -> Image.Image:
    """Plot every loss term over the steps on a logarithmic scale, as an RGB image of `width` x `height` pixels.

    Args:
        rows: "step" and the terms of each step. Values that are not positive are left out.

    Raises:
        ValueError: no row.
    """
    if not rows:
        raise ValueError("a loss curve needs at least one step")
    size = max(1, math.ceil(len(rows) / POINTS))
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    lines = {
        key: [(group[-1]["step"], math.log10(mean)) for group in groups if (mean := _mean(group, key)) > 0]
        for key in rows[0]
        if key != "step"
    }
    values = [value for line in lines.values() for _, value in line] or [0.0]
    low, high = min(values), max(values)
    low, high = low - 0.05 * (high - low) - 0.02, high + 0.05 * (high - low) + 0.02
    first, last = rows[0]["step"], max(rows[-1]["step"], rows[0]["step"] + 1)

    scale = OVERSAMPLING
    picture = Image.new("RGB", (width * scale, height * scale), PAPER)
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(13 * scale)
    left, top, right, bottom = 64 * scale, 14 * scale, (width - 16) * scale, (height - 34) * scale

    def place(step: float, value: float) -> tuple[float, float]:
        return left + (right - left) * (step - first) / (last - first), bottom - (bottom - top) * (value - low) / (high - low)

    for value in _marks(low, high):
        _, y = place(first, value)
        pen.line([(left, y), (right, y)], fill=GRID, width=scale)
        pen.text((left - 6 * scale, y), f"{10**value:.3g}", fill=INK, font=font, anchor="rm")
    for step in sorted({round(first + (last - first) * k / 4) for k in range(5)}):
        x, _ = place(step, low)
        pen.text((x, bottom + 6 * scale), str(step), fill=INK, font=font, anchor="ra" if step == last else "ma")
    for number, (key, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = [place(*point) for point in line]
        if len(points) > 1:
            pen.line(points, fill=colour, width=2 * scale, joint="curve")
        elif points:
            x, y = points[0]
            pen.ellipse([x - 3 * scale, y - 3 * scale, x + 3 * scale, y + 3 * scale], fill=colour)
        pen.text((right - 8 * scale, top + 18 * scale * number), key, fill=colour, font=font, anchor="ra")
    pen.line([(left, top), (left, bottom), (right, bottom)], fill=INK, width=scale)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _mean(group: Sequence[Mapping[str, float]], key: str) -> float:
    return sum(row.get(key, 0.0) for row in group) / len(group)


def _marks(low: float, high: float) -> list[float]:
    """Positions of the axis labels: powers of ten if at least two are visible, else evenly spaced."""
    powers = [float(p) for p in range(math.ceil(low), math.floor(high) + 1)]
    if len(powers) > 1:
        return powers[:: max(1, len(powers) // 6)]
    return [low + (high - low) * (k + 0.5) / 4 for k in range(4)]
