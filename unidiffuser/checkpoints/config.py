"""What a model consists of: the sizes of its parts, as stored in our files and as read off the shapes of others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from ..small.network import config_of
from ..uvit import UViTConfig

HEAD_DIM = 64  # of every published part; the number of attention heads leaves no trace in the shapes

T = TypeVar("T")


def _sd1_ddconfig() -> dict[str, Any]:
    return {
        "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_channels": 4,
        "double_z": True, "resolution": 256, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip


def _clip_l_text() -> dict[str, Any]:
    return {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "max_position_embeddings": 77, "vocab_size": 49408, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
        "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1,
    }  # fmt: skip


def _clip_b32_image() -> dict[str, Any]:
    return {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 32, "num_channels": 3, "projection_dim": 512, "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip


def _gpt2_small() -> dict[str, Any]:
    return {
        "vocab_size": 50258, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    }  # fmt: skip


@dataclass(frozen=True)
class VAEConfig:
    """The KL autoencoder; the defaults are Stable Diffusion 1's.

    `ddconfig` is that of the latent-diffusion code. `scale_factor` multiplies a sampled latent. With `patch_size` p > 1
    pixels go through pixel_unshuffle(p) before the encoder and pixel_shuffle(p) after the decoder. `palette` is that of a
    :class:`.palette.Palette`: the names of its "manners" and how many "colours" each has; None for none.
    `preview_rgb` maps a scaled latent to RGB in [-1, 1] for previews while sampling: {"factors": [embed_dim][3], "bias":
    [3]}; None means Stable Diffusion 1's.
    """

    ddconfig: dict[str, Any] = field(default_factory=_sd1_ddconfig)
    embed_dim: int = 4
    scale_factor: float = 0.18215
    patch_size: int = 1
    palette: dict[str, Any] | None = None
    preview_rgb: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.preview_rgb is not None:
            rows = [*self.preview_rgb.get("factors", []), self.preview_rgb.get("bias", [])]
            if [len(row) for row in rows] != [3] * (self.embed_dim + 1):
                raise ValueError(f"preview_rgb needs {self.embed_dim} rows of 3 factors and a bias of 3.")

    @property
    def downscale(self) -> int:
        """Pixels per latent, along a side."""
        return self.patch_size * 2 ** (len(self.ddconfig["ch_mult"]) - 1)


@dataclass(frozen=True)
class CaptionConfig:
    """The caption decoder: two Linear layers, prefix_dim -> hidden_dim -> n_embd, and a GPT-2 (fields of HF's GPT2Config)."""

    gpt2: dict[str, Any] = field(default_factory=_gpt2_small)
    prefix_length: int = 77
    prefix_dim: int = 768
    hidden_dim: int = 64
    stop_token_id: int = 50257
    max_new_tokens: int = 67


@dataclass(frozen=True)
class ModelConfig:
    """All sizes of a model; `ModelConfig()` is UniDiffuser v1.

    `clip_text` holds fields of HF's CLIPTextConfig, `clip_image` those of CLIPVisionConfig with image_mean and image_std
    ([3] each). `image_size` is the side of the pictures it was trained for, in pixels. `defaults` may suggest "steps",
    "guidance" and, for pairs out of nothing, "speeds".
    """

    uvit: UViTConfig = field(default_factory=UViTConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    clip_text: dict[str, Any] = field(default_factory=_clip_l_text)
    clip_image: dict[str, Any] = field(default_factory=_clip_b32_image)
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    image_size: int = 512
    defaults: dict[str, Any] = field(default_factory=lambda: {"steps": 50, "guidance": 8.0})

    def to_dict(self) -> dict[str, Any]:
        """The tree as plain dicts, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`; what is absent is as in v1, unknown fields of newer versions are passed over.

        Raises:
            ValueError: a section is not an object or sizes contradict each other.
        """
        if not isinstance(data, Mapping):
            raise ValueError("the configuration must be an object.")
        for name in ("uvit", "vae", "clip_text", "clip_image", "caption", "defaults"):
            if not isinstance(data.get(name, {}), Mapping):
                raise ValueError(f"the configuration's {name!r} must be an object, not {data[name]!r}.")
        sections: dict[str, Any] = {
            name: make(_tuples(data[name]))
            for name, make in (
                ("uvit", config_of),
                ("vae", partial(_build, VAEConfig)),
                ("caption", partial(_build, CaptionConfig)),
            )
            if name in data
        }
        return _build(cls, {**data, **sections})


def _build(kind: type[T], data: Mapping[str, Any]) -> T:
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in data.items() if name in known})


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    """A section read from JSON, which has no tuples."""
    return {name: tuple(value) if name == "img_size" and isinstance(value, list) else value for name, value in data.items()}


V1 = ModelConfig()
V0 = ModelConfig(uvit=UViTConfig(data_types=0))


def count(shapes: Mapping[str, Tensor], prefix: str) -> int:
    """How many members a numbered list has: 1 + the largest n of names `prefix`n.*"""
    numbers = [int(name[len(prefix) :].split(".")[0]) for name in shapes if name.startswith(prefix)]
    return 1 + max(numbers, default=-1)


def infer_uvit(shapes: Mapping[str, Tensor], num_text_tokens: int = 77) -> UViTConfig:
    """Sizes of a U-ViT from tensors under the original names.

    Heads are taken to be 64 wide, the text to have `num_text_tokens` tokens and pictures to be square: the shapes cannot
    tell. An odd depth reads as the even one below, which is the same network.
    """
    width, channels, patch, _ = shapes["patch_embed.proj.weight"].shape
    patches = shapes["pos_embed"].shape[1] - 2 - num_text_tokens - 1
    side = math.isqrt(max(patches, 0))
    if side < 1 or side * side != patches:
        raise ValueError(
            f"pos_embed has {shapes['pos_embed'].shape[1]} positions, which is not 2 times + {num_text_tokens} text + "
            "1 CLIP + a square of image patches."
        )
    return UViTConfig(
        img_size=side * patch,
        in_chans=channels,
        patch_size=patch,
        embed_dim=width,
        depth=2 * count(shapes, "in_blocks."),
        num_heads=max(1, width // HEAD_DIM),
        text_dim=shapes["text_embed.weight"].shape[1],
        num_text_tokens=num_text_tokens,
        clip_img_dim=shapes["clip_img_embed.weight"].shape[1],
        data_types=shapes["token_embedding.weight"].shape[0] if "token_embedding.weight" in shapes else 0,
        mlp_ratio=shapes["mid_block.mlp.fc1.weight"].shape[0] / width,
        qkv_bias="mid_block.attn.qkv.bias" in shapes,
    )


def infer_vae(shapes: Mapping[str, Tensor]) -> VAEConfig:
    """Sizes of a KL autoencoder from tensors under the LDM names; the scale factor is taken to be SD 1's."""
    if any(".attn." in name for name in shapes):
        raise ValueError("its autoencoder has attention in its levels; only attention in the middle is supported.")
    first = shapes["encoder.conv_in.weight"].shape
    levels = count(shapes, "encoder.down.")
    widths = [shapes[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    ddconfig = _sd1_ddconfig() | {
        "in_channels": first[1],
        "out_ch": shapes["decoder.conv_out.weight"].shape[0],
        "ch": first[0],
        "ch_mult": [width // first[0] for width in widths],
        "num_res_blocks": count(shapes, "encoder.down.0.block."),
        "z_channels": shapes["decoder.conv_in.weight"].shape[1],
    }
    patch = math.isqrt(first[1] // 3)
    return VAEConfig(ddconfig, embed_dim=shapes["post_quant_conv.weight"].shape[1], patch_size=patch)


def infer_clip_text(shapes: Mapping[str, Tensor]) -> dict[str, Any]:
    """CLIPTextConfig fields from tensors under HF's names."""
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"].shape
    return _clip_l_text() | {
        "hidden_size": width,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": count(shapes, "text_model.encoder.layers."),
        "num_attention_heads": max(1, width // HEAD_DIM),
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"].shape[0],
        "vocab_size": vocabulary,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def infer_clip_image(shapes: Mapping[str, Tensor]) -> dict[str, Any]:
    """CLIPVisionConfig fields (and the usual mean and std) from tensors under HF's names."""
    width, channels, patch, _ = shapes["vision_model.embeddings.patch_embedding.weight"].shape
    side = math.isqrt(shapes["vision_model.embeddings.position_embedding.weight"].shape[0] - 1)
    return _clip_b32_image() | {
        "hidden_size": width,
        "intermediate_size": shapes["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": count(shapes, "vision_model.encoder.layers."),
        "num_attention_heads": max(1, width // HEAD_DIM),
        "image_size": side * patch,
        "patch_size": patch,
        "num_channels": channels,
        "projection_dim": shapes["visual_projection.weight"].shape[0],
    }


def infer_caption(shapes: Mapping[str, Tensor]) -> CaptionConfig:
    """Sizes of a caption decoder from its tensors; the last id of the vocabulary is taken to be the stop token."""
    vocabulary, width = shapes["gpt.transformer.wte.weight"].shape
    hidden, prefix = shapes["encode_prefix.weight"].shape
    gpt2 = _gpt2_small() | {
        "vocab_size": vocabulary,
        "n_positions": shapes["gpt.transformer.wpe.weight"].shape[0],
        "n_embd": width,
        "n_layer": count(shapes, "gpt.transformer.h."),
        "n_head": max(1, width // HEAD_DIM),
    }
    return CaptionConfig(gpt2, prefix_dim=prefix, hidden_dim=hidden, stop_token_id=vocabulary - 1)
