"""Configuration of a model and its parts; the defaults are UniDiffuser v1."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from ..small.network import config_of
from ..uvit import UViTConfig
from .vocabulary import Vocabulary

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


LARGEST_EXTRA = 1024  # colours, styles or channels: far more than a file of a sensible size has


@dataclass(frozen=True)
class VAEConfig:
    """Configuration of the KL autoencoder; the defaults are Stable Diffusion 1's.

    Attributes:
        ddconfig: the `ddconfig` of the latent-diffusion code.
        embed_dim: channels of a latent.
        scale_factor: factor between a sampled latent and the image latent that the U-ViT sees.
        patch_size: p > 1 puts pixel_unshuffle(p) before the encoder and pixel_shuffle(p) after the decoder.
        palette: arguments of a `small.palette.Palette`: names of its styles ("manners") and number of "colours" of each;
            None for an autoencoder without one.
        upsampler: arguments of a `small.upsampler.ConvexUpsampler`: number of "features" that the decoder returns beside the
            pixels, and "width". The encoder then reads pictures at half their sides, and the decoder's are doubled; None for
            an autoencoder without one.
        preview_rgb: linear map of a scaled latent to RGB in [-1, 1], for previews during sampling:
            {"factors": [embed_dim][3], "bias": [3]}; None means Stable Diffusion 1's.
    """

    ddconfig: dict[str, Any] = field(default_factory=_sd1_ddconfig)
    embed_dim: int = 4
    scale_factor: float = 0.18215
    patch_size: int = 1
    palette: dict[str, Any] | None = None
    upsampler: dict[str, Any] | None = None
    preview_rgb: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        sizes = {f"upsampler.{name}": size for name, size in (self.upsampler or {}).items()}
        if self.palette is not None:
            sizes |= {"palette.colours": self.palette.get("colours"), "palette.manners": len(self.palette.get("manners", ()))}
        for name, size in sizes.items():
            if not isinstance(size, int) or not 1 <= size <= LARGEST_EXTRA:
                raise ValueError(f"vae.{name} must be a whole number from 1 to {LARGEST_EXTRA}, not {size!r}.")
        if self.upsampler is not None and set(self.upsampler) != {"features", "width"}:
            raise ValueError(f'vae.upsampler must have "features" and "width", not {sorted(self.upsampler)}.')
        if self.upsampler is not None and self.patch_size != 4:
            raise ValueError(f"vae.upsampler reads features of squares of 4 x 4 pixels, but patch_size is {self.patch_size}.")
        if self.preview_rgb is not None:
            rows = [*self.preview_rgb.get("factors", []), self.preview_rgb.get("bias", [])]
            if [len(row) for row in rows] != [3] * (self.embed_dim + 1):
                raise ValueError(f"preview_rgb must have {self.embed_dim} rows of 3 factors and a bias of 3 numbers.")

    @property
    def downscale(self) -> int:
        """Side of a latent cell in pixels."""
        return self.patch_size * 2 ** (len(self.ddconfig["ch_mult"]) - 1) * (1 if self.upsampler is None else 2)


@dataclass(frozen=True)
class CaptionConfig:
    """Configuration of the caption decoder; the defaults are the published one's.

    Attributes:
        gpt2: fields of transformers' GPT2Config.
        prefix_length: L, tokens of a text latent.
        prefix_dim: width of the CLIP text states, the input of the first Linear layer.
        hidden_dim: width of a text latent, between the two Linear layers.
        stop_token_id: id of the token that ends a caption.
        max_new_tokens: longest caption, in tokens.
    """

    gpt2: dict[str, Any] = field(default_factory=_gpt2_small)
    prefix_length: int = 77
    prefix_dim: int = 768
    hidden_dim: int = 64
    stop_token_id: int = 50257
    max_new_tokens: int = 67


@dataclass(frozen=True)
class ModelConfig:
    """Configuration of a whole model; `ModelConfig()` is UniDiffuser v1.

    Attributes:
        uvit: the diffusion network.
        vae: the autoencoder.
        clip_text: fields of transformers' CLIPTextConfig.
        clip_image: fields of CLIPVisionConfig, with "image_mean" and "image_std" ([3] each) and, for a convolutional patch
            embedding, the arguments of `small.stem.ConvStem` as "stem".
        caption: the caption decoder.
        image_size: side of the training images, in pixels.
        defaults: suggested "steps", "guidance" and, for image-caption pairs without a prompt, "speeds"; "task_steps" gives
            other steps for some of "text_to_image", "image_to_text", "joint", "image" and "text".
        vocabulary: words of the training captions; None if the checkpoint does not list them, as the published ones.
    """

    uvit: UViTConfig = field(default_factory=UViTConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    clip_text: dict[str, Any] = field(default_factory=_clip_l_text)
    clip_image: dict[str, Any] = field(default_factory=_clip_b32_image)
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    image_size: int = 512
    defaults: dict[str, Any] = field(default_factory=lambda: {"steps": 50, "guidance": 8.0})
    vocabulary: Vocabulary | None = None

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts, ready for JSON; without "vocabulary" if there is none."""
        data = dataclasses.asdict(dataclasses.replace(self, vocabulary=None))
        del data["vocabulary"]
        return data if self.vocabulary is None else {**data, "vocabulary": self.vocabulary.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`.

        Absent fields are those of v1; unknown ones, of newer versions, are ignored.

        Raises:
            ValueError: a section is no object, or sizes contradict each other.
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
        if data.get("vocabulary") is not None:
            sections["vocabulary"] = Vocabulary.from_dict(data["vocabulary"])
        return _build(cls, {**data, **sections})


def _build(kind: type[T], data: Mapping[str, Any]) -> T:
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in data.items() if name in known})


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    """A section read from JSON, with the tuples that JSON stored as lists."""
    return {name: tuple(value) if name == "img_size" and isinstance(value, list) else value for name, value in data.items()}


V1 = ModelConfig()
V0 = ModelConfig(uvit=UViTConfig(data_types=0))
