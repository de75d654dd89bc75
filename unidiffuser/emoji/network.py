"""Training of the network, from scratch, on the latents of a checkpoint that has all other parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..checkpoints.checkpoint import load_checkpoint
from ..distributed import own_device
from ..small.network import build, config_of, predicts_noise
from ..streams import draw_normal
from ..training.augment import augmented
from ..training.config import TrainConfig
from ..training.network import attention_for, example_cost, export_model, prompt_grid
from ..training.objective import diffusion_loss, draw_labels
from ..training.stage import Batch, ExampleCost, TrainingStage, generator_on, seeded_init
from ..uvit import Block, UViT
from .image_folder import training_set
from .latents import Augment, Latents
from .network_options import Network
from .options import Where
from .pairs import CaptioningPairs, DrawingPairs, form_weights, where

DATA_TYPES = 2  # as in UniDiffuser v1


class NetworkStage(TrainingStage):
    """Trains the network on the latents of an image folder.

    Args:
        config: settings of the run.
        options: those of the section `network`.
        data: the image folder.
        encoders: a checkpoint, in any layout; a network in it is not used.
    """

    blocks = (Block,)
    model: UViT

    def __init__(self, config: TrainConfig, options: Network, data: Path, encoders: str | Path):
        self.out, self.options = Path(config.out), options
        self.checkpoint = load_checkpoint(encoders)
        shape = self.checkpoint.config.uvit
        of_latents = {
            name: getattr(shape, name) for name in ("img_size", "in_chans", "text_dim", "num_text_tokens", "clip_img_dim")
        }
        sizes = config_of({**of_latents, **options.sizes.fields(), "data_types": DATA_TYPES})
        self.latents = self._encoded(data, options.where)
        self.size = len(self.latents.records)
        self.forms = form_weights(options.with_style, self.latents.captions.shape[1])
        self.velocity = not predicts_noise(sizes)
        self.captioning: CaptioningPairs | None = None
        self.drawing: DrawingPairs | None = None
        if given := options.captioning:
            augment = partial(augmented, place=given.place, colour=0.0)
            latents = self._encoded(data, given.where, versions=given.versions, augment=augment)
            self.captioning = CaptioningPairs(latents, given.other_latent)
        if options.drawing:
            latents = self._encoded(data, options.drawing.where, versions=2, augment=lambda pixels, _: pixels.flip(3))
            self.drawing = DrawingPairs(latents, options.drawing, config.seed)
        with seeded_init(config.seed):
            self.model = build(sizes, attention=attention_for(sizes))

    def _encoded(self, data: Path, chosen: Where, versions: int = 1, augment: Augment | None = None) -> Latents:
        images = training_set(data, self.checkpoint.config.image_size, chosen)
        settings: dict[str, Any] = {} if augment is None else {"augment": augment}
        return Latents(self.checkpoint, images, versions=versions, device=own_device(), **settings)

    def examples(self, indices: Tensor, seeds: Sequence[int]) -> Batch:
        return {"index": indices}

    def cost(self) -> ExampleCost:
        return example_cost(self.model.config)

    def loss(self, model: Any, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        index, given = batch["index"], self.options
        device, count = index.device, len(index)
        generator = generator_on(device, generator)
        self.forms = self.forms.to(device)
        labels = draw_labels(count, vars(given.mix), generator, given.lean, given.logit_normal)
        clean = self.latents.to(device).draw(index, self.forms, generator)
        if self.captioning is not None:
            clean_image = labels["img"] == 0
            clean = clean.zip(self.captioning.draw(count, generator), lambda own, other: where(clean_image, other, own))
        if self.drawing is not None:
            drawn = self.drawing.draw(labels, generator)
            clean = clean.zip(drawn.pairs, lambda own, other: where(drawn.used, other, own))
        noise = clean.map(lambda x: draw_normal(x.shape, generator))
        if self.drawing is not None:
            noise = self.drawing.noise(drawn, clean, noise, labels, generator)
        settings: dict[str, Any] = {"velocity": self.velocity, "weights": vars(given.weights)}
        return diffusion_loss(model, clean, generator, labels=labels, noise=noise, **settings)

    def sample(self, model: Any) -> Image.Image | None:
        """A grid of the sample prompts, 8 in a row, 20 steps at guidance 3."""
        if self.options.sample_prompts is None:
            return None
        return prompt_grid(model, self.options.sample_prompts, self.latents.encode_text, self.latents.autoencoder)

    def export(self, model: Any) -> None:
        """Write `model.safetensors`: the checkpoint with this network, complete in one float16 file."""
        suggested = {name: value for name, value in asdict(self.options.suggested).items() if value is not None}
        export_model(self.checkpoint, model, self.out / "model.safetensors", torch.float16, suggested)
