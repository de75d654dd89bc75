"""Stage "latents": trains the U-ViT on latent shards, with any amount of data and any number of processes.

All random numbers of an example (posterior sample of its image latent, choice of its caption, noise levels, noise) come from
its own seed, so the loss of a step does not depend on how the batch is split over processes and passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint, load_checkpoint
from ..checkpoints.fields import checked_config
from ..checkpoints.vocabulary import Vocabulary
from ..data.fingerprint import check_encoders
from ..data.shards import WINDOW, LatentShards, posterior_sample
from ..encoders.autoencoder import Autoencoder
from ..encoders.clip import TextEncoder
from ..media.json_files import shown_list
from ..runtime.precision import weight_dtype
from ..small.network import PictureUViTConfig, build, config_of, predicts_noise
from ..streams import Streams, draw_normal
from ..uvit import Block, UViT
from .config import TrainConfig, stage_options
from .growth import grown
from .network import attention_for, example_cost, export_model, prompt_grid
from .objective import PAPER, diffusion_loss, draw_labels
from .stage import Batch, ExampleCost, TrainingStage, seeded_init

OPTIONS = {
    "latents": str,
    "checkpoint": str,
    "uvit": dict | None,
    "data_type": int,
    "mix": dict[str, float],
    "lean": float,
    "logit_normal": list[float] | None,
    "window": int,
    "defaults": dict,
    "vocabulary": dict | None,
    "dtype": str,
    "sample_prompts": list[str],
}


class LatentStage(TrainingStage):
    """The U-ViT on latent shards.

    Options:
        latents: folder of latent shards, made by `unidiffuser data encode`.
        checkpoint: a model, or its encoders alone: those that made the shards.
        uvit: sizes of a new network (fields of `UViTConfig`). If absent, the checkpoint's network is trained further; for
            shards of another size its position embedding is resized.
        data_type: of all pairs, for networks that use it: 1 = curated (the default), 0 = web.
        mix, lean, logit_normal: distribution of the noise levels, see `draw_labels`; the paper's if absent.
        window: shards whose examples are shuffled together.
        defaults: "steps", "guidance" and others that the exported file suggests, see `ModelConfig`.
        vocabulary: "concepts", "styles" and "words" of the captions (see `checkpoints.vocabulary`), for the exported file.
        dtype: of the exported file, "float32" if absent.
        sample_prompts: captions of the sample grid, multiples of 8.

    Raises:
        FileNotFoundError: no shards, or no checkpoint.
        ValueError: an unknown option, one of another type or out of range, or shards that other encoders made.
    """

    blocks = (Block,)
    model: UViT

    def __init__(self, config: TrainConfig):
        options = stage_options(config.options, OPTIONS)
        self.out = Path(config.out)
        self.shards = LatentShards(options["latents"], options.get("window", WINDOW))
        self.size = len(self.shards)
        self.checkpoint: Checkpoint = load_checkpoint(options["checkpoint"])
        check_encoders(self.shards, self.checkpoint)
        words = options.get("vocabulary")  # never the checkpoint's: these captions are others
        vocabulary = None if words is None else Vocabulary.from_dict(words)
        self.checkpoint.config = replace(self.checkpoint.config, vocabulary=vocabulary)
        self.mix, self.lean = options.get("mix", PAPER), options.get("lean", 0.0)
        self.logit_normal: list[float] | None = options.get("logit_normal")
        draw_labels(1, self.mix, torch.Generator(), self.lean, self.logit_normal)  # their errors, before the first step
        self.data_type: int = options.get("data_type", 1)
        if self.data_type not in (0, 1):
            raise ValueError(f"data_type must be 1 (curated) or 0 (web), got {self.data_type}")
        self.dtype = weight_dtype(options.get("dtype", "float32"))
        self.defaults = checked_config({"defaults": options.get("defaults", self.checkpoint.config.defaults)})["defaults"]
        self.prompts: list[str] = options.get("sample_prompts", [])
        side = self.shards.manifest["encoding"]["image_size"] // self.checkpoint.config.vae.downscale
        self.model = _network(self.checkpoint, options.get("uvit"), side, config.seed)

    def order(self, batch_size: int, seed: int, step: int) -> Tensor:
        return self.shards.order(batch_size, seed, step)

    def examples(self, indices: Tensor, seeds: Sequence[int]) -> Batch:
        examples = []
        for row, seed in zip(self.shards.read(indices), seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            labels = draw_labels(1, self.mix, generator, self.lean, self.logit_normal)
            caption = int(torch.randint(len(row["text"]), (), generator=generator, device=generator.device))
            clean = {"img": posterior_sample(row, generator), "clip_img": row["clip_img"], "text": row["text"][caption]}
            noise = {f"noise_{name}": draw_normal(x.shape, generator) for name, x in clean.items()}
            examples.append(clean | noise | {f"t_{name}": label[0] for name, label in labels.items()})
        return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}

    def loss(self, model: Any, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        clean, noise = (Streams(*(batch[at + name] for name in ("img", "clip_img", "text"))) for at in ("", "noise_"))
        labels = {"img": batch["t_img"], "text": batch["t_text"]}
        kind = torch.full_like(batch["t_img"], self.data_type)
        velocity = not predicts_noise(self.model.config)
        return diffusion_loss(model, clean, generator, labels=labels, noise=noise, data_type=kind, velocity=velocity)

    def cost(self) -> ExampleCost:
        return example_cost(self.model.config)

    def example_name(self, index: int) -> str:
        return self.shards.name_of(index)

    def fingerprint(self) -> str:
        return self.shards.fingerprint

    @cached_property
    def _sample_parts(self) -> tuple[TextEncoder, Autoencoder]:
        text = TextEncoder.from_checkpoint(self.checkpoint, "cpu", torch.float32)
        return text, Autoencoder.from_checkpoint(self.checkpoint, "cpu", torch.float32)

    def sample(self, model: Any) -> Image.Image | None:
        """Pictures of the sample prompts, 8 in a row, 20 steps at guidance 3."""
        return prompt_grid(model, self.prompts, *self._sample_parts) if self.prompts else None

    def export(self, model: Any) -> None:
        """Write `model.safetensors`: the checkpoint with this network, complete in one file."""
        export_model(self.checkpoint, model, self.out / "model.safetensors", self.dtype, self.defaults)


def _network(checkpoint: Checkpoint, new: dict[str, Any] | None, side: int, seed: int) -> UViT:
    """A new network of the given sizes, or the checkpoint's, resized to latents of this side."""
    if new is None and "uvit" not in checkpoint.parts():
        raise ValueError(f"{checkpoint.path} has no network: set the option `uvit` to the sizes of a new one")
    state = None
    if new is None:
        state, sizes = grown(checkpoint.state_dict("uvit", dtype=torch.float32), checkpoint.config.uvit, side)
    else:
        if unknown := sorted(map(str, new.keys() - {each.name for each in fields(PictureUViTConfig)})):
            raise ValueError(f"uvit has no size {shown_list(unknown)}; see the fields of UViTConfig")
        sizes = config_of(checked_config({"uvit": {"img_size": side, **new}})["uvit"])
        if sizes.latent_size != (side, side):
            raise ValueError(f"uvit.img_size is {sizes.img_size}, but the shards hold latents of {side} x {side}")
    with seeded_init(seed):
        network = build(sizes, attention=attention_for(sizes))
    if state is not None:
        network.load_state_dict(state)
    return network
