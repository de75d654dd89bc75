"""From a folder of captioned pictures to a fine-tuned checkpoint: encode, train with prior preservation, write one file.

    from unidiffuser.training.fine_tune import fine_tune
    path = fine_tune("pictures", "run")

The pictures become latent shards in the run folder, each in a few slightly changed variations; stage "fine-tune" trains on
them. Both parts continue where they were interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.checkpoint import load_checkpoint
from ..data.encode import Encoders, Encoding, encode
from ..data.fingerprint import check_encoders
from ..data.shards import LatentShards
from ..distributed import joined
from ..encoders.prompts import with_captions
from ..options import side_multiple
from ..pipeline import load
from .config import TrainConfig, kinds_of, stage_options
from .fine_tune_data import captioned_parts, check_captions
from .growth import grown
from .loop import Estimate, Watch, train
from .network import trainable_network
from .prior_data import PRIOR, PriorSettings, make_prior
from .tuned import FineTuneStage, TunedModel

FILE = "model.safetensors"  # the result, in the run folder
LATENTS = "latents"  # folder of the shards, in the run folder


@dataclass(frozen=True)
class Prepared:
    """Encoded pictures, and how the result will differ from the checkpoint.

    Attributes:
        latents: folder of the shards.
        pairs: variations of all pictures that were encoded.
        pictures: pictures that were encoded.
        left_out: reasons and numbers of the pictures that were not.
        side: of the result's pictures, in pixels.
        old_side: of the checkpoint's.
        new_words: words of the captions that the checkpoint's vocabulary lacks; empty if it has none.
    """

    latents: Path
    pairs: int
    pictures: int
    left_out: dict[str, int]
    side: int
    old_side: int
    new_words: tuple[str, ...]

    def warnings(self) -> list[str]:
        """One line for each thing that the user should know before training."""
        lines = []
        if self.left_out:
            listed = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
            total = self.pictures + sum(self.left_out.values())
            lines.append(f"{self.pictures} of {total} pictures are used, the others are left out: {listed}")
        if self.side != self.old_side:
            lines.append(
                f"the result draws {self.side} x {self.side} pixels, the model was trained at {self.old_side}: this takes more "
                "steps, and a side much larger or smaller may stay worse"
            )
        if self.new_words:
            shown = ", ".join(self.new_words[:12]) + (
                f" and {len(self.new_words) - 12} more" if len(self.new_words) > 12 else ""
            )
            lines.append(f"words that are new to the model, and enter the vocabulary of the result: {shown}")
        return lines


def prepare(
    pictures: str | Path,
    out: str | Path,
    model: str = "emoji",
    *,
    image_size: int | None = None,
    variations: int = 4,
    seed: int = 0,
    device: str | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Prepared:
    """Encode a folder of captioned pictures into the run folder; pictures that are encoded already are skipped.

    Args:
        pictures: folder with captions in `.txt` files beside the pictures, or in `metadata.jsonl`.
        out: the run folder.
        model: "emoji", or a checkpoint file or folder.
        image_size: side of the squares in pixels; the model's if None.
        variations: of each picture, all but the first slightly rotated, zoomed and shifted.
        seed: of the variations.
        device: as in `training.loop.train`.
        report: called with the number of encoded variations and their total, after each part.

    Raises:
        FileNotFoundError: no such folder or model, or no picture in the folder.
        ValueError: no picture has a caption, none can be read, or a setting is out of range.
    """
    if variations < 1:
        raise ValueError(f"variations must be at least 1, got {variations}")
    pairs = check_captions(Path(pictures))
    checkpoint = load_checkpoint(model)
    side, multiple = image_size or checkpoint.config.image_size, side_multiple(checkpoint.config)
    if side < 1 or side % multiple:
        raise ValueError(f"image_size must be a multiple of {multiple}, got {side}")
    parts = captioned_parts(pairs, side, variations, seed)
    total, done = len(pairs) * variations, 0

    def count(kept: int) -> None:
        nonlocal done
        done += kept
        report(done, total)

    with joined(device, patience=timedelta(days=1)) as world:
        manifest = encode(parts, Path(out) / LATENTS, Encoders(checkpoint, world.device), Encoding(side), world, count)
    left_out = {reason: -(-number // variations) for reason, number in manifest["dropped"].items()}
    if not manifest["samples"]:
        listed = ", ".join(f"{number} {reason}" for reason, number in left_out.items())
        raise ValueError(f"none of the {len(pairs)} pictures in {pictures} can be used: {listed}")
    shards = LatentShards(Path(out) / LATENTS)
    old = checkpoint.config.vocabulary
    new: tuple[str, ...] = ()
    if old is not None:
        known = with_captions(old, (caption for captions in shards.captions() for caption in captions))
        new = (*known.concepts[len(old.concepts) :], *known.words[len(old.words) :])
    return Prepared(
        shards.folder, len(shards), len(pairs) - sum(left_out.values()), left_out, side, checkpoint.config.image_size, new
    )


def fine_tune_config(
    out: str | Path, *, steps: int = 200, batch_size: int = 8, learning_rate: float = 3e-4, **more: Any
) -> TrainConfig:
    """Settings of the training loop for fine-tuning a small model; `more` are fields of `TrainConfig`."""
    values = {
        "warmup_steps": max(1, steps // 10),
        "decay": 0.5,
        "betas": (0.9, 0.99),
        "weight_decay": 0.0,
        "ema_decay": 0.99,
        "save_every": 25,
        "keep": 1,
        "first_sample": max(1, steps // 20),
        "sample_every": max(1, steps // 4),
        **more,
    }
    return TrainConfig("fine-tune", str(out), steps, batch_size, learning_rate=learning_rate, **values).checked()


def fine_tune_stage(config: TrainConfig, watch: Callable[[int], None] = lambda done: None) -> FineTuneStage:
    """Build stage "fine-tune" from a config; `watch` is called with the number of prior samples done.

    Options:
        latents: folder of latent shards, by `prepare` or `unidiffuser data encode`.
        checkpoint: the model to train, "emoji" if absent; the one that made the shards.
        and the fields of `PriorSettings`, except the seed, which is the run's.

    Raises:
        ValueError: an unknown option, one of another type or out of range, a checkpoint without a network, or shards that
            other encoders made.
        FileNotFoundError: no shards.
    """
    options = stage_options(config.options, {"latents": str, "checkpoint": str} | kinds_of(PriorSettings))
    shards, name = LatentShards(options.pop("latents")), options.pop("checkpoint", "emoji")
    settings = PriorSettings(seed=config.seed, **options)
    model = load(name, dtype=torch.float32)
    checkpoint = model.checkpoint
    check_encoders(shards, checkpoint)
    if checkpoint.config.vocabulary is not None:
        captions = (caption for captions in shards.captions() for caption in captions)
        checkpoint.config = replace(checkpoint.config, vocabulary=with_captions(checkpoint.config.vocabulary, captions))
    side = shards.manifest["encoding"]["image_size"] // checkpoint.config.vae.downscale
    weights, sizes = grown(checkpoint.state_dict("uvit", dtype=torch.float32), checkpoint.config.uvit, side)
    network = trainable_network(sizes, weights).to(model.device).eval()
    model.captioner.gpt.config._attn_implementation = "eager"  # faster backward pass for short sequences
    prior, tokens = make_prior(network, model.captioner, settings, watch, Path(config.out) / PRIOR)
    tuned = TunedModel(network, model.captioner if settings.captions else None)
    more: dict[str, Any] = {"keep": settings.keep, "kept_each": settings.kept_each, "decode": model.autoencoder.decode}
    return FineTuneStage(tuned, shards, prior, tokens, checkpoint, Path(config.out) / FILE, **more)


def fine_tune(
    pictures: str | Path,
    out: str | Path,
    model: str = "emoji",
    *,
    image_size: int | None = None,
    variations: int = 4,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
    watch: Watch | None = None,
    estimate: Estimate | None = None,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Fine-tune a model on a folder of captioned pictures; an interrupted run continues.

    Args:
        pictures, out, model, image_size, variations, seed, device: see `prepare`.
        progress, watch, estimate: see `training.loop.train`.
        options: fields of `PriorSettings`, as keep=4.0.
        **settings: of `fine_tune_config`, as steps=400.

    Returns:
        The path of the checkpoint, which `unidiffuser.load` and ComfyUI read.

    Raises:
        FileNotFoundError, ValueError: see `prepare`, `fine_tune_stage` and `training.loop.train`.
    """
    prepared = prepare(pictures, out, model, image_size=image_size, variations=variations, seed=seed, device=device)
    named = {"latents": str(prepared.latents), "checkpoint": str(model), **(options or {})}
    config = fine_tune_config(out, seed=seed, options=named, **settings)
    train(fine_tune_stage(config), config, progress=progress, device=device, watch=watch, estimate=estimate)
    return Path(out) / FILE
