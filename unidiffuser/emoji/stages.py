"""The training stages of the bundled model by name."""

from __future__ import annotations

from collections.abc import Mapping

from ..training.config import TrainConfig
from ..training.stage import TrainingStage
from ..training.stages import STAGES as GENERAL
from ..training.stages import Build
from ..training.stages import make_stage as make_general_stage
from .autoencoder import AutoencoderStage
from .captioner import CaptionerStage
from .decoder import DecoderStage
from .image_tower import ImageTowerStage
from .network import UViTStage
from .towers import EncodersStage

STAGES: Mapping[str, Build] = {
    **GENERAL,
    "autoencoder": AutoencoderStage,
    "decoder": DecoderStage,
    "encoders": EncodersStage,
    "image_tower": ImageTowerStage,
    "captioner": CaptionerStage,
    "uvit": UViTStage,
}


def make_stage(config: TrainConfig) -> TrainingStage:
    """The stage of a config: one of these or a general one."""
    return make_general_stage(config, STAGES)
