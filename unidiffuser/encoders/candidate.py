"""A candidate caption, in a module of its own so that naming it does not import the caption decoder."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Caption:
    """One candidate caption.

    Attributes:
        text: the caption.
        score: mean log-probability of its tokens, at most 0; comparable between candidates and methods.
        tokens: generated token ids; the last one is the stop token unless the length limit was reached.
    """

    text: str
    score: float
    tokens: tuple[int, ...]
