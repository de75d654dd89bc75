"""The steppers: how one interval of a path is taken, given what the network predicted so far.

In the manner of k-diffusion each is a plain function, and each knows one stream only: `step(history, stage)` gets the
points this stream visited on its way, the newest last, and returns the stream at `stage.next`. Its noise levels are
those of its own modality, so that a path may move the two at unequal speeds.

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
    """A noise level in all its forms; lam (half the log-SNR) is infinite at label 0."""

    label: float
    alpha: float
    sigma: float
    lam: float

    @classmethod
    def of(cls, label: float) -> Level:
        t = torch.tensor(label, dtype=torch.float64)
        alpha, sigma = alpha_sigma(t)
        return cls(label, float(alpha), float(sigma), float(half_logsnr(t)))


@dataclass(frozen=True)
class Stage:
    """One interval of one modality: from `level` to `next`, number `index` of a movement of `count` intervals.

    A held modality has count 0 and next = level.
    """

    level: Level
    next: Level
    index: int = 0
    count: int = 0

    @property
    def moving(self) -> bool:
        return self.count > 0


@dataclass(frozen=True)
class Visit:
    """A point that a stream came through: its level, the state x there, and the noise predicted for the step on."""

    level: Level
    x: Tensor
    eps: Tensor

    @property
    def x0(self) -> Tensor:
        """The clean stream that x and eps imply."""
        return (self.x - self.level.sigma * self.eps) / self.level.alpha


LONGEST = 20  # times the shortest interval that a slope may span
Stepper = Callable[[Sequence[Visit], Stage], Tensor]


def stages(labels: Sequence[float], least: float = 0.0) -> list[Stage]:
    """The intervals of one modality along its labels (steps + 1) of a path.

    A movement that would end below `least` is compressed to end there: 1000 -> 0 in uniform steps becomes 1000 -> 1 in
    uniform steps. The hold after it keeps its own label, as the authors hand a sample on as clean.
    """
    result: list[Stage] = []
    first = 0
    for i in range(1, len(labels)):
        if labels[i] == labels[i - 1]:
            level = Level.of(labels[i])
            result.append(Stage(level, level))
            first = i
        elif i + 1 == len(labels) or labels[i + 1] == labels[i]:  # the movement that began at `first` ends here
            way, start, end = labels[first : i + 1], labels[first], labels[i]
            if end < least < start:
                way = [least + (t - end) * (start - least) / (start - end) for t in way]
            count = len(way) - 1
            result += [Stage(Level.of(way[k]), Level.of(way[k + 1]), k, count) for k in range(count)]
    return result


def ddim(history: Sequence[Visit], stage: Stage) -> Tensor:
    """DDIM with eta = 0 (Song et al., arXiv 2010.02502, eq. 12); in x / alpha it is Euler's method in sigma / alpha.

    Read upwards, with eps from the far end of the interval, the same line inverts itself.
    """
    now = history[-1]
    return stage.next.alpha * now.x0 + stage.next.sigma * now.eps


def dpmpp_2m(history: Sequence[Visit], stage: Stage) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2); first order at the start, and into label 0 (infinite h)."""
    if not _comparable(stage, history[-2:]):
        return _first_order(history[-1], stage.next)
    before, now = history[-2:]
    h = stage.next.lam - now.level.lam
    r = (now.level.lam - before.level.lam) / h
    d = (1 + 1 / (2 * r)) * now.x0 - 1 / (2 * r) * before.x0
    return stage.next.sigma / now.level.sigma * now.x - stage.next.alpha * math.expm1(-h) * d


def dpmpp_3m(history: Sequence[Visit], stage: Stage) -> Tensor:
    """DPM-Solver++(3M): the expansion of arXiv 2211.01095, section 4, to third order over the last three points."""
    if len(history) < 3 or not _comparable(stage, history[-3:]):
        return dpmpp_2m(history, stage)
    oldest, before, now = history[-3:]
    h = stage.next.lam - now.level.lam
    r0, r1 = (now.level.lam - before.level.lam) / h, (before.level.lam - oldest.level.lam) / h
    d0, d1 = (now.x0 - before.x0) / r0, (before.x0 - oldest.x0) / r1
    first, second = d0 + r0 / (r0 + r1) * (d0 - d1), (d0 - d1) / (r0 + r1)  # derivatives by lambda, in units of h
    phi1 = math.expm1(-h)
    phi2 = phi1 / h + 1
    phi3 = phi2 / h - 0.5
    x = stage.next.sigma / now.level.sigma * now.x
    return x - stage.next.alpha * (phi1 * now.x0 - phi2 * first + phi3 * second)


def reference(history: Sequence[Visit], stage: Stage) -> Tensor:
    """The authors' sampler: singlestep DPM-Solver++ of order 3 (arXiv 2211.01095; its 3S in the form of 2206.00927).

    A group of 3 intervals (the last ones 2 or 1) starts at s. Its inner points are ordinary points of the path, reached
    from s with what is known by then, so that one evaluation per interval is all it needs: the first interval takes
    x_0(s) alone, the second adds the slope of x_0 from s to the first inner point, the third that to the second.
    """
    inner, order = _group(stage.index, stage.count)
    start, now = history[-1 - inner], history[-1]
    if not _comparable(stage, [start, now] if inner else [now]):
        return _first_order(start, stage.next)
    h = stage.next.lam - start.level.lam
    r = (now.level.lam - start.level.lam) / h  # where, within this step, the newest prediction was made
    phi1 = math.expm1(-h)
    # NOTE: a step of 2 intervals that ends a group of 2 weighs its slope by -phi1 / 2, one inside a group of 3 by phi2.
    weight = -phi1 / 2 if order == 2 else phi1 / h + 1
    slope = (now.x0 - start.x0) / r
    x = stage.next.sigma / start.level.sigma * start.x
    return x - stage.next.alpha * (phi1 * start.x0 - weight * slope)


def _group(index: int, count: int) -> tuple[int, int]:
    """(place within its group, order of the group) of interval `index` in the authors' schedule of `count` intervals.

    Groups of 3, as many as leave an interval over, and those left over as 1, 2, or 2 and 1.
    """
    whole = (count - 1) // 3
    rest = count - 3 * whole  # 1, 2 or 3
    if index < 3 * whole:
        return index % 3, 3
    place = index - 3 * whole
    return (place, 2) if rest > 1 and place < 2 else (0, 1)


def _comparable(stage: Stage, points: Sequence[Visit]) -> bool:
    """Whether a slope through `points` may be carried on to `stage.next`.

    It takes two points at least and a finite step, and intervals of one size: over an interval 20 times longer than the
    one it was measured on, a slope is mostly the rounding error of the network. The paths of `path` stay well below that.
    """
    lams = [*(visit.level.lam for visit in points), stage.next.lam]
    gaps = [b - a for a, b in itertools.pairwise(lams)]
    return len(gaps) > 1 and 0 < max(gaps) < LONGEST * min(gaps)


def _first_order(start: Visit, end: Level) -> Tensor:
    ratio = end.sigma / start.level.sigma
    return ratio * start.x + (end.alpha - start.level.alpha * ratio) * start.x0


@dataclass(frozen=True)
class Method:
    """A stepper and how it wants to be driven.

    least: the label at which its movements end when the path goes on to 0.
    implicit: it goes from clean to noisy and takes eps from the far end of an interval, which it finds by
        `evaluations` fixed-point iterations.
    """

    step: Stepper
    least: float = 0.0
    implicit: bool = False
    evaluations: int = 1


METHODS: dict[str, Method] = {
    "euler": Method(ddim),  # the same algorithm: see `ddim`
    "ddim": Method(ddim),
    "dpmpp_2m": Method(dpmpp_2m),
    "dpmpp_3m": Method(dpmpp_3m),
    # Fixed-point inversion: Pan et al., arXiv 2309.04907. The second iteration makes the way there and back ten times as
    # exact (0.1 % of a latent over 100 steps); a third gains nothing that can be seen.
    "ddim_inverse": Method(ddim, implicit=True, evaluations=2),
    "reference": Method(reference, least=1.0),
}
