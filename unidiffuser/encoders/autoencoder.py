"""KL autoencoder between images and image latents (arXiv 2303.06555, section 4).

diffusers' module is annotated as Any, so that diffusers is imported only where one is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint, VAEConfig
from ..checkpoints.keys import vae_to_diffusers
from ..runtime.precision import ROWS, depends_on_batch, in_fixed_batches
from ..small.palette import Palette
from ..small.upsampler import FACTOR, ConvexUpsampler
from ..streams import draw_noise

Device = torch.device | str | None


def autoencoder_kl(config: VAEConfig, sample_size: int = 512) -> Any:
    """diffusers' AutoencoderKL of a config, with fresh weights.

    Args:
        config: sizes of the autoencoder. With a palette or an upsampler, the module has a `Palette` or a `ConvexUpsampler` as
            its attribute of that name.
        sample_size: side of a tile of tiled encoding and decoding, in pixels after pixel_unshuffle.
    """
    from diffusers import AutoencoderKL

    dd = config.ddconfig
    vae = AutoencoderKL(
        in_channels=dd["in_channels"],
        out_channels=dd["out_ch"],
        down_block_types=("DownEncoderBlock2D",) * len(dd["ch_mult"]),
        up_block_types=("UpDecoderBlock2D",) * len(dd["ch_mult"]),
        block_out_channels=tuple(dd["ch"] * m for m in dd["ch_mult"]),
        layers_per_block=dd["num_res_blocks"],
        latent_channels=dd["z_channels"],
        sample_size=sample_size,
    )
    if config.palette:
        vae.palette = Palette(len(config.palette["manners"]), config.palette["colours"])
    if config.upsampler:
        vae.upsampler = ConvexUpsampler(**config.upsampler)
    return vae


def to_encoder_size(pixels: Tensor, config: VAEConfig) -> Tensor:
    """Pictures (B, 3, H, W) at the size that the encoder reads: half their sides before an upsampler, else unchanged."""
    return pixels if config.upsampler is None else F.avg_pool2d(pixels, FACTOR)


def to_pixels(
    x: Tensor, config: VAEConfig, palette: Palette | None = None, styles: Tensor | None = None, upsampler: Any = None
) -> Tensor:
    """The pictures of a decoder's output.

    Args:
        x: (B, 3 p^2 + C, h, w), p the config's `patch_size`, with the C features that its upsampler reads.
        config: of the autoencoder.
        palette: pulls the pixels towards the colours of `styles` (B, M).
        upsampler: a `ConvexUpsampler` that doubles their sides.

    Returns:
        (B, 3, H, W), H and W the sides of x times `patch_size` and the upsampler's factor.
    """
    channels = 3 * config.patch_size**2
    pixels = F.pixel_shuffle(x[:, :channels], config.patch_size)
    if palette is not None and styles is not None:
        pixels = palette(pixels, styles)
    return pixels if upsampler is None else upsampler(pixels, x[:, channels:])


class Autoencoder:
    """Encoder of images to image latents, and decoder of latents to images.

    Args:
        vae: diffusers' AutoencoderKL, as `autoencoder_kl` builds it.
        config: config of the same autoencoder.
        tiling: process images larger than the trained size tile by tile, which bounds memory; tile borders are blended.
    """

    def __init__(self, vae: Any, config: VAEConfig, tiling: bool = False):
        self.vae, self.config = vae, config
        self.palette: Palette | None = getattr(vae, "palette", None)
        self.upsampler: ConvexUpsampler | None = getattr(vae, "upsampler", None)
        if tiling:
            vae.enable_tiling()

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, device: Device = None, dtype: torch.dtype | None = None, tiling: bool = False
    ) -> Autoencoder:
        """Load the part "vae"; `device` and `dtype` as for `Checkpoint.load_into`."""
        config = checkpoint.config.vae
        with checkpoint.building("vae"):
            # the side that diffusers' module sees, before pixel_unshuffle and after the upsampler
            side = checkpoint.config.image_size * 2 ** (len(config.ddconfig["ch_mult"]) - 1) // config.downscale
            vae = autoencoder_kl(config, side)
        checkpoint.load_into(vae, "vae", rename=vae_to_diffusers, device=device, dtype=dtype)
        return cls(vae, config, tiling)

    @torch.inference_mode()
    def encode(self, pixels: Tensor, generator: torch.Generator | Sequence[torch.Generator]) -> Tensor:
        """Sample image latents: from the posterior, times the scale factor.

        Args:
            pixels: (B, 3, H, W) in [-1, 1]; H and W are multiples of `config.downscale`, which is 8 in the published model.
            generator: one CPU generator per item, so that an item does not depend on its batch; or one for all items, in order.

        Returns:
            (B, C, H/d, W/d) with d = `config.downscale`, on the autoencoder's device and in its dtype.

        Raises:
            ValueError: `pixels` has a wrong shape, or the number of generators differs from B.
        """
        step = self.config.downscale
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] % step or pixels.shape[3] % step:
            raise ValueError(
                f"pixels must be (B, 3, H, W) with sides that {step} divides, not {tuple(pixels.shape)}; crop or resize."
            )
        generators = [generator] * len(pixels) if isinstance(generator, torch.Generator) else list(generator)
        if len(generators) != len(pixels):
            raise ValueError(f"{len(pixels)} pictures need as many generators, not {len(generators)}; or give a single one.")
        x = pixels.to(self.vae.device, self.vae.dtype)
        mean, std = self._in_batches(self._unscaled_posterior, x, step)
        noise = draw_noise(mean.shape[1:], generators, x.device)
        return (mean + std * noise.to(x)) * self.config.scale_factor

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode image latents to pixels.

        Args:
            latents: (B, C, H/d, W/d), as `encode` returns them.

        Returns:
            (B, 3, H, W), about [-1, 1] and not clamped.

        Raises:
            ValueError: `latents` has a wrong shape, or NaN or infinite values.
        """
        channels = self.config.embed_dim
        if latents.ndim != 4 or latents.shape[1] != channels:
            step = self.config.downscale
            raise ValueError(f"image latents must be (B, {channels}, H/{step}, W/{step}), not {tuple(latents.shape)}.")
        if not torch.isfinite(latents).all():
            raise ValueError("the image latents hold NaN or infinite values; lower the guidance or use float32.")
        (x,) = self._in_batches(lambda z: (self._decoded(z),), latents.to(self.vae.device, self.vae.dtype), 1)
        return x

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the image latents that `encode` samples.

        Args:
            pixels: (B, 3, H, W) in [-1, 1], on the autoencoder's device and in its dtype.

        Returns:
            Two tensors (B, C, H/d, W/d), both times the scale factor.
        """
        mean, std = self._unscaled_posterior(pixels)
        return mean * self.config.scale_factor, std * self.config.scale_factor

    def _unscaled_posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        pixels = to_encoder_size(pixels, self.config)
        latent = self.vae.encode(F.pixel_unshuffle(pixels, self.config.patch_size)).latent_dist
        if self.palette is None:
            return latent.mean, latent.std
        scale = self.config.scale_factor
        return self.palette.write_code(latent.mean * scale, self.palette.recognise(pixels)) / scale, latent.std

    def _decoded(self, latents: Tensor) -> Tensor:
        styles = None
        if self.palette is not None:
            styles = self.palette.read_code(latents)
            latents = self.palette.remove_code(latents)
        x = self.vae.decode(latents / self.config.scale_factor).sample
        return to_pixels(x, self.config, self.palette, styles, self.upsampler)

    def _in_batches(self, function: Callable[[Tensor], Sequence[Tensor]], x: Tensor, downscale: int) -> Sequence[Tensor]:
        """`function` of x (B, C, H, W), in fixed batches if results depend on that."""
        if not depends_on_batch(self.vae.device, self.vae.dtype):
            return function(x)
        area = x.shape[2] * x.shape[3] // downscale**2  # of the latent
        return in_fixed_batches(function, math.ceil(ROWS / area), x)
