"""From a folder of pictures to a LoRA file: the stage "lora", its settings, and the loop settings for a small model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..encoders.captions import CaptionDecoder
from ..pipeline import load
from ..streams import Streams
from ..uvit import UViT
from .adapters import AdaptedModel
from .config import TrainConfig, kinds_of, stage_options
from .lora_data import LoRAData, captions_of_variations, encode_pairs, read_pictures, variations
from .lora_stage import LoRAStage
from .network import trainable_network
from .prior_data import PRIOR, PriorSettings, make_prior

FILE = "lora.safetensors"


@dataclass(frozen=True)
class LoRASettings(PriorSettings):
    """Settings of a LoRA: those of `PriorSettings`, and its own.

    Attributes:
        rank: of the adapters. A higher rank learns more and forgets more.
        variations: of each picture, all but the first slightly rotated, zoomed and shifted; 1 takes the pictures as they are.
        strength: of these changes, 0 to 1. Uncovered areas are white.

    Raises:
        ValueError: a setting out of range.
    """

    rank: int = 32
    variations: int = 4
    strength: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "variations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def lora_config(
    out: str | Path, *, steps: int = 800, batch_size: int = 8, learning_rate: float = 2e-3, **more: Any
) -> TrainConfig:
    """Settings of the training loop for a LoRA on a small model; `more` are fields of `TrainConfig`."""
    values = {
        "warmup_steps": max(1, steps // 10),
        "decay": 0.5,
        "betas": (0.9, 0.99),
        "weight_decay": 0.01,
        "ema_decay": 0.99,
        "precision": "no",
        "save_every": 25,
        "keep": 1,
        "first_sample": max(1, steps // 20),
        "sample_every": max(1, steps // 4),
        **more,
    }
    return TrainConfig("lora", str(out), steps, batch_size, learning_rate=learning_rate, **values).checked()


def build_lora_stage(
    network: UViT,
    captioner: CaptionDecoder,
    pairs: Streams,
    captions: Sequence[str],
    out: Path,
    settings: LoRASettings,
    *,
    decode: Callable[[Tensor], Tensor] | None = None,
    about: dict[str, Any] | None = None,
    watch: Callable[[int], None] = lambda done: None,
) -> LoRAStage:
    """Sample the prior and put adapters on a model.

    Args:
        network, captioner: in float32, on the device to sample the prior on; both are changed in place.
        pairs: streams (N, ...) of the pairs to learn.
        captions: their N captions.
        out: the file to write at the end.
        decode: for the sample grid, see `LoRAStage`.
        about: more metadata for the file.
        watch: called with the number of prior samples done.
    """
    captioner.gpt.config._attn_implementation = "eager"  # faster backward pass for short sequences
    network.eval()
    prior, tokens = make_prior(network, captioner, settings, watch, out.with_name(PRIOR) if out.name else None)
    data = LoRAData(pairs, tuple(captions), prior, tokens)
    model = AdaptedModel(network, captioner if settings.captions else None, settings.rank, settings.seed)
    metadata = {**asdict(settings), **(about or {})}
    return LoRAStage(model, data, out, keep=settings.keep, kept_each=settings.kept_each, decode=decode, about=metadata)


def lora_stage(config: TrainConfig, watch: Callable[[int], None] = lambda done: None) -> LoRAStage:
    """Build stage "lora" from a config; `watch` is called with the number of prior samples done.

    Options:
        data: folder of pictures, see `read_pictures`.
        word: caption of the pictures that have none of their own.
        checkpoint: the model to train on, "emoji" if absent.
        and the fields of `LoRASettings`, except the seed, which is the run's.

    Raises:
        ValueError: an unknown option, or one of another type or out of range.
        FileNotFoundError: no such folder, or no picture in it.
    """
    own = {"data": str, "word": str | None, "checkpoint": str}
    options = stage_options(config.options, own | kinds_of(LoRASettings))
    data, word, name = Path(options.pop("data")), options.pop("word", None), options.pop("checkpoint", "emoji")
    settings = LoRASettings(seed=config.seed, **options)
    model = load(name, dtype=torch.float32)
    pictures, forms = read_pictures(data, model.config.image_size, word)
    captions = captions_of_variations(forms, settings.variations)
    squares = variations(pictures, settings.variations, settings.strength, config.seed)
    network = trainable_network(model.config.uvit, model.checkpoint.state_dict("uvit", dtype=torch.float32)).to(model.device)
    return build_lora_stage(
        network,
        model.captioner,
        encode_pairs(model, squares, captions, config.seed),
        captions,
        Path(config.out) / FILE,
        settings,
        decode=model.autoencoder.decode,
        about={"model": str(name), "steps": config.steps},
        watch=watch,
    )
