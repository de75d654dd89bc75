"""Trained parts combined into one checkpoint without a network, from which the network is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.checkpoint import save_checkpoint
from ..checkpoints.config import CaptionConfig, ModelConfig, VAEConfig
from ..checkpoints.vocabulary import Vocabulary
from ..uvit import UViTConfig

LEFT_OUT = ("position_ids", "gpt.lm_head.weight")  # rebuilt when the parts are loaded


def assemble(
    autoencoder: Path, text_encoder: Path, image_encoder: Path, captioner: Path, vocabulary: Vocabulary, out: Path
) -> None:
    """Write one checkpoint.

    Args:
        autoencoder, text_encoder, image_encoder, captioner: folders of the finished runs.
        vocabulary: concepts and styles of the network's captions.
        out: the .safetensors file, in float16.
    """
    vae, text, image, caption = (
        json.loads(path.read_text(encoding="utf-8"))
        for path in (
            autoencoder / "autoencoder.json",
            text_encoder / "text.json",
            image_encoder / "image.json",
            captioner / "caption.json",
        )
    )
    tokenizers = {"clip_tokenizer": text["tokenizer"], "gpt2_tokenizer": caption.pop("tokenizer")}
    vae_config = VAEConfig(**vae["vae"])
    config = ModelConfig(
        uvit=UViTConfig(
            img_size=vae["image_size"] // vae_config.downscale,
            text_dim=caption["hidden_dim"],
            num_text_tokens=text["clip_text"]["max_position_embeddings"],
            clip_img_dim=image["projection_dim"],
        ),
        vae=vae_config,
        clip_text=text["clip_text"],
        clip_image={**image, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        caption=CaptionConfig(**caption),
        image_size=vae["image_size"],
        vocabulary=vocabulary,
    )
    parts = {
        "vae": _weights(autoencoder / "autoencoder.pt"),
        "clip_text": _weights(text_encoder / "text.pt"),
        "clip_image": _weights(image_encoder / "image.pt"),
        "caption": _weights(captioner / "caption.pt"),
    }
    save_checkpoint(out, config, parts, tokenizers, torch.float16)


def _weights(path: Path) -> dict[str, Tensor]:
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return {name: value for name, value in state.items() if not name.endswith(LEFT_OUT)}
