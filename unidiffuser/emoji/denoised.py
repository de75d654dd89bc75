"""Latents as a network denoises them, with the errors that it makes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..media.images import from_levels
from ..schedule import add_noise, alpha_sigma
from ..small.network import build
from ..streams import draw_normal
from ..training.network import attention_for
from ..training.stage import generator_on
from .image_folder import ImageFolder
from .latents import Latents


class DenoisedLatents:
    """Latents of known pictures, noised and denoised in one step by a checkpoint's network.

    Args:
        checkpoint: with a network.
        pictures: those that are returned beside their latents.
        encoded: the same pictures at the checkpoint's size, which may be half theirs.
        labels: lowest and highest noise label.
        device: where the network works.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        pictures: ImageFolder,
        encoded: ImageFolder,
        labels: tuple[int, int],
        device: torch.device,
    ):
        self.pictures, self.labels, self.device = pictures, labels, device
        self.latents = Latents(checkpoint, encoded, device=device)
        self.forms = torch.ones(self.latents.captions.shape[1])
        self.net = build(checkpoint.config.uvit, attention=attention_for(checkpoint.config.uvit))
        self.net.load_state_dict(checkpoint.state_dict("uvit", dtype=torch.float32))
        self.net.to(device).eval().requires_grad_(False)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Random pictures (B, 3, H, W), their denoised latents (B, C, h, w) and their indices (B,), on the device.

        Args:
            count: B.
            generator: on the CPU.
        """
        at, device = generator_on(self.device, generator), self.device
        index = torch.randint(len(self.pictures), (count,), generator=at, device=device)
        clean = self.latents.draw(index, self.forms, at)
        noise = clean.map(lambda x: draw_normal(x.shape, at))
        labels = torch.randint(self.labels[0], self.labels[1] + 1, (count,), generator=at, device=device).float()
        img, clip_img = (add_noise(clean.need(name), noise.need(name), labels) for name in ("img", "clip_img"))
        zero, data_type = torch.zeros(count, device=device), torch.ones(count, dtype=torch.long, device=device)
        eps = self.net(img, clip_img, clean.need("text"), labels, zero, data_type, heads=("img",))[0]
        alpha, sigma = (x.view(-1, 1, 1, 1) for x in alpha_sigma(labels))
        return from_levels(self.pictures.levels(index.cpu()).to(device)), (img - sigma * eps.float()) / alpha, index
