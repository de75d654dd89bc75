"""Training of the image encoder, whose token conditions the network, as a classifier of concepts.

A contrastive run on a small set has few captions of one concept in a batch, so it separates concepts well and styles hardly at
all, and a transformer on plain patches memorises its pictures. Here an encoder with a convolutional stem classifies the concept
in pictures augmented in whatever does not matter for it, the style included. UniDiffuser needs no common space of its text and
image encoders: the published one has its text from ViT-L/14 and its image token from ViT-B/32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from ..encoders.clip import clip_image_model
from ..media.files import write_text
from ..media.images import from_levels
from ..small.stem import ConvStem
from ..training.augment import augmented
from ..training.config import TrainConfig
from ..training.stage import Batch, TrainingStage, seeded_init, step_indices
from .image_folder import CONCEPT, field_of, training_set
from .options import ImageEncoder
from .restyle import Restyle

SMOOTHING = 0.1  # label smoothing
STATISTICS = 40  # batches for the running statistics of the norms


class ConceptClassifier(nn.Module):
    """An image encoder and a linear classifier on the directions of its tokens (cosine logits).

    Args:
        tower: a CLIPVisionModelWithProjection.
        concepts: number of concepts.
    """

    def __init__(self, tower: Any, concepts: int):
        super().__init__()
        self.tower = tower
        self.vectors = nn.Parameter(torch.randn(concepts, tower.visual_projection.out_features))
        self.log_scale = nn.Parameter(torch.tensor(math.log(15.0)))

    def forward(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> logits (B, concepts)."""
        tokens = F.normalize(image_tokens(self.tower, pixels).float(), dim=1)
        return self.log_scale.exp().clamp(max=100.0) * tokens @ F.normalize(self.vectors.float(), dim=1).T


class ImageEncoderStage(TrainingStage):
    """Trains an image encoder on an image folder.

    Args:
        config: settings of the run.
        options: those of the section `encoders.image`.
        data: the image folder.
    """

    def __init__(self, config: TrainConfig, options: ImageEncoder, data: Path):
        self.out, self.options = Path(config.out), options
        self.images = training_set(data, options.image_size, options.where)
        self.size = len(self.images)
        labels = field_of(self.images, CONCEPT)
        concepts = sorted(set(labels))
        self.targets = torch.tensor([concepts.index(label) for label in labels])
        self.sizes = {
            "hidden_size": options.width,
            "intermediate_size": 4 * options.width,
            "num_hidden_layers": options.layers,
            "num_attention_heads": options.heads,
            "hidden_act": "quick_gelu",
            "projection_dim": options.projection,
            "patch_size": options.patch_size,
            "image_size": options.image_size,
            "stem": asdict(options.stem),
        }
        with seeded_init(config.seed):
            tower = clip_image_model(self.sizes, norm=nn.BatchNorm2d)
            tower.set_attn_implementation("eager")  # for short sequences on a CPU, faster backwards than the fused kernel
            model = ConceptClassifier(tower, len(concepts))
        self.restyle = Restyle()
        stem: ConvStem = tower.vision_model.embeddings.patch_embedding
        # Where features are still fine: deeper ones, mixed too, gave fewer concepts of held-out pairs.
        next(iter(stem.blocks)).register_forward_hook(self.restyle)
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs

    def examples(self, indices: Tensor, seeds: Sequence[int]) -> Batch:
        return {"levels": self.images.levels(indices), "concepts": self.targets[indices]}

    def loss(self, model: Any, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        pixels = self._augmented(from_levels(batch["levels"]), generator)
        with self.restyle.during(self.options.restyle, generator):
            logits = model(pixels)
        wrong = (logits.argmax(1) != batch["concepts"]).float().mean()
        return {"loss": F.cross_entropy(logits, batch["concepts"], label_smoothing=SMOOTHING), "wrong": wrong + 1e-4}

    def _augmented(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        given = self.options
        return augmented(pixels, generator, place=given.place, colour=given.colour, shade=given.shade, noise=given.noise)

    @torch.no_grad()
    def export(self, model: Any) -> None:
        """Write `image.pt` (weights) and `image.json` (sizes); tokens have unit variance."""
        tower, device = model.tower, model.log_scale.device

        def pixels(indices: Tensor) -> Tensor:
            return from_levels(self.images.levels(indices).to(device))

        # The running statistics belong to the last weights; these are the averaged ones.
        generator = torch.Generator().manual_seed(0)
        batches = [step_indices(self.size, 128, 0, step) for step in range(min(STATISTICS, -(-self.size // 128)))]
        update_bn((self._augmented(pixels(batch), generator) for batch in batches), model)
        model.eval()
        tower.vision_model.embeddings.patch_embedding.fold_norms()
        tokens = torch.cat([image_tokens(tower, pixels(part)) for part in torch.arange(self.size).split(128)])
        tower.visual_projection.weight /= tokens.std()
        weights = {name: value.cpu().contiguous() for name, value in tower.state_dict().items()}
        torch.save(weights, self.out / "image.pt")
        write_text(self.out / "image.json", json.dumps(self.sizes))


def image_tokens(tower: Any, pixels: Tensor) -> Tensor:
    """Projected image embeddings (B, D) of pixels (B, 3, H, W) in [-1, 1] (CLIP mean and std of 0.5)."""
    tokens: Tensor = tower.visual_projection(tower.vision_model(pixel_values=pixels).pooler_output)
    return tokens
