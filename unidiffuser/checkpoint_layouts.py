"""Reading the three layouts of a checkpoint: this project's single file, the original files, a diffusers folder.

Each reader finds the files, gives their tensors canonical names (checkpoint_keys.py) and sizes (model_config.py), and
leaves out what is not there: a checkpoint without, say, a caption decoder still makes pictures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import model_config as mc
from .checkpoint_keys import PARTS, RECIPES, Recipe, Recipes, apply
from .model_config import ModelConfig
from .tokenizers import Spec, read_spec
from .weights import WeightFiles, find_weights, read_json, shape_of, windows

FORMAT = "unidiffuser"
TOKENIZERS = ("clip_tokenizer", "gpt2_tokenizer")
_TIED = "gpt.lm_head.weight"


class InMemory:
    """Tensors in memory behind the interface of WeightFiles."""

    name = "the given state dict"

    def __init__(self, tensors: dict[str, Tensor]):
        self.shapes = tensors

    def open(self) -> dict[str, Tensor]:
        return self.shapes


class Part:
    """The tensors of one part under canonical names, made from stored ones when asked for.

    `shapes` has a "meta" tensor (shape and dtype) for each name.
    """

    def __init__(self, source: WeightFiles | InMemory, recipes: Recipes):
        self.source, self.recipes = source, recipes
        self.shapes = apply(recipes, {key: shape_of(tensor) for key, tensor in source.shapes.items()})

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, memory-mapped where the source is a file."""
        return apply(self.recipes, self.source.open())

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) in the given order, through mappings so short-lived that little of the file stays resident."""
        sizes = {name: self.shapes[name].numel() * self.shapes[name].element_size() for name in names}
        for group in windows(sizes):
            stored = self.source.open()
            for name in group:
                yield name, self.recipes[name].make(*(stored[key] for key in self.recipes[name].keys))


@dataclass(frozen=True)
class Contents:
    """What a reader found. `notes` tell why files that might have helped were passed over."""

    config: ModelConfig
    parts: dict[str, Part]
    tokenizers: dict[str, Spec] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def make_part(name: str, source: WeightFiles | InMemory) -> Part:
    """A part from tensors in any dialect. GPT-2's output matrix is left out where it equals the input embedding."""
    part = Part(source, RECIPES[name](source.shapes))
    if name == "caption" and _TIED in part.recipes:
        both = (part.recipes[key].keys[0] for key in (_TIED, "gpt.transformer.wte.weight"))
        stored = source.open()
        head, embedding = (stored.get(key) for key in both)
        if head is not None and embedding is not None and torch.equal(head, embedding):
            part = Part(source, {key: recipe for key, recipe in part.recipes.items() if key != _TIED})
    return part


# ---- This project's file --------------------------------------------------------------------------------------------


def read_own(files: WeightFiles, metadata: dict[str, str]) -> Contents:
    """The single safetensors file that `save_checkpoint` writes."""
    if metadata.get("version") != "1":
        raise ValueError(f"{files.name} has format version {metadata.get('version')!r}; this release reads 1. Update it.")
    try:
        config = ModelConfig.from_dict(json.loads(metadata["config"]))
        tokenizers = {name: json.loads(metadata[name]) for name in TOKENIZERS if name in metadata}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the metadata of {files.name} is damaged ({error}); convert it again.") from error
    parts = {}
    for name in PARTS:
        prefix = name + "."
        recipes = {key.removeprefix(prefix): Recipe((key,)) for key in files.shapes if key.startswith(prefix)}
        if recipes:
            parts[name] = Part(files, recipes)
    return Contents(config, parts, tokenizers)


# ---- Original files -------------------------------------------------------------------------------------------------

_SUFFIXES = (".pth", ".safetensors", ".pt", ".bin", ".ckpt")
_LANDMARKS = {  # a tensor every part of that kind has
    "uvit": "pos_embed",
    "vae": "decoder.conv_out.weight",
    "clip_text": "text_model.embeddings.token_embedding.weight",
    "clip_image": "vision_model.embeddings.patch_embedding.weight",
    "caption": "encode_prefix.weight",
}


def read_original(path: Path) -> Contents:
    """uvit_v0.pth or uvit_v1.pth with its neighbours: a folder with one of them, or the file itself.

    CLIP was never part of the published set: a text tower as wide as the caption decoder expects and an image tower that
    projects to what the U-ViT expects are looked for in all weight files beside and one folder below.
    """
    folder = path if path.is_dir() else path.parent
    uvit_path = path if path.is_file() else _the_uvit(folder)
    config, parts, notes = ModelConfig(), {}, []

    if uvit_path is not None:
        parts["uvit"] = part = _named_part("uvit", uvit_path)
        config = replace(config, uvit=_infer(mc.infer_uvit, part))
    if (vae_path := _find(folder, "autoencoder_kl")) is not None:
        parts["vae"] = part = _named_part("vae", vae_path)
        config = replace(config, vae=_infer(mc.infer_vae, part))
    if (caption_path := _find(folder, "caption_decoder")) is not None:
        parts["caption"] = part = _named_part("caption", caption_path)
        caption = replace(_infer(mc.infer_caption, part), prefix_length=config.uvit.num_text_tokens)
        config = replace(config, caption=caption)
    height, _ = config.uvit.latent_size
    config = replace(config, image_size=height * config.vae.downscale)

    known = {uvit_path, vae_path, caption_path}
    for candidate in _clip_candidates(folder, known):
        try:
            files = WeightFiles(candidate)
        except ValueError as error:
            notes.append(str(error))
            continue
        text, image = make_part("clip_text", files), make_part("clip_image", files)
        tower = text.shapes.get(_LANDMARKS["clip_text"])
        if "clip_text" not in parts and tower is not None and tower.shape[1] == config.caption.prefix_dim:
            parts["clip_text"] = text
            fields = _hf_fields(candidate.parent, "CLIPTextConfig", "text_config")
            config = replace(config, clip_text=_infer(mc.infer_clip_text, text) | fields)
        projection = image.shapes.get("visual_projection.weight")
        if "clip_image" not in parts and projection is not None and projection.shape[0] == config.uvit.clip_img_dim:
            fields = _hf_fields(candidate.parent, "CLIPVisionConfig", "vision_config")
            found = _infer(mc.infer_clip_image, image) | fields
            if found["patch_size"] != 16:  # ViT-B/16 projects to 512 as well; the published model was trained with B/32
                parts["clip_image"] = image
                config = replace(config, clip_image=found)
    return Contents(config, parts, notes=tuple(notes))


def _the_uvit(folder: Path) -> Path | None:
    found = [path for stem in ("uvit_v0", "uvit_v1", "uvit") if (path := _find(folder, stem)) is not None]
    if len(found) > 1:
        raise ValueError(f"{folder} has {found[0].name} and {found[1].name}: give the path of the one you want.")
    return found[0] if found else None


def _find(folder: Path, stem: str) -> Path | None:
    return next((path for suffix in _SUFFIXES if (path := folder / (stem + suffix)).is_file()), None)


def _clip_candidates(folder: Path, known: set[Path | None]) -> Iterator[Path]:
    for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        for suffixes in ((".safetensors",), (".bin", ".pt", ".pth")):  # HF folders hold the same weights in both kinds
            found = sorted(path for path in place.iterdir() if path.suffix in suffixes and path not in known)
            yield from found
            if found:
                break


def _named_part(name: str, path: Path) -> Part:
    part = make_part(name, WeightFiles(path))
    if _LANDMARKS[name] not in part.shapes:
        keys = ", ".join(list(part.source.shapes)[:3]) or "none"
        raise ValueError(f"{path} is not the weights of {name!r}: {_LANDMARKS[name]} is missing (its keys: {keys}, ...).")
    return part


def _infer(infer: Callable[..., Any], part: Part) -> Any:
    try:
        return infer(part.shapes)
    except KeyError as error:
        raise ValueError(f"{part.source.name} is incomplete: {error.args[0]} is missing.") from error
    except ValueError as error:
        raise ValueError(f"{part.source.name}: {error}") from error


def _hf_fields(folder: Path, kind: str, section: str) -> dict[str, Any]:
    """The fields a transformers config.json settles that shapes do not; {} without one."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    import transformers

    data = read_json(path)
    config = getattr(transformers, kind)(**data.get(section, data)).to_dict()
    return {name: config[name] for name in ("num_attention_heads", "hidden_act", "layer_norm_eps")}


# ---- diffusers folder -----------------------------------------------------------------------------------------------

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
        if _LANDMARKS[name] not in part.shapes:
            raise ValueError(f"{files.name} is not the {name!r} of a UniDiffuser: {_LANDMARKS[name]} cannot be made of it.")
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
    uvit = _infer(lambda shapes: mc.infer_uvit(shapes, settings.get("num_text_tokens", 77)), part)
    return replace(config, uvit=replace(uvit, num_heads=settings["num_attention_heads"]))


def _vae_settings(config: ModelConfig, part: Part, settings: dict[str, Any], folder: Path) -> ModelConfig:
    if settings.get("norm_num_groups", 32) != 32:
        raise ValueError(f"{folder / 'vae'}: norm_num_groups must be 32, as in latent diffusion's autoencoder.")
    vae = _infer(mc.infer_vae, part)
    return replace(config, vae=replace(vae, scale_factor=settings.get("scaling_factor", vae.scale_factor)))


def _clip_text_settings(config: ModelConfig, part: Part, settings: dict[str, Any], folder: Path) -> ModelConfig:
    fields = _hf_fields(folder / "text_encoder", "CLIPTextConfig", "text_config")
    return replace(config, clip_text=_infer(mc.infer_clip_text, part) | fields)


def _clip_image_settings(config: ModelConfig, part: Part, settings: dict[str, Any], folder: Path) -> ModelConfig:
    fields = _hf_fields(folder / "image_encoder", "CLIPVisionConfig", "vision_config")
    for processor in sorted(folder.glob("*/preprocessor_config.json")):
        data = read_json(processor)
        fields |= {name: data[name] for name in ("image_mean", "image_std") if name in data}
    return replace(config, clip_image=_infer(mc.infer_clip_image, part) | fields)


def _caption_settings(config: ModelConfig, part: Part, settings: dict[str, Any], folder: Path) -> ModelConfig:
    caption = _infer(mc.infer_caption, part)
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
