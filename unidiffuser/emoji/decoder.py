"""Stage `decoder`: the autoencoder's decoder learns to decode the network's latents, which are never exact.

A small network leaves errors of about a tenth of the latents' spread, which a decoder trained on exact latents paints as
mottled areas. Trained on noisy latents, and on latents denoised by the network itself, with true pictures as targets, it learns
to ignore them (noise-augmented decoding: Zheng et al., "Diffusion Transformers with Representation Autoencoders", arXiv
2510.11690). The encoder stays fixed, so networks keep their latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..checkpoints.checkpoint import VAEConfig, load_checkpoint, save_checkpoint
from ..distributed import own_device
from ..encoders.autoencoder import Autoencoder, to_encoder_size, to_pixels
from ..evaluation.metrics import psnr
from ..media.images import from_levels, to_images
from ..small.palette import Palette
from ..small.upsampler import ConvexUpsampler
from ..training.augment import hue_turn
from ..training.config import TrainConfig
from ..training.stage import Batch, TrainingStage, generator_on, seeded_init
from .autoencoder import noise_levels, reconstruction_loss
from .denoised import DenoisedLatents
from .image_folder import ImageFolder, training_set

SMALLEST_MSE = 1e-4  # 46 dB: a picture better than that needs no more weight in the loss


class Decoder(nn.Module):
    """The decoder half of an autoencoder: scaled latents (B, C, h, w) -> pixels (B, 3, H, W), about [-1, 1]."""

    def __init__(self, autoencoder: Autoencoder):
        super().__init__()
        self.post_quant_conv, self.decoder = autoencoder.vae.post_quant_conv, autoencoder.vae.decoder
        self.config = autoencoder.config
        if autoencoder.palette is not None:
            self.palette = autoencoder.palette
        if autoencoder.upsampler is not None:
            self.upsampler = autoencoder.upsampler

    def forward(
        self, latents: Tensor, styles: Tensor | None = None, real: Tensor | None = None, crop: Crop | None = None
    ) -> Any:
        """Decode latents.

        Args:
            latents: (B, C, h, w), scaled.
            styles: (B, M), the palette's styles to decode in; read from the latents' code when None.
            real: (B, 3, H, W), real pictures to classify in the same call, so that DDP sees one.
            crop: the part of each picture that is decoded, in latent cells; the whole when None.

        Returns:
            pixels; with `real` and a palette, pixels and the style logits (B, M + 1) of the real pictures.
        """
        palette: Palette | None = getattr(self, "palette", None)
        if palette is not None:
            styles = palette.read_code(latents) if styles is None else styles
            latents = palette.remove_code(latents)
        x = self.decoder(self.post_quant_conv(latents / self.config.scale_factor))
        if crop is not None:
            x = crop(x, x.shape[2] // latents.shape[2])
        pixels = to_pixels(x, self.config, palette, styles, getattr(self, "upsampler", None))
        return pixels if real is None or palette is None else (pixels, palette.style_logits(to_encoder_size(real, self.config)))


@dataclass(frozen=True)
class Crop:
    """A square of latent cells. Palette and upsampler are most of a decoder's work, so they learn from a part of a picture."""

    top: int
    left: int
    side: int

    def __call__(self, x: Tensor, cell: int, margin: int = 0) -> Tensor:
        """The square of x (B, C, H, W), in which a latent cell has `cell` positions a side, without `margin` cells around."""
        first, last = margin * cell, (self.side - margin) * cell
        top, left = self.top * cell, self.left * cell
        return x[..., top + first : top + last, left + first : left + last]


def random_crop(side: int, latents: Tensor, generator: torch.Generator) -> Crop:
    """A square of `side` cells anywhere in latents (B, C, h, w)."""
    top, left = (int(torch.randint(cells - side + 1, (1,), generator=generator)) for cells in latents.shape[2:])
    return Crop(top, left, side)


class DecoderStage(TrainingStage):
    """Trains a decoder on noisy latents and on denoised ones.

    Options:
        data, where, image_size: image folder, record filter, side in pixels.
        checkpoint: a complete model, whose decoder is trained on.
        noise: largest standard deviation of noise on the latents, which have about unit variance; a batch has all levels.
        clean: fraction without noise.
        known: record filter of the pictures that the network was trained on.
        denoised: fraction of a batch that are such pictures, with latents denoised by the network.
        labels: lowest and highest noise label that it denoises from.
        palette: adds a `Palette` to an autoencoder without one: "field" of the records that names the style, "manners", the
            styles' names, and "colours", their number in each. Latents then carry a style code, so a network must be trained
            on them again.
        upsampler: adds a `ConvexUpsampler` with these sizes ("features", "width") to an autoencoder without one. The pictures
            are then twice as large for the same latents.
        crop: side in latent cells of the squares that each batch trains on; whole pictures when absent. The cells at the
            border of a square see zeros instead of their neighbours, so they are left out of the loss.
        psnr: weight of the mean logarithm of the pictures' squared errors, in which a good picture counts as much as a bad one;
            0 when absent.
        gate: added to the palette's gates in the exported file. Training for the least error pulls pixels only part of the
            way to a colour that may be wrong; with 4 all are pulled to it, so a network's pictures have exact colours, and
            exact pictures become slightly worse. Leave it at 0 for a run that starts from such a file.
        strange: fraction of the real pictures with random colours, so that the classifier learns pictures of no style.
        test: record filter of `psnr.txt` and of the samples; held-out concepts when absent.
    """

    model: Decoder

    def __init__(self, config: TrainConfig):
        options = config.options
        self.out = Path(config.out)
        self.checkpoint = load_checkpoint(options["checkpoint"])
        self.device = own_device()  # of the frozen parts
        self.autoencoder = Autoencoder.from_checkpoint(self.checkpoint, device=self.device, dtype=torch.float32)
        self.train_set = training_set(options)
        self._with_upsampler(config.seed, options.get("upsampler"))
        self.vae = self._with_palette(config.seed, options.get("palette"))
        self.crop: int | None = options.get("crop")
        self.psnr = float(options.get("psnr", 0.0))
        self.model = Decoder(self.autoencoder).requires_grad_(True)
        self.strange, self.gate = float(options.get("strange", 0.0)), float(options.get("gate", 0.0))
        if self.gate and not self.vae.palette:
            raise ValueError("gate is of a palette, which this autoencoder has not; give it one, or leave gate out")
        self.test_set = ImageFolder(options["data"], options["image_size"], options.get("test", {"split": "heldout_concept"}))
        self.size = len(self.train_set)
        self.noise, self.clean = float(options.get("noise", 0.25)), float(options.get("clean", 0.25))
        self.denoised_fraction = float(options.get("denoised", 0.4))
        known = training_set(options | {"where": options["known"]})
        encoded = training_set(options | {"where": options["known"], "image_size": self.checkpoint.config.image_size})
        self.styles, self.known_styles = self._styles(self.train_set), self._styles(known)
        low, high = options.get("labels", (50, 600))
        self.denoised = DenoisedLatents(self.checkpoint, known, encoded, (int(low), int(high)), self.device)

    def _with_palette(self, seed: int, options: dict[str, Any] | None) -> VAEConfig:
        """The autoencoder's config, after adding the palette of the options if it has none yet."""
        config = self.autoencoder.config
        self.field: str = (options or {}).get("field", "style")
        if not options or config.palette:
            return config
        names, colours = list(options["manners"]), int(options.get("colours", 96))
        with seeded_init(seed):
            palette = Palette(len(names), colours)
        config = replace(config, palette={"manners": names, "colours": colours})
        styles = self._styles(self.train_set, names)
        order = torch.randperm(len(styles), generator=torch.Generator().manual_seed(seed))
        some = torch.cat([order[styles[order] == style][:200] for style in range(len(names))])
        palette.init_colours(self.train_set.levels(some), styles[some])
        self._fit_classifier(palette, some, styles[some])
        self.autoencoder.vae.palette = self.autoencoder.palette = palette.to(self.device)
        self.autoencoder.config = config
        return config

    def _with_upsampler(self, seed: int, sizes: dict[str, int] | None) -> None:
        """Add an upsampler of these sizes to an autoencoder without one."""
        config = self.autoencoder.config
        if not sizes or config.upsampler:
            return
        vae, old = self.autoencoder.vae, self.autoencoder.vae.decoder.conv_out
        ddconfig = {**config.ddconfig, "out_ch": old.out_channels + sizes["features"]}
        with seeded_init(seed):
            upsampler = ConvexUpsampler(**sizes)
            conv = nn.Conv2d(old.in_channels, ddconfig["out_ch"], 3, padding=1)
        with torch.no_grad():
            for name, new in conv.named_parameters():
                new[: old.out_channels] = getattr(old, name)
        vae.decoder.conv_out = conv.to(self.device)
        vae.upsampler = self.autoencoder.upsampler = upsampler.to(self.device)
        self.autoencoder.config = replace(config, upsampler=sizes, ddconfig=ddconfig)

    def _fit_classifier(self, palette: Palette, index: Tensor, styles: Tensor) -> None:
        """Train a palette's classifier on the pictures `index` (N,) of these styles (N,), an eighth in random colours."""
        generator, usage = torch.Generator().manual_seed(0), []
        none = len(palette.gate)
        styles = styles.masked_fill(torch.rand(len(styles), generator=generator) < 1 / 8, none)
        with torch.no_grad():
            for chunk, style in zip(index.split(16), styles.split(16), strict=True):
                pixels = to_encoder_size(self.train_set.pixels(chunk), self.autoencoder.config)
                strange = (style == none)[:, None, None, None]
                usage.append(palette.colour_usage(torch.where(strange, strange_colours(pixels, generator), pixels)))
        palette.fit_classifier(torch.cat(usage), styles)

    def _styles(self, images: ImageFolder, names: list[str] | None = None) -> Tensor:
        """(N,) the style of each picture, M where it has none of them."""
        if names is None:
            names = (self.vae.palette or {}).get("manners", [])
        number = {name: i for i, name in enumerate(names)}
        return torch.tensor([number.get(record.get(self.field, ""), len(names)) for record in images.records])

    @property
    def no_style(self) -> int:
        """M, the index that stands for no style."""
        return len((self.vae.palette or {}).get("manners", []))

    def _one_hot(self, styles: Tensor) -> Tensor:
        """Styles (B,) as (B, M); 0 for none."""
        return F.one_hot(styles, self.no_style + 1)[:, :-1].float()

    @torch.no_grad()
    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, C, h, w) of the latents of pictures, scaled."""
        return self.autoencoder.posterior(pixels)

    def examples(self, indices: Tensor, seeds: Sequence[int]) -> Batch:
        return {"levels": self.train_set.levels(indices), "styles": self.styles[indices]}

    def loss(self, model: Any, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        # The first examples are replaced by pictures that the network knows.
        total, device = len(batch["levels"]), batch["levels"].device
        batch = {name: value[round(self.denoised_fraction * total) :] for name, value in batch.items()}
        count, at = len(batch["levels"]), generator_on(self.device, generator)
        pixels, styles = from_levels(batch["levels"].to(self.device)), batch["styles"].to(self.device)
        if self.strange:
            turned = torch.rand(count, generator=at, device=self.device) < self.strange
            pixels = torch.where(turned[:, None, None, None], strange_colours(pixels, at), pixels)
            styles = styles.masked_fill(turned, self.no_style)
        spread = noise_levels(count, self.noise, self.clean, at).view(-1, 1, 1, 1)
        mean, std = self._posterior(pixels)
        latents = mean + (std.square() + spread.square()).sqrt() * torch.randn(mean.shape, generator=at, device=self.device)
        with torch.no_grad():
            others, denoised, index = self.denoised.draw(round(count / (1 - self.denoised_fraction)) - count, generator)
        latents, wanted = torch.cat((latents, denoised)).to(device), torch.cat((pixels, others)).to(device)
        crop = None if self.crop is None else random_crop(self.crop, latents, generator)
        if not self.vae.palette:
            return self._error(model(latents, crop=crop).float(), wanted, crop)
        styles = torch.cat((styles, self.known_styles.to(self.device)[index])).to(device)
        decoded, logits = model(latents, self._one_hot(styles), wanted, crop)
        losses = self._error(decoded.float(), wanted, crop)
        style = F.cross_entropy(logits.float(), styles)
        return losses | {"loss": losses["loss"] + style / 10, "style": style}

    def _error(self, decoded: Tensor, wanted: Tensor, crop: Crop | None) -> dict[str, Tensor]:
        """The loss of decoded pictures, or of crops of them; "loss" is the sum of the terms."""
        if crop is not None:
            cell = self.vae.downscale
            wanted, decoded = crop(wanted, cell, margin=1), decoded[..., cell:-cell, cell:-cell]
        losses = reconstruction_loss(decoded, wanted)
        if not self.psnr:
            return losses
        log_mse = ((decoded - wanted).square().flatten(1).mean(1) + SMALLEST_MSE).log().mean()
        return losses | {"loss": losses["loss"] + self.psnr * log_mse}

    def sample(self, model: Any) -> Image.Image:
        """Test pictures decoded from exact and from noisy latents, and known ones from denoised latents; with `psnr.txt`."""
        generator = torch.Generator().manual_seed(1)
        order = torch.randperm(len(self.test_set), generator=generator)[:128]
        scores, rows = [], []
        for chunk in order.split(32):
            pixels = self.test_set.pixels(chunk)
            mean = self._posterior(pixels.to(self.device))[0].cpu()
            noisy = mean + self.noise / 2 * torch.randn(mean.shape, generator=generator)
            decoded = [self._decoded(model, x) for x in (mean, noisy)]
            scores.append(torch.stack([psnr(x, pixels) for x in decoded]))
            rows.append([pixels, *decoded])
        pixels, latents, index = (x.cpu() for x in self.denoised.draw(32, generator))
        if self.autoencoder.palette is not None:
            styles = self._one_hot(self.known_styles[index])
            latents = self.autoencoder.palette.write_code(latents.to(self.device), styles.to(self.device)).cpu()
        decoded = [self._decoded(model, latents)]
        means = [*torch.cat(scores, dim=1).mean(1).tolist(), psnr(decoded[0], pixels).mean().item()]
        with (self.out / "psnr.txt").open("a") as file:
            file.write(" ".join(f"{mean:.2f}" for mean in means) + "\n")
        shown = [x for row in rows[:2] for x in row] + [pixels, *decoded]
        return to_images(torch.cat([torch.cat(list(x[:8]), dim=2) for x in shown], dim=1)[None])[0]

    @staticmethod
    def _decoded(model: Any, latents: Tensor) -> Tensor:
        """Pictures of latents, both on the CPU, wherever the decoder is."""
        pixels: Tensor = model(latents.to(model.post_quant_conv.weight.device)).cpu()
        return pixels

    def export(self, model: Any) -> None:
        """Write `model.safetensors`: the checkpoint with this decoder, complete in one float16 file."""
        ours = model.state_dict()
        if self.gate:
            ours["palette.gate"] = ours["palette.gate"] + self.gate
        kept = {k: v for k, v in self.autoencoder.vae.state_dict().items() if k not in ours}
        parts = {name: self.checkpoint.state_dict(name) for name in self.checkpoint.parts() if name != "vae"}
        parts["vae"] = kept | ours
        config = replace(self.checkpoint.config, vae=self.vae, image_size=self.train_set.size)
        save_checkpoint(self.out / "model.safetensors", config, parts, self.checkpoint.tokenizer_specs(), torch.float16)


def strange_colours(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] with a random hue and up to half as saturated; white stays white."""
    angle, paler = (torch.rand(len(pixels), generator=generator, device=pixels.device) for _ in range(2))
    turned = torch.einsum("bij,bjhw->bihw", hue_turn(2 * math.pi * angle), pixels - 1)
    return (1 + turned * (1 - paler / 2)[:, None, None, None]).clamp(-1, 1)
