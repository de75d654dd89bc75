"""Stage 1: a small KL autoencoder in the LDM layout, behind a pixel-unshuffle stem.

The stem moves p x p pixel blocks into channels, so nearly all the work is done at 1/p of the resolution: several times
faster to train and to decode on a CPU than the same layout on pixels, at equal quality of small pictures.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed import own_device
from ..evaluation.metrics import psnr
from ..media.images import from_levels, to_images
from ..training.config import TrainConfig
from ..training.stage import Batch, TrainingStage, generator_on, seeded_init
from .image_folder import ImageFolder, training_set

log = logging.getLogger(__name__)

SCALE = 0.18215  # latents times this have unit variance (Stable Diffusion's convention)
LEAST_LOGVAR = -30.0  # diffusers clamps there too
PLAIN = 3  # channels that are the picture itself where `plain` asks for them
SIGNAL = 0.2  # share of a channel's variance that comes from the picture, below which the channel is only noise


class PatchedAutoencoder(nn.Module):
    """diffusers' AutoencoderKL between pixel_unshuffle(p) and pixel_shuffle(p).

    Args:
        patch_size: p of the stem.
        channels: widths of the levels; each level after the first halves the resolution.
        layers: ResNet layers in a level.
        latent: channels of the latents.
        used: how many of them hold something; the others are 0. None: all.
    """

    def __init__(
        self,
        patch_size: int = 4,
        channels: tuple[int, ...] = (64, 128),
        layers: int = 1,
        latent: int = 4,
        used: int | None = None,
    ):
        super().__init__()
        from diffusers import AutoencoderKL

        self.patch_size, self.latent = patch_size, latent
        self.used = latent if used is None else used
        depth = 3 * patch_size**2
        self.kl = AutoencoderKL(
            in_channels=depth,
            out_channels=depth,
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            block_out_channels=channels,
            layers_per_block=layers,
            latent_channels=latent,
            norm_num_groups=32,
        )

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (B, 3, H, W) in [-1, 1] -> mean, log variance, both (B, 4, H/8, W/8) for p = 4 and two levels."""
        h = self.kl.quant_conv(self.kl.encoder(F.pixel_unshuffle(pixels, self.patch_size)))
        mean, logvar = h.chunk(2, dim=1)
        return self._emptied(mean), self._emptied(logvar, LEAST_LOGVAR).clamp(LEAST_LOGVAR, 20)

    def _emptied(self, x: Tensor, value: float = 0.0) -> Tensor:
        """Latents (B, C, h, w) with this value in the channels that are not used."""
        return F.pad(x[:, : self.used], (0, 0, 0, 0, 0, self.latent - self.used), value=value)

    def forward(self, pixels: Tensor, noise: Tensor, spread: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and log variance of the latents, and the pictures decoded from mean + standard deviation * noise.

        `spread` (B,) is the standard deviation of more noise, in scaled latents, that is added to that of the posterior.
        """
        mean, logvar = self.moments(pixels)
        variance = logvar.exp()
        if spread is not None:
            variance = variance + (spread.view(-1, 1, 1, 1) / SCALE).square()
        return mean, logvar, self.decode(mean + self._emptied(noise) * variance.sqrt())

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

    @torch.no_grad()
    def silence(self, channel: int) -> None:
        """Make a channel of the latents 0, for sure, and let the decoder pass it over."""
        quant, post = self.kl.quant_conv, self.kl.post_quant_conv
        for row in (channel, channel + self.latent):
            quant.weight[row] = 0
        quant.bias[channel], quant.bias[channel + self.latent] = 0, LEAST_LOGVAR
        post.weight[:, channel] = 0


def reduced(pixels: Tensor, times: int) -> Tensor:
    """Pictures (B, 3, H, W) at 1 / times of their sides: each pixel the mean of those it stands for."""
    return F.avg_pool2d(pixels, times)


def reconstruction_loss(decoded: Tensor, pixels: Tensor, edge_weight: float, mse_weight: float) -> dict[str, Tensor]:
    """L1 on pixels and on their differences (edges), and a squared error for what is far off; "loss" is their sum."""
    pixel = F.l1_loss(decoded, pixels)
    edges = sum(F.l1_loss(decoded.diff(dim=d), pixels.diff(dim=d)) for d in (2, 3))
    mse = F.mse_loss(decoded, pixels)
    return {"loss": pixel + edge_weight * edges + mse_weight * mse, "pixel": pixel, "mse": mse}


def noise_levels(count: int, largest: float, clean: float, generator: torch.Generator) -> Tensor:
    """Standard deviations (count,) of noise on latents: all levels up to the largest, and none for a share of ``clean``."""
    levels, chance = (torch.rand(count, generator=generator, device=generator.device) for _ in range(2))
    return (largest * levels).masked_fill(chance < clean, 0.0)


@torch.no_grad()
def principal_colours(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Principal components of the colours of pictures (B, 3, H, W), the widest first.

    Returns:
        matrix (3, 3) and mean (3,): matrix @ (colour - mean) has variance 1 in each component, and no two go together.
    """
    colours = pixels.transpose(0, 1).flatten(1)
    mean = colours.mean(1)
    values, vectors = torch.linalg.eigh(torch.cov(colours))
    vectors = vectors * vectors.sum(0).sign().where(vectors.sum(0) != 0, torch.ones(()))  # the signs are free
    return (vectors / values.clamp_min(1e-6).sqrt()).flip(1).T, mean


class AutoencoderStage(TrainingStage):
    """Options: data, image_size, patch_size, channels, layers, kl_weight, edge_weight, mse_weight.

    plain: weight of a term that makes the first three channels of the latents the picture itself, reduced to their resolution,
        in its principal colours, and keeps the others at mean 0 and variance 1. What is plain in a picture (one colour up to an
        edge) is plain in such latents, and a network has less to learn; the other channels hold what the decoder needs
        beside it.
    only_plain: leave the others 0. They make pictures sharper, but what they hold a network can hardly guess of a picture that
        it has not seen; a decoder that is trained for longer finds much of it by itself. Needs `plain`.
    noise: largest standard deviation of noise on the latents, which have unit variance; a batch has all levels. Needs `plain`,
        or latents would grow to drown it.
    clean: share of a batch that has none, 0.25 when absent.
    test: a filter of the records that the samples and ``psnr.txt`` are made of; validation pairs and unseen concepts when
        absent.
    start_of: an earlier run, of the same sizes, that goes on learning.
    """

    model: PatchedAutoencoder

    def __init__(self, config: TrainConfig):
        options = config.options
        used = PLAIN if options.get("only_plain", False) else None
        with seeded_init(config.seed):
            self.model = PatchedAutoencoder(options["patch_size"], tuple(options["channels"]), options["layers"], used=used)
        if own_device().type == "cuda":  # convolutions of bf16 want their channels last there
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
        self.downscale = options["patch_size"] * 2 ** (len(options["channels"]) - 1)
        if "start_of" in options:
            state = torch.load(Path(options["start_of"]) / "autoencoder.pt", map_location="cpu", weights_only=True)
            self.model.load_state_dict(state)
        self.train_set = training_set(options)
        try:
            unseen = {"split": ["validation", "heldout_concept"]}
            self.test_set = ImageFolder(options["data"], options["image_size"], options.get("test", unseen))
        except ValueError:  # a folder without splits is measured on what it has
            self.test_set = self.train_set
        self.size = len(self.train_set)
        self.kl_weight = options.get("kl_weight", 1e-6)
        self.edge_weight = options.get("edge_weight", 0.5)
        self.mse_weight = options.get("mse_weight", 1.0)
        self.plain, self.noise = float(options.get("plain", 0.0)), float(options.get("noise", 0.0))
        self.clean = float(options.get("clean", 0.25))
        if self.noise and not self.plain:
            raise ValueError("noise needs plain: latents without a fixed size would grow until the noise means nothing")
        if used and not self.plain:
            raise ValueError("only_plain needs plain, which says what the channels hold")
        if self.plain:
            some = torch.randperm(self.size, generator=torch.Generator().manual_seed(0))[:1024]
            self.colours = principal_colours(reduced(self.train_set.pixels(some), self.downscale))
        self.out = Path(config.out)

    def examples(self, indices: Tensor, seeds: Sequence[int]) -> Batch:
        return {"levels": self.train_set.levels(indices)}

    def _not_plain(self, scaled: Tensor, pixels: Tensor) -> Tensor:
        """How far scaled latents (B, C, h, w) are from the reduced pictures, and their other channels from unit variance."""
        matrix, mean = (x.to(pixels) for x in self.colours)
        wanted = torch.einsum("ij,bjhw->bihw", matrix, reduced(pixels, self.downscale) - mean.view(-1, 1, 1))
        loss, others = F.mse_loss(scaled[:, :PLAIN], wanted), scaled[:, PLAIN : self.model.used].transpose(0, 1).flatten(1)
        if not len(others):
            return loss
        return loss + ((others.var(1) - 1).square() + others.mean(1).square()).sum()

    def loss(self, model: Any, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The error of the pictures, and small terms that keep the latents bounded, and plain if asked for."""
        pixels = from_levels(batch["levels"])
        generator = generator_on(pixels.device, generator)
        shape = (len(pixels), self.model.latent, *(side // self.downscale for side in pixels.shape[2:]))
        noise = torch.randn(shape, generator=generator, device=generator.device)
        spread = noise_levels(len(pixels), self.noise, self.clean, generator) if self.noise else None
        mean, logvar, decoded = model(pixels, noise, spread)
        kl = 0.5 * (mean.float().square() + logvar.float().exp() - 1 - logvar.float()).sum((1, 2, 3)).mean()
        terms = reconstruction_loss(decoded.float(), pixels, self.edge_weight, self.mse_weight)
        terms = terms | {"loss": terms["loss"] + self.kl_weight * kl, "kl": kl}
        if self.plain:
            terms["plain"] = self._not_plain(SCALE * mean.float(), pixels)
            terms["loss"] = terms["loss"] + self.plain * terms["plain"]
        return terms

    def sample(self, model: Any) -> Any:
        order = torch.randperm(len(self.test_set), generator=torch.Generator().manual_seed(1))[:192]
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
        """Normalise the latents to SD's convention (unit variance after x 0.18215) and save the weights.

        The KL term can talk the encoder out of using a channel. Such a channel would be pure noise, which a network can only
        fail to predict; it is made 0 instead.
        """
        means = []
        for chunk in torch.arange(min(self.size, 4096)).split(64):
            mean, logvar = model.moments(self.train_set.pixels(chunk).to(model.kl.quant_conv.weight.device))
            means.append(torch.stack([mean, (0.5 * logvar).exp()]).transpose(1, 2).flatten(2))
        stacked = torch.cat(means, dim=2)
        shift, signal, noise = stacked[0].mean(1), stacked[0].var(1), stacked[1].square().mean(1)
        model.rescale(1 / ((signal + noise).sqrt() * SCALE), shift)
        for channel in (signal / (signal + noise) < SIGNAL).nonzero().flatten().tolist():
            log.info("channel %d of the latents holds nothing of the picture; it is 0 from now on", channel)
            model.silence(channel)
        state = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
        torch.save(state, self.out / "autoencoder.pt")
