"""From the inputs of UniDiffuser Noise Path to a noise path; errors name the inputs as the node shows them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from ..unidiffuser.path import CLEAN, LEAST, MARGINAL, NoisePath

try:
    from comfy_api.input import CurveInput
except ImportError:  # older hosts have no curves that a node could give
    CurveInput = None

CORNERS, DRAWN = "through a corner", "drawn"
ENDS = ("start", "corner", "end")
HAS_CURVES = CurveInput is not None
CURVE_LINES = 256  # straight lines that stand for a curve of the host
TOLERANCE = 1e-9  # of a curve's rounding


def make_path(task: dict[str, Any], steps: int, spacing: str) -> NoisePath:
    """The path of the node's inputs; `task` maps "task" to the chosen preset and holds the inputs of that preset.

    Raises:
        ValueError: inputs that are no path.
    """
    levels = dict(task)
    preset = levels.pop("task")
    if preset == DRAWN:
        return _drawn(levels, steps, spacing)
    if preset == CORNERS:
        return NoisePath.through(*_corners(levels), steps=steps, spacing=spacing)
    if preset == "joint":
        if levels["image_start"] == levels["text_start"] == CLEAN:
            raise ValueError("'image_start' and 'text_start' are 0: nothing is left to denoise. Raise one of them.")
        return NoisePath.joint(
            steps,
            start=(levels["image_start"], levels["text_start"]),
            speeds=(levels["speed_image"], levels["speed_text"]),
            spacing=spacing,
        )
    presets = {
        "text to image": NoisePath.text_to_image,
        "image to text": NoisePath.image_to_text,
        "image": NoisePath.image,
        "text": NoisePath.text,
    }
    if levels["start"] == CLEAN:
        raise ValueError(
            "'start' is 0: nothing is left to denoise. Set it to 1000, or to 400 to 800 to keep part of the input."
        )
    return presets[preset](steps, spacing=spacing, **levels)


def _corners(levels: dict[str, float]) -> list[tuple[float, float]]:
    """The different points (image, text) of "through a corner", checked."""
    for what, (before, here) in itertools.product(("image", "text"), itertools.pairwise(ENDS)):
        first, then = levels[f"{what}_{before}"], levels[f"{what}_{here}"]
        if then > first:
            raise ValueError(
                f"'{what}_{here}' is {then:g}, above '{what}_{before}' ({first:g}). Sampling only removes noise: set it to "
                f"{first:g} or less."
            )
    if min(levels["image_end"], levels["text_end"]) > LEAST:
        raise ValueError(
            f"'image_end' is {levels['image_end']:g} and 'text_end' is {levels['text_end']:g}: both would end noisy. Set at "
            f"least one of them to 0."
        )
    corners = list(dict.fromkeys((levels[f"image_{end}"], levels[f"text_{end}"]) for end in ENDS))
    if len(corners) < 2:
        raise ValueError(
            "The path does not move: start, corner and end are the same point. Raise 'image_start' or 'text_start'."
        )
    return corners


def _drawn(levels: dict[str, Any], steps: int, spacing: str) -> NoisePath:
    """The path of "drawn": its curve if one is connected, else its points."""
    curve = levels.get("curve")
    name, points = ("points", levels["points"]) if curve is None else ("curve", curve_points(curve))
    try:
        return NoisePath.from_points(points, steps, spacing)
    except ValueError as error:
        raise ValueError(f"'{name}': {error}") from None


def curve_points(curve: Any) -> list[tuple[float, float]]:
    """Points (image noise, caption noise) from noise to clean of a host's CURVE over [0, 1], y over x.

    Raises:
        ValueError: the curve falls somewhere, or leaves [0, 1].
    """
    x = np.linspace(1, 0, CURVE_LINES + 1)
    y = np.asarray(CurveInput.from_raw(curve).interp_array(x), dtype=np.float64)
    if not ((y > -TOLERANCE) & (y < 1 + TOLERANCE)).all():
        raise ValueError("'curve': it leaves the square. Keep its points between 0 and 1.")
    falls = np.flatnonzero(np.diff(y) > TOLERANCE)
    if len(falls):
        raise ValueError(
            f"'curve': it falls near {x[falls[-1]]:.2f}, so the caption would get noisier while the image gets cleaner. Draw a "
            f"curve that rises or stays level from left to right."
        )
    y = np.minimum.accumulate(y.clip(0, 1))
    return list(zip((MARGINAL * x).tolist(), (MARGINAL * y).tolist(), strict=True))
