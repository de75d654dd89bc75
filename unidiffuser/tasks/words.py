"""Which tokens of a text a rewriting changes, from words or their positions."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..media.json_files import brief

Words = str | int | Sequence[str | int]
"""Words of a text, in one string or a list, or their positions: 0 is the first word, -1 the last."""


def token_mask(
    text: str,
    count: Callable[[str], int],
    length: int,
    *,
    change: Words | None = None,
    keep: Words | None = None,
    rest: bool = True,
    first: int = 1,
) -> Tensor:
    """Mask (1, L, 1) of the tokens of a text: 1 = rewrite, 0 = keep.

    Args:
        text: the whole text.
        count: number of tokens of one word.
        length: L, tokens of a text latent.
        change: the words of `text` to rewrite; case and punctuation do not matter.
        keep: the words to keep, instead of `change`.
        rest: also rewrite the tokens after the end of the text, so that it can grow longer.
        first: tokens before the first word.

    Raises:
        ValueError: not exactly one of `change` and `keep`, no words, or one that does not occur in the text.
    """
    if (change is None) == (keep is None):
        raise ValueError("give the words to change or the words to keep: one of change= and keep=")
    words = text.split()
    name, wanted = ("change", change) if keep is None else ("keep", keep)
    chosen = positions(words, wanted, name)  # type: ignore[arg-type]  # one of them is given
    changed = chosen if keep is None else set(range(len(words))) - chosen
    mask = torch.zeros(1, length, 1, dtype=torch.float32)
    position = first
    for k, word in enumerate(words):  # byte pairs never span two words, so each word can be counted alone
        end = position + count(word)
        mask[:, position:end] = float(k in changed)
        position = end
    mask[:, position:] = float(rest)
    return mask


def positions(words: Sequence[str], wanted: Words, name: str) -> set[int]:
    """Positions of the `wanted` words; a word that occurs more than once is meant everywhere.

    Raises:
        ValueError: none are wanted, or one is not there; names it and the input `name`.
    """
    items = wanted.split() if isinstance(wanted, str) else list(wanted) if isinstance(wanted, Iterable) else [wanted]
    strange = [item for item in items if isinstance(item, bool) or not isinstance(item, (str, int))]
    if strange:
        raise ValueError(f"{name} must hold words of the text, or their positions from 0, got {brief(strange[0])}")
    if not items:
        raise ValueError(f"{name} is empty; name words of the text, or their positions from 0")
    found: set[int] = set()
    missing = []
    for item in items:
        if isinstance(item, int):
            places = {item % len(words)} if -len(words) <= item < len(words) else set()
        else:
            places = {k for k, word in enumerate(words) if bare(word) == bare(item)}
        found |= places
        if not places:
            missing.append(f"position {item}" if isinstance(item, int) else item)
    if missing:
        listed = ", ".join(missing)
        raise ValueError(f"{name} contains {listed}, which the text does not contain; its words are: {' '.join(words)}")
    return found


def bare(word: str) -> str:
    """A word without the punctuation around it, in lower case."""
    return word.strip(string.punctuation).lower()
