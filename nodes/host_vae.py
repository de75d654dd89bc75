"""The host's VAE, which refuses pictures that would take gigabytes and that the diffusion network cannot use anyway."""

from __future__ import annotations

from typing import Any

import comfy.sd
from torch import Tensor

LARGEST_ENCODED = 16  # area of a picture in multiples of the trained one; the network does no better with more


class HostVAE(comfy.sd.VAE):
    """A VAE with the side of the training pictures as `trained_side`, in pixels."""

    trained_side = 512
    plain = True
    """Whether encoder and decoder alone are the whole autoencoder, as in Stable Diffusion."""

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """Latents of pictures (B, H, W, C).

        Raises:
            ValueError: they are larger than `LARGEST_ENCODED` allows.
        """
        self._check_layers()
        height, width = pixel_samples.shape[-3:-1]
        if height * width > LARGEST_ENCODED * self.trained_side**2:
            raise ValueError(
                f"The image has {width} x {height} pixels, which takes gigabytes to encode, and this model was trained on "
                f"{self.trained_side} x {self.trained_side}. Use 'Encode Picture', or scale the image down first."
            )
        return super().encode(pixel_samples)

    def decode(self, samples_in: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """Pictures (B, H, W, C) of latents."""
        self._check_layers()
        return super().decode(samples_in, *arguments, **named)

    def _check_layers(self) -> None:
        """Refuse a node that runs the layers of the autoencoder itself, tile by tile.

        Raises:
            ValueError: there is one, and this autoencoder has more than these layers.
        """
        model = self.first_stage_model
        hooks = {type(vars(part).get("forward")).__name__ for part in (model.encoder, model.decoder)}
        if not self.plain and "VAEHook" in hooks:
            raise ValueError(
                "'Tiled VAE Encode' and 'Tiled VAE Decode' of Tiled Diffusion run the layers of Stable Diffusion's VAE; "
                "this model's has others. Use 'VAE Encode (Tiled)' and 'VAE Decode (Tiled)'."
            )
