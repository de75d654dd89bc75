"""The layout of a diffusers folder: model_index.json, unet/, vae/, text_encoder/, image_encoder/, text_decoder/, tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import config as mc
from .config import ModelConfig
from .parts import LANDMARKS, Contents, Part, hf_fields, infer, make_part
from .tokenizers import read_spec
from .weights import find_weights, read_json

_FOLDERS = {
    "uvit": ("unet", "diffusion_pytorch_model"),
    "vae": ("vae", "diffusion_pytorch_model"),
    "clip_text": ("text_encoder", "model"),
    "clip_image": ("image_encoder", "model"),
    "caption": ("text_decoder", "diffusion_pytorch_model"),
}
_UNET_MUST = {  # the only settings under which diffusers' network is UniDiffuser's
    "activation_fn": "gelu", "block_type": "unidiffuser", "pre_layer_norm": False, "use_timestep_embedding": False,
    "use_patch_pos_embed": False, "norm_type": "layer_norm",
}  # fmt: skip


def read_diffusers(folder: Path) -> Contents:
    """A folder that diffusers' UniDiffuserPipeline saved, whole or in part."""
    config, parts = ModelConfig(), {}
    for name, (sub, stem) in _FOLDERS.items():
        files = find_weights(folder / sub, stem) or find_weights(folder / sub, "pytorch_model")
        if files is None:
            continue
        parts[name] = part = make_part(name, files)
        if LANDMARKS[name] not in part.shapes:
            raise ValueError(f"{files.name} is not the {name!r} of a UniDiffuser: {LANDMARKS[name]} cannot be made of it.")
        settings = read_json(folder / sub / "config.json") if (folder / sub / "config.json").is_file() else None
        if settings is None:
            raise FileNotFoundError(f"{folder / sub / 'config.json'} is missing; download it too.")
        config = _SETTINGS[name](config, part, settings, folder)
    if "vae" in parts or "uvit" in parts:
        config = replace(config, image_size=config.uvit.latent_size[0] * config.vae.downscale)
    specs = {"clip_tokenizer": read_spec(folder / "clip_tokenizer"), "gpt2_tokenizer": read_spec(folder / "text_tokenizer")}
    return Contents(config, parts, {name: spec for name, spec in specs.items() if spec is not None})


def _uvit_settings(config: ModelConfig, part: Part, settings: dict[str, Any], folder: Path) -> ModelConfig:
    for name, wanted in _UNET_MUST.items():
        if settings.get(name, wanted) != wanted:
            raise ValueError(f"{folder / 'unet'}: {name}={settings[name]!r} is not UniDiffuser's network ({wanted!r}).")
    uvit = infer(lambda shapes: mc.infer_uvit(shapes, settings.get("num_text_tokens", 77)), part)
    return replace(config, uvit=replace(uvit, num_heads=settings["num_attention_heads"]))


def _vae_settings(config: ModelConfig, part: Part, settings: dict[str, Any], folder: Path) -> ModelConfig:
    if settings.get("norm_num_groups", 32) != 32:
        raise ValueError(f"{folder / 'vae'}: norm_num_groups must be 32, as in latent diffusion's autoencoder.")
    vae = infer(mc.infer_vae, part)
    return replace(config, vae=replace(vae, scale_factor=settings.get("scaling_factor", vae.scale_factor)))


def _clip_text_settings(config: ModelConfig, part: Part, settings: dict[str, Any], folder: Path) -> ModelConfig:
    fields = hf_fields(folder / "text_encoder", "CLIPTextConfig", "text_config")
    return replace(config, clip_text=infer(mc.infer_clip_text, part) | fields)


def _clip_image_settings(config: ModelConfig, part: Part, settings: dict[str, Any], folder: Path) -> ModelConfig:
    fields = hf_fields(folder / "image_encoder", "CLIPVisionConfig", "vision_config")
    for processor in sorted(folder.glob("*/preprocessor_config.json")):
        data = read_json(processor)
        fields |= {name: data[name] for name in ("image_mean", "image_std") if name in data}
    return replace(config, clip_image=infer(mc.infer_clip_image, part) | fields)


def _caption_settings(config: ModelConfig, part: Part, settings: dict[str, Any], folder: Path) -> ModelConfig:
    caption = infer(mc.infer_caption, part)
    # NOTE: the activation stays gelu_new, whatever the folder says: the decoder was trained with it, and diffusers'
    # conversion of the published weights names another one.
    gpt2 = caption.gpt2 | {"n_head": settings["n_head"], "layer_norm_epsilon": settings.get("layer_norm_epsilon", 1e-5)}
    return replace(config, caption=replace(caption, gpt2=gpt2, prefix_length=settings["prefix_length"]))


_SETTINGS: dict[str, Callable[[ModelConfig, Part, dict[str, Any], Path], ModelConfig]] = {
    "uvit": _uvit_settings,
    "vae": _vae_settings,
    "clip_text": _clip_text_settings,
    "clip_image": _clip_image_settings,
    "caption": _caption_settings,
}
