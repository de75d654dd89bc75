"""Training of the autoencoder: a small KL autoencoder behind a pixel-unshuffle stem.

The stem folds p x p squares of pixels into channels, so nearly all work is done at 1/p of the resolution: several times faster
to train and to decode on a CPU than the same layout on pixels, at equal quality of small pictures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints.config import VAEConfig
from ..distributed import own_device
from ..encoders.autoencoder import autoencoder_kl
from ..evaluation.metrics import psnr
from ..media.files import write_text
from ..media.images import from_levels, to_images
from ..streams import draw_normal, draw_uniform
from ..training.config import TrainConfig
from ..training.stage import Batch, TrainingStage, generator_on, seeded_init
from .colours import fitted_palette
from .image_folder import training_set, unseen_set
from .options import Autoencoder

LATENT = 4  # channels of the latents
SCALE = 0.18215  # latents times this have unit variance (Stable Diffusion's convention)
LEAST_LOGVAR = -30.0  # diffusers clamps there too
PLAIN = 3  # channels that are the reduced picture itself
CLEAN = 0.25  # fraction of a batch without noise on the latents
KL_WEIGHT, EDGE_WEIGHT = 1e-6, 0.5


def vae_config(image_size: int, patch_size: int, channels: Sequence[int], layers: int) -> VAEConfig:
    """The config of an autoencoder.

    Args:
        image_size: side of its pictures in pixels.
        patch_size: p of the stem.
        channels: widths of the levels; each level after the first halves the resolution.
        layers: residual blocks in a level.
    """
    return VAEConfig(
        ddconfig={
            "in_channels": 3 * patch_size**2,
            "out_ch": 3 * patch_size**2,
            "ch": channels[0],
            "ch_mult": [width // channels[0] for width in channels],
            "num_res_blocks": layers,
            "z_channels": LATENT,
            "double_z": True,
            "resolution": image_size // patch_size,
            "attn_resolutions": [],
            "dropout": 0.0,
        },
        patch_size=patch_size,
    )


class PatchedAutoencoder(nn.Module):
    """An AutoencoderKL between pixel_unshuffle(p) and pixel_shuffle(p), as it is trained: latents are not scaled."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.kl = autoencoder_kl(config)

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, (B, 4, h, w) each, of the latents of pixels (B, 3, H, W) in [-1, 1]."""
        h = self.kl.quant_conv(self.kl.encoder(F.pixel_unshuffle(pixels, self.patch_size)))
        mean, logvar = h.chunk(2, dim=1)
        return mean, logvar.clamp(LEAST_LOGVAR, 20)

    def forward(self, pixels: Tensor, noise: Tensor, spread: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, log variance, and the pictures decoded from mean + standard deviation * noise.

        Args:
            pixels: (B, 3, H, W) in [-1, 1].
            noise: (B, 4, h, w), standard normal.
            spread: (B,), standard deviation of additional noise, in scaled latents.
        """
        mean, logvar = self.moments(pixels)
        variance = logvar.exp()
        if spread is not None:
            variance = variance + (spread.view(-1, 1, 1, 1) / SCALE).square()
        return mean, logvar, self.decode(mean + noise * variance.sqrt())

    def decode(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(self.kl.decoder(self.kl.post_quant_conv(latents)), self.patch_size)

    @torch.no_grad()
    def rescale(self, scale: Tensor, shift: Tensor) -> None:
        """Fold an affine map of the latents, z -> (z - shift) * scale per channel, into the two 1x1 convolutions."""
        quant, post = self.kl.quant_conv, self.kl.post_quant_conv
        channels = scale.numel()
        quant.weight[:channels] *= scale.view(-1, 1, 1, 1)
        quant.bias[:channels] = (quant.bias[:channels] - shift) * scale
        quant.bias[channels:] += 2 * scale.log()
        post.bias += (post.weight[:, :, 0, 0] * shift).sum(1)
        post.weight /= scale.view(1, -1, 1, 1)


def reduced(pixels: Tensor, factor: int) -> Tensor:
    """Pictures (B, 3, H, W) at 1 / factor of their sides, averaged over squares."""
    return F.avg_pool2d(pixels, factor)


def reconstruction_loss(decoded: Tensor, pixels: Tensor, mse_weight: float = 1.0) -> dict[str, Tensor]:
    """L1 error of pixels and of their differences (edges), and squared error for large deviations; "loss" is their sum."""
    pixel = F.l1_loss(decoded, pixels)
    edges = sum(F.l1_loss(decoded.diff(dim=d), pixels.diff(dim=d)) for d in (2, 3))
    mse = F.mse_loss(decoded, pixels)
    return {"loss": pixel + EDGE_WEIGHT * edges + mse_weight * mse, "pixel": pixel, "mse": mse}


def noise_levels(count: int, largest: float, clean: float, generator: torch.Generator) -> Tensor:
    """Standard deviations (count,) of noise on latents, uniform up to the largest; 0 for a fraction `clean`."""
    levels, chance = (draw_uniform((count,), generator) for _ in range(2))
    return (largest * levels).masked_fill(chance < clean, 0.0)


@torch.no_grad()
def principal_colours(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Principal components of the colours of pictures (B, 3, H, W), the widest first.

    Returns:
        matrix (3, 3) and mean (3,): the components matrix @ (colour - mean) have variance 1 and are uncorrelated.
    """
    colours = pixels.transpose(0, 1).flatten(1)
    mean = colours.mean(1)
    values, vectors = torch.linalg.eigh(torch.cov(colours))
    vectors = vectors * vectors.sum(0).sign().where(vectors.sum(0) != 0, torch.ones(()))  # the signs are free
    return (vectors / values.clamp_min(1e-6).sqrt()).flip(1).T, mean


class AutoencoderStage(TrainingStage):
    """Trains an autoencoder on an image folder.

    A term of the loss makes the first three latent channels the picture itself, reduced to their resolution, in its principal
    colours, and keeps the fourth at mean 0 and variance 1. Flat areas stay flat in such latents, so a network has less to
    learn; the fourth channel keeps detail for the decoder. Without it, noise on the latents would make them grow.

    Args:
        config: settings of the run.
        options: those of the section `autoencoder`.
        data: the image folder.
    """

    model: PatchedAutoencoder

    def __init__(self, config: TrainConfig, options: Autoencoder, data: Path):
        self.out, self.options, self.seed = Path(config.out), options, config.seed
        self.sizes = vae_config(options.image_size, options.patch_size, options.channels, options.layers)
        self.downscale = self.sizes.downscale
        with seeded_init(config.seed):
            self.model = PatchedAutoencoder(self.sizes)
        if own_device().type == "cuda":  # bf16 convolutions are faster with their channels last there
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
        self.train_set = training_set(data, options.image_size, options.where)
        self.test_set = unseen_set(data, options.image_size, options.palette.styles) or self.train_set
        self.size = len(self.train_set)
        self.colours = principal_colours(reduced(self.train_set.pixels(self._some(1024)), self.downscale))

    def _some(self, count: int) -> Tensor:
        """Indices of this many random pictures, always the same."""
        return torch.randperm(self.size, generator=torch.Generator().manual_seed(0), device="cpu")[:count]

    def examples(self, indices: Tensor, seeds: Sequence[int]) -> Batch:
        return {"levels": self.train_set.levels(indices)}

    def _plain_loss(self, scaled: Tensor, pixels: Tensor) -> Tensor:
        """Distance of scaled latents (B, 4, h, w) from the reduced pictures, and of the fourth channel from unit variance."""
        matrix, mean = (x.to(pixels) for x in self.colours)
        wanted = torch.einsum("ij,bjhw->bihw", matrix, reduced(pixels, self.downscale) - mean.view(-1, 1, 1))
        others = scaled[:, PLAIN:].transpose(0, 1).flatten(1)
        return F.mse_loss(scaled[:, :PLAIN], wanted) + ((others.var(1) - 1).square() + others.mean(1).square()).sum()

    def loss(self, model: Any, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Reconstruction error, a small KL term that bounds the latents, and the term of the plain channels."""
        pixels = from_levels(batch["levels"])
        generator = generator_on(pixels.device, generator)
        shape = (len(pixels), LATENT, *(side // self.downscale for side in pixels.shape[2:]))
        noise = draw_normal(shape, generator)
        spread = noise_levels(len(pixels), self.options.noise, CLEAN, generator)
        mean, logvar, decoded = model(pixels, noise, spread)
        kl = 0.5 * (mean.float().square() + logvar.float().exp() - 1 - logvar.float()).sum((1, 2, 3)).mean()
        terms = reconstruction_loss(decoded.float(), pixels, self.options.mse_weight)
        plain = self._plain_loss(SCALE * mean.float(), pixels)
        return terms | {"loss": terms["loss"] + KL_WEIGHT * kl + plain, "kl": kl, "plain": plain}

    def sample(self, model: Any) -> Any:
        """Test pictures and their reconstructions; their mean PSNR is appended to `psnr.txt`."""
        order = torch.randperm(len(self.test_set), generator=torch.Generator().manual_seed(1), device="cpu")[:192]
        scores, rows = [], []
        device = model.kl.quant_conv.weight.device
        for chunk in order.split(32):
            pixels = self.test_set.pixels(chunk).to(device)
            with torch.autocast(pixels.device.type, torch.bfloat16):
                decoded = model.decode(model.moments(pixels)[0]).float()
            scores.append(psnr(decoded, pixels))
            rows.append(torch.cat([pixels, decoded], dim=2))
        with (self.out / "psnr.txt").open("a") as file:
            file.write(f"{torch.cat(scores).mean():.2f}\n")
        grid = torch.cat([torch.cat(list(r[:8]), dim=2) for r in rows[:4]], dim=1)
        return to_images(grid[None])[0]

    @torch.no_grad()
    def export(self, model: Any) -> None:
        """Write `autoencoder.pt` (weights, with a fitted palette) and `autoencoder.json` (sizes).

        The latents are normalised to SD's convention: unit variance after x 0.18215.
        """
        means = []
        for chunk in torch.arange(min(self.size, 4096)).split(64):
            mean, logvar = model.moments(self.train_set.pixels(chunk).to(model.kl.quant_conv.weight.device))
            means.append(torch.stack([mean, (0.5 * logvar).exp()]).transpose(1, 2).flatten(2))
        stacked = torch.cat(means, dim=2)
        shift, signal, noise = stacked[0].mean(1), stacked[0].var(1), stacked[1].square().mean(1)
        model.rescale(1 / ((signal + noise).sqrt() * SCALE), shift)
        palette = fitted_palette(self.train_set, self.options.palette.styles, self.options.palette.colours, self.seed)
        config = replace(
            self.sizes,
            palette={"manners": list(self.options.palette.styles), "colours": self.options.palette.colours},
            preview_rgb=self._preview(model),
        )
        weights = model.kl.state_dict() | {f"palette.{name}": value for name, value in palette.state_dict().items()}
        torch.save({name: value.cpu().contiguous() for name, value in weights.items()}, self.out / "autoencoder.pt")
        sizes = {"vae": asdict(config), "image_size": self.options.image_size}
        write_text(self.out / "autoencoder.json", json.dumps(sizes))

    def _preview(self, model: Any) -> dict[str, Any]:
        """The linear map from scaled latents to reduced pictures that fits best, for previews: "factors" and "bias"."""
        latents, colours = [], []
        for chunk in self._some(256).split(64):
            pixels = self.train_set.pixels(chunk).to(model.kl.quant_conv.weight.device)
            latents.append(SCALE * model.moments(pixels)[0].movedim(1, 3).flatten(0, 2))
            colours.append(reduced(pixels, self.downscale).movedim(1, 3).flatten(0, 2))
        rows = torch.cat(latents).cpu()
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1).double()
        (*factors, bias) = torch.linalg.lstsq(rows, torch.cat(colours).cpu().double()).solution.tolist()
        return {"factors": [[round(x, 4) for x in row] for row in factors], "bias": [round(x, 4) for x in bias]}
