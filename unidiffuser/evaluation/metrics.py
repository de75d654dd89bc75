"""Success rates with confidence intervals, and PSNR."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor


@dataclass(frozen=True)
class SuccessRate:
    """A rate of successes with its 95 % confidence interval, all in [0, 1], over `total` trials."""

    rate: float
    low: float
    high: float
    total: int

    def __str__(self) -> str:
        return f"{100 * self.rate:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}], n = {self.total}"


def wilson(successes: float, total: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a binomial proportion (Wilson 1927): `(low, high)` in [0, 1].

    Unlike the normal approximation it keeps its coverage for few trials and for proportions near 0 and 1.

    Args:
        successes: 0 to `total`.
        total: number of trials; may be fractional (an effective sample size).
        confidence: coverage of the interval.

    Raises:
        ValueError: `total` is not positive, or `successes` is outside 0 to `total`.
    """
    if not (total > 0 and 0 <= successes <= total):
        raise ValueError(f"{successes} successes of {total} trials: give 0 <= successes <= total and total > 0")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / total
    centre = p + z * z / (2 * total)
    spread = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def success_rate(outcomes: Sequence[Sequence[bool]]) -> SuccessRate:
    """The rate of True over repeated runs of the same trials.

    Runs of one prompt with different seeds are not independent draws of prompts, so they are not simply pooled: the sample
    size is divided by Kish's design effect (Kish 1965), the variance of the means per prompt over the variance of
    independent trials, kept between 1 (independent runs) and the number of runs (identical runs).

    Args:
        outcomes: `outcomes[run][trial]`, one run a seed.

    Raises:
        ValueError: there is no trial, or the runs differ in length.
    """
    if not outcomes or not outcomes[0]:
        raise ValueError("no outcomes: a success rate needs at least one trial")
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
    return SuccessRate(rate, low, high, total)


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture, (B, C, H, W) in [-1, 1] -> (B,); at most 100.

    `images` are clamped first, as they are when shown.
    """
    error = (images.clamp(-1, 1) - references).square().flatten(1).mean(1) / 4
    return -10 * torch.log10(error.clamp_min(1e-10))
