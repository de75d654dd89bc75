"""Reader of the original layout: uvit_v0.pth or uvit_v1.pth, with its neighbours.

The neighbours are autoencoder_kl.pth, caption_decoder.pth and CLIP's two towers, which the published set does not include.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from . import sizes
from .config import ModelConfig
from .fields import IMAGE_HEADS, TEXT_HEADS, clip_fields
from .parts import IDENTIFYING_KEYS, TITLES, CheckpointContents, ModelPart, infer, make_part
from .weights import WeightFiles

_SUFFIXES = (".pth", ".safetensors", ".pt", ".bin", ".ckpt")


def read_original(path: Path) -> CheckpointContents:
    """Read the original layout from a folder, or from its uvit_v0.pth or uvit_v1.pth.

    CLIP is searched for in all weight files of the folder and of its subfolders: a text tower of the width that the caption
    decoder takes, and an image tower whose projection has the width that the U-ViT takes.

    Raises:
        ValueError: a file is damaged or holds something else, or there are two networks.
    """
    folder = path if path.is_dir() else path.parent
    uvit_path = path if path.is_file() else _the_uvit(folder)
    config, parts, skipped = ModelConfig(), {}, []

    if uvit_path is not None:
        parts["uvit"] = part = _checked_part("uvit", uvit_path)
        config = replace(config, uvit=infer(sizes.infer_uvit, part))
    if (vae_path := _find(folder, "autoencoder_kl")) is not None:
        parts["vae"] = part = _checked_part("vae", vae_path)
        config = replace(config, vae=infer(sizes.infer_vae, part))
    if (caption_path := _find(folder, "caption_decoder")) is not None:
        parts["caption"] = part = _checked_part("caption", caption_path)
        caption = replace(infer(sizes.infer_caption, part), prefix_length=config.uvit.num_text_tokens)
        config = replace(config, caption=caption)
    height, _ = config.uvit.latent_size
    config = replace(config, image_size=height * config.vae.downscale)

    known = {uvit_path, vae_path, caption_path}
    for candidate in _clip_candidates(folder, known):
        try:
            files = WeightFiles(candidate)
        except ValueError as error:
            skipped.append(str(error))
            continue
        text, image = make_part("clip_text", files), make_part("clip_image", files)
        tower = text.shapes.get(IDENTIFYING_KEYS["clip_text"])
        if "clip_text" not in parts and tower is not None and tower.shape[1] == config.caption.prefix_dim:
            parts["clip_text"] = text
            fields = clip_fields(candidate.parent, "text_config", TEXT_HEADS)
            config = replace(config, clip_text=infer(sizes.infer_clip_text, text) | fields)
        projection = image.shapes.get("visual_projection.weight")
        if "clip_image" not in parts and projection is not None and projection.shape[0] == config.uvit.clip_img_dim:
            fields = clip_fields(candidate.parent, "vision_config", IMAGE_HEADS)
            found = infer(sizes.infer_clip_image, image) | fields
            if found["patch_size"] != 16:  # ViT-B/16 projects to 512 as well, but the model was trained with B/32
                parts["clip_image"] = image
                config = replace(config, clip_image=found)
    return CheckpointContents(config, parts, skipped=tuple(skipped))


def _the_uvit(folder: Path) -> Path | None:
    found = [path for stem in ("uvit_v0", "uvit_v1", "uvit") if (path := _find(folder, stem)) is not None]
    if len(found) > 1:
        raise ValueError(f"{folder} has {found[0].name} and {found[1].name}; give the path of the one you want.")
    return found[0] if found else None


def _find(folder: Path, stem: str) -> Path | None:
    return next((path for suffix in _SUFFIXES if (path := folder / (stem + suffix)).is_file()), None)


def _clip_candidates(folder: Path, known: set[Path | None]) -> Iterator[Path]:
    for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        for suffixes in ((".safetensors",), (".bin", ".pt", ".pth")):  # folders often hold the same weights in both formats
            found = sorted(path for path in place.iterdir() if _is_weights(path, suffixes) and path not in known)
            yield from found
            if found:
                break


def _is_weights(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.suffix in suffixes and not path.name.startswith(".")  # macOS leaves a "._a.pth" beside "a.pth"


def _checked_part(name: str, path: Path) -> ModelPart:
    part = make_part(name, WeightFiles(path))
    if IDENTIFYING_KEYS[name] not in part.shapes:
        keys = ", ".join(list(part.source.shapes)[:3]) or "none"
        raise ValueError(
            f"{path} does not hold the weights of the {TITLES[name]}: {IDENTIFYING_KEYS[name]} is missing (its keys: {keys}, "
            f"...)."
        )
    return part
