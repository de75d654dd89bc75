"""Training data of a LoRA: a few image-caption pairs to learn, and samples of the model itself for prior preservation.

Everything is held as latents, made once, so the encoders (the library's, or ComfyUI's VAE and CLIP) and the training loop need
not know each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from ..data.captioned import INDEX, read_beside, read_listed
from ..media.formats import PICTURE_FORMATS
from ..media.images import fit, to_images, to_tensor
from ..streams import Streams, item_generators
from .augment import augmented
from .prior_data import trainable_copy

if TYPE_CHECKING:
    from ..engine import Engine


@dataclass(frozen=True)
class LoRAData:
    """Pairs to learn, and prior samples whose predictions the LoRA must not change.

    Attributes:
        pairs: the three streams of N image-caption pairs, (N, ...) each.
        captions: their N captions.
        prior: the three streams of M pairs sampled from the model without a prompt.
        prior_tokens: (M, T) captions that the model's caption decoder gives the prior samples, `IGNORED_TOKEN` after the stop;
            None if the caption decoder is not trained.
    """

    pairs: Streams
    captions: tuple[str, ...]
    prior: Streams
    prior_tokens: Tensor | None = None

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any pair, caption or prior sample."""
        digest = hashlib.sha256("\n".join(self.captions).encode())
        for streams in (self.pairs, self.prior):
            for _, stream in streams.items():
                digest.update(stream.contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def read_pictures(folder: str | Path, size: int, word: str | None = None) -> tuple[list[Image.Image], list[list[str]]]:
    """Read the pictures of a folder as squares of `size` pixels, with the captions of each.

    Captions come from the folder's `metadata.jsonl`, which then lists the pictures, or from a `.txt` beside each picture. A
    picture without a caption gets the `word`.

    Raises:
        FileNotFoundError: no such folder, or no picture in it.
        ValueError: a picture that is damaged, or without a caption.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: put 4 to 8 pictures of the new thing into one")
    listed = (folder / INDEX).is_file()
    pairs = list(read_listed(folder) if listed else read_beside(folder, recursive=False))
    if not pairs:
        raise FileNotFoundError(f"{folder} holds no picture ({', '.join(PICTURE_FORMATS)})")
    captions = []
    for pair in pairs:
        if pair.problem:
            raise ValueError(f"the caption of {pair.path} cannot be read; check the permissions of the .txt beside it")
        texts = [text.strip() for text in pair.captions if text.strip()]
        if not texts and not word:
            place = INDEX if listed else pair.path.with_suffix(".txt").name
            raise ValueError(f"{pair.path} has no caption: write one in {place}, or give a word for all pictures")
        captions.append(texts or [str(word)])
    return [fit(pair.image(), size, size) for pair in pairs], captions


def variations(pictures: Sequence[Image.Image], count: int, strength: float, seed: int) -> list[Image.Image]:
    """`count` variations of each picture: itself, then copies that are slightly rotated, zoomed and shifted.

    Args:
        pictures: squares of one size.
        strength: of the changes; 1 is the full range of `augmented`.

    Returns:
        `count` variations of the first picture, then of the second, and so on.
    """
    pixels, generator = to_tensor(pictures), torch.Generator().manual_seed(seed)
    changed = [augmented(pixels, generator, place=strength, colour=0.0) for _ in range(count - 1)]
    return to_images(torch.stack([pixels, *changed], dim=1).flatten(0, 1))


def captions_of_variations(captions: Sequence[Sequence[str]], count: int) -> tuple[str, ...]:
    """A caption for each of `count` variations of each picture; several captions of a picture take turns."""
    return tuple(forms[k % len(forms)] for forms in captions for k in range(count))


def encode_pairs(model: Engine, pictures: Sequence[Image.Image], captions: Sequence[str], seed: int) -> Streams:
    """Streams (N, ...) of N square pictures and their captions, float32 on the CPU, by the model's own encoders."""
    with torch.no_grad():
        img = model.autoencoder.encode(to_tensor(pictures), item_generators(seed, len(pictures)))
        clip_img = model.image_token_encoder(pictures)
        text = model.encode_texts(list(captions))
    return Streams(img, clip_img, text).map(trainable_copy)
