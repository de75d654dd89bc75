"""Statistics of the evaluation: shares with intervals, what a caption says, and the baselines to beat.

Everything here works on labels and numbers alone; no model and no judge is needed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from unidiffuser.data.captioned import Pair


@dataclass(frozen=True)
class Share:
    """A share of successes with its 95 % interval, all in [0, 1], over ``total`` trials."""

    rate: float
    low: float
    high: float
    total: int

    def __str__(self) -> str:
        return f"{100 * self.rate:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}], n = {self.total}"


def wilson(successes: float, total: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a binomial share (Wilson 1927): ``(low, high)`` in [0, 1].

    Unlike the textbook interval it keeps its coverage for few trials and for shares near 0 and 1. ``total`` may be
    fractional (an effective sample size).

    Raises:
        ValueError: if ``total`` is not positive, or ``successes`` lies outside ``0..total``.
    """
    if not (total > 0 and 0 <= successes <= total):
        raise ValueError(f"{successes} successes of {total} trials is not a share: give 0 <= successes <= total, total > 0")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / total
    centre = p + z * z / (2 * total)
    spread = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def share(outcomes: Sequence[Sequence[bool]]) -> Share:
    """The share of True over runs of the same trials: ``outcomes[run][trial]``, one run per seed.

    Runs of one prompt with other seeds are not independent draws of prompts, so several runs are not simply pooled: the
    sample size is divided by Kish's design effect (Kish 1965), the variance of the per-prompt means over the variance
    that independent trials would have, kept between 1 (independent) and the number of runs (identical runs).

    Raises:
        ValueError: if there is no trial, or the runs differ in length.
    """
    if not outcomes or not outcomes[0]:
        raise ValueError("no outcomes: there is nothing to take a share of")
    if len({len(run) for run in outcomes}) > 1:
        raise ValueError(f"the runs differ in length ({[len(run) for run in outcomes]}): each must hold the same trials")
    runs, trials = len(outcomes), len(outcomes[0])
    total = runs * trials
    rate = sum(map(sum, outcomes)) / total
    effect = float(runs)
    if runs == 1:
        effect = 1.0
    elif trials > 1 and 0 < rate < 1:
        means = [sum(run[trial] for run in outcomes) / runs for trial in range(trials)]
        clustered = sum((mean - rate) ** 2 for mean in means) / (trials - 1) / trials
        effect = min(max(clustered / (rate * (1 - rate) / total), 1.0), float(runs))
    low, high = wilson(rate * (total / effect), total / effect)
    return Share(rate, low, high, total)


def parse_caption(caption: str, styles: Collection[str]) -> tuple[str, str | None]:
    """``"red apple, noto"`` -> ``("red apple", "noto")``; ``"red apple"`` -> ``("red apple", None)``.

    Only a last part that is a known style is one, since labels hold commas too. Nothing else is forgiven but blanks at
    the ends: label-exact means the same letters.
    """
    label, comma, style = caption.strip().rpartition(",")
    if comma and style.strip() in styles:
        return label.strip(), style.strip()
    return caption.strip(), None


def nearest(queries: Tensor, references: Tensor) -> Tensor:
    """For each query the index of the nearest reference (Euclidean): (Q, ...), (R, ...) -> (Q,)."""
    return torch.cdist(queries.flatten(1).float(), references.flatten(1).float()).argmin(dim=1)


def psnr(real: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio of two pictures of one size, in dB over 8-bit RGB; 100 where they are equal."""
    difference = np.asarray(real.convert("RGB"), dtype=np.float64) - np.asarray(other.convert("RGB"), dtype=np.float64)
    error = float(np.mean(difference**2))
    return min(100.0, 10.0 * math.log10(255.0**2 / error)) if error else 100.0


def thumbnails(images: Tensor, side: int = 16) -> Tensor:
    """(B, C, H, W) -> (B, C, side, side) by averaging: the pixel space of the nearest-training-image baseline.

    Small enough that a shift by a pixel or a thin outline does not decide which picture is nearest.
    """
    return F.adaptive_avg_pool2d(images, side)


def nearest_by_caption(targets: Sequence[Pair], training: Sequence[Pair], seed: int = 0) -> list[Pair]:
    """The picture that a mere memory of the training set would show for each target's caption.

    It is the training picture of the same label and style where there is one (a trained pair: then this baseline is the
    judge's ceiling), else one of the same label in another style, drawn by ``seed`` (a held-out pair: the concept is
    right, the style cannot be).

    Raises:
        ValueError: if a label has no training picture in any style.
    """
    rng = random.Random(seed)
    by_label: dict[str, list[Pair]] = {}
    for pair in training:
        by_label.setdefault(pair.label, []).append(pair)
    found = []
    for target in targets:
        candidates = by_label.get(target.label)
        if not candidates:
            raise ValueError(f"no training picture shows {target.label!r}")
        same_style = [pair for pair in candidates if pair.style == target.style]
        found.append(rng.choice(same_style or candidates))
    return found


def shuffled(count: int, seed: int = 0) -> list[int]:
    """A permutation of ``range(count)`` that leaves nothing in its place (one cycle): the shuffled-caption baseline.

    Sattolo's algorithm, so a trial is never scored against its own caption. For one trial there is no such permutation.

    Raises:
        ValueError: if ``count`` is below 2.
    """
    if count < 2:
        raise ValueError("captions can be shuffled among two or more pictures")
    rng = random.Random(seed)
    order = list(range(count))
    for last in range(count - 1, 0, -1):
        other = rng.randrange(last)
        order[last], order[other] = order[other], order[last]
    return order
