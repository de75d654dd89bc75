"""From a folder of pictures to a LoRA file: the stage "lora", its settings, and the loop settings for a small model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.skeleton import assign_weights, skeleton
from ..encoders.captions import CaptionDecoder
from ..pipeline import load
from ..small.network import build
from ..streams import Streams
from ..uvit import UViT, UViTConfig
from .adapters import AdaptedModel
from .config import TrainConfig
from .lora_data import LoRAData, captions_of_variations, decode_tokens, encode_pairs, read_pictures, sample_prior, variations
from .lora_stage import LoRAStage
from .network import attention_for

FILE = "lora.safetensors"


@dataclass(frozen=True)
class LoRASettings:
    """Settings of a LoRA; the defaults suit the bundled model. The names are those of the YAML options.

    Attributes:
        rank: of the adapters. A higher rank learns more and forgets more.
        captions: train the caption decoder too; needed for words that it has never written.
        variations: of each picture, all but the first slightly rotated, zoomed and shifted; 1 takes the pictures as they are.
        strength: of these changes, 0 to 1. Uncovered areas are white.
        kept: prior samples, for prior preservation.
        kept_each: prior samples in a step for each pair to learn.
        keep: weight of prior preservation against learning.
        kept_steps: sampling steps of the prior samples.
        guidance: of the prior samples.
        seed: random seed.

    Raises:
        ValueError: a setting out of range.
    """

    rank: int = 32
    captions: bool = True
    variations: int = 4
    strength: float = 0.3
    kept: int = 320
    kept_each: int = 1
    keep: float = 2.0
    kept_steps: int = 8
    guidance: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "variations", "kept", "kept_each", "kept_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.keep < 0:
            raise ValueError(f"keep must not be negative, got {self.keep}")


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
        "sample_every": max(1, steps // 4),
        **more,
    }
    return TrainConfig("lora", str(out), steps, batch_size, learning_rate=learning_rate, **values)


def trainable_network(sizes: UViTConfig, weights: Mapping[str, Tensor]) -> UViT:
    """A network with these weights (float32, original names) and the attention that trains fastest on this machine."""
    with skeleton():
        network = build(sizes, attention=attention_for(sizes))
    assign_weights(network, weights, "the given network")
    return network


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
    prior = sample_prior(
        network, settings.kept, steps=settings.kept_steps, guidance=settings.guidance, seed=settings.seed, watch=watch
    )
    tokens = decode_tokens(captioner, prior.need("text")).cpu() if settings.captions else None
    data = LoRAData(pairs, tuple(captions), prior, tokens)
    model = AdaptedModel(network, captioner if settings.captions else None, settings.rank, settings.seed)
    metadata = {**asdict(settings), **(about or {})}
    return LoRAStage(model, data, out, keep=settings.keep, kept_each=settings.kept_each, decode=decode, about=metadata)


def lora_stage(config: TrainConfig) -> LoRAStage:
    """Build stage "lora" from a config.

    Options:
        data: folder of pictures, see `read_pictures`.
        word: caption of the pictures that have none of their own.
        checkpoint: the model to train on, "emoji" if absent.
        and the fields of `LoRASettings`, except the seed, which is the run's.

    Raises:
        ValueError: an unknown option, or a setting out of range.
        FileNotFoundError: no such folder, or no picture in it.
    """
    options = dict(config.options)
    data, word, name = Path(options.pop("data")), options.pop("word", None), options.pop("checkpoint", "emoji")
    known = set(LoRASettings.__dataclass_fields__) - {"seed"}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"unknown options {', '.join(unknown)}; known are data, word, checkpoint, {', '.join(sorted(known))}")
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
    )
