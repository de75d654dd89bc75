"""The original layout, both ways: uvit_v0.pth or uvit_v1.pth, autoencoder_kl.pth, caption_decoder.pth; CLIP from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import config as mc
from .config import ModelConfig
from .parts import LANDMARKS, Contents, Part, hf_fields, infer, make_part
from .weights import WeightFiles

if TYPE_CHECKING:
    pass

_SUFFIXES = (".pth", ".safetensors", ".pt", ".bin", ".ckpt")


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
        config = replace(config, uvit=infer(mc.infer_uvit, part))
    if (vae_path := _find(folder, "autoencoder_kl")) is not None:
        parts["vae"] = part = _named_part("vae", vae_path)
        config = replace(config, vae=infer(mc.infer_vae, part))
    if (caption_path := _find(folder, "caption_decoder")) is not None:
        parts["caption"] = part = _named_part("caption", caption_path)
        caption = replace(infer(mc.infer_caption, part), prefix_length=config.uvit.num_text_tokens)
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
        tower = text.shapes.get(LANDMARKS["clip_text"])
        if "clip_text" not in parts and tower is not None and tower.shape[1] == config.caption.prefix_dim:
            parts["clip_text"] = text
            fields = hf_fields(candidate.parent, "CLIPTextConfig", "text_config")
            config = replace(config, clip_text=infer(mc.infer_clip_text, text) | fields)
        projection = image.shapes.get("visual_projection.weight")
        if "clip_image" not in parts and projection is not None and projection.shape[0] == config.uvit.clip_img_dim:
            fields = hf_fields(candidate.parent, "CLIPVisionConfig", "vision_config")
            found = infer(mc.infer_clip_image, image) | fields
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
    if LANDMARKS[name] not in part.shapes:
        keys = ", ".join(list(part.source.shapes)[:3]) or "none"
        raise ValueError(f"{path} is not the weights of {name!r}: {LANDMARKS[name]} is missing (its keys: {keys}, ...).")
    return part
