"""Trained encoders put together into one file, ready for training the network."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor


def assemble(runs: Path, out: Path, dtype: torch.dtype = torch.float16) -> Path:
    """Write the runs ``autoencoder``, ``encoders`` and ``captioner`` below ``runs`` as one file that lacks only a network.

    Args:
        runs: folder of the three run folders, all finished.
            More may be there: ``autoencoder_plain``, or else ``autoencoder_longer``, takes the place of the first, and
            ``image_tower`` that of the image half of the second.
        out: the ``.safetensors`` file, which the ``uvit`` stage takes as its checkpoint.
        dtype: of the weights in the file; the network is then trained on the latents of exactly these encoders.
    """
    from ..checkpoints.checkpoint import save_checkpoint
    from ..checkpoints.config import CaptionConfig, ModelConfig, VAEConfig
    from ..uvit import UViTConfig

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
    patch, channels = vae["patch_size"], vae["channels"]
    ddconfig = {
        "in_channels": 3 * patch**2,
        "out_ch": 3 * patch**2,
        "ch": channels[0],
        "ch_mult": [c // channels[0] for c in channels],
        "num_res_blocks": vae["layers"],
        "z_channels": 4,
        "double_z": True,
        "resolution": vae["image_size"] // patch,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    tokenizers = {"clip_tokenizer": clip_sizes.pop("tokenizer"), "gpt2_tokenizer": caption_sizes.pop("tokenizer")}
    vae_config = VAEConfig(ddconfig=ddconfig, patch_size=patch)
    config = ModelConfig(
        uvit=UViTConfig(
            img_size=vae["image_size"] // vae_config.downscale,
            text_dim=caption_sizes["hidden_dim"],
            num_text_tokens=clip_sizes["clip_text"]["max_position_embeddings"],
            clip_img_dim=clip_sizes["clip_image"]["projection_dim"],
        ),
        vae=vae_config,
        clip_text=clip_sizes["clip_text"],
        clip_image={**clip_sizes["clip_image"], "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        caption=CaptionConfig(**caption_sizes),
        image_size=vae["image_size"],
        defaults={"steps": 20, "guidance": 3.0},
    )
    parts = {
        "vae": {k.removeprefix("kl."): v for k, v in kl.items()},
        "clip_text": {k: v for k, v in clip.items() if k.startswith("text_model.")},
        "clip_image": {k: v for k, v in clip.items() if k.startswith(("vision_model.", "visual_projection."))},
        "caption": caption,
    }
    save_checkpoint(out, config, parts, tokenizers, dtype)
    return out
