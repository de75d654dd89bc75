"""What looks at pictures and captions while an evaluation runs: an extractor and, where they are wanted, CLIP and a judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from unidiffuser.emoji.judge import Judge
from unidiffuser.evaluation.clip_score import Clip
from unidiffuser.evaluation.features import Extractor
from unidiffuser.media.images import fit


@dataclass(frozen=True)
class Eyes:
    """What sees.

    Attributes:
        features: the extractor.
        side: pixels; every picture, real or made, is cropped to a square of this side first, so that all are seen alike.
        clip, judge: None where they are not wanted.
    """

    features: Extractor
    side: int
    clip: Clip | None = None
    judge: Judge | None = None

    def see(self, images: Sequence[Image.Image]) -> tuple[list[dict[str, Any]], dict[str, NDArray[Any]]]:
        """For each picture a dict (the judge's ``concept``, ``drawn`` style and ``confidence``), and for all the arrays
        ``features`` (B, D) and ``clip_image`` (B, E)."""
        squares = [fit(image, self.side, self.side) for image in images]
        arrays: dict[str, NDArray[Any]] = {"features": self.features(squares)}
        if self.clip is not None:
            arrays["clip_image"] = self.clip.images(squares)
        if self.judge is None:
            return [{} for _ in squares], arrays
        verdicts = self.judge.judge_pictures(squares)
        return [{"concept": v.concept, "drawn": v.style, "confidence": round(v.confidence, 4)} for v in verdicts], arrays

    def read(self, captions: Sequence[str]) -> dict[str, NDArray[Any]]:
        """The array ``clip_text`` (B, E) of captions; nothing without CLIP."""
        return {} if self.clip is None else {"clip_text": self.clip.texts(captions)}

    def names(self) -> dict[str, Any]:
        """What tells these eyes from others."""
        judge = None if self.judge is None else self.judge.digest()
        return {"features": self.features.name, "side": self.side, "clip": self.clip and self.clip.name, "judge": judge}
