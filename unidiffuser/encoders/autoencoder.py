"""The KL autoencoder: pictures to image latents and back (arXiv 2303.06555, section 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint, VAEConfig
from ..checkpoints.keys import vae_to_diffusers
from ..checkpoints.skeleton import skeleton
from ..runtime.precision import ROWS, depends_on_batch, in_fixed_batches
from ..small.palette import Palette

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


Device = torch.device | str | None


def autoencoder_kl(config: VAEConfig, sample_size: int = 512) -> AutoencoderKL:
    """The autoencoder that `ModelConfig.vae` describes, with fresh weights; `sample_size` is the side of a tile."""
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
    return vae


class Autoencoder:
    """Pictures to image latents and back.

    Args:
        vae: diffusers' AutoencoderKL; its attribute "palette", if it has one, is a :class:`.palette.Palette`.
        config: its scale factor and patch size.
        tiling: work tile by tile on pictures larger than the model's own, which bounds memory; seams are blended.
    """

    def __init__(self, vae: AutoencoderKL, config: VAEConfig, tiling: bool = False):
        self.vae, self.config = vae, config
        self.palette: Palette | None = getattr(vae, "palette", None)
        if tiling:
            vae.enable_tiling()

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, device: Device = None, dtype: torch.dtype | None = None, tiling: bool = False
    ) -> Autoencoder:
        """Needs "vae"."""
        config = checkpoint.config.vae
        with skeleton():
            vae = autoencoder_kl(config, checkpoint.config.image_size // config.patch_size)
        checkpoint.load_into(vae, "vae", rename=vae_to_diffusers, device=device, dtype=dtype)
        return cls(vae, config, tiling)

    @torch.inference_mode()
    def encode(self, pixels: Tensor, generator: torch.Generator | Sequence[torch.Generator]) -> Tensor:
        """pixels (B, 3, H, W) in [-1, 1] -> latents (B, C, H/8, W/8): a sample of the posterior times the scale factor.

        Args:
            pixels: sides are multiples of `config.downscale` (8).
            generator: one CPU generator per item, so that an item does not depend on its batch; or one that serves the
                items in turn.

        Raises:
            ValueError: a shape the autoencoder cannot take, or not as many generators as items.
        """
        step = self.config.downscale
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] % step or pixels.shape[3] % step:
            raise ValueError(f"pixels must be (B, 3, H, W) with sides that {step} divides, not {tuple(pixels.shape)}.")
        generators = [generator] * len(pixels) if isinstance(generator, torch.Generator) else list(generator)
        if len(generators) != len(pixels):
            raise ValueError(f"{len(pixels)} pictures need as many generators, not {len(generators)}.")
        x = pixels.to(self.vae.device, self.vae.dtype)
        mean, std = self._in_batches(self._posterior, x, step)
        shape = mean.shape[1:]
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])  # on the CPU: the same on any device
        return (mean + std * noise.to(x)) * self.config.scale_factor

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, C, H/8, W/8), scaled -> pixels (B, 3, H, W), about [-1, 1] and not clamped.

        Raises:
            ValueError: a wrong shape, or NaN or infinite values.
        """
        channels = self.config.embed_dim
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"image latents must be (B, {channels}, H/8, W/8), not {tuple(latents.shape)}.")
        if not torch.isfinite(latents).all():
            raise ValueError("the image latents hold NaN or infinite values; lower the guidance or use float32.")
        (x,) = self._in_batches(lambda z: (self._drawn(z),), latents.to(self.vae.device, self.vae.dtype), 1)
        return x

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, C, H/8, W/8) of the latents of pixels (B, 3, H, W) on its own device, scaled."""
        mean, std = self._posterior(pixels)
        return mean * self.config.scale_factor, std * self.config.scale_factor

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The same, not scaled."""
        found = self.vae.encode(F.pixel_unshuffle(pixels, self.config.patch_size)).latent_dist
        if self.palette is None:
            return found.mean, found.std
        scale = self.config.scale_factor
        return self.palette.write_code(found.mean * scale, self.palette.recognise(pixels)) / scale, found.std

    def _drawn(self, latents: Tensor) -> Tensor:
        styles = None
        if self.palette is not None:
            styles = self.palette.read_code(latents)
            latents = self.palette.remove_code(latents)
        x = F.pixel_shuffle(self.vae.decode(latents / self.config.scale_factor).sample, self.config.patch_size)
        return x if self.palette is None or styles is None else self.palette(x, styles)

    def _in_batches(self, function: Callable[[Tensor], Sequence[Tensor]], x: Tensor, downscale: int) -> Sequence[Tensor]:
        """`function` of x (B, C, H, W), in batches of one size where the arithmetic would show another."""
        if not depends_on_batch(self.vae.device, self.vae.dtype):
            return function(x)
        area = x.shape[2] * x.shape[3] // downscale**2  # of the latent
        return in_fixed_batches(function, math.ceil(ROWS / area), x)
