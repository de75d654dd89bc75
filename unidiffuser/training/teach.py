"""From a few pictures to a LoRA file: the stage "lora", its settings, and the run that fits a small model on a CPU."""

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
from .config import TrainConfig
from .lessons import Lessons, encode, own_pairs, read_pictures, said_of, spread, variations
from .lora import Adapted, LoraStage
from .network import attention_for

FILE = "lora.safetensors"


@dataclass(frozen=True)
class Teaching:
    """How to learn; the defaults suit the bundled model.

    Attributes:
        rank: of the adapters; more can hold more, and forgets more.
        captions: whether the caption decoder learns to write the words, which it must for words that it has never written.
        variations: of each picture, all but the first a little turned, zoomed and shifted; 1 takes the pictures as they are.
        strength: of these changes. What comes in from outside is white.
        kept: pairs of the model's own that keep what it knows.
        kept_each: how many of them are in a step for each pair to learn.
        keep: weight of keeping against learning.
        kept_steps, guidance: with which these pairs are made.
        seed: of everything.
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


def lora_run(
    out: str | Path, *, steps: int = 800, batch_size: int = 8, learning_rate: float = 2e-3, **more: Any
) -> TrainConfig:
    """Settings of the training loop for a LoRA on a small model; `more` as `TrainConfig`."""
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
    """A network with these weights (float32, original names) and the attention that learns fastest where it is."""
    with skeleton():
        network = build(sizes, attention=attention_for(sizes))
    assign_weights(network, weights, "the given network")
    return network


def lora_stage_of(
    network: UViT,
    captioner: CaptionDecoder,
    learned: Streams,
    words: Sequence[str],
    out: Path,
    settings: Teaching,
    *,
    decode: Callable[[Tensor], Tensor] | None = None,
    about: dict[str, Any] | None = None,
    watch: Callable[[int], None] = lambda done: None,
) -> LoraStage:
    """The stage that teaches `words` and the pictures `learned` to a model, whose modules it keeps and changes.

    Args:
        network, captioner: in float32, on the device where the own pairs are to be made.
        out: the file to write at the end.
        decode: for the samples, see :class:`.lora.LoraStage`.
        watch: called with the number of own pairs that are there.
    """
    captioner.gpt.config._attn_implementation = "eager"  # faster backwards for short sequences
    network.eval()
    kept = own_pairs(
        network, settings.kept, steps=settings.kept_steps, guidance=settings.guidance, seed=settings.seed, watch=watch
    )
    tokens = said_of(captioner, kept.need("text")).cpu() if settings.captions else None
    lessons = Lessons(learned, tuple(words), kept, tokens)
    adapted = Adapted(network, captioner if settings.captions else None, settings.rank, settings.seed)
    told = {**asdict(settings), **(about or {})}
    return LoraStage(adapted, lessons, out, keep=settings.keep, kept_each=settings.kept_each, decode=decode, about=told)


def lora_stage(config: TrainConfig) -> LoraStage:
    """Stage "lora". Options:

    data: folder of pictures, see :func:`.lessons.read_pictures`.
    word: caption of the pictures that have none of their own.
    checkpoint: the model to teach, "emoji" when absent.
    The fields of :class:`Teaching`, but for the seed, which is the run's.
    """
    options = dict(config.options)
    data, word, name = Path(options.pop("data")), options.pop("word", None), options.pop("checkpoint", "emoji")
    known = set(Teaching.__dataclass_fields__) - {"seed"}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"unknown options {', '.join(unknown)}; known are data, word, checkpoint, {', '.join(sorted(known))}")
    settings = Teaching(seed=config.seed, **options)
    model = load(name, dtype=torch.float32)
    pictures, captions = read_pictures(data, model.config.image_size, word)
    words = spread(captions, settings.variations)
    learned = encode(model, variations(pictures, settings.variations, settings.strength, config.seed), words, config.seed)
    network = trainable_network(model.config.uvit, model.checkpoint.state_dict("uvit", dtype=torch.float32)).to(model.device)
    return lora_stage_of(
        network,
        model.captioner,
        learned,
        words,
        Path(config.out) / FILE,
        settings,
        decode=model.autoencoder.decode,
        about={"model": str(name), "steps": config.steps},
    )
