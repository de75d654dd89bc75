"""An optional classifier of pictures: its interface, and how its verdicts become figures of the report."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from PIL import Image

from ..data.captioned import Pair

Item = Mapping[str, Any]


class Verdict(Protocol):
    """What a classifier recognises in one picture; `confidence` in [0, 1] is the probability of the label."""

    @property
    def label(self) -> str: ...

    @property
    def style(self) -> str: ...

    @property
    def confidence(self) -> float: ...


class Classifier(Protocol):
    """Assigns one of `labels` and one of `styles` to a picture."""

    @property
    def labels(self) -> Sequence[str]: ...

    @property
    def styles(self) -> Sequence[str]: ...

    def classify(self, images: Sequence[Image.Image]) -> Sequence[Verdict]:
        """One verdict for each picture; all of one size."""
        ...

    def among(self, labels: Collection[str]) -> Classifier:
        """The classifier restricted to these labels; ValueError if it knows none of them."""
        ...

    def digest(self) -> str:
        """Identifies labels and weights."""
        ...


class Score(Protocol):
    """Turns the verdicts on generated pictures into entries of `scores.json`."""

    def __call__(
        self,
        outputs: Mapping[str, Sequence[Item]],
        chosen: Mapping[str, Sequence[Pair]],
        pairs: Sequence[Pair],
        classifier: Classifier,
    ) -> dict[str, Any]:
        """Entries of the report, "judged" among them: a list of dicts with at least `measure` and `rate`.

        Args:
            outputs: `"task/split/seed"` -> the items of that cell, dicts with the verdict (`concept`, `drawn`, `confidence`)
                of a picture and the `caption` where one was generated.
            chosen: split -> the pairs used as input, in order.
            pairs: all real pictures.
            classifier: restricted to the labels of `pairs`.
        """
        ...


NOT_JUDGED: dict[str, Any] = {"judged": [], "styles": [], "style_confusion": {}}
"""The same entries of `scores.json` for an evaluation without a classifier."""
