"""Stage `image_tower`: the image encoder whose token conditions the network, trained to classify fields of the records.

A contrastive run on a small set has few captions of one thing in a batch, so it separates things well and styles hardly at
all, and a transformer on plain patches memorises its pictures. Here an encoder with a convolutional stem classifies fields (the
thing, the style) of pictures augmented in whatever does not matter for that field. UniDiffuser needs no common space of its
text and image encoders: the published one has its text from ViT-L/14 and its image token from ViT-B/32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from ..encoders.clip import clip_image_model
from ..small.stem import ConvStem
from ..training.augment import augmented
from ..training.config import TrainConfig
from ..training.stage import Batch, TrainingStage, seeded_init, step_indices
from .image_folder import training_set
from .restyle import Restyle
from .towers import image_tokens

SMOOTHING = 0.1  # label smoothing
STATISTICS = 40  # batches for the running statistics of the norms


class FieldClassifier(nn.Module):
    """An image encoder and, for each field, a linear classifier on directions (cosine logits).

    Args:
        tower: a CLIPVisionModelWithProjection.
        values: number of values of each field.
    """

    def __init__(self, tower: Any, values: dict[str, int]):
        super().__init__()
        self.tower = tower
        width = tower.visual_projection.out_features
        self.vectors = nn.ParameterDict({name: nn.Parameter(torch.randn(count, width)) for name, count in values.items()})
        self.log_scale = nn.ParameterDict({name: nn.Parameter(torch.tensor(math.log(15.0))) for name in values})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> for each field logits (B, values)."""
        tokens = F.normalize(image_tokens(self.tower, pixels).float(), dim=1)
        return {
            name: self.log_scale[name].exp().clamp(max=100.0) * tokens @ F.normalize(vectors.float(), dim=1).T
            for name, vectors in self.vectors.items()
        }


class ImageTowerStage(TrainingStage):
    """Trains an image encoder on an image folder.

    Options:
        data, where, image_size: image folder, record filter, side in pixels.
        encoders_of: folder of a finished run of the stage `encoders`; its text half is kept.
        image: fields of transformers' CLIPVisionConfig, and `stem`, the arguments of `ConvStem`.
        tell: field of the records -> settings of its classifier: `share` of a batch trained on it (relative), the arguments of
            `augmented`, and `restyle`, the fraction of these pictures with the feature statistics of others (see `Restyle`),
            for a field that does not depend on the style; it needs a stem.
    """

    def __init__(self, config: TrainConfig):
        options = config.options
        self.out = Path(config.out)
        self.folder = Path(options["encoders_of"])
        self.images = training_set(options)
        self.size = len(self.images)
        records = self.images.records
        self.augmentation: dict[str, dict[str, Any]] = {field: dict(given) for field, given in options["tell"].items()}
        self.fractions = torch.tensor([given.pop("share") for given in self.augmentation.values()])
        self.restyled: list[float] = [given.pop("restyle", 0.0) for given in self.augmentation.values()]
        self.targets: dict[str, Tensor] = {}
        for field in self.augmentation:
            if missing := sum(field not in record for record in records):
                raise ValueError(f"{missing} records have no {field!r}, which `tell` names")
            values = sorted({record[field] for record in records})
            self.targets[field] = torch.tensor([values.index(record[field]) for record in records])
        self.sizes = {**options["image"], "image_size": options["image_size"]}
        with seeded_init(config.seed):
            tower = clip_image_model(self.sizes, norm=nn.BatchNorm2d)
            tower.set_attn_implementation("eager")  # for short sequences on a CPU, faster backwards than the fused kernel
            model = FieldClassifier(tower, {field: int(found.max()) + 1 for field, found in self.targets.items()})
        self.restyle = Restyle()
        if any(self.restyled):
            stem = tower.vision_model.embeddings.patch_embedding
            if not isinstance(stem, ConvStem):
                raise ValueError("`restyle` changes the features of convolutions: give `image` a `stem`, or remove `restyle`")
            # Where features are still fine: deeper ones, mixed too, gave fewer concepts of held-out pairs.
            next(iter(stem.blocks)).register_forward_hook(self.restyle)
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs

    def examples(self, indices: Tensor, seeds: Sequence[int]) -> Batch:
        return {"pixels": self.images.pixels(indices)} | {field: found[indices] for field, found in self.targets.items()}

    def parts(self, count: int) -> list[slice]:
        """The part of a batch that each field is trained on."""
        ends = [0, *(self.fractions.cumsum(0) / self.fractions.sum() * count).round().long().tolist()]
        return [slice(first, end) for first, end in pairwise(ends)]

    def loss(self, model: Any, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        pixels = self._augment(batch["pixels"], generator)
        losses, wrong = {}, {}
        parts = self.parts(len(pixels))
        with self.restyle.during(list(zip(parts, self.restyled, strict=True)), generator):
            classified = model(pixels)
        for part, (field, logits) in zip(parts, classified.items(), strict=True):
            targets = batch[field][part]
            losses[field] = F.cross_entropy(logits[part], targets, label_smoothing=SMOOTHING)
            wrong[f"wrong_{field}"] = (logits[part].argmax(1) != targets).float().mean().detach() + 1e-4
        total = torch.stack(list(losses.values())).sum()
        return {"loss": total} | {name: loss.detach() for name, loss in losses.items()} | wrong

    def _augment(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Each part of a batch, augmented as its field needs it."""
        parts = zip(self.parts(len(pixels)), self.augmentation.values(), strict=True)
        return torch.cat([augmented(pixels[part], generator, **given) for part, given in parts])

    @torch.no_grad()
    def export(self, model: Any) -> None:
        """Write `clip.pt` and `clip.json` like those of `encoders_of`, with this image half; tokens have unit variance."""
        tower = model.tower
        embedding = tower.vision_model.embeddings.patch_embedding
        if isinstance(embedding, ConvStem):
            # The running statistics belong to the last weights; these are the averaged ones.
            generator = torch.Generator().manual_seed(0)
            rows = [step_indices(self.size, 128, 0, step) for step in range(min(STATISTICS, -(-self.size // 128)))]
            update_bn((self._augment(self.images.pixels(part), generator) for part in rows), model)
            model.eval()
            embedding.fold_norms()
        tokens = torch.cat([image_tokens(tower, self.images.pixels(part)) for part in torch.arange(self.size).split(128)])
        tower.visual_projection.weight /= tokens.std()
        state = torch.load(self.folder / "clip.pt", map_location="cpu", weights_only=True)
        kept = {name: value for name, value in state.items() if not name.startswith(("vision_model.", "visual_projection."))}
        torch.save(kept | {k: v.contiguous() for k, v in tower.state_dict().items()}, self.out / "clip.pt")
        sizes = json.loads((self.folder / "clip.json").read_text(encoding="utf-8")) | {"clip_image": self.sizes}
        (self.out / "clip.json").write_text(json.dumps(sizes), encoding="utf-8")
