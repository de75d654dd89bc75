"""Reader of diffusers folders, as UniDiffuserPipeline saves them.

A folder holds model_index.json and unet/, vae/, text_encoder/, image_encoder/, text_decoder/, clip_tokenizer/, text_tokenizer/.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import sizes
from .config import ModelConfig
from .parts import IDENTIFYING_KEYS, TITLES, CheckpointContents, ModelPart, hf_fields, infer, make_part
from .tokenizers import read_spec
from .weights import find_weights, read_json

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
        settings = read_json(folder / sub / "config.json") if (folder / sub / "config.json").is_file() else None
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
                f"{folder / 'unet'} is another network: its {name} is {settings[name]!r}, UniDiffuser's {wanted!r}."
            )
    uvit = infer(lambda shapes: sizes.infer_uvit(shapes, settings.get("num_text_tokens", 77)), part)
    return replace(config, uvit=replace(uvit, num_heads=settings["num_attention_heads"]))


def _vae_settings(config: ModelConfig, part: ModelPart, settings: dict[str, Any], folder: Path) -> ModelConfig:
    if settings.get("norm_num_groups", 32) != 32:
        raise ValueError(f"{folder / 'vae'}: norm_num_groups must be 32, as in latent diffusion's autoencoder.")
    vae = infer(sizes.infer_vae, part)
    return replace(config, vae=replace(vae, scale_factor=settings.get("scaling_factor", vae.scale_factor)))


def _clip_text_settings(config: ModelConfig, part: ModelPart, settings: dict[str, Any], folder: Path) -> ModelConfig:
    fields = hf_fields(folder / "text_encoder", "CLIPTextConfig", "text_config")
    return replace(config, clip_text=infer(sizes.infer_clip_text, part) | fields)


def _clip_image_settings(config: ModelConfig, part: ModelPart, settings: dict[str, Any], folder: Path) -> ModelConfig:
    fields = hf_fields(folder / "image_encoder", "CLIPVisionConfig", "vision_config")
    for processor in sorted(folder.glob("*/preprocessor_config.json")):
        data = read_json(processor)
        fields |= {name: data[name] for name in ("image_mean", "image_std") if name in data}
    return replace(config, clip_image=infer(sizes.infer_clip_image, part) | fields)


def _caption_settings(config: ModelConfig, part: ModelPart, settings: dict[str, Any], folder: Path) -> ModelConfig:
    caption = infer(sizes.infer_caption, part)
    # NOTE: the activation stays gelu_new, with which the decoder was trained; diffusers' conversion of the published weights
    # names another one.
    gpt2 = caption.gpt2 | {"n_head": settings["n_head"], "layer_norm_epsilon": settings.get("layer_norm_epsilon", 1e-5)}
    return replace(config, caption=replace(caption, gpt2=gpt2, prefix_length=settings["prefix_length"]))


_SETTINGS: dict[str, Callable[[ModelConfig, ModelPart, dict[str, Any], Path], ModelConfig]] = {
    "uvit": _uvit_settings,
    "vae": _vae_settings,
    "clip_text": _clip_text_settings,
    "clip_image": _clip_image_settings,
    "caption": _caption_settings,
}
