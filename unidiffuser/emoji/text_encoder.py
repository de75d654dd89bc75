"""Training of the text encoder: CLIP's contrastive objective with a small image encoder (Radford et al., arXiv 2103.00020)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoints.tokenizers import END, START, BytePairTokenizer
from ..encoders.clip import clip_text_model
from ..media.files import write_text
from ..media.images import from_levels
from ..streams import draw_uniform
from ..training.config import TrainConfig
from ..training.stage import Batch, TrainingStage, seeded_init
from .image_folder import training_set
from .options import TextEncoder
from .vocabulary import clip_vocabulary

ZOOM, MOVE = 0.12, 0.16  # augmentation of the pictures: zoom, and shift in half sides


def random_shift(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, H, W), each zoomed and shifted a little at random; white (1.0) fills the borders."""
    count = len(pixels)
    scale = 1 + (draw_uniform((count,), generator) * 2 - 1) * ZOOM
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = (draw_uniform((count, 2), generator) * 2 - 1) * MOVE
    grid = F.affine_grid(theta.to(pixels.device), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels - 1, grid, align_corners=False) + 1


class TextEncoderStage(TrainingStage):
    """Trains a text and an image encoder on an image folder; only the text encoder is written.

    A caption that fits several pictures of a batch (a label without style) matches all of them.

    Args:
        config: settings of the run.
        options: those of the section `encoders.text`.
        data: the image folder.
    """

    def __init__(self, config: TrainConfig, options: TextEncoder, data: Path):
        from transformers import CLIPConfig, CLIPModel

        self.out = Path(config.out)
        self.images = training_set(data, options.image_size, options.where)
        self.size = len(self.images)
        captions = [record["text"] for record in self.images.records]
        texts = sorted({text for given in captions for text in given})
        spec = clip_vocabulary([text for given in captions for text in given], options.vocabulary_size)
        self.text_ids = BytePairTokenizer.from_spec(spec)(texts, options.text_tokens)  # (T, L)
        numbers = {text: i for i, text in enumerate(texts)}
        forms = max(map(len, captions))
        self.caption_of = torch.tensor(
            [[numbers[given[min(k, len(given) - 1)]] for k in range(forms)] for given in captions]
        )  # (N, forms)
        tower = {
            "hidden_size": options.width,
            "intermediate_size": 4 * options.width,
            "num_hidden_layers": options.layers,
            "num_attention_heads": max(1, options.width // 64),
            "hidden_act": "quick_gelu",
            "projection_dim": options.projection,
        }
        text_config = {
            **tower,
            "vocab_size": len(spec["vocab"]),
            "max_position_embeddings": options.text_tokens,
            "bos_token_id": spec["vocab"][START],
            "eos_token_id": spec["vocab"][END],
            "pad_token_id": spec["vocab"][END],
        }
        vision_config = {**tower, "image_size": options.image_size, "patch_size": options.image_patch}
        with seeded_init(config.seed):
            self.model = CLIPModel(
                CLIPConfig(
                    text_config=text_config,
                    vision_config=vision_config,
                    projection_dim=options.projection,
                    attn_implementation="eager",  # for short sequences on a CPU, faster backwards than the fused kernel
                )
            )
        self.sizes = {"clip_text": text_config, "tokenizer": spec}

    def examples(self, indices: Tensor, seeds: Sequence[int]) -> Batch:
        return {"levels": self.images.levels(indices), "captions": self.caption_of[indices]}

    def loss(self, model: Any, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        pixels, captions = from_levels(batch["levels"]), batch["captions"]
        form = torch.randint(captions.shape[1], (len(captions),), generator=generator, device=generator.device)
        chosen = captions.gather(1, form.to(captions.device)[:, None])[:, 0]
        matches = (captions[:, :, None] == chosen[None, None, :]).any(1).float()  # picture i fits caption j
        out = model(input_ids=self.text_ids[chosen.cpu()].to(pixels.device), pixel_values=random_shift(pixels, generator))
        logits = out.logits_per_image.float()
        by_image = -(logits.log_softmax(1) * matches / matches.sum(1, keepdim=True)).sum(1).mean()
        by_text = -(logits.log_softmax(0) * matches / matches.sum(0, keepdim=True)).sum(0).mean()
        right = matches.gather(1, logits.argmax(1, keepdim=True)).mean()
        return {"loss": (by_image + by_text) / 2, "wrong": 1 - right.detach() + 1e-4}

    def export(self, model: Any) -> None:
        """Write `text.pt` (weights) and `text.json` (sizes, vocabulary)."""
        weights = {name: value.cpu() for name, value in model.state_dict().items() if name.startswith("text_model.")}
        torch.save(weights, self.out / "text.pt")
        write_text(self.out / "text.json", json.dumps(self.sizes))


def load_text_encoder(folder: Path) -> tuple[Any, BytePairTokenizer, dict[str, Any]]:
    """The CLIPTextModel of a finished run, its tokenizer and the fields of its config."""
    sizes = json.loads((folder / "text.json").read_text(encoding="utf-8"))
    model = clip_text_model(sizes["clip_text"])
    weights = torch.load(folder / "text.pt", map_location="cpu", weights_only=True)
    if not any(name.startswith("text_model.") for name in model.state_dict()):  # newer versions of transformers
        weights = {name.removeprefix("text_model."): value for name, value in weights.items()}
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False), BytePairTokenizer.from_spec(sizes["tokenizer"]), sizes["clip_text"]
