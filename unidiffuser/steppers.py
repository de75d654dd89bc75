"""Steppers: one step of a stream over one interval of a path, from the predictions made so far.

As in k-diffusion each is a plain function. `step(history, interval)` gets the last points of one stream, the newest last (at
most three, and none from before a hold), and returns the stream at `interval.next`. Noise levels are those of the stream's own
modality, so a path may move the two at unequal speeds.

Notation of DPM-Solver++ (Lu et al., arXiv 2211.01095): x_t = alpha_t x_0 + sigma_t eps, lambda = log(alpha / sigma),
h = lambda_next - lambda. Each of its updates is sigma_next / sigma * x plus alpha_next times a combination of x_0
predictions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .schedule import alpha_sigma, half_logsnr


@dataclass(frozen=True)
class Level:
    """A noise level: label, alpha, sigma and lam, half the log-SNR, which is infinite at label 0."""

    label: float
    alpha: float
    sigma: float
    lam: float

    @classmethod
    def of(cls, label: float) -> Level:
        """The noise level of a label in [0, 1000]."""
        t = torch.tensor(label, dtype=torch.float64)
        alpha, sigma = alpha_sigma(t)
        return cls(label, float(alpha), float(sigma), float(half_logsnr(t)))


@dataclass(frozen=True)
class Interval:
    """One interval of one modality, from `level` to `next`: number `index` of `count` in an uninterrupted run.

    A held modality has count 0 and next = level.
    """

    level: Level
    next: Level
    index: int = 0
    count: int = 0

    @property
    def moving(self) -> bool:
        """Whether the modality changes its noise level here."""
        return self.count > 0


@dataclass(frozen=True)
class Point:
    """A point on a stream's way: its level, the state x there, and the noise predicted there."""

    level: Level
    x: Tensor
    eps: Tensor

    @property
    def x0(self) -> Tensor:
        """The x_0 prediction that x and eps imply."""
        return (self.x - self.level.sigma * self.eps) / self.level.alpha


MAX_RATIO = 20  # of interval lengths over which a slope is extrapolated
Stepper = Callable[[Sequence[Point], Interval], Tensor]


def intervals(labels: Sequence[float], least: float = 0.0) -> list[Interval]:
    """Intervals of one modality from its labels (steps + 1) on a path.

    A run that would end below `least` is compressed to end there: 1000 -> 0 in uniform steps becomes 1000 -> 1 in uniform
    steps. A hold after it keeps its own label, as the authors pass a sample on as clean.
    """
    result: list[Interval] = []
    first = 0
    for i in range(1, len(labels)):
        if labels[i] == labels[i - 1]:
            level = Level.of(labels[i])
            result.append(Interval(level, level))
            first = i
        elif i + 1 == len(labels) or labels[i + 1] == labels[i]:  # the run that began at `first` ends here
            run, start, end = labels[first : i + 1], labels[first], labels[i]
            if end < least < start:
                run = [least + (t - end) * (start - least) / (start - end) for t in run]
            count = len(run) - 1
            result += [Interval(Level.of(run[k]), Level.of(run[k + 1]), k, count) for k in range(count)]
    return result


def ddim(history: Sequence[Point], interval: Interval) -> Tensor:
    """DDIM with eta = 0 (Song et al., arXiv 2010.02502, eq. 12); in x / alpha it is Euler's method in sigma / alpha.

    Read upwards, with eps from the far end of the interval, the same line inverts itself.
    """
    now = history[-1]
    return interval.next.alpha * now.x0 + interval.next.sigma * now.eps


def lcm(history: Sequence[Point], interval: Interval) -> Tensor:
    """The x_0 prediction at the next noise level, without noise: the sampler adds fresh noise (`Method.renews`).

    Multistep consistency sampling (Luo et al., arXiv 2310.04378, algorithm 3), for networks that were distilled to predict the
    end of the whole path from each point.
    """
    return interval.next.alpha * history[-1].x0


def dpmpp_2m(history: Sequence[Point], interval: Interval) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2); first order at the start, and into label 0 (infinite h)."""
    if not _comparable(interval, history[-2:]):
        return _first_order(history[-1], interval.next)
    before, now = history[-2:]
    h = interval.next.lam - now.level.lam
    r = (now.level.lam - before.level.lam) / h
    d = (1 + 1 / (2 * r)) * now.x0 - 1 / (2 * r) * before.x0
    return interval.next.sigma / now.level.sigma * now.x - interval.next.alpha * math.expm1(-h) * d


def dpmpp_3m(history: Sequence[Point], interval: Interval) -> Tensor:
    """DPM-Solver++(3M): the expansion of arXiv 2211.01095, section 4, to third order over the last three points."""
    if len(history) < 3 or not _comparable(interval, history[-3:]):
        return dpmpp_2m(history, interval)
    oldest, before, now = history[-3:]
    h = interval.next.lam - now.level.lam
    r0, r1 = (now.level.lam - before.level.lam) / h, (before.level.lam - oldest.level.lam) / h
    d0, d1 = (now.x0 - before.x0) / r0, (before.x0 - oldest.x0) / r1
    first, second = d0 + r0 / (r0 + r1) * (d0 - d1), (d0 - d1) / (r0 + r1)  # derivatives by lambda, in units of h
    phi1 = math.expm1(-h)
    phi2 = phi1 / h + 1
    phi3 = phi2 / h - 0.5
    x = interval.next.sigma / now.level.sigma * now.x
    return x - interval.next.alpha * (phi1 * now.x0 - phi2 * first + phi3 * second)


def reference(history: Sequence[Point], interval: Interval) -> Tensor:
    """The authors' sampler: singlestep DPM-Solver++ of order 3 (arXiv 2211.01095; its 3S in the form of 2206.00927).

    A group of 3 intervals (the last ones 2 or 1) starts at s. Its inner points are ordinary points of the path, reached
    from s with the predictions made by then, so one evaluation per interval suffices: the first interval uses x_0(s) alone, the
    second adds the slope of x_0 from s to the first inner point, the third the slope to the second.
    """
    inner, order = _group(interval.index, interval.count)
    start, now = history[-1 - inner], history[-1]
    if not _comparable(interval, [start, now] if inner else [now]):
        return _first_order(start, interval.next)
    h = interval.next.lam - start.level.lam
    r = (now.level.lam - start.level.lam) / h  # where, within this step, the newest prediction was made
    phi1 = math.expm1(-h)
    # NOTE: a step of 2 intervals that ends a group of 2 weighs its slope by -phi1 / 2, one inside a group of 3 by phi2.
    weight = -phi1 / 2 if order == 2 else phi1 / h + 1
    slope = (now.x0 - start.x0) / r
    x = interval.next.sigma / start.level.sigma * start.x
    return x - interval.next.alpha * (phi1 * start.x0 - weight * slope)


def _group(index: int, count: int) -> tuple[int, int]:
    """(place within its group, order of the group) of interval `index` in the authors' schedule of `count` intervals.

    Groups of 3, as many as leave at least one interval; the rest as 1, 2, or 2 and 1.
    """
    whole = (count - 1) // 3
    rest = count - 3 * whole  # 1, 2 or 3
    if index < 3 * whole:
        return index % 3, 3
    place = index - 3 * whole
    return (place, 2) if rest > 1 and place < 2 else (0, 1)


def _comparable(interval: Interval, points: Sequence[Point]) -> bool:
    """Whether a slope through `points` may be extrapolated to `interval.next`.

    That takes at least two points, a finite step and intervals of similar size: over an interval 20 times longer than the one
    it was measured on, a slope is mostly the network's rounding error. The paths of `path` stay well below that.
    """
    lams = [*(visit.level.lam for visit in points), interval.next.lam]
    gaps = [b - a for a, b in itertools.pairwise(lams)]
    return len(gaps) > 1 and 0 < max(gaps) < MAX_RATIO * min(gaps)


def _first_order(start: Point, end: Level) -> Tensor:
    ratio = end.sigma / start.level.sigma
    return ratio * start.x + (end.alpha - start.level.alpha * ratio) * start.x0


@dataclass(frozen=True)
class Method:
    """A stepper and how the sampler drives it.

    Attributes:
        step: the stepper.
        least: label at which its last interval ends where the path goes on to 0.
        implicit: it goes from clean to noisy and takes eps from the far end of each interval, found by `evaluations`
            fixed-point iterations.
        evaluations: network evaluations per interval.
        renews: the sampler adds fresh noise after each step; the stepper returns the state without noise.
    """

    step: Stepper
    least: float = 0.0
    implicit: bool = False
    evaluations: int = 1
    renews: bool = False


METHODS: dict[str, Method] = {
    "euler": Method(ddim),  # the same algorithm: see `ddim`
    "ddim": Method(ddim),
    "dpmpp_2m": Method(dpmpp_2m),
    "dpmpp_3m": Method(dpmpp_3m),
    "lcm": Method(lcm, renews=True),
    # Fixed-point inversion: Pan et al., arXiv 2309.04907. The second iteration makes the way there and back ten times as
    # exact (0.1 % of a latent over 100 steps); a third gains nothing that can be seen.
    "ddim_inverse": Method(ddim, implicit=True, evaluations=2),
    "reference": Method(reference, least=1.0),
}
