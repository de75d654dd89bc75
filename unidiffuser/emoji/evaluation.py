"""Evaluation of the bundled model: the general one, with the judge's scores."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..evaluation.config import EvaluationConfig
from ..evaluation.loading import load_model
from ..evaluation.run import Evaluation
from .judge import BUNDLED, load_judge
from .scores import score


@dataclass
class JudgedConfig(EvaluationConfig):
    """Settings of an evaluation with the judge.

    Attributes:
        judge: "bundled", a file, or None; needs data with the fields `label` and `style`.
    """

    judge: str | None = None


def open_evaluation(settings: JudgedConfig, progress: bool = True) -> Evaluation:
    """Load the model, the feature extractors and the judge of a config.

    Raises:
        FileNotFoundError, ValueError: a file is missing or does not match the config.
    """
    model, extractors = load_model(settings)
    if settings.judge is not None:
        judge = load_judge(BUNDLED if settings.judge == "bundled" else settings.judge)
        extractors = replace(extractors, classifier=judge)
    return Evaluation(settings, model, extractors, score, progress)
