"""Stage 2b: the image tower alone goes on learning beside a frozen text tower (the idea of LiT, arXiv 2111.07991).

The text latents that the captioner and the network know do not change. Since the text tower is frozen, every caption of the
data set is a negative of every picture, at the price of one matrix product.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .augment import augmented
from .data import ImageFolder, training_set
from .encoders import image_tokens, load_clip
from .loop import Stage, TrainConfig


class Towers(nn.Module):
    """A CLIPModel as `forward(pixels (B, 3, H, W), words (T, W)) -> logits (B, T)`; `words` are pooled text features."""

    def __init__(self, clip: Any):
        super().__init__()
        self.clip = clip

    def forward(self, pixels: Tensor, words: Tensor) -> Tensor:
        images = F.normalize(image_tokens(self.clip, pixels), dim=-1)
        texts = F.normalize(self.clip.text_projection(words), dim=-1)
        scaled: Tensor = images @ texts.T * self.clip.logit_scale.exp().clamp(max=100)
        return scaled


class ImageEncoderStage(Stage):
    """Options: data, where, image_size, encoders (the run to go on from), place, colour (of `augmented`)."""

    def __init__(self, config: TrainConfig):
        options = config.options
        self.out = Path(config.out)
        self.images = training_set(options)
        self.unseen = self._unseen(options)
        self.size = len(self.images)
        self.strength = {name: options.get(name, 1.0) for name in ("place", "colour")}
        clip, tokenizer, self.configs = load_clip(Path(options["encoders"]))
        for part in (clip.vision_model, clip.visual_projection, clip.text_projection):
            part.requires_grad_(True)
        clip.logit_scale.requires_grad_(True)
        clip.set_attn_implementation("eager")  # for short sequences on a CPU, faster backwards than the fused kernel
        self.model = Towers(clip)
        texts = sorted({text for record in self.images.records for text in record["text"]})
        ids = tokenizer(texts, self.configs["clip_text"]["max_position_embeddings"])
        with torch.no_grad():
            self.words = torch.cat([clip.text_model(input_ids=part).pooler_output for part in ids.split(512)])
        self.numbers = {text: i for i, text in enumerate(texts)}
        forms = max(len(record["text"]) for record in self.images.records)
        self.captions = torch.tensor(
            [[self.numbers[r["text"][min(k, len(r["text"]) - 1)]] for k in range(forms)] for r in self.images.records]
        )

    @staticmethod
    def _unseen(options: dict[str, Any]) -> ImageFolder | None:
        try:
            where = {**options.get("where", {}), "split": ["validation"]}
            return ImageFolder(options["data"], options["image_size"], where)
        except ValueError:  # a folder without splits
            return None

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        return {"pixels": self.images.pixels(indices), "captions": self.captions[indices]}

    def loss(self, model: Any, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Cross-entropy of the picture's own captions among all captions of the data set, each form of equal weight."""
        pixels, captions = batch["pixels"], batch["captions"]
        moved = augmented(pixels.cpu(), generator, **self.strength).to(pixels.device)
        logits = model(moved, self.words.to(pixels.device)).float()
        loss = -logits.log_softmax(1).gather(1, captions).mean()
        right = (logits.argmax(1, keepdim=True) == captions).any(1).float().mean()
        return {"loss": loss, "wrong": 1 - right.detach() + 1e-4}

    def sample(self, model: Any) -> None:
        """Appends to ``accuracy.txt``: share of unseen pictures whose first form is the best of all first forms."""
        if self.unseen is None:
            return
        texts = [record["text"][0] for record in self.unseen.records]
        known = [i for i, text in enumerate(texts) if text in self.numbers]
        if not known:
            return
        first = self.captions[:, 0].unique()
        first = torch.tensor(sorted({*first.tolist(), *(self.numbers[texts[i]] for i in known)}))
        best = torch.cat(
            [first[model(self.unseen.pixels(part), self.words[first]).argmax(1)] for part in torch.tensor(known).split(128)]
        )
        right = (best == torch.tensor([self.numbers[texts[i]] for i in known])).float().mean()
        with (self.out / "accuracy.txt").open("a") as file:
            file.write(f"{right:.3f}\n")

    @torch.no_grad()
    def export(self, model: Any) -> None:
        """``clip.pt`` and ``clip.json``, as of the encoders stage; image tokens are brought to unit variance."""
        clip = model.clip
        tokens = [image_tokens(clip, self.images.pixels(part)) for part in torch.arange(self.size).split(128)]
        clip.visual_projection.weight /= torch.cat(tokens).std()
        torch.save(clip.state_dict(), self.out / "clip.pt")
        (self.out / "clip.json").write_text(json.dumps(self.configs), encoding="utf-8")
