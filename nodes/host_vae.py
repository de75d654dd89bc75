"""The host's VAE, which refuses pictures that would take gigabytes and that the diffusion network cannot use anyway."""

from __future__ import annotations

import comfy.sd
from torch import Tensor

LARGEST_ENCODED = 16  # area of a picture in multiples of the trained one; the network does no better with more


class HostVAE(comfy.sd.VAE):
    """A VAE with the side of the training pictures as `trained_side`, in pixels."""

    trained_side = 512

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """Latents of pictures (B, H, W, C).

        Raises:
            ValueError: they are larger than `LARGEST_ENCODED` allows.
        """
        height, width = pixel_samples.shape[-3:-1]
        if height * width > LARGEST_ENCODED * self.trained_side**2:
            raise ValueError(
                f"The image has {width} x {height} pixels, which takes gigabytes to encode, and this model was trained on "
                f"{self.trained_side} x {self.trained_side}. Use 'Encode Picture', or scale the image down first."
            )
        return super().encode(pixel_samples)
