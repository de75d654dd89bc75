"""Configs inferred from tensor shapes, and stored configs checked against them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from ..media.json_files import brief
from ..uvit import UViTConfig
from .config import V1, CaptionConfig, ModelConfig, VAEConfig
from .keys import numbered

HEAD_DIM = 64  # of every published part; shapes do not show the number of attention heads
MOST_LAYERS, MOST_POSITIONS = 256, 8192  # quickly built, whatever the file holds
MOST_PIXELS = 8192  # side of a picture


def check_sizes(config: ModelConfig, shapes: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse a config with far more layers or positions than the file holds.

    Building such a model takes minutes and fills the memory before its weights are found missing. Smaller differences are
    left to `assign_weights`, which names the tensors.

    Args:
        config: as stored in the file.
        shapes: for each part of the file, its tensors by canonical name.

    Raises:
        ValueError: a size is no whole number or too large; names its field.
    """
    uvit, dd, text, image, gpt2 = config.uvit, config.vae.ddconfig, config.clip_text, config.clip_image, config.caption.gpt2
    for name in V1.vae.ddconfig.keys() - {"double_z", "resolution", "attn_resolutions", "dropout"}:
        if name not in dd:
            raise ValueError(f"vae.ddconfig.{name} is missing")
    grid = image.get("image_size", 0) // image.get("patch_size", 1)
    table = "embeddings.position_embedding.weight"
    sizes = [  # (field, size in the config, part, prefix of numbered modules or name of a table)
        ("uvit.depth", uvit.depth // 2, "uvit", "in_blocks."),
        ("uvit.detail_blocks", getattr(uvit, "detail_blocks", 0), "uvit", "detail.blocks."),
        ("uvit.detail_inner_blocks", getattr(uvit, "detail_inner_blocks", 0), "uvit", "detail.inner."),
        ("vae.ddconfig.ch_mult", len(dd["ch_mult"]), "vae", "encoder.down."),
        ("vae.ddconfig.num_res_blocks", dd["num_res_blocks"], "vae", "encoder.down.0.block."),
        ("clip_text.num_hidden_layers", text.get("num_hidden_layers", 0), "clip_text", "text_model.encoder.layers."),
        ("clip_text.max_position_embeddings", text.get("max_position_embeddings", 0), "clip_text", f"text_model.{table}"),
        ("clip_image.num_hidden_layers", image.get("num_hidden_layers", 0), "clip_image", "vision_model.encoder.layers."),
        ("clip_image.stem.channels", len(image.get("stem", {}).get("channels", [])), "clip_image", "vision_model.stem."),
        ("clip_image.image_size", grid**2, "clip_image", f"vision_model.{table}"),
    ]
    for name in ("n_layer", "num_hidden_layers"):  # GPT2Config takes both names of a size
        sizes.append((f"caption.gpt2.{name}", gpt2.get(name, 0), "caption", "gpt.transformer.h."))
    for name in ("n_positions", "max_position_embeddings"):
        sizes.append((f"caption.gpt2.{name}", gpt2.get(name, 0), "caption", "gpt.transformer.wpe.weight"))
    for field, wanted, part, key in sizes:
        stored = shapes.get(part, {})
        is_table = key.endswith("weight")
        found = numbered(stored, key) if not is_table else stored[key].shape[0] if key in stored else 0
        if not isinstance(wanted, int) or wanted > max(found, MOST_POSITIONS if is_table else MOST_LAYERS):
            unit = "positions" if is_table else "layers"
            raise ValueError(f"{field} asks for {brief(wanted)} {unit}, but the file has tensors for {found}")
    _check_text_length(uvit, shapes.get("uvit", {}))
    if not 1 <= config.image_size <= MOST_PIXELS:
        raise ValueError(f"image_size must be 1 to {MOST_PIXELS} pixels, not {brief(config.image_size)}")


def _check_text_length(uvit: UViTConfig, shapes: Mapping[str, Tensor]) -> None:
    """The text encoder is built for `num_text_tokens`, before the network is found to have others."""
    found = shapes["pos_embed"].shape[1] if "pos_embed" in shapes and shapes["pos_embed"].ndim == 3 else 0
    if uvit.tokens > max(found, MOST_POSITIONS):
        raise ValueError(
            f"uvit.num_text_tokens and uvit.img_size ask for {brief(uvit.tokens)} positions, but pos_embed has {found}"
        )


def check_parts_fit(config: ModelConfig, parts: Collection[str]) -> None:
    """Refuse parts that cannot work together, such as files of two models in one folder.

    Args:
        config: sizes of all parts.
        parts: names of those that are there.

    Raises:
        ValueError: a size of one part is not that of its neighbour; names both.
    """
    uvit, vae, caption, text = config.uvit, config.vae, config.caption, config.clip_text
    features = (vae.upsampler or {}).get("features", 0)
    pairs = [  # (part, its size, the size, the other part, its size, the size)
        ("caption", "hidden_dim", caption.hidden_dim, "uvit", "text_dim", uvit.text_dim),
        ("caption", "prefix_length", caption.prefix_length, "uvit", "num_text_tokens", uvit.num_text_tokens),
        ("caption", "prefix_dim", caption.prefix_dim, "clip_text", "hidden_size", text.get("hidden_size")),
        ("clip_image", "projection_dim", config.clip_image.get("projection_dim"), "uvit", "clip_img_dim", uvit.clip_img_dim),
        ("vae", "embed_dim", vae.embed_dim, "uvit", "in_chans", uvit.in_chans),
        ("vae", "ddconfig.in_channels", vae.ddconfig["in_channels"], "vae", "patch_size", 3 * vae.patch_size**2),
        ("vae", "ddconfig.out_ch", vae.ddconfig["out_ch"], "vae", "patch_size", 3 * vae.patch_size**2 + features),
    ]
    for one, field, size, other, wanted, needed in pairs:
        if one in parts and other in parts and size != needed:
            raise ValueError(
                f"its parts belong to different models: {one}.{field} is {brief(size)}, but {other}.{wanted} needs "
                f"{brief(needed)}; get all files from one place"
            )
    if {"clip_text", "uvit"} <= set(parts) and uvit.num_text_tokens > text.get("max_position_embeddings", 77):
        raise ValueError("its text encoder has fewer positions than uvit.num_text_tokens; get all files from one place")
    for name in ("image_mean", "image_std"):
        if "clip_image" in parts and len(config.clip_image.get(name, ())) != config.clip_image.get("num_channels", 3):
            raise ValueError(f"clip_image.{name} must have a number for each channel")
    if "caption" in parts and caption.stop_token_id >= max(1, caption.gpt2.get("vocab_size", 0)):
        raise ValueError(f"caption.stop_token_id {brief(caption.stop_token_id)} is outside the vocabulary")


def infer_uvit(shapes: Mapping[str, Tensor], num_text_tokens: int = 77) -> UViTConfig:
    """Config of a U-ViT from its tensors under the original names.

    Shapes do not determine everything: heads are assumed to be 64 wide and images square. An odd depth reads as the even one
    below it, which is the same network.

    Args:
        shapes: tensors by name; only their shapes are used.
        num_text_tokens: L, the number of text tokens.

    Raises:
        KeyError: a tensor is missing.
        ValueError: the shapes contradict each other.
    """
    width, channels, patch, _ = shapes["patch_embed.proj.weight"].shape
    patches = shapes["pos_embed"].shape[1] - 2 - num_text_tokens - 1
    side = math.isqrt(max(patches, 0))
    if side < 1 or side * side != patches:
        raise ValueError(
            f"pos_embed has {shapes['pos_embed'].shape[1]} positions, which is not 2 timesteps + {num_text_tokens} text + "
            "1 CLIP image + a square number of image tokens."
        )
    return UViTConfig(
        img_size=side * patch,
        in_chans=channels,
        patch_size=patch,
        embed_dim=width,
        depth=2 * numbered(shapes, "in_blocks."),
        num_heads=max(1, width // HEAD_DIM),
        text_dim=shapes["text_embed.weight"].shape[1],
        num_text_tokens=num_text_tokens,
        clip_img_dim=shapes["clip_img_embed.weight"].shape[1],
        data_types=shapes["token_embedding.weight"].shape[0] if "token_embedding.weight" in shapes else 0,
        mlp_ratio=shapes["mid_block.mlp.fc1.weight"].shape[0] / width,
        qkv_bias="mid_block.attn.qkv.bias" in shapes,
    )


def infer_vae(shapes: Mapping[str, Tensor]) -> VAEConfig:
    """Config of a KL autoencoder from its tensors under latent diffusion's names.

    Shapes do not determine the scale factor, which is assumed to be SD 1's.

    Raises:
        KeyError: a tensor is missing.
        ValueError: it has attention outside the middle block.
    """
    if any(".attn." in name for name in shapes):
        raise ValueError("the autoencoder has attention in its levels; only attention in the middle block is supported.")
    first = shapes["encoder.conv_in.weight"].shape
    levels = numbered(shapes, "encoder.down.")
    widths = [shapes[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    ddconfig = V1.vae.ddconfig | {
        "in_channels": first[1],
        "out_ch": shapes["decoder.conv_out.weight"].shape[0],
        "ch": first[0],
        "ch_mult": [width // first[0] for width in widths],
        "num_res_blocks": numbered(shapes, "encoder.down.0.block."),
        "z_channels": shapes["decoder.conv_in.weight"].shape[1],
    }
    patch = math.isqrt(first[1] // 3)
    return VAEConfig(ddconfig, embed_dim=shapes["post_quant_conv.weight"].shape[1], patch_size=patch)


def infer_clip_text(shapes: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields of CLIPTextConfig from the text tower's tensors.

    Raises:
        KeyError: a tensor is missing.
    """
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"].shape
    return V1.clip_text | {
        "hidden_size": width,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": numbered(shapes, "text_model.encoder.layers."),
        "num_attention_heads": max(1, width // HEAD_DIM),
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"].shape[0],
        "vocab_size": vocabulary,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def infer_clip_image(shapes: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields of CLIPVisionConfig from the image tower's tensors, with mean and std.

    Raises:
        KeyError: a tensor is missing.
    """
    width, channels, patch, _ = shapes["vision_model.embeddings.patch_embedding.weight"].shape
    side = math.isqrt(shapes["vision_model.embeddings.position_embedding.weight"].shape[0] - 1)
    return V1.clip_image | {
        "hidden_size": width,
        "intermediate_size": shapes["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": numbered(shapes, "vision_model.encoder.layers."),
        "num_attention_heads": max(1, width // HEAD_DIM),
        "image_size": side * patch,
        "patch_size": patch,
        "num_channels": channels,
        "projection_dim": shapes["visual_projection.weight"].shape[0],
    }


def infer_caption(shapes: Mapping[str, Tensor]) -> CaptionConfig:
    """Config of a caption decoder from its tensors; the last id is the stop token.

    Raises:
        KeyError: a tensor is missing.
    """
    vocabulary, width = shapes["gpt.transformer.wte.weight"].shape
    hidden, prefix = shapes["encode_prefix.weight"].shape
    gpt2 = V1.caption.gpt2 | {
        "vocab_size": vocabulary,
        "n_positions": shapes["gpt.transformer.wpe.weight"].shape[0],
        "n_embd": width,
        "n_layer": numbered(shapes, "gpt.transformer.h."),
        "n_head": max(1, width // HEAD_DIM),
    }
    return CaptionConfig(gpt2, prefix_dim=prefix, hidden_dim=hidden, stop_token_id=vocabulary - 1)
