"""Trained encoders combined into one checkpoint, ready for training the network."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.checkpoint import save_checkpoint
from ..checkpoints.config import CaptionConfig, ModelConfig
from ..uvit import UViTConfig
from .autoencoder import vae_config
from .words import emoji_vocabulary


def assemble(runs: Path, out: Path, dtype: torch.dtype = torch.float16) -> Path:
    """Write the finished runs `autoencoder`, `encoders` and `captioner` as one checkpoint that lacks only a network.

    Args:
        runs: contains the three run folders. If it also contains `autoencoder_plain` or `autoencoder_longer`, that one replaces
            `autoencoder` (the first of these); `image_tower` replaces the image half of `encoders`.
        out: the .safetensors file, the checkpoint that the stage `uvit` starts from.
        dtype: of the weights in the file.

    Raises:
        FileNotFoundError: a run is missing or not finished.
    """

    def weights(name: str, drop: tuple[str, ...] = ("position_ids", "gpt.lm_head.weight")) -> dict[str, Tensor]:
        path = runs / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: finish that stage first")
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return {k: v for k, v in state.items() if not k.endswith(drop)}

    encoders = "image_tower" if (runs / "image_tower").is_dir() else "encoders"
    longer = (name for name in ("autoencoder_plain", "autoencoder_longer") if (runs / name).is_dir())
    autoencoder = next(longer, "autoencoder")
    clip, kl, caption = (
        weights(f"{encoders}/clip.pt"),
        weights(f"{autoencoder}/autoencoder.pt"),
        weights("captioner/caption.pt"),
    )
    clip_sizes = json.loads((runs / f"{encoders}/clip.json").read_text(encoding="utf-8"))
    caption_sizes = json.loads((runs / "captioner/caption.json").read_text(encoding="utf-8"))
    vae = json.loads((runs / f"{autoencoder}/config.json").read_text(encoding="utf-8"))["options"]
    tokenizers = {"clip_tokenizer": clip_sizes.pop("tokenizer"), "gpt2_tokenizer": caption_sizes.pop("tokenizer")}
    kl_config = vae_config(vae["image_size"], vae["patch_size"], vae["channels"], vae["layers"])
    config = ModelConfig(
        uvit=UViTConfig(
            img_size=vae["image_size"] // kl_config.downscale,
            text_dim=caption_sizes["hidden_dim"],
            num_text_tokens=clip_sizes["clip_text"]["max_position_embeddings"],
            clip_img_dim=clip_sizes["clip_image"]["projection_dim"],
        ),
        vae=kl_config,
        clip_text=clip_sizes["clip_text"],
        clip_image={**clip_sizes["clip_image"], "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        caption=CaptionConfig(**caption_sizes),
        image_size=vae["image_size"],
        defaults={"steps": 20, "guidance": 3.0},
        vocabulary=emoji_vocabulary(),
    )
    parts = {
        "vae": {k.removeprefix("kl."): v for k, v in kl.items()},
        "clip_text": {k: v for k, v in clip.items() if k.startswith("text_model.")},
        "clip_image": {k: v for k, v in clip.items() if k.startswith(("vision_model.", "visual_projection."))},
        "caption": caption,
    }
    save_checkpoint(out, config, parts, tokenizers, dtype)
    return out
