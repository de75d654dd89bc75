"""A checkpoint with every part at toy size and random weights, for tests of the wiring."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from unidiffuser.checkpoints.checkpoint import CaptionConfig, ModelConfig, VAEConfig, save_checkpoint
from unidiffuser.checkpoints.tokenizers import END, START, STOP
from unidiffuser.encoders.autoencoder import autoencoder_kl
from unidiffuser.encoders.captions import CaptionDecoder
from unidiffuser.encoders.clip import clip_image_model, clip_text_model
from unidiffuser.small.network import build, config_of

LENGTH, TEXT_DIM, WIDTH, TOKEN_DIM = 8, 16, 32, 24


def tokenizer_specs() -> dict[str, dict[str, object]]:
    """Byte-level vocabularies of single letters, with and without the mark of a word's end or start."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    clip = [*letters, *(c + "</w>" for c in letters), START, END]
    gpt2 = [*letters, "Ġ", END, STOP]
    return {
        name: {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": []}
        for name, tokens in (("clip_tokenizer", clip), ("gpt2_tokenizer", gpt2))
    }


HEAD: dict[str, Any] = {"sigma_data": 0.3, "detail_width": 16, "detail_blocks": 1, "detail_features": 4}
"""Fields of a network with the head for large patches."""


def tiny_config(downscale: int = 8, **uvit: Any) -> ModelConfig:
    """`downscale`: pixels of the picture for one of the latent, along a side; even. `uvit`: other sizes of the network."""
    patch_size = downscale // 2
    specs = tokenizer_specs()
    clip_vocab, gpt2_vocab = specs["clip_tokenizer"]["vocab"], specs["gpt2_tokenizer"]["vocab"]
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
    ddconfig = {
        "in_channels": 3 * patch_size**2,
        "out_ch": 3 * patch_size**2,
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "z_channels": 4,
        "double_z": True,
        "resolution": 32,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    return ModelConfig(
        uvit=config_of(
            {
                "img_size": 128 // downscale,
                "in_chans": 4,
                "patch_size": 4,
                "embed_dim": 48,
                "depth": 4,
                "num_heads": 2,
                "text_dim": TEXT_DIM,
                "num_text_tokens": LENGTH,
                "clip_img_dim": TOKEN_DIM,
                "data_types": 2,
                **uvit,
            }
        ),
        vae=VAEConfig(ddconfig, patch_size=patch_size),
        clip_text={
            **tower,
            "vocab_size": len(clip_vocab),
            "max_position_embeddings": LENGTH,
            "bos_token_id": clip_vocab[START],
            "eos_token_id": clip_vocab[END],
            "pad_token_id": clip_vocab[END],
        },
        clip_image={
            **tower,
            "image_size": 32,
            "patch_size": 8,
            "num_channels": 3,
            "projection_dim": TOKEN_DIM,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
        caption=CaptionConfig(
            {
                "vocab_size": len(gpt2_vocab),
                "n_positions": 32,
                "n_embd": 32,
                "n_layer": 2,
                "n_head": 2,
                "activation_function": "gelu_new",
            },
            prefix_length=LENGTH,
            prefix_dim=WIDTH,
            hidden_dim=TEXT_DIM,
            stop_token_id=gpt2_vocab[STOP],
            max_new_tokens=10,
        ),
        image_size=128,
        defaults={"steps": 4, "guidance": 2.0},
    )


def write_tiny_checkpoint(
    path: Path,
    seed: int = 0,
    downscale: int = 8,
    uvit: dict[str, Any] | None = None,
    palette: dict[str, Any] | None = None,
    upsampler: dict[str, int] | None = None,
    **clip_image: Any,
) -> None:
    """The same file for the same seed; `uvit` are other sizes of the network, `clip_image` of the image encoder.

    `palette` and `upsampler` are those of the autoencoder; the pictures of one with an upsampler are twice as large.
    """
    config = tiny_config(downscale, **(uvit or {}))
    config = replace(config, vae=replace(config.vae, palette=palette))
    if upsampler:
        ddconfig = {**config.vae.ddconfig, "out_ch": config.vae.ddconfig["out_ch"] + upsampler["features"]}
        vae_config = replace(config.vae, ddconfig=ddconfig, upsampler=upsampler)
        config = replace(config, vae=vae_config, image_size=2 * config.image_size)
    config.clip_image.update(clip_image)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = build(config.uvit)
        for parameter in net.parameters():  # fresh biases and some tables are zero, which would hide a lost one
            if parameter.ndim == 1 or parameter.shape[0] == 1 or not parameter.any():
                parameter.data += 0.05 * torch.randn_like(parameter)
        vae = autoencoder_kl(config.vae)
        if palette:
            for parameter in vae.palette.parameters():
                if not parameter.any():
                    parameter.data += 0.3 * torch.randn_like(parameter)
        parts = {
            "uvit": net,
            "vae": vae,
            "clip_text": clip_text_model(config.clip_text),
            "clip_image": clip_image_model(config.clip_image),
            "caption": CaptionDecoder(config.caption),
        }
    save_checkpoint(path, config, {name: part.state_dict() for name, part in parts.items()}, tokenizer_specs())


if __name__ == "__main__":
    import sys

    write_tiny_checkpoint(Path(sys.argv[1]))
