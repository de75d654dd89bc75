"""The latents of an image folder, encoded once by the frozen encoders of a checkpoint and kept in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..checkpoints.checkpoint import Checkpoint
from ..encoders.autoencoder import Autoencoder
from ..encoders.clip import ImageTokenEncoder, TextEncoder
from ..media.images import to_images, to_levels
from ..streams import Streams, draw_normal
from .colours import style_numbers
from .image_folder import ImageFolder

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""Augmentation of pictures (B, 3, H, W) in [-1, 1], with a generator on the CPU."""


class Latents:
    """The latents of an image folder.

    Args:
        checkpoint: its autoencoder and encoders.
        images: N pictures with captions.
        versions: V, latents of each picture: as it is, and V - 1 augmented ones.
        augment: makes these.
        seed: of the augmentation.
        batch_size: pictures encoded at once.
        device: of the encoders and of the latents.

    Attributes:
        mean, std: (N V, C, H/8, W/8) of the autoencoder's posterior, scaled. Image latents are sampled from it at every draw.
            With a palette they carry the code of the record's style instead of the one recognised in the picture.
        clip_img: (N V, 1, D) CLIP image tokens. Rows i V ... of these three are the versions of picture i.
        text: (T, L, text_dim), one text latent for each distinct caption.
        captions: (N, forms) rows of `text` with the captions of each picture; a picture with fewer repeats its last.
        styles: (N, M), one-hot styles of the palette, 0 where a record names none of them; None without a palette.
        records: the N records of the image folder.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        images: ImageFolder,
        *,
        versions: int = 1,
        augment: Augment = lambda pixels, _: pixels,
        seed: int = 0,
        batch_size: int = 32,
        device: torch.device | str = "cpu",
    ):
        self.versions, self.records = versions, images.records
        generator = torch.Generator().manual_seed(seed)
        self.autoencoder = Autoencoder.from_checkpoint(checkpoint, device=device, dtype=torch.float32)
        tokens = ImageTokenEncoder.from_checkpoint(checkpoint, device=device, dtype=torch.float32)
        self.encode_text = TextEncoder.from_checkpoint(checkpoint, device=device, dtype=torch.float32)
        means, stds, clip_imgs = [], [], []
        with torch.no_grad():
            for chunk in tqdm(torch.arange(len(images)).split(batch_size), desc="encode", leave=False):
                originals = images.pixels(chunk).to(device)
                changed = [augment(originals, generator) for _ in range(versions - 1)]
                pixels = torch.stack([originals, *changed], dim=1).flatten(0, 1)
                mean, std = self.autoencoder.posterior(pixels)
                means.append(mean)
                stds.append(std)
                if pixels.shape[2] == tokens.size:  # nothing to resize, so they need not leave the device
                    clip_imgs.append(tokens.encode_pixels(tokens.normalise(to_levels(pixels))))
                else:
                    clip_imgs.append(tokens(to_images(pixels)))
            texts = sorted({text for record in images.records for text in record["text"]})
            self.text = torch.cat([self.encode_text(texts[i : i + 256]) for i in range(0, len(texts), 256)])
        # clone: tensors made in inference mode cannot take part in a training step
        self.mean, self.std, self.clip_img = (torch.cat(x).clone() for x in (means, stds, clip_imgs))
        self.text = self.text.clone()
        numbers = {text: i for i, text in enumerate(texts)}
        forms = max(len(record["text"]) for record in images.records)
        self.captions = torch.tensor(
            [[numbers[r["text"][min(k, len(r["text"]) - 1)]] for k in range(forms)] for r in images.records], device=device
        )
        self.styles: Tensor | None = None
        if checkpoint.config.vae.palette is not None:
            names = checkpoint.config.vae.palette["manners"]
            numbers_of_styles = style_numbers(images, names).to(device)
            self.styles = F.one_hot(numbers_of_styles, len(names) + 1)[:, :-1].to(self.mean.dtype)
            every = torch.arange(len(self.mean), device=device)
            self.mean = self.with_style_code(self.mean, every // versions)

    def with_style_code(self, img: Tensor, index: Tensor | None) -> Tensor:
        """Latents (B, C, H, W) with the style codes of the pictures `index` (B,), or with none; unchanged without a palette."""
        if self.styles is None or self.autoencoder.palette is None:
            return img
        palette = self.autoencoder.palette
        return palette.remove_code(img) if index is None else palette.write_code(img, self.styles[index])

    def to(self, device: torch.device) -> Latents:
        """Itself, with all latents on the device; the encoders stay on theirs."""
        if self.mean.device != device:
            for name in ("mean", "std", "clip_img", "text", "captions"):
                setattr(self, name, getattr(self, name).to(device))
            self.styles = None if self.styles is None else self.styles.to(device)
        return self

    def draw(self, index: Tensor, forms: Tensor, generator: torch.Generator, changed: Tensor | None = None) -> Streams:
        """Latents of the pictures `index` (B,), each in a random version, with its posterior sampled and one of its captions.

        Args:
            index: (B,) rows of `captions`.
            forms: (forms,) or (B, forms), relative probability of each caption form.
            generator: on the latents' device, like `index` and `changed`.
            changed: (B,), False for items that must not be augmented.
        """
        device = generator.device
        forms = forms.to(device).expand(len(index), -1)
        form = torch.multinomial(forms, 1, generator=generator)
        text = self.text[self.captions[index].gather(1, form)[:, 0]]
        version = torch.randint(self.versions, index.shape, generator=generator, device=device)
        row = index * self.versions + (version if changed is None else version * changed)
        mean = self.mean[row]
        img = mean + self.std[row] * draw_normal(mean.shape, generator)
        return Streams(img, self.clip_img[row], text)

    def draw_index(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) random pictures; all latents are moved to the generator's device first."""
        self.to(generator.device)
        return torch.randint(len(self.captions), (count,), generator=generator, device=generator.device)
