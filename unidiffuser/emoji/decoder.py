"""Training of the decoder on the network's latents, which are never exact.

A small network leaves errors of about a tenth of the latents' spread, which a decoder trained on exact latents paints as
mottled areas. Trained on noisy latents, and on latents denoised by the network itself, with true pictures as targets, it learns
to ignore them (noise-augmented decoding: Zheng et al., "Diffusion Transformers with Representation Autoencoders", arXiv
2510.11690). The encoder stays fixed, so networks keep their latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..checkpoints.checkpoint import load_checkpoint, save_checkpoint
from ..distributed import own_device
from ..encoders.autoencoder import Autoencoder, to_encoder_size, to_pixels
from ..evaluation.metrics import psnr
from ..media.images import from_levels, to_images
from ..small.palette import Palette
from ..small.upsampler import ConvexUpsampler
from ..streams import draw_normal, draw_uniform
from ..training.config import TrainConfig
from ..training.stage import Batch, TrainingStage, generator_on, seeded_init
from .autoencoder import noise_levels, reconstruction_loss
from .colours import randomly_coloured, style_numbers
from .denoised import DenoisedLatents
from .image_folder import training_set, unseen_set
from .options import Finish

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
    top, left = (
        int(torch.randint(cells - side + 1, (1,), generator=generator, device=generator.device)) for cells in latents.shape[2:]
    )
    return Crop(top, left, side)


class DecoderStage(TrainingStage):
    """Trains the decoder of a model on noisy latents and on denoised ones.

    Args:
        config: settings of the run.
        options: those of the section `finish`.
        data: the image folder.
        checkpoint: a complete model, with a palette.
    """

    model: Decoder

    def __init__(self, config: TrainConfig, options: Finish, data: Path, checkpoint: str | Path):
        self.out, self.options = Path(config.out), options
        self.checkpoint = load_checkpoint(checkpoint)
        self.device = own_device()  # of the frozen parts
        self.autoencoder = Autoencoder.from_checkpoint(self.checkpoint, device=self.device, dtype=torch.float32)
        if options.upsampler is not None:
            self._with_upsampler(config.seed, asdict(options.upsampler))
        self.vae = self.autoencoder.config
        if self.vae.palette is None:
            raise ValueError(f"the autoencoder of {checkpoint} has no palette; train it by the section `autoencoder`")
        names = self.vae.palette["manners"]
        self.no_style = len(names)  # the index that stands for no style
        self.model = Decoder(self.autoencoder).requires_grad_(True)
        for name in ("colours", "prior", "spread"):  # exact colours are what a style is recognised by, and training blurs them
            getattr(self.model.palette, name).requires_grad_(False)
        self.train_set = training_set(data, options.image_size, options.where)
        self.test_set = unseen_set(data, options.image_size, names) or self.train_set
        self.size = len(self.train_set)
        self.styles = style_numbers(self.train_set, names)
        encoded = training_set(data, self.checkpoint.config.image_size, options.where)
        self.denoised = DenoisedLatents(self.checkpoint, self.train_set, encoded, options.labels, self.device)

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
        batch = {name: value[round(self.options.denoised * total) :] for name, value in batch.items()}
        count, at = len(batch["levels"]), generator_on(self.device, generator)
        pixels, styles = from_levels(batch["levels"].to(self.device)), batch["styles"].to(self.device)
        if self.options.random_colours:
            turned = draw_uniform((count,), at) < self.options.random_colours
            pixels = torch.where(turned[:, None, None, None], randomly_coloured(pixels, at), pixels)
            styles = styles.masked_fill(turned, self.no_style)
        spread = noise_levels(count, self.options.noise, self.options.clean, at).view(-1, 1, 1, 1)
        mean, std = self._posterior(pixels)
        latents = mean + (std.square() + spread.square()).sqrt() * draw_normal(mean.shape, at)
        with torch.no_grad():
            others, denoised, index = self.denoised.draw(round(count / (1 - self.options.denoised)) - count, generator)
        latents, wanted = torch.cat((latents, denoised)).to(device), torch.cat((pixels, others)).to(device)
        crop = None if self.options.crop is None else random_crop(self.options.crop, latents, generator)
        styles = torch.cat((styles, self.styles.to(self.device)[index])).to(device)
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
        log_mse = ((decoded - wanted).square().flatten(1).mean(1) + SMALLEST_MSE).log().mean()
        return losses | {"loss": losses["loss"] + self.options.psnr_weight * log_mse}

    def sample(self, model: Any) -> Image.Image:
        """Test pictures decoded from exact and from noisy latents, and known ones from denoised latents; with `psnr.txt`."""
        generator = torch.Generator().manual_seed(1)
        order = torch.randperm(len(self.test_set), generator=generator, device=generator.device)[:128]
        scores, rows = [], []
        for chunk in order.split(32):
            pixels = self.test_set.pixels(chunk)
            mean = self._posterior(pixels.to(self.device))[0].cpu()
            noisy = mean + self.options.noise / 2 * draw_normal(mean.shape, generator)
            decoded = [self._decoded(model, x) for x in (mean, noisy)]
            scores.append(torch.stack([psnr(x, pixels) for x in decoded]))
            rows.append([pixels, *decoded])
        pixels, latents, index = (x.cpu() for x in self.denoised.draw(32, generator))
        if self.autoencoder.palette is not None:
            styles = self._one_hot(self.styles[index])
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
        ours["palette.gate"] = ours["palette.gate"] + self.options.gate
        kept = {k: v for k, v in self.autoencoder.vae.state_dict().items() if k not in ours}
        parts = {name: self.checkpoint.state_dict(name) for name in self.checkpoint.parts() if name != "vae"}
        parts["vae"] = kept | ours
        config = replace(self.checkpoint.config, vae=self.vae, image_size=self.train_set.size)
        save_checkpoint(self.out / "model.safetensors", config, parts, self.checkpoint.tokenizer_specs(), torch.float16)
