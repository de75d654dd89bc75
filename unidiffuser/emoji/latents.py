"""Pairs as latents, made once by the frozen encoders of a checkpoint and kept in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..checkpoints.checkpoint import Checkpoint
from ..encoders.autoencoder import Autoencoder
from ..encoders.clip import ImageTokenEncoder, TextEncoder
from ..media.images import to_images, to_levels
from ..streams import Streams
from ..training.augment import augmented
from .image_folder import ImageFolder


class Latents:
    """The latents of an image folder.

    Attributes:
        mean, std: (N * V, C, H/8, W/8) of the autoencoder's posterior, scaled; an image latent is drawn anew at every visit.
        clip_img: (N * V, 1, D) CLIP image tokens.
        versions: V; rows i * V ... of the three are picture i as it is, then as :func:`.augment.augmented` changes it.
        text: (T, L, text_dim), one text latent for each different caption.
        captions: (N, forms) rows of ``text`` for the captions of each picture; a picture with fewer repeats its last.
        manners: (N, M) of the autoencoder's palette, 1 for the one that a record names and all 0 where it names none of them;
            None without a palette, or where nothing says which field names them.
        records: the N records of the image folder.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        images: ImageFolder,
        *,
        versions: int = 1,
        strength: Mapping[str, Any] | None = None,
        seed: int = 0,
        batch_size: int = 32,
        device: torch.device | str = "cpu",
        manner_of: str | None = None,
    ):
        """What is encoded, and how.

        Args:
            versions, strength ("place", "colour" ...), seed: of the changes.
            device: where it is done and where they are kept.
            manner_of: the field of the records that names the manner of an autoencoder with a palette: latents then have the
                code of what the record says, rather than of what the palette sees in the picture.
        """
        self.versions, self.records = versions, images.records
        generator = torch.Generator().manual_seed(seed)
        self.autoencoder = Autoencoder.from_checkpoint(checkpoint, device=device, dtype=torch.float32)
        tokens = ImageTokenEncoder.from_checkpoint(checkpoint, device=device, dtype=torch.float32)
        self.encode_text = TextEncoder.from_checkpoint(checkpoint, device=device, dtype=torch.float32)
        means, stds, clip_imgs = [], [], []
        with torch.no_grad():
            for chunk in tqdm(torch.arange(len(images)).split(batch_size), desc="encode", leave=False):
                given = images.pixels(chunk).to(device)
                changed = [augmented(given, generator, **(strength or {})) for _ in range(versions - 1)]
                pixels = torch.stack([given, *changed], dim=1).flatten(0, 1)
                mean, std = self.autoencoder.posterior(pixels)
                means.append(mean)
                stds.append(std)
                if pixels.shape[2] == tokens.size:  # nothing to resize, so they need not leave the device
                    clip_imgs.append(tokens.of_pixels(tokens.normalised(to_levels(pixels))))
                else:
                    clip_imgs.append(tokens(to_images(pixels)))
            texts = sorted({text for record in images.records for text in record["text"]})
            self.text = torch.cat([self.encode_text(texts[i : i + 256]) for i in range(0, len(texts), 256)])
        # clone: what inference mode made may not take part in a training step
        self.mean, self.std, self.clip_img = (torch.cat(x).clone() for x in (means, stds, clip_imgs))
        self.text = self.text.clone()
        numbers = {text: i for i, text in enumerate(texts)}
        forms = max(len(record["text"]) for record in images.records)
        self.captions = torch.tensor(
            [[numbers[r["text"][min(k, len(r["text"]) - 1)]] for k in range(forms)] for r in images.records], device=device
        )
        self.manners = self._named(checkpoint, manner_of)
        if self.manners is not None:
            every = torch.arange(len(self.mean), device=device)
            self.mean = self.in_manner(self.mean, every // versions)

    def _named(self, checkpoint: Checkpoint, field: str | None) -> Tensor | None:
        palette = checkpoint.config.vae.palette
        if palette is None or field is None:
            return None
        named = [[record.get(field) == manner for manner in palette["manners"]] for record in self.records]
        return torch.tensor(named, dtype=self.mean.dtype, device=self.mean.device)

    def in_manner(self, img: Tensor, index: Tensor | None) -> Tensor:
        """Image latents (B, C, H, W) in the code of the pictures ``index`` (B,), or in none; as they are without manners."""
        if self.manners is None or self.autoencoder.palette is None:
            return img
        palette = self.autoencoder.palette
        return palette.remove_code(img) if index is None else palette.write_code(img, self.manners[index])

    def to(self, device: torch.device) -> Latents:
        """Itself, with all pairs on the device; the encoders stay where they are."""
        if self.mean.device != device:
            for name in ("mean", "std", "clip_img", "text", "captions"):
                setattr(self, name, getattr(self, name).to(device))
            self.manners = None if self.manners is None else self.manners.to(device)
        return self

    def draw(self, index: Tensor, shares: Tensor, generator: torch.Generator, changed: Tensor | None = None) -> Streams:
        """Latents of the pairs ``index`` (B,): any version, its posterior sampled, a caption form by ``shares``: (forms,), or
        (B, forms) for shares of each pair's own.

        Where ``changed`` (B,) is false, the picture is as it is. All of them, and the generator, on the pairs' own device.
        """
        device = generator.device
        shares = shares.to(device).expand(len(index), -1)
        form = torch.multinomial(shares, 1, generator=generator)
        text = self.text[self.captions[index].gather(1, form)[:, 0]]
        version = torch.randint(self.versions, index.shape, generator=generator, device=device)
        row = index * self.versions + (version if changed is None else version * changed)
        mean = self.mean[row]
        img = mean + self.std[row] * torch.randn(mean.shape, generator=generator, device=device)
        return Streams(img, self.clip_img[row], text)
