"""The feature extractors of an evaluation: features for FID and KID, CLIP embeddings, a classifier's verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from ..media.images import fit
from .classifier import Classifier
from .clip_score import Clip
from .features import FeatureExtractor


@dataclass(frozen=True)
class FeatureExtractors:
    """All extractors, applied to real and generated pictures alike.

    Attributes:
        features: features for FID, KID, diversity and memorisation.
        side: pixels; every picture, real or generated, is first cropped and scaled to a square of this side.
        clip: for CLIP scores, or None.
        classifier: or None.
    """

    features: FeatureExtractor
    side: int
    clip: Clip | None = None
    classifier: Classifier | None = None

    def encode_images(self, images: Sequence[Image.Image]) -> tuple[list[dict[str, Any]], dict[str, NDArray[Any]]]:
        """Verdicts and features of B pictures.

        Returns:
            one dict a picture, with the classifier's `concept` (label), `drawn` (style) and `confidence` where there is a
            classifier, and the arrays `features` (B, D) and, with CLIP, `clip_image` (B, E).
        """
        squares = [fit(image, self.side, self.side) for image in images]
        arrays: dict[str, NDArray[Any]] = {"features": self.features(squares)}
        if self.clip is not None:
            arrays["clip_image"] = self.clip.images(squares)
        if self.classifier is None:
            return [{} for _ in squares], arrays
        verdicts = self.classifier.classify(squares)
        return [{"concept": v.label, "drawn": v.style, "confidence": round(v.confidence, 4)} for v in verdicts], arrays

    def encode_captions(self, captions: Sequence[str]) -> dict[str, NDArray[Any]]:
        """The array `clip_text` (B, E) of B captions; no array without CLIP."""
        return {} if self.clip is None else {"clip_text": self.clip.texts(captions)}

    def identity(self) -> dict[str, Any]:
        """Names, weights' digests and size: finished work is kept per value of this."""
        digest = None if self.classifier is None else self.classifier.digest()
        return {"features": self.features.name, "side": self.side, "clip": self.clip and self.clip.name, "judge": digest}
