"""The autoencoder's decoder learns to decode what a network makes, which is never quite the latent of a picture.

A small network leaves errors of about a tenth of the latents' spread. A decoder that has only seen true latents paints them as
a mottle over flat colours. Shown the true picture beside noisy latents, and beside latents that the network itself took the
noise from, it learns what is meant (noise-augmented decoding: Zheng et al., "Diffusion Transformers with Representation
Autoencoders", arXiv 2510.11690). The encoder stays as it is, so networks go on with the same latents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from ..encoders import Autoencoder
from ..images import to_images
from ..schedule import add_noise, alpha_sigma
from ..uvit import UViT
from .autoencoder import noise_levels, psnr, reconstruction_loss
from .data import ImageFolder, in_floats, training_set
from .latents import Latents
from .loop import Stage, TrainConfig
from .parallel import own_device
from .stage import generator_on
from .uvit import attention_for


class Decoder(nn.Module):
    """The half of an autoencoder that draws: scaled latents (B, C, H/8, W/8) -> pixels (B, 3, H, W), about [-1, 1]."""

    def __init__(self, autoencoder: Autoencoder):
        super().__init__()
        self.post_quant_conv, self.decoder = autoencoder.vae.post_quant_conv, autoencoder.vae.decoder
        self.scale, self.patch_size = autoencoder.config.scale_factor, autoencoder.config.patch_size

    def forward(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(latents / self.scale)), self.patch_size)


class Denoised:
    """Latents of pictures that a network knows, noised and given back by it in one step: with the errors it makes."""

    def __init__(self, checkpoint: Checkpoint, pictures: ImageFolder, labels: tuple[int, int], device: torch.device):
        self.pictures, self.labels, self.device = pictures, labels, device
        self.latents = Latents(checkpoint, pictures, device=device)
        self.shares = torch.ones(self.latents.captions.shape[1])
        self.net = UViT(checkpoint.config.uvit, attention=attention_for(checkpoint.config.uvit))
        self.net.load_state_dict(checkpoint.state_dict("uvit", dtype=torch.float32))
        self.net.to(device).eval().requires_grad_(False)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, H, W) and latents (B, C, H/8, W/8) of them, on the network's device; the generator on the CPU."""
        at, device = generator_on(self.device, generator), self.device
        index = torch.randint(len(self.pictures), (count,), generator=at, device=device)
        clean = self.latents.draw(index, self.shares, at)
        noise = clean.map(lambda x: torch.randn(x.shape, generator=at, device=device))
        labels = torch.randint(self.labels[0], self.labels[1] + 1, (count,), generator=at, device=device).float()
        img, clip_img = (add_noise(clean.need(name), noise.need(name), labels) for name in ("img", "clip_img"))
        said, kind = torch.zeros(count, device=device), torch.ones(count, dtype=torch.long, device=device)
        eps = self.net(img, clip_img, clean.need("text"), labels, said, kind, heads=("img",))[0]
        alpha, sigma = (x.view(-1, 1, 1, 1) for x in alpha_sigma(labels))
        return in_floats(self.pictures.levels(index.cpu()).to(device)), (img - sigma * eps.float()) / alpha


class DecoderStage(Stage):
    """Options:

    data, where, image_size: pictures to decode.
    checkpoint: a whole model; its decoder goes on learning.
    noise: largest standard deviation of the noise on the latents, which have about unit variance. A batch has all levels.
    clean: share of a batch that has none.
    known: a record filter: the pictures that the network has learnt.
    denoised: share of a batch that is of these pictures, with latents from the network.
    labels: (least, largest) noise that the network took away.
    edge_weight, mse_weight: as for the autoencoder.
    test: a filter of the pictures that ``psnr.txt`` and the samples are made of; unseen concepts when absent.
    dtype: of the exported file, "float16" when absent.
    """

    model: Decoder

    def __init__(self, config: TrainConfig):
        options = config.options
        self.out = Path(config.out)
        self.checkpoint = load_checkpoint(options["checkpoint"])
        self.device = own_device()  # of what is frozen
        self.autoencoder = Autoencoder.from_checkpoint(self.checkpoint, device=self.device, dtype=torch.float32)
        self.model = Decoder(self.autoencoder).requires_grad_(True)
        self.train_set = training_set(options)
        self.test_set = ImageFolder(options["data"], options["image_size"], options.get("test", {"split": "heldout_concept"}))
        self.size = len(self.train_set)
        self.noise, self.clean = float(options.get("noise", 0.25)), float(options.get("clean", 0.25))
        self.denoised_share = float(options.get("denoised", 0.4))
        known = training_set(options | {"where": options["known"]})
        low, high = options.get("labels", (50, 600))
        self.denoised = Denoised(self.checkpoint, known, (int(low), int(high)), self.device)
        self.edge_weight, self.mse_weight = options.get("edge_weight", 0.5), options.get("mse_weight", 1.0)
        self.dtype = getattr(torch, options.get("dtype", "float16"))

    @torch.no_grad()
    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, C, H/8, W/8) of the latents of pictures, scaled."""
        config = self.autoencoder.config
        posterior = self.autoencoder.vae.encode(F.pixel_unshuffle(pixels, config.patch_size)).latent_dist
        return posterior.mean * config.scale_factor, posterior.std * config.scale_factor

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        return {"levels": self.train_set.levels(indices[round(self.denoised_share * len(indices)) :])}

    def loss(self, model: Any, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        count, device = len(batch["levels"]), batch["levels"].device
        total = round(count / (1 - self.denoised_share))
        at, pixels = generator_on(self.device, generator), in_floats(batch["levels"].to(self.device))
        spread = noise_levels(count, self.noise, self.clean, at).view(-1, 1, 1, 1)
        mean, std = self._posterior(pixels)
        latents = mean + (std.square() + spread.square()).sqrt() * torch.randn(mean.shape, generator=at, device=self.device)
        with torch.no_grad():
            others, known = self.denoised.draw(total - count, generator)
        return reconstruction_loss(
            model(torch.cat((latents, known)).to(device)).float(),
            torch.cat((pixels, others)).to(device),
            self.edge_weight,
            self.mse_weight,
        )

    def sample(self, model: Any) -> Image.Image:
        """Pictures, decoded from their latents and from noisy ones, and what the network gave back of some it knows."""
        generator = torch.Generator().manual_seed(1)
        order = torch.randperm(len(self.test_set), generator=generator)[:128]
        scores, rows = [], []
        for chunk in order.split(32):
            pixels = self.test_set.pixels(chunk)
            mean = self._posterior(pixels.to(self.device))[0].cpu()
            noisy = mean + self.noise / 2 * torch.randn(mean.shape, generator=generator)
            decoded = [self._drawn(model, x) for x in (mean, noisy)]
            scores.append(torch.stack([psnr(x, pixels) for x in decoded]))
            rows.append([pixels, *decoded])
        pixels, given_back = (x.cpu() for x in self.denoised.draw(32, generator))
        decoded = [self._drawn(model, given_back)]
        means = [*torch.cat(scores, dim=1).mean(1).tolist(), psnr(decoded[0], pixels).mean().item()]
        with (self.out / "psnr.txt").open("a") as file:
            file.write(" ".join(f"{mean:.2f}" for mean in means) + "\n")
        shown = [x for row in rows[:2] for x in row] + [pixels, *decoded]
        return to_images(torch.cat([torch.cat(list(x[:8]), dim=2) for x in shown], dim=1)[None])[0]

    @staticmethod
    def _drawn(model: Any, latents: Tensor) -> Tensor:
        """Pictures of latents, both on the CPU, wherever the decoder is."""
        drawn: Tensor = model(latents.to(model.post_quant_conv.weight.device)).cpu()
        return drawn

    def export(self, model: Any) -> None:
        """``model.safetensors``: the checkpoint with this decoder, complete in one file."""
        ours = model.state_dict()
        kept = {k: v for k, v in self.autoencoder.vae.state_dict().items() if k not in ours}
        parts = {name: self.checkpoint.state_dict(name) for name in self.checkpoint.parts() if name != "vae"}
        parts["vae"] = kept | ours
        path, specs = self.out / "model.safetensors", self.checkpoint.tokenizer_specs()
        save_checkpoint(path, self.checkpoint.config, parts, specs, self.dtype)
