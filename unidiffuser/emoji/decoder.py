"""The autoencoder's decoder learns to decode what a network makes, which is never quite the latent of a picture.

A small network leaves errors of about a tenth of the latents' spread. A decoder that has only seen true latents paints them as
a mottle over flat colours. Shown the true picture beside noisy latents, and beside latents that the network itself took the
noise from, it learns what is meant (noise-augmented decoding: Zheng et al., "Diffusion Transformers with Representation
Autoencoders", arXiv 2510.11690). The encoder stays as it is, so networks go on with the same latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..checkpoints.checkpoint import Checkpoint, VAEConfig, load_checkpoint, save_checkpoint
from ..distributed import own_device
from ..encoders.autoencoder import Autoencoder
from ..evaluation.metrics import psnr
from ..media.images import from_levels, to_images
from ..schedule import add_noise, alpha_sigma
from ..small.network import build
from ..small.palette import Palette
from ..training.augment import hue_turn
from ..training.config import TrainConfig
from ..training.network import attention_for
from ..training.stage import Batch, TrainingStage, generator_on, seeded_init
from .autoencoder import noise_levels, reconstruction_loss
from .image_folder import ImageFolder, training_set
from .latents import Latents


class Decoder(nn.Module):
    """The half of an autoencoder that draws: scaled latents (B, C, H/8, W/8) -> pixels (B, 3, H, W), about [-1, 1]."""

    def __init__(self, autoencoder: Autoencoder):
        super().__init__()
        self.post_quant_conv, self.decoder = autoencoder.vae.post_quant_conv, autoencoder.vae.decoder
        self.scale, self.patch_size = autoencoder.config.scale_factor, autoencoder.config.patch_size
        if autoencoder.palette is not None:
            self.palette = autoencoder.palette

    def forward(self, latents: Tensor, manners: Tensor | None = None, whole: Tensor | None = None) -> Any:
        """Pictures; and of those of a palette in the given manners (B, M), not those that the latents name.

        With ``whole``, real pictures, also the logits (B, M + 1) of their manners.
        """
        palette: Palette | None = getattr(self, "palette", None)
        if palette is not None:
            manners = palette.read_code(latents) if manners is None else manners
            latents = palette.remove_code(latents)
        pixels = F.pixel_shuffle(self.decoder(self.post_quant_conv(latents / self.scale)), self.patch_size)
        if palette is not None and manners is not None:
            pixels = palette(pixels, manners)
        return pixels if whole is None or palette is None else (pixels, palette.style_logits(whole))


class Denoised:
    """Latents of pictures that a network knows, noised and given back by it in one step: with the errors it makes."""

    def __init__(self, checkpoint: Checkpoint, pictures: ImageFolder, labels: tuple[int, int], device: torch.device):
        self.pictures, self.labels, self.device = pictures, labels, device
        self.latents = Latents(checkpoint, pictures, device=device)
        self.shares = torch.ones(self.latents.captions.shape[1])
        self.net = build(checkpoint.config.uvit, attention=attention_for(checkpoint.config.uvit))
        self.net.load_state_dict(checkpoint.state_dict("uvit", dtype=torch.float32))
        self.net.to(device).eval().requires_grad_(False)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures (B, 3, H, W), latents (B, C, H/8, W/8) of them and which they are, on the network's device.

        The generator is on the CPU.
        """
        at, device = generator_on(self.device, generator), self.device
        index = torch.randint(len(self.pictures), (count,), generator=at, device=device)
        clean = self.latents.draw(index, self.shares, at)
        noise = clean.map(lambda x: torch.randn(x.shape, generator=at, device=device))
        labels = torch.randint(self.labels[0], self.labels[1] + 1, (count,), generator=at, device=device).float()
        img, clip_img = (add_noise(clean.need(name), noise.need(name), labels) for name in ("img", "clip_img"))
        said, kind = torch.zeros(count, device=device), torch.ones(count, dtype=torch.long, device=device)
        eps = self.net(img, clip_img, clean.need("text"), labels, said, kind, heads=("img",))[0]
        alpha, sigma = (x.view(-1, 1, 1, 1) for x in alpha_sigma(labels))
        return from_levels(self.pictures.levels(index.cpu()).to(device)), (img - sigma * eps.float()) / alpha, index


class DecoderStage(TrainingStage):
    """Options:

    data, where, image_size: pictures to decode.
    checkpoint: a whole model; its decoder goes on learning.
    noise: largest standard deviation of the noise on the latents, which have about unit variance. A batch has all levels.
    clean: share of a batch that has none.
    known: a record filter: the pictures that the network has learnt.
    denoised: share of a batch that is of these pictures, with latents from the network.
    labels: (least, largest) noise that the network took away.
    edge_weight, mse_weight: as for the autoencoder.
    palette: gives the autoencoder a :class:`..palette.Palette`: "field" (of the records, what they call a manner), "manners"
        (its values) and "colours" (of each). An autoencoder that has one goes on with it. The latents then bear a code of the
        manner, so a network has to go on learning on them.
    gate: how much higher the palette's gates are in the exported file than they were learnt. Who minimises an error goes only a
        part of the way to a colour that may be the wrong one; with 4 every pixel goes all the way, which leaves pictures of a
        network in the colours that were asked for and costs exact ones a little. A file exported so has its gates raised
        already: leave it at 0 when a run goes on from one.
    strange: share of the real pictures that are turned to other colours, so that no manner is seen in what has none.
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
        self.train_set = training_set(options)
        self.vae = self._with_palette(config.seed, options.get("palette"))
        self.model = Decoder(self.autoencoder).requires_grad_(True)
        self.strange, self.gate = float(options.get("strange", 0.0)), float(options.get("gate", 0.0))
        if self.gate and not self.vae.palette:
            raise ValueError("gate is of a palette, which this autoencoder has not; give it one, or leave gate out")
        self.test_set = ImageFolder(options["data"], options["image_size"], options.get("test", {"split": "heldout_concept"}))
        self.size = len(self.train_set)
        self.noise, self.clean = float(options.get("noise", 0.25)), float(options.get("clean", 0.25))
        self.denoised_share = float(options.get("denoised", 0.4))
        known = training_set(options | {"where": options["known"]})
        self.kinds, self.known_kinds = self._kinds(self.train_set), self._kinds(known)
        low, high = options.get("labels", (50, 600))
        self.denoised = Denoised(self.checkpoint, known, (int(low), int(high)), self.device)
        self.edge_weight, self.mse_weight = options.get("edge_weight", 0.5), options.get("mse_weight", 1.0)
        self.dtype = getattr(torch, options.get("dtype", "float16"))

    def _with_palette(self, seed: int, options: dict[str, Any] | None) -> VAEConfig:
        """The autoencoder's sizes, with a palette where there is one or shall be one."""
        config = self.autoencoder.config
        self.field: str = (options or {}).get("field", "style")
        if not options or config.palette:
            return config
        manners, colours = list(options["manners"]), int(options.get("colours", 96))
        with seeded_init(seed):
            palette = Palette(len(manners), colours)
        config = replace(config, palette={"manners": manners, "colours": colours})
        kinds = self._kinds(self.train_set, manners)
        order = torch.randperm(len(kinds), generator=torch.Generator().manual_seed(seed))
        some = torch.cat([order[kinds[order] == kind][:200] for kind in range(len(manners))])
        palette.init_colours(self.train_set.levels(some), kinds[some])
        self._tell_manners(palette, some, kinds[some])
        self.autoencoder.vae.palette = self.autoencoder.palette = palette.to(self.device)
        self.autoencoder.config = config
        return config

    def _tell_manners(self, palette: Palette, index: Tensor, kinds: Tensor) -> None:
        """Let a palette learn to tell the manners (N,) of pictures (N,), an eighth of which is turned to strange colours."""
        generator, used = torch.Generator().manual_seed(0), []
        kinds = kinds.masked_fill(torch.rand(len(kinds), generator=generator) < 1 / 8, len(palette.gate))
        with torch.no_grad():
            for chunk, kind in zip(index.split(16), kinds.split(16), strict=True):
                pixels = self.train_set.pixels(chunk)
                strange = (kind == len(palette.gate))[:, None, None, None]
                used.append(palette.colour_usage(torch.where(strange, strange_colours(pixels, generator), pixels)))
        palette.fit_classifier(torch.cat(used), kinds)

    def _kinds(self, images: ImageFolder, manners: list[str] | None = None) -> Tensor:
        """(N,) the manner of each picture, M where it has none of them."""
        if manners is None:
            manners = (self.vae.palette or {}).get("manners", [])
        number = {name: i for i, name in enumerate(manners)}
        return torch.tensor([number.get(record.get(self.field, ""), len(manners)) for record in images.records])

    @torch.no_grad()
    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, C, H/8, W/8) of the latents of pictures, scaled."""
        return self.autoencoder.posterior(pixels)

    def examples(self, indices: Tensor, seeds: Sequence[int]) -> Batch:
        return {"levels": self.train_set.levels(indices), "kinds": self.kinds[indices]}

    def loss(self, model: Any, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        # The first examples give their places to pictures that the network knows.
        batch = {name: value[round(self.denoised_share * len(value)) :] for name, value in batch.items()}
        count, device = len(batch["levels"]), batch["levels"].device
        total = round(count / (1 - self.denoised_share))
        at, pixels = generator_on(self.device, generator), from_levels(batch["levels"].to(self.device))
        kinds = batch["kinds"].to(self.device)
        if self.strange:
            turned = torch.rand(count, generator=at, device=self.device) < self.strange
            pixels = torch.where(turned[:, None, None, None], strange_colours(pixels, at), pixels)
            kinds = kinds.masked_fill(turned, self.none)
        spread = noise_levels(count, self.noise, self.clean, at).view(-1, 1, 1, 1)
        mean, std = self._posterior(pixels)
        latents = mean + (std.square() + spread.square()).sqrt() * torch.randn(mean.shape, generator=at, device=self.device)
        with torch.no_grad():
            others, known, which = self.denoised.draw(total - count, generator)
        latents, wanted = torch.cat((latents, known)).to(device), torch.cat((pixels, others)).to(device)
        weights = self.edge_weight, self.mse_weight
        if not self.vae.palette:
            return reconstruction_loss(model(latents).float(), wanted, *weights)
        kinds = torch.cat((kinds, self.known_kinds.to(self.device)[which])).to(device)
        drawn, told = model(latents, F.one_hot(kinds, self.none + 1)[:, :-1].float(), wanted)
        losses = reconstruction_loss(drawn.float(), wanted, *weights)
        manner = F.cross_entropy(told.float(), kinds)
        return losses | {"loss": losses["loss"] + manner / 10, "manner": manner}

    @property
    def none(self) -> int:
        """The number that stands for no manner."""
        return len((self.vae.palette or {}).get("manners", []))

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
        pixels, given_back, which = (x.cpu() for x in self.denoised.draw(32, generator))
        if self.autoencoder.palette is not None:
            told = F.one_hot(self.known_kinds[which], self.none + 1)[:, :-1].float()
            given_back = self.autoencoder.palette.write_code(given_back.to(self.device), told.to(self.device)).cpu()
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
        if self.gate:
            ours["palette.gate"] = ours["palette.gate"] + self.gate
        kept = {k: v for k, v in self.autoencoder.vae.state_dict().items() if k not in ours}
        parts = {name: self.checkpoint.state_dict(name) for name in self.checkpoint.parts() if name != "vae"}
        parts["vae"] = kept | ours
        path, specs = self.out / "model.safetensors", self.checkpoint.tokenizer_specs()
        save_checkpoint(path, replace(self.checkpoint.config, vae=self.vae), parts, specs, self.dtype)


def strange_colours(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1], each turned in hue by any angle and made paler by up to a half, on the same white."""
    angle, paler = (torch.rand(len(pixels), generator=generator, device=pixels.device) for _ in range(2))
    turned = torch.einsum("bij,bjhw->bihw", hue_turn(2 * math.pi * angle), pixels - 1)
    return (1 + turned * (1 - paler / 2)[:, None, None, None]).clamp(-1, 1)
