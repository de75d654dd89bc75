"""Stage `encoders`: small CLIP-shaped text and image encoders, trained contrastively (Radford et al., arXiv 2103.00020)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoints.tokenizers import END, START, BytePairTokenizer
from ..encoders.clip import clip_image_model
from ..training.config import TrainConfig
from ..training.stage import Batch, TrainingStage, seeded_init
from .image_folder import training_set
from .vocabulary import clip_vocabulary


def random_shift(pixels: Tensor, generator: torch.Generator, zoom: float = 0.12, move: float = 0.08) -> Tensor:
    """Pictures (B, 3, H, W), each zoomed and shifted a little at random; white (1.0) fills the borders."""
    count = pixels.shape[0]
    scale = 1 + (torch.rand(count, generator=generator) * 2 - 1) * zoom
    shift = (torch.rand(count, 2, generator=generator) * 2 - 1) * move * 2
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels - 1, grid, align_corners=False) + 1


class EncodersStage(TrainingStage):
    """Trains a text and an image encoder on an image folder.

    A caption that fits several pictures of a batch (a label without style) matches all of them.

    Options:
        data, where, image_size: image folder, record filter, side in pixels.
        vocabulary_size: of the byte-pair vocabulary that is trained on the captions.
        text_tokens: length of a tokenised caption.
        width, layers: of both transformers.
        image_patch: side of the image encoder's patches in pixels.
        projection: size of the common space, and of the image token.
    """

    def __init__(self, config: TrainConfig):
        from transformers import CLIPConfig, CLIPModel

        options = config.options
        self.out = Path(config.out)
        self.images = training_set(options)
        self.size = len(self.images)
        captions = [text for record in self.images.records for text in record["text"]]
        spec = clip_vocabulary(captions, options["vocabulary_size"])
        self.tokenizer = BytePairTokenizer.from_spec(spec)
        self.length = options["text_tokens"]
        self.forms = max(len(record["text"]) for record in self.images.records)
        texts = sorted(set(captions))
        numbers = {text: i for i, text in enumerate(texts)}
        self.text_ids = self.tokenizer(texts, self.length)  # (T, L)
        self.caption_of = torch.tensor(
            [[numbers[r["text"][min(k, len(r["text"]) - 1)]] for k in range(self.forms)] for r in self.images.records]
        )  # (N, forms)
        tower = {
            "hidden_size": options["width"],
            "intermediate_size": 4 * options["width"],
            "num_hidden_layers": options["layers"],
            "num_attention_heads": max(1, options["width"] // 64),
            "hidden_act": "quick_gelu",
            "projection_dim": options["projection"],
        }
        text_config = {
            **tower,
            "vocab_size": len(self.tokenizer),
            "max_position_embeddings": self.length,
            "bos_token_id": spec["vocab"][START],
            "eos_token_id": spec["vocab"][END],
            "pad_token_id": spec["vocab"][END],
        }
        vision_config = {**tower, "image_size": options["image_size"], "patch_size": options["image_patch"]}
        with seeded_init(config.seed):
            self.model = CLIPModel(
                CLIPConfig(
                    text_config=text_config,
                    vision_config=vision_config,
                    projection_dim=options["projection"],
                    attn_implementation="eager",  # for short sequences on a CPU, faster backwards than the fused kernel
                )
            )
        self.configs = {"clip_text": text_config, "clip_image": vision_config, "tokenizer": spec}

    def examples(self, indices: Tensor, seeds: Sequence[int]) -> Batch:
        return {"pixels": self.images.pixels(indices), "captions": self.caption_of[indices]}

    def loss(self, model: Any, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        pixels, captions = batch["pixels"], batch["captions"]
        form = torch.randint(captions.shape[1], (len(captions),), generator=generator)
        chosen = captions.gather(1, form.to(captions.device)[:, None])[:, 0]
        matches = (captions[:, :, None] == chosen[None, None, :]).any(1).float()  # picture i fits caption j
        out = model(input_ids=self.text_ids[chosen.cpu()].to(pixels.device), pixel_values=random_shift(pixels, generator))
        logits = out.logits_per_image.float()
        by_image = -(logits.log_softmax(1) * matches / matches.sum(1, keepdim=True)).sum(1).mean()
        by_text = -(logits.log_softmax(0) * matches / matches.sum(0, keepdim=True)).sum(0).mean()
        right = matches.gather(1, logits.argmax(1, keepdim=True)).mean()
        return {"loss": (by_image + by_text) / 2, "wrong": 1 - right.detach() + 1e-4}

    @torch.no_grad()
    def export(self, model: Any) -> None:
        """Write `clip.pt` (weights) and `clip.json` (sizes, vocabulary); image tokens are scaled to unit variance."""
        tokens = []
        for chunk in torch.arange(self.size).split(128):
            tokens.append(image_tokens(model, self.images.pixels(chunk)))
        stacked = torch.cat(tokens)
        model.visual_projection.weight /= stacked.std()
        torch.save(model.state_dict(), self.out / "clip.pt")
        (self.out / "clip.json").write_text(json.dumps(self.configs), encoding="utf-8")


def image_tokens(model: Any, pixels: Tensor) -> Tensor:
    """Projected image embeddings (B, D) of pixels in [-1, 1] (CLIP mean and std of 0.5)."""
    return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)


def load_clip(folder: Path) -> tuple[Any, BytePairTokenizer, dict[str, Any]]:
    """The CLIPModel of a finished run, its tokenizer and its sizes."""
    from transformers import CLIPConfig, CLIPModel

    configs = json.loads((folder / "clip.json").read_text(encoding="utf-8"))
    model = CLIPModel(
        CLIPConfig(
            text_config=configs["clip_text"],
            vision_config=configs["clip_image"],
            projection_dim=configs["clip_image"]["projection_dim"],
        )
    )
    model.vision_model = clip_image_model(configs["clip_image"]).vision_model  # with a convolutional stem if the sizes have one
    model.load_state_dict(torch.load(folder / "clip.pt", weights_only=True))
    return model.eval().requires_grad_(False), BytePairTokenizer.from_spec(configs["tokenizer"]), configs
