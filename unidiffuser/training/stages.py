"""The training stages by name; add a new one here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .config import TrainConfig
from .stage import TrainingStage

Build = Callable[[TrainConfig], TrainingStage]


def _latents(config: TrainConfig) -> TrainingStage:
    from .latent_stage import LatentStage

    return LatentStage(config)


def _lora(config: TrainConfig) -> TrainingStage:
    from .lora_run import lora_stage

    return lora_stage(config)


def _fine_tune(config: TrainConfig) -> TrainingStage:
    from .fine_tune import fine_tune_stage

    return fine_tune_stage(config)


def _distill(config: TrainConfig) -> TrainingStage:
    from .distill import DistillStage

    return DistillStage(config)


STAGES: Mapping[str, Build] = {"latents": _latents, "lora": _lora, "fine-tune": _fine_tune, "distill": _distill}


def make_stage(config: TrainConfig, stages: Mapping[str, Build] = STAGES) -> TrainingStage:
    """Build the stage `config.stage` from `config.options`.

    Args:
        config: settings of the run.
        stages: builders by name.

    Raises:
        ValueError: an unknown stage, or a missing option; the text names it.
    """
    if config.stage not in stages:
        raise ValueError(f"unknown stage {config.stage!r}; choose one of {', '.join(stages)}")
    try:
        return stages[config.stage](config)
    except KeyError as error:
        raise ValueError(f"stage {config.stage!r} needs the option {error} in its config") from error
