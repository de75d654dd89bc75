"""Checks of a node's LATENT and CLIP_VISION_OUTPUT against the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..unidiffuser.uvit import UViTConfig

LARGEST = 3  # largest area of a latent, in multiples of the trained one


def check_image_latent(latent: Tensor, config: UViTConfig, downscale: int) -> None:
    """Check that a LATENT fits the network.

    `downscale` is the number of pixels per latent cell, along a side.

    Raises:
        ValueError: it has the wrong channels, is too large, or its sides are not multiples of the patch size.
    """
    patch, (rows, columns) = config.patch_size, config.latent_size
    if latent.ndim != 4 or latent.shape[1] != config.in_chans:
        raise ValueError(
            f"The LATENT is {tuple(latent.shape)}, but UniDiffuser needs {config.in_chans} channels, as Stable Diffusion 1.x. "
            f"Use 'Empty Latent Image', or VAE Encode with the VAE output of 'Load UniDiffuser'."
        )
    height, width = latent.shape[2:]
    if height * width > LARGEST * rows * columns:
        raise ValueError(
            f"The LATENT is one of {width * downscale} x {height * downscale} pixels; this model was trained on "
            f"{columns * downscale} x {rows * downscale} and fails above {LARGEST} times that area. Use a "
            f"smaller 'Empty Latent Image', or scale the image down before VAE Encode."
        )
    if height % patch or width % patch:
        raise ValueError(
            f"The LATENT is one of {width * downscale} x {height * downscale} pixels; this model needs sides that are "
            f"multiples of {patch * downscale} pixels."
        )


def clip_token(conditioning: Sequence[dict[str, Any]], batch: int, width: int) -> Tensor | None:
    """The CLIP image token (B, 1, width) of a conditioning, or None if it has none.

    Raises:
        ValueError: the token is of another CLIP vision model.
    """
    for cond in conditioning:
        for entry in cond.get("unclip_conditioning", []):
            return clip_vision_token(entry["clip_vision_output"], batch, width)
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
