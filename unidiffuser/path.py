"""Noise paths: pairs of timestep schedules, drawn as curves in the square (t_img, t_text) in [0, 1000]^2.

The network predicts the noise of both modalities at any pair of noise levels (arXiv 2303.06555, section 3), so each task is a
path from a noisy corner of the square to a clean one:

    text to image   along the bottom edge       t_img 1000 -> 0, t_text = 0
    image to text   along the left edge         t_img = 0, t_text 1000 -> 0
    joint           down the diagonal           both 1000 -> 0
    image, text     along the far edges         the other stays at 1000: pure noise, marginalised

and every other monotone curve is a sampler too. A path has no mode: whether a stream is denoised over an interval, or held
clean, noisy or marginalised, follows from its two labels there.
"""

from __future__ import annotations

import itertools
import math
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor

from .schedule import NUM_LABELS, half_logsnr, label_of_half_logsnr, label_of_sigma, sigma_of_label

CLEAN, MARGINAL = 0.0, float(NUM_LABELS)
LEAST = 1.0  # lowest label that the network was trained on
KARRAS_RHO = 7.0  # Karras et al., arXiv 2206.00364, eq. 5

Warp = Callable[[Tensor], Tensor]
SPACINGS: dict[str, tuple[Warp, Warp]] = {  # name: (label -> axis of equal steps, its inverse)
    "uniform": (lambda t: t, lambda u: u),
    "logsnr": (half_logsnr, label_of_half_logsnr),
    "karras": (lambda t: sigma_of_label(t) ** (1 / KARRAS_RHO), lambda u: label_of_sigma(u**KARRAS_RHO)),
}


def spaced(start: float, end: float, steps: int, spacing: str = "uniform") -> list[float]:
    """steps + 1 labels from `start` down to `end`, both exact, equally spaced on the axis named by `spacing`.

    "uniform" is the authors' choice. "logsnr" (arXiv 2206.00927) and "karras" are infinite at label 0: they run to label 1 in
    one step less, and the last interval goes from there to the end; below label 1 the steps are uniform.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"Unknown spacing {spacing!r}; choose one of {', '.join(SPACINGS)}.")
    if start == end:
        return [start] * (steps + 1)
    if max(start, end) <= LEAST:
        spacing = "uniform"
    warp, unwarp = SPACINGS[spacing]
    jump = spacing != "uniform" and end < LEAST < start and steps > 1
    last = LEAST if jump else end
    if steps == 1:
        return [start, end]
    ends = warp(torch.tensor([start, last], dtype=torch.float64))
    inner = unwarp(torch.lerp(ends[0], ends[1], torch.linspace(0, 1, steps + (not jump), dtype=torch.float64))).tolist()
    return [start, *inner[1:-1], last, end] if jump else [start, *inner[1:-1], end]


@dataclass(frozen=True)
class NoisePath:
    """A monotone curve of steps + 1 points; sampling takes one step per interval.

    Args:
        t_img, t_text: labels in [0, 1000] of the image (latent and CLIP token) and of the text at each point: two
            sequences of one length, both falling or level. Both rising or level is the path of an inversion.

    A stream whose label does not change over an interval is held there: at 0 as a clean condition, at 1000 marginalised (fresh
    noise at every evaluation), in between as a condition at that noise level. The low end must lie on an axis or at the origin,
    where at least one stream is clean; label 1, where the authors stop, counts as clean.

    Raises:
        ValueError: labels outside the square, of unequal lengths, not monotone, going nowhere, or ending off the axes.
    """

    t_img: tuple[float, ...]
    t_text: tuple[float, ...]

    def __init__(self, t_img: Sequence[float] | Tensor, t_text: Sequence[float] | Tensor):
        # NOTE: labels closer than a millionth are one noise level in floating point, and a step between them is 0 / 0.
        object.__setattr__(self, "t_img", tuple(round(float(t), 6) for t in t_img))
        object.__setattr__(self, "t_text", tuple(round(float(t), 6) for t in t_text))
        if len(self.t_img) != len(self.t_text):
            raise ValueError(f"t_img and t_text must be of one length, not {len(self.t_img)} and {len(self.t_text)}.")
        if len(self.t_img) < 2:
            raise ValueError("A path needs at least 2 points, that is 1 step.")
        for name, labels in (("t_img", self.t_img), ("t_text", self.t_text)):
            outside = [t for t in labels if not CLEAN <= t <= MARGINAL]  # NaN is outside as well
            if outside:
                raise ValueError(f"{name} has label {outside[0]}; labels run from 0 (clean) to {NUM_LABELS} (noise).")
        changes = [b - a for labels in (self.t_img, self.t_text) for a, b in itertools.pairwise(labels)]
        if any(c < 0 for c in changes) and any(c > 0 for c in changes):
            raise ValueError("A path must be monotone: both labels falling or level, or both rising for an inversion.")
        if not any(changes):
            raise ValueError("This path does not move: at least one of t_img and t_text must change.")
        end = 0 if self.ascending else -1
        if (low := min(self.t_img[end], self.t_text[end])) > LEAST:
            raise ValueError(f"A path must end with the image or the text at 0; here the cleaner ends at {low:g}.")

    @property
    def steps(self) -> int:
        """Number of intervals."""
        return len(self.t_img) - 1

    @property
    def ascending(self) -> bool:
        """True for a path from clean to noisy, as an inversion takes it."""
        return self.t_img[-1] > self.t_img[0] or self.t_text[-1] > self.t_text[0]

    def labels(self, modality: str) -> tuple[float, ...]:
        """The labels of "img" or "text"."""
        return {"img": self.t_img, "text": self.t_text}[modality]

    def reversed(self) -> NoisePath:
        """The same curve from its other end."""
        return NoisePath(self.t_img[::-1], self.t_text[::-1])

    @classmethod
    def through(cls, *corners: tuple[float, float], steps: int, spacing: str = "uniform") -> NoisePath:
        """Straight lines through (t_img, t_text) corners, with steps in proportion to their length, at least one each.

        `through((1000, 1000), (0, 1000), (0, 0), steps=40)` samples a picture and then captions it.
        """
        return cls._in_proportion(corners, _lengths(corners), steps, spacing)

    @classmethod
    def from_points(cls, points: str | Sequence[Sequence[float]], steps: int, spacing: str = "uniform") -> NoisePath:
        """A path drawn by hand: straight lines through points, from noise to clean.

        Args:
            points: at least two pairs (image noise, caption noise) in [0, 1000], as numbers or as a text such as
                "1000,1000 400,0 0,0". No level rises, and the last point has at least one of the two at 0.
            steps: intervals of the path. Every point is kept if there are at least as many steps as lines; with fewer, the
                steps cut corners and spread over the whole curve.
            spacing: of the steps, see `spaced`; on each line, or over the whole curve if there are fewer steps than lines.

        Raises:
            ValueError: points that are no such path. The text counts them from 1.
        """
        corners = path_points(points)
        if len(corners) - 1 <= _check_steps(steps, 1):
            return cls.through(*corners, steps=steps, spacing=spacing)
        reached = [0.0, *itertools.accumulate(_lengths(corners))]
        left = spaced(MARGINAL, CLEAN, steps, spacing)  # of the whole length, scaled to labels
        at = [reached[-1] * (1 - label / MARGINAL) for label in left]
        return cls(*(_interpolated(at, reached, levels) for levels in zip(*corners, strict=True)))

    @classmethod
    def _in_proportion(
        cls, corners: Sequence[tuple[float, float]], lengths: Sequence[float], steps: int, spacing: str
    ) -> NoisePath:
        """The path through `corners` whose lines get steps in proportion to `lengths`, at least one each."""
        _check_steps(steps, len(lengths))
        bounds = [0]  # index of each corner on the path, leaving at least one step for every later line
        for k in range(1, len(lengths)):
            index = round(steps * sum(lengths[:k]) / (sum(lengths) or 1))
            bounds.append(min(max(index, bounds[-1] + 1), steps - (len(lengths) - k)))
        bounds.append(steps)
        t_img, t_text = [corners[0][0]], [corners[0][1]]
        for k in range(len(lengths)):
            count = bounds[k + 1] - bounds[k]
            t_img += spaced(corners[k][0], corners[k + 1][0], count, spacing)[1:]
            t_text += spaced(corners[k][1], corners[k + 1][1], count, spacing)[1:]
        return cls(t_img, t_text)

    @classmethod
    def text_to_image(cls, steps: int, *, start: float = MARGINAL, hold: float = CLEAN, spacing: str = "uniform") -> NoisePath:
        """p(img | text). `start` < 1000 begins at an image noised to that label; `hold` is the noise level of the condition."""
        return cls.through((start, hold), (CLEAN, hold), steps=steps, spacing=spacing)

    @classmethod
    def image_to_text(cls, steps: int, *, start: float = MARGINAL, hold: float = CLEAN, spacing: str = "uniform") -> NoisePath:
        """p(text | img). `start` and `hold` as in `text_to_image`, with the modalities exchanged."""
        return cls.through((hold, start), (hold, CLEAN), steps=steps, spacing=spacing)

    @classmethod
    def image(cls, steps: int, *, start: float = MARGINAL, spacing: str = "uniform") -> NoisePath:
        """p(img), the text marginalised."""
        return cls.text_to_image(steps, start=start, hold=MARGINAL, spacing=spacing)

    @classmethod
    def text(cls, steps: int, *, start: float = MARGINAL, spacing: str = "uniform") -> NoisePath:
        """p(text), the image marginalised."""
        return cls.image_to_text(steps, start=start, hold=MARGINAL, spacing=spacing)

    @classmethod
    def joint(
        cls,
        steps: int,
        *,
        start: tuple[float, float] = (MARGINAL, MARGINAL),
        speeds: tuple[float, float] = (1.0, 1.0),
        spacing: str = "uniform",
    ) -> NoisePath:
        """p(img, text).

        Args:
            start: labels (image, text) of the first point.
            speeds: labels per step of (image, text), of which only the ratio matters. The modality that is clean first is
                held while the other finishes. One that is 0 waits for the other, and then takes the second half of the steps.
                The default is the diagonal.
        """
        if any(not (math.isfinite(s) and s >= 0) for s in speeds) or not any(speeds):
            raise ValueError(f"speeds must be positive, or 0 for one that waits; not {speeds}.")
        if 0 in speeds:
            waits = start[0] if not speeds[0] else CLEAN, start[1] if not speeds[1] else CLEAN
            return cls._in_proportion((start, waits, (CLEAN, CLEAN)), (1.0, 1.0), steps, spacing)
        durations = start[0] / speeds[0], start[1] / speeds[1]
        corner = max(CLEAN, start[0] - speeds[0] * durations[1]), max(CLEAN, start[1] - speeds[1] * durations[0])
        if math.isclose(durations[0], durations[1]) or max(corner) < LEAST:
            return cls.through(start, (CLEAN, CLEAN), steps=steps, spacing=spacing)
        times = min(durations), max(durations) - min(durations)
        return cls._in_proportion((start, corner, (CLEAN, CLEAN)), times, steps, spacing)

    def picture(self, size: int = 256) -> Image:
        """A diagram of the path, RGB, `size` x `size` pixels: image noise on the x axis, text noise on the y axis."""
        from .media.path_picture import draw

        return draw(self.t_img, self.t_text, size)


def path_points(points: str | Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """The checked (image noise, caption noise) points of a drawn path, see `NoisePath.from_points`; repeated points once."""
    written: Sequence[str | Sequence[float]] = points.replace(";", " ").split() if isinstance(points, str) else points
    pairs = [_pair(point, k) for k, point in enumerate(written, start=1)]
    corners = [pair for k, pair in enumerate(pairs) if k == 0 or pair != pairs[k - 1]]
    if len(corners) < 2:
        raise ValueError(f"A path needs at least 2 different points, such as 1000,0 0,0; here are {len(corners)}.")
    for k, (before, here) in enumerate(itertools.pairwise(pairs), start=2):
        for name, was, level in zip(("image", "caption"), before, here, strict=True):
            if level > was:
                raise ValueError(
                    f"The {name} noise rises from {was:g} to {level:g} at point {k}. Sampling only removes noise: set it to "
                    f"{was:g} or less."
                )
    if min(corners[-1]) > LEAST:
        raise ValueError(
            f"The last point is {corners[-1][0]:g},{corners[-1][1]:g}: image and caption both end noisy. Set at least one of "
            f"them to 0."
        )
    return corners


def _pair(point: str | Sequence[float], number: int) -> tuple[float, float]:
    """One point of a drawn path: two labels in [0, 1000], to a millionth."""
    try:
        image, caption = (round(float(part), 6) for part in (point.split(",") if isinstance(point, str) else point))
    except (TypeError, ValueError):
        raise ValueError(
            f"Point {number} is {reprlib.repr(point)}; write image noise,caption noise, such as 1000,500."
        ) from None
    for name, level in (("image", image), ("caption", caption)):
        if not CLEAN <= level <= MARGINAL:  # NaN is outside as well
            raise ValueError(f"The {name} noise of point {number} is {level:g}; it must be 0 (clean) to 1000 (noise).")
    return image, caption


def _lengths(corners: Sequence[tuple[float, float]]) -> list[float]:
    """Length of each line between corners: the larger change of the two labels."""
    return [max(abs(a - b) for a, b in zip(p, q, strict=True)) for p, q in itertools.pairwise(corners)]


def _interpolated(at: Sequence[float], x: Sequence[float], y: Sequence[float]) -> list[float]:
    """Values at `at`, rising, of the piecewise linear curve through (x, y); the first and last of them exact."""
    values, k = [float(y[0])], 0
    for position in at[1:-1]:
        while x[k + 1] < position:
            k += 1
        values.append(y[k] + (y[k + 1] - y[k]) * (position - x[k]) / (x[k + 1] - x[k]))
    return [*values, float(y[-1])]


def _check_steps(steps: int, least: int) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, not {steps!r}.")
    if least < 1:
        raise ValueError("A path needs at least two corners.")
    if steps < least:
        raise ValueError(f"steps must be at least {least} here, one for each straight part of the path, not {steps}.")
    return steps
