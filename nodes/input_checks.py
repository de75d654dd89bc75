"""Checks of a node's LATENT, CONDITIONING and CLIP_VISION_OUTPUT against the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..unidiffuser.schedule import NUM_LABELS
from ..unidiffuser.uvit import UViTConfig

USUAL, LARGEST = 2, 16  # area of a latent in multiples of the trained one: more gets a warning, is refused
LONG = 1.75  # a side in multiples of the trained one, from which there is a warning too
SECOND_PASS, ENLARGED = 350, 4  # up to this label and area the picture that is there keeps its shapes
START_FROM_IT = "start from it: VAE Encode, and a denoise below 1 or a path that starts below 1000"


def check_image_latent(
    latent: Tensor,
    config: UViTConfig,
    downscale: int,
    conditions: Sequence[Mapping[str, Any]],
    tiled: bool,
    start: float,
) -> str | None:
    """Check that a LATENT fits the network; returns a warning for one that is large or long.

    Args:
        latent: the samples.
        config: sizes of the network.
        downscale: pixels per latent cell, along a side.
        conditions: the texts that guide it. If all have areas of usual size, that of the latent does not matter.
        tiled: a patch of the MODEL samples it in tiles, so its area is not limited.
        start: label at which the sampling begins. Below `NUM_LABELS` tiles follow the picture in the latent, so its size does
            not matter to them, and a second pass over an enlarged picture keeps it.

    Raises:
        ValueError: it has the wrong channels, is too large, its sides are not multiples of the patch size, or an area of a
            text lies outside of it.
    """
    patch, (rows, columns) = config.patch_size, config.latent_size
    if latent.ndim != 4 or latent.shape[1] != config.in_chans:
        raise ValueError(
            f"The LATENT is {tuple(latent.shape)}, but UniDiffuser needs {config.in_chans} channels, as Stable Diffusion 1.x. "
            f"Use 'Empty Latent Image', or VAE Encode with the VAE output of 'Load UniDiffuser'."
        )
    height, width = latent.shape[2:]
    area, in_areas = height * width / (rows * columns), _in_areas(conditions, latent, config)
    size = f"The LATENT is one of {width * downscale} x {height * downscale} pixels; this model"
    trained = f"was trained on {columns * downscale} x {rows * downscale}"
    if area > LARGEST and not (tiled or in_areas):
        raise ValueError(
            f"{size} {trained} and fails above {LARGEST} times that area. Use a smaller 'Empty Latent Image', or scale the "
            f"image down before VAE Encode."
        )
    _check_areas(conditions, height, width)
    if height % patch or width % patch:
        raise ValueError(f"{size} needs sides that are multiples of {patch * downscale} pixels.")
    kept = start < NUM_LABELS and (tiled or (start <= SECOND_PASS and area <= ENLARGED))
    if _is_large(height, width, config) and not in_areas and not kept:
        return (
            f"{size} {trained}, so objects may repeat or stretch. Better: sample at that size, scale the latent up, and sample "
            f"again with denoise 0.2 to 0.35."
        )
    return None


def _check_areas(conditions: Sequence[Mapping[str, Any]], height: int, width: int) -> None:
    for area in filter(None, (condition.get("area") for condition in conditions)):
        bottom, right = (1, 1) if area[0] == "percentage" else (height, width)
        if area[-2] >= bottom or area[-1] >= right:
            raise ValueError(
                "The area of a prompt lies outside of the image. Move it into the image, with x and y of 'Conditioning (Set "
                "Area)'."
            )


def _in_areas(conditions: Sequence[Mapping[str, Any]], latent: Tensor, config: UViTConfig) -> bool:
    """Whether all texts have an area of about the trained size, so that a large image is sampled in usual parts."""
    for condition in conditions:
        area = condition.get("area")
        if area is None:
            return False
        parts = area[0] == "percentage"
        height, width = (area[1] * latent.shape[2], area[2] * latent.shape[3]) if parts else area[:2]
        if _is_large(height, width, config):
            return False
    return bool(conditions)


def _is_large(height: float, width: float, config: UViTConfig) -> bool:
    rows, columns = config.latent_size
    return height * width > USUAL * rows * columns or max(height / rows, width / columns) >= LONG


def clip_token(conditioning: Sequence[dict[str, Any]], batch: int, width: int) -> Tensor | None:
    """The CLIP image token (B, 1, width) of a conditioning, or None if it has none.

    Raises:
        ValueError: the token is of another CLIP vision model.
    """
    for cond in conditioning:
        for entry in cond.get("unclip_conditioning", []):
            return clip_vision_token(entry["clip_vision_output"], batch, width)
    return None


def unclip_warning(conditioning: Sequence[Mapping[str, Any]], from_noise: bool) -> str | None:
    """A warning of what 'unCLIPConditioning' asks for and this model cannot do.

    It follows one image, with all of it, and from pure noise loosely: the embedding then starts as noise, like the image.
    """
    entries = [entry for cond in conditioning for entry in cond.get("unclip_conditioning", [])]
    told, images = [], {id(entry["clip_vision_output"]) for entry in entries}
    if len(images) > 1 or any(entry["strength"] != 1 or entry["noise_augmentation"] for entry in entries):
        told.append(
            "UniDiffuser follows the image of the first 'unCLIPConditioning' only, without its strength and "
            "noise_augmentation: they, and further images, have no effect."
        )
    if entries and from_noise:
        told.append(
            "An image that starts from noise follows 'unCLIPConditioning' loosely or not at all: UniDiffuser adds noise to the "
            "CLIP embedding too."
        )
    if not told:
        return None
    return " ".join([*told, "To vary an image, caption it with 'Caption Picture' and use the caption as the prompt."])


def ignored_unclip_warning(texts: Sequence[Mapping[str, Any]]) -> str | None:
    """A warning of 'unCLIPConditioning' in front of a node that takes the CLIP embedding by an input of its own."""
    if not any(text.get("unclip_conditioning") for text in texts):
        return None
    return (
        "'unCLIPConditioning' has no effect here. To start from an image, connect its CLIP_VISION_OUTPUT to "
        "clip_vision_output; to vary it, caption it with 'Caption Picture' and use the caption as the prompt."
    )


def check_conditioning(texts: Iterable[Mapping[str, Any]]) -> str | None:
    """Check what nodes have attached to texts; returns a warning of what has no effect.

    Raises:
        ValueError: a ControlNet, which computes changes for the layers of a U-Net.
    """
    keys = {key for text in texts for key, value in text.items() if value is not None}
    if "control" in keys:
        raise ValueError(
            "A ControlNet changes the layers of a U-Net, which UniDiffuser does not have. Remove 'Apply ControlNet' from the "
            f"prompt; to keep the shapes of an image, {START_FROM_IT}."
        )
    if "reference_latents" in keys:
        return f"'ReferenceLatent' has no effect on UniDiffuser. To vary an image, {START_FROM_IT}."
    return None


def clip_vision_token(output: Any, batch: int, width: int) -> Tensor:
    """The CLIP image token (B, 1, width) of a CLIP_VISION_OUTPUT, repeated over the batch.

    Raises:
        ValueError: the token is of another CLIP vision model.
    """
    embeds = output["image_embeds"]
    if embeds.shape[-1] != width:
        raise ValueError(
            f"The CLIP_VISION_OUTPUT has {embeds.shape[-1]} channels, but this model needs {width}. Use CLIP Vision Encode "
            f"with the CLIP_VISION output of 'Load UniDiffuser'."
        )
    token = embeds.float().cpu().reshape(-1, 1, width)
    return token.repeat(-(-batch // token.shape[0]), 1, 1)[:batch]
