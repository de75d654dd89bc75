"""Reader of diffusers folders, as UniDiffuserPipeline saves them.

A folder holds model_index.json and unet/, vae/, text_encoder/, image_encoder/, text_decoder/, clip_tokenizer/, text_tokenizer/.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..media.json_files import brief, read_object
from . import sizes
from .config import ModelConfig
from .fields import IMAGE_HEADS, TEXT_HEADS, clip_fields, field_of
from .parts import IDENTIFYING_KEYS, TITLES, CheckpointContents, ModelPart, infer, make_part
from .tokenizers import read_spec
from .weights import find_weights

FOLDERS = {
    "uvit": ("unet", "diffusion_pytorch_model"),
    "vae": ("vae", "diffusion_pytorch_model"),
    "clip_text": ("text_encoder", "model"),
    "clip_image": ("image_encoder", "model"),
    "caption": ("text_decoder", "diffusion_pytorch_model"),
}
_UNET_SETTINGS = {  # diffusers' network equals the published one under these only
    "activation_fn": "gelu", "block_type": "unidiffuser", "pre_layer_norm": False, "use_timestep_embedding": False,
    "use_patch_pos_embed": False, "norm_type": "layer_norm",
}  # fmt: skip


def read_diffusers(folder: Path) -> CheckpointContents:
    """Read a folder that UniDiffuserPipeline saved; parts may be absent.

    Raises:
        FileNotFoundError: a shard or a part's config.json is missing.
        ValueError: a file is damaged, or no part of a UniDiffuser.
    """
    config, parts = ModelConfig(), {}
    for name, (sub, stem) in FOLDERS.items():
        files = find_weights(folder / sub, stem) or find_weights(folder / sub, "pytorch_model")
        if files is None:
            continue
        parts[name] = part = make_part(name, files)
        if IDENTIFYING_KEYS[name] not in part.shapes:
            raise ValueError(
                f"{files.name} is not the {TITLES[name]} of a UniDiffuser: it has no tensor for {IDENTIFYING_KEYS[name]}."
            )
        settings = read_object(folder / sub / "config.json") if (folder / sub / "config.json").is_file() else None
        if settings is None:
            raise FileNotFoundError(f"{folder / sub / 'config.json'} is missing; download it too.")
        config = _SETTINGS[name](config, part, settings, folder)
    if "vae" in parts or "uvit" in parts:
        config = replace(config, image_size=config.uvit.latent_size[0] * config.vae.downscale)
    specs = {"clip_tokenizer": read_spec(folder / "clip_tokenizer"), "gpt2_tokenizer": read_spec(folder / "text_tokenizer")}
    return CheckpointContents(config, parts, {name: spec for name, spec in specs.items() if spec is not None})


def _uvit_settings(config: ModelConfig, part: ModelPart, settings: dict[str, Any], folder: Path) -> ModelConfig:
    for name, wanted in _UNET_SETTINGS.items():
        if settings.get(name, wanted) != wanted:
            raise ValueError(
                f"{folder / 'unet'} is another network: its {name} is {brief(settings[name])}, UniDiffuser's {wanted!r}."
            )
    tokens = field_of(folder / "unet", settings, "num_text_tokens", 1, 77)
    heads = field_of(folder / "unet", settings, "num_attention_heads", 1)
    uvit = infer(lambda shapes: sizes.infer_uvit(shapes, tokens), part)
    return replace(config, uvit=infer(lambda shapes: replace(uvit, num_heads=heads), part))


def _vae_settings(config: ModelConfig, part: ModelPart, settings: dict[str, Any], folder: Path) -> ModelConfig:
    if settings.get("norm_num_groups", 32) != 32:
        raise ValueError(f"{folder / 'vae'}: norm_num_groups must be 32, as in latent diffusion's autoencoder.")
    vae = infer(sizes.infer_vae, part)
    return replace(
        config, vae=replace(vae, scale_factor=field_of(folder / "vae", settings, "scaling_factor", 0.5, vae.scale_factor))
    )


def _clip_text_settings(config: ModelConfig, part: ModelPart, settings: dict[str, Any], folder: Path) -> ModelConfig:
    fields = clip_fields(folder / "text_encoder", "text_config", TEXT_HEADS)
    return replace(config, clip_text=infer(sizes.infer_clip_text, part) | fields)


def _clip_image_settings(config: ModelConfig, part: ModelPart, settings: dict[str, Any], folder: Path) -> ModelConfig:
    fields = clip_fields(folder / "image_encoder", "vision_config", IMAGE_HEADS)
    for processor in sorted(folder.glob("*/preprocessor_config.json")):
        data = read_object(processor)
        fields |= {name: field_of(processor.parent, data, name, [0.5]) for name in ("image_mean", "image_std") if name in data}
    return replace(config, clip_image=infer(sizes.infer_clip_image, part) | fields)


def _caption_settings(config: ModelConfig, part: ModelPart, settings: dict[str, Any], folder: Path) -> ModelConfig:
    caption = infer(sizes.infer_caption, part)
    # NOTE: the activation stays gelu_new, with which the decoder was trained; diffusers' conversion of the published weights
    # names another one.
    sub = folder / "text_decoder"
    gpt2 = caption.gpt2 | {
        "n_head": field_of(sub, settings, "n_head", 1),
        "layer_norm_epsilon": field_of(sub, settings, "layer_norm_epsilon", 1e-5, 1e-5),
    }
    return replace(config, caption=replace(caption, gpt2=gpt2, prefix_length=field_of(sub, settings, "prefix_length", 1)))


_SETTINGS: dict[str, Callable[[ModelConfig, ModelPart, dict[str, Any], Path], ModelConfig]] = {
    "uvit": _uvit_settings,
    "vae": _vae_settings,
    "clip_text": _clip_text_settings,
    "clip_image": _clip_image_settings,
    "caption": _caption_settings,
}
