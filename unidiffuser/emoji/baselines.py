"""Baselines of the judge's scores: nearest training picture, shuffled inputs; and the parts of a caption."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.captioned import Pair


def parse_caption(caption: str, styles: Collection[str]) -> tuple[str, str | None]:
    """`"red apple, noto"` -> `("red apple", "noto")`; `"red apple"` -> `("red apple", None)`.

    Only a last part that is a known style is one, since labels contain commas too. Apart from white space at the ends the
    label must match exactly.
    """
    label, comma, style = caption.strip().rpartition(",")
    if comma and style.strip() in styles:
        return label.strip(), style.strip()
    return caption.strip(), None


def thumbnails(images: Tensor, side: int = 16) -> Tensor:
    """(B, C, H, W) -> (B, C, side, side) by averaging, for the nearest training picture in pixels.

    Small enough that a shift by a pixel or a thin outline does not decide which picture is nearest.
    """
    return F.adaptive_avg_pool2d(images, side)


def nearest(queries: Tensor, references: Tensor) -> Tensor:
    """For each query the index of the nearest reference (Euclidean): (Q, ...), (R, ...) -> (Q,)."""
    return torch.cdist(queries.flatten(1).float(), references.flatten(1).float()).argmin(dim=1)


def nearest_by_caption(targets: Sequence[Pair], training: Sequence[Pair], seed: int = 0) -> list[Pair]:
    """The picture that a model which only memorised the training set would return for each target's caption.

    This is the training picture of the same label and style where there is one (for a trained pair the pair itself, so that
    the baseline equals the ceiling), else one of the same label in another style, drawn by `seed` (for a held-out pair).

    Raises:
        ValueError: a label has no training picture in any style.
    """
    rng = random.Random(seed)
    by_label: dict[str, list[Pair]] = {}
    for pair in training:
        by_label.setdefault(pair.label, []).append(pair)
    found = []
    for target in targets:
        candidates = by_label.get(target.label)
        if not candidates:
            raise ValueError(f"no training picture has the label {target.label!r}")
        same_style = [pair for pair in candidates if pair.style == target.style]
        found.append(rng.choice(same_style or candidates))
    return found


def shuffled(count: int, seed: int = 0) -> list[int]:
    """A random permutation of `range(count)` without fixed points (one cycle; Sattolo's algorithm).

    Without fixed points no trial is scored against its own input.

    Raises:
        ValueError: `count` is below 2.
    """
    if count < 2:
        raise ValueError(f"shuffling needs two or more pictures, got {count}")
    rng = random.Random(seed)
    order = list(range(count))
    for last in range(count - 1, 0, -1):
        other = rng.randrange(last)
        order[last], order[other] = order[other], order[last]
    return order
