"""Stage `uvit`: the network, from scratch where the checkpoint has only encoders, else fine-tuned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint, load_checkpoint
from ..distributed import own_device
from ..small.network import build, config_of, predicts_noise
from ..streams import MODALITY_OF
from ..training.config import TrainConfig
from ..training.network import attention_for, example_cost, export_model, prompt_grid
from ..training.objective import PAPER, diffusion_loss, draw_labels
from ..training.stage import Batch, ExampleCost, TrainingStage, generator_on, seeded_init
from ..uvit import Block, UViT, UViTConfig
from .image_folder import training_set
from .latents import Latents
from .pairs import CaptioningPairs, DrawingPairs, form_weights, where
from .transplant import transplanted


class UViTStage(TrainingStage):
    """Trains the network on the latents of an image folder.

    Options:
        data, where, image_size: image folder, record filter, side in pixels.
        checkpoint: a model, or its encoders alone (written by `assemble`), in any layout.
        uvit: fields of the network's config, if the checkpoint has no network.
        network_of: another model whose network is trained on, instead of that of `checkpoint`. Its encoders must have the same
            shapes; if `uvit` gives other image latents ("img_size", "in_chans", "patch_size") or another image head
            ("sigma_data", "detail_width" ...), the layers that read and write them start anew, see `transplanted`.
        mix, lean, logit_normal: how often each label is trained, see `draw_labels`; the paper's objective when absent.
        weights: weight of each stream in the loss, see `diffusion_loss`; 1 when absent.
        manner_of: field of the records that names the style, for an autoencoder with a palette.
        caption_shares: probability of each caption form of a picture; equal when absent.
        captioning: other pictures for the items with a clean picture (label 0), so that the network captions more pictures
            than it draws:
            where: their record filter.
            versions, place, colour ...: copies of each picture, all but the first augmented with these strengths.
            swap: fraction of the items whose image latent is replaced by that of another picture with the same value of the
                field `swap_within`. Only the CLIP token then identifies the picture. Without it a small set is memorised by
                its latents, and unseen pictures are captioned wrongly although their token is right.
            caption_shares: as above, for these items.
        drawing: other pictures for items with a clean caption (label 0), so that the network sees more things in each style:
            where: their record filter.
            share: fraction of the items; `share_below` is that at labels below `changed_below` (the same when absent).
            versions, place, colour, mirror ...: augmentation, only at labels below `changed_below` (everywhere when absent).
                Low noise hides little of an augmentation, and augmented pictures are denoised rather than memorised; above,
                the network draws them as they are.
            shift: largest shift in latent cells, in steps of two; needs no memory and costs no sharpness.
            repaint: fraction of the items, at labels from `repaint_from`, whose noisy picture is that of another picture with
                the same value of the field `repaint_within` (see `noise_of_another`): the same thing in another style. A
                small network remembers one picture of a thing and starts it whatever style is named; so it learns to leave it.
            borrow: fraction of the pictures whose captions are always shown with another picture of their `repaint_within`
                group, in the style code of their own. A network that knows one picture for each caption draws a mean of
                several for other captions; so it learns to choose one.
            caption_shares: as above, for these items.
            mixed_shares: the same for items changed by `repaint` or `borrow`. It should leave out captions without a style:
                under those, the network would learn to leave any picture it has started, and draw mixtures.
        defaults: "steps" and "guidance" that the exported file suggests.
        sample_prompts: captions of the sample grid, multiples of 8.
    """

    blocks = (Block,)
    model: UViT

    def __init__(self, config: TrainConfig):
        options = config.options
        self.out = Path(config.out)
        self.checkpoint: Checkpoint = load_checkpoint(options["checkpoint"])
        start = self._start(options)
        sizes = self._sizes(options, start)
        images = training_set(options)
        self.size = len(images)
        self.latents = Latents(self.checkpoint, images, device=own_device(), style_field=options.get("manner_of"))
        self.mix, self.lean = options.get("mix", PAPER), float(options.get("lean", 0.0))
        self.logit_normal: list[float] | None = options.get("logit_normal")
        self.velocity = not predicts_noise(sizes)
        self.weights = options.get("weights") or {}
        if wrong := [name for name, weight in self.weights.items() if name not in MODALITY_OF or not weight >= 0]:
            raise ValueError(f"weights has {wrong[0]}; it may have {', '.join(MODALITY_OF)}, each 0 or more")
        self.forms = form_weights(options.get("caption_shares"), self.latents.captions.shape[1], "caption_shares")
        self.captioning: CaptioningPairs | None = None
        self.drawing: DrawingPairs | None = None
        if others := options.get("captioning"):
            latents = self._other_latents("captioning", options, CaptioningPairs.OPTIONS)
            self.captioning = CaptioningPairs(latents, others, self.forms)
        if others := options.get("drawing"):
            latents = self._other_latents("drawing", options, DrawingPairs.OPTIONS)
            self.drawing = DrawingPairs(latents, others, self.forms, config.seed)
        self.defaults = options.get("defaults", self.checkpoint.config.defaults)
        self.prompts: list[str] = options.get("sample_prompts", [])
        with seeded_init(config.seed):
            self.model = build(sizes, attention=attention_for(sizes))
        if start is not None:
            weights = start.state_dict("uvit", dtype=torch.float32)
            if sizes != start.config.uvit:
                weights = transplanted(weights, start.config.uvit, self.model)
            self.model.load_state_dict(weights)

    def _start(self, options: dict[str, Any]) -> Checkpoint | None:
        """The checkpoint whose network is trained on; None for a new network."""
        if "network_of" not in options:
            return self.checkpoint if "uvit" in self.checkpoint.parts() else None
        return load_checkpoint(options["network_of"])

    def _sizes(self, options: dict[str, Any], start: Checkpoint | None) -> UViTConfig:
        """The network's config: from the options, or from `start` with the changes in the option `uvit`."""
        if start is None:
            return config_of(options["uvit"])
        if start is self.checkpoint:
            return start.config.uvit
        ours, theirs = self.checkpoint.config.uvit, config_of(vars(start.config.uvit) | options.get("uvit", {}))
        for name in ("img_size", "in_chans", "text_dim", "num_text_tokens", "clip_img_dim"):
            if getattr(ours, name) != getattr(theirs, name):
                raise ValueError(
                    f"the encoders of {options['checkpoint']} give {name} {getattr(ours, name)}, the network of "
                    f"{options['network_of']} takes {getattr(theirs, name)}"
                )
        return theirs

    def _other_latents(self, name: str, options: dict[str, Any], own: frozenset[str]) -> Latents:
        """The latents of the pictures of the option `name`; its keys beside `own` are a filter and augmentation."""
        strength = {key: value for key, value in options[name].items() if key not in own}
        filtered, versions = strength.pop("where", options.get("where", {})), strength.pop("versions", 1)
        images = training_set(options | {"where": filtered})
        settings: dict[str, Any] = {"device": own_device(), "style_field": options.get("manner_of")}
        latents = Latents(self.checkpoint, images, versions=versions, strength=strength, **settings)
        if latents.captions.shape[1] != self.latents.captions.shape[1]:
            raise ValueError(f"the pictures of `{name}` must have as many captions each as the others")
        return latents

    def examples(self, indices: Tensor, seeds: Sequence[int]) -> Batch:
        return {"index": indices}

    def cost(self) -> ExampleCost:
        return example_cost(self.model.config)

    def loss(self, model: Any, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        index = batch["index"]
        device, count = index.device, len(index)
        generator = generator_on(device, generator)
        self.forms = self.forms.to(device)
        labels = draw_labels(count, self.mix, generator, self.lean, self.logit_normal)
        clean = self.latents.to(device).draw(index, self.forms, generator)
        if self.captioning is not None:
            given = labels["img"] == 0
            clean = clean.zip(self.captioning.draw(count, generator), lambda own, other: where(given, other, own))
        if self.drawing is not None:
            drawn = self.drawing.draw(labels, generator)
            clean = clean.zip(drawn.pairs, lambda own, other: where(drawn.used, other, own))
        noise = clean.map(lambda x: torch.randn(x.shape, generator=generator, device=device))
        if self.drawing is not None:
            noise = self.drawing.repainted_noise(drawn, clean, noise, labels, generator)
        settings: dict[str, Any] = {"velocity": self.velocity, "weights": self.weights}
        return diffusion_loss(model, clean, generator, labels=labels, noise=noise, **settings)

    def sample(self, model: Any) -> Image.Image | None:
        """A grid of the sample prompts, 8 in a row, 20 steps at guidance 3."""
        if not self.prompts:
            return None
        return prompt_grid(model, self.prompts, self.latents.encode_text, self.latents.autoencoder)

    def export(self, model: Any) -> None:
        """Write `model.safetensors`: the checkpoint with this network, complete in one float16 file."""
        export_model(self.checkpoint, model, self.out / "model.safetensors", torch.float16, self.defaults)
