"""Stage "latents": the U-ViT from latent shards, for any amount of data and any number of processes.

Every random number of an example (the sample of its image latent, its caption, its noise levels, its noise) comes from its own
seed. So the loss of a step is the same however the batch is spread over processes and passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint, load_checkpoint
from ..data.shards import WINDOW, LatentShards
from ..encoders.autoencoder import Autoencoder
from ..encoders.clip import TextEncoder
from ..small.network import build, config_of, predicts_noise
from ..streams import Streams
from ..uvit import Block, UViT
from .config import TrainConfig
from .growth import grown
from .network import attention_for, example_cost, export_model, prompt_grid
from .objective import PAPER, diffusion_loss, draw_labels
from .stage import Batch, ExampleCost, TrainingStage, seeded_init


class LatentStage(TrainingStage):
    """Options:

    latents: folder of latent shards (`unidiffuser data encode`).
    checkpoint: a model, or its encoders alone; the very encoders that made the shards.
    uvit: sizes of a new network (fields of UViTConfig). When absent, the checkpoint's own is trained on; where the shards
        have another size than it, its position embedding grows with them.
    data_type: of all pairs, for networks that know data types: 1 = curated (when absent), 0 = web.
    mix, lean, logit_normal: which labels are seen how often, see :func:`.objective.draw_labels`; the paper's objective
        when absent.
    window: shards that are mixed with each other.
    defaults, dtype, sample_prompts: as in :class:`.uvit.UViTStage`.
    """

    blocks = (Block,)
    model: UViT

    def __init__(self, config: TrainConfig):
        options = config.options
        self.out = Path(config.out)
        self.shards = LatentShards(options["latents"], options.get("window", WINDOW))
        self.size = len(self.shards)
        self.checkpoint: Checkpoint = load_checkpoint(options["checkpoint"])
        self.mix, self.lean = options.get("mix", PAPER), float(options.get("lean", 0.0))
        self.logit_normal: list[float] | None = options.get("logit_normal")
        self.data_type = int(options.get("data_type", 1))
        self.dtype = getattr(torch, options.get("dtype", "float32"))
        self.defaults = options.get("defaults", self.checkpoint.config.defaults)
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
            caption = int(torch.randint(len(row["text"]), (), generator=generator))
            img = row["mean"] + row["std"] * torch.randn(row["mean"].shape, generator=generator)
            clean = {"img": img, "clip_img": row["clip_img"], "text": row["text"][caption]}
            noise = {f"noise_{name}": torch.randn(x.shape, generator=generator) for name, x in clean.items()}
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
    def _painters(self) -> tuple[TextEncoder, Autoencoder]:
        text = TextEncoder.from_checkpoint(self.checkpoint, "cpu", torch.float32)
        return text, Autoencoder.from_checkpoint(self.checkpoint, "cpu", torch.float32)

    def sample(self, model: Any) -> Image.Image | None:
        """Pictures of the sample prompts, 8 in a row, 20 steps at guidance 3."""
        return prompt_grid(model, self.prompts, *self._painters) if self.prompts else None

    def export(self, model: Any) -> None:
        """``model.safetensors``: the checkpoint with this network, complete in one file."""
        export_model(self.checkpoint, model, self.out / "model.safetensors", self.dtype, self.defaults)


def _network(checkpoint: Checkpoint, new: dict[str, Any] | None, side: int, seed: int) -> UViT:
    """A new network of these sizes, or the checkpoint's, grown to latents of this side."""
    if new is None and "uvit" not in checkpoint.parts():
        raise ValueError(f"{checkpoint.path} has no network: give the sizes of a new one as the option `uvit`")
    state = None
    if new is None:
        state, sizes = grown(checkpoint.state_dict("uvit", dtype=torch.float32), checkpoint.config.uvit, side)
    else:
        sizes = config_of({"img_size": side, **new})
        if sizes.latent_size != (side, side):
            raise ValueError(f"uvit.img_size is {sizes.img_size}, but the shards hold latents of {side} x {side}")
    with seeded_init(seed):
        network = build(sizes, attention=attention_for(sizes))
    if state is not None:
        network.load_state_dict(state)
    return network
