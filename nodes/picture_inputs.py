"""Pictures of any size, cropped or padded to a size that the model takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..unidiffuser.media.images import fit
from .input_checks import LARGEST
from .stream_inputs import require_model

FITS = {
    "crop": "cuts out the centre square",
    "pad": "adds white borders to make it square",
    "keep shape": "keeps the shape with about the same number of pixels",
}
BATCH = 16  # pictures that are encoded or captioned at once


@dataclass(frozen=True)
class Frame:
    """Where a picture goes: `width` x `height` pixels, filled by cropping, or by white borders if `padded`."""

    width: int
    height: int
    padded: bool = False

    @classmethod
    def of(cls, model: Any, image: Tensor, how: str, size: int = 0) -> Frame:
        """The frame for an IMAGE (B, H, W, C).

        Args:
            model: the MODEL, which gives the sides' multiple and the trained size.
            image: the pictures.
            how: one of `FITS`.
            size: side of the square in pixels, rounded to the next legal one; 0 means the trained size.

        Raises:
            ValueError: more than `LARGEST` times the trained area.
        """
        host = require_model(model)
        config, cell = host.diffusion_model.config, host.latent_format.spacial_downscale_ratio
        step, trained = cell * config.patch_size, math.prod(config.latent_size) * cell**2
        side = size or math.sqrt(trained)
        ratio = image.shape[2] / image.shape[1] if how == "keep shape" else 1.0
        width, height = (max(1, round(side * scale / step)) * step for scale in (math.sqrt(ratio), math.sqrt(1 / ratio)))
        if width * height > LARGEST * trained:
            raise ValueError(
                f"'size' {size} gives {width} x {height} pixels; this model was trained on {config.latent_size[1] * cell} x "
                f"{config.latent_size[0] * cell} and fails above {LARGEST} times that area. Use a smaller size, or 0."
            )
        return cls(width, height, how == "pad")

    def place(self, picture: Image.Image) -> Image.Image:
        """The picture in this frame; a mask gets borders of 0."""
        if not self.padded:
            return fit(picture, self.width, self.height)
        scale = min(self.width / picture.width, self.height / picture.height)
        inner = [max(1, round(side * scale)) for side in picture.size]
        canvas = Image.new(picture.mode, (self.width, self.height), "white" if picture.mode == "RGB" else 0)
        canvas.paste(fit(picture, *inner), ((self.width - inner[0]) // 2, (self.height - inner[1]) // 2))
        return canvas

    def images(self, image: Tensor) -> Tensor:
        """An IMAGE (B, H, W, C) as IMAGE (B, height, width, 3) in this frame."""
        return _each(image, lambda item: self.place(_picture(item)))

    def squares(self, image: Tensor) -> Tensor:
        """The centre squares of the placed pictures, which the CLIP image encoder sees."""
        side = min(self.width, self.height)
        return _each(image, lambda item: Frame(side, side, self.padded).place(_picture(item)))

    def masks(self, mask: Tensor, image: Tensor) -> Tensor:
        """A MASK (B, h, w) of the pictures, as MASK (B, height, width) in this frame."""
        sized = torch.nn.functional.interpolate(mask[:, None].float(), image.shape[1:3], mode="bilinear")[:, 0]
        return _each(sized, lambda item: self.place(Image.fromarray(_levels(item))))


def encode(model: Any, vae: Any, clip_vision: Any, image: Tensor, frame: Frame) -> tuple[Tensor, Tensor, Any]:
    """IMAGE in the frame, its latents, and its CLIP_VISION_OUTPUT; memory does not depend on the size of the pictures."""
    shown, latents, tokens = [], [], []
    for part in image.split(BATCH):
        comfy.model_management.throw_exception_if_processing_interrupted()
        shown.append(frame.images(part))
        latents.append(vae.encode(shown[-1]))
        square = frame.width == frame.height
        tokens.append(clip_vision.encode_image(shown[-1] if square else frame.squares(part)))
    joined = tokens[0]
    for name in ("image_embeds", "last_hidden_state", "penultimate_hidden_states"):
        values = [token[name] for token in tokens if getattr(token, name, None) is not None]
        if len(values) > 1:
            joined[name] = torch.cat(values)
    return torch.cat(shown), torch.cat(latents), joined


def _each(items: Tensor, place: Callable[[Tensor], Image.Image]) -> Tensor:
    """Results of `place` for each item, stacked, in [0, 1]."""
    return torch.stack([torch.from_numpy(np.asarray(place(item), np.float32) / 255) for item in items])


def _picture(pixels: Tensor) -> Image.Image:
    """A picture (H, W, C) in [0, 1] as RGB; grey is repeated, transparency becomes white."""
    channels = pixels.shape[-1]
    if channels in (2, 4):
        alpha = pixels[..., -1:]
        pixels = pixels[..., :-1] * alpha + (1 - alpha)
    return Image.fromarray(_levels(pixels.expand(-1, -1, 3) if channels < 3 else pixels[..., :3]))


def _levels(pixels: Tensor) -> Any:
    """Values in [0, 1], clamped, as uint8."""
    return pixels.mul(255).round_().clamp_(0, 255).to(torch.uint8).cpu().numpy()
