"""What a LoRA learns from: a few pictures of the new thing with their captions, and pairs of the model's own to keep the rest.

All of it is latents, made once, so that who encodes (the library, or ComfyUI with its own VAE and CLIP) and who trains need
not know each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from ..data.captioned import INDEX, read_beside, read_listed
from ..media.images import PICTURE_FORMATS, fit, to_images, to_tensor
from ..path import NoisePath
from ..samplers import sample
from ..streams import Streams, item_generators
from .augment import augmented

if TYPE_CHECKING:
    from ..encoders.captions import CaptionDecoder
    from ..engine import Engine

NO_TOKEN = -100  # what no loss looks at


@dataclass(frozen=True)
class Lessons:
    """Pairs to learn and pairs to keep.

    Attributes:
        learned: N pairs of the new thing, all three streams.
        words: their N captions.
        kept: M pairs as the model makes them itself.
        kept_tokens: (M, T) what its caption decoder says of them, `NO_TOKEN` after the stop; None where nobody trains it.
    """

    learned: Streams
    words: tuple[str, ...]
    kept: Streams
    kept_tokens: Tensor | None = None

    def fingerprint(self) -> str:
        """Changes with anything that is learned or kept."""
        digest = hashlib.sha256("\n".join(self.words).encode())
        for streams in (self.learned, self.kept):
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
        texts = [text.strip() for text in pair.captions if text.strip()]
        if not texts and not word:
            place = INDEX if listed else pair.path.with_suffix(".txt").name
            raise ValueError(f"{pair.path} has no caption: write one in {place}, or give a word for all pictures")
        captions.append(texts or [str(word)])
    return [fit(pair.image(), size, size) for pair in pairs], captions


def variations(pictures: Sequence[Image.Image], count: int, strength: float, seed: int) -> list[Image.Image]:
    """Each picture `count` times: as it is, then a little turned, zoomed and shifted (`strength` 1: see `augmented`)."""
    pixels, generator = to_tensor(pictures), torch.Generator().manual_seed(seed)
    changed = [augmented(pixels, generator, place=strength, colour=0.0) for _ in range(count - 1)]
    return to_images(torch.stack([pixels, *changed], dim=1).flatten(0, 1))


def spread(captions: Sequence[Sequence[str]], count: int) -> tuple[str, ...]:
    """A caption for each of `count` variations of each picture; several captions of a picture take turns."""
    return tuple(forms[k % len(forms)] for forms in captions for k in range(count))


def encode(model: Engine, pictures: Sequence[Image.Image], words: Sequence[str], seed: int) -> Streams:
    """The pairs of squares and captions as latents, by the library's own encoders."""
    with torch.no_grad():
        img = model.autoencoder.encode(to_tensor(pictures), item_generators(seed, len(pictures)))
        clip_img = model.image_token_encoder(pictures)
        text = model.encode_texts(list(words))
    return Streams(img, clip_img, text).map(
        lambda x: x.float().cpu().clone()
    )  # clone: an inference tensor cannot be learned from


def own_pairs(
    net: Callable[..., Any],
    count: int,
    *,
    steps: int,
    guidance: float,
    seed: int,
    batch: int = 16,
    watch: Callable[[int], None] = lambda done: None,
) -> Streams:
    """Pairs that a network makes out of nothing: samples of what it knows, from no data.

    Args:
        watch: called with the number of pairs that are there, after each batch.
    """
    parts = []
    for first in range(0, count, batch):
        generators = item_generators(seed + first, min(batch, count - first))
        out = sample(net, NoisePath.joint(steps), Streams(), guidance=guidance, generator=generators)
        parts.append(out.map(lambda x: x.float().cpu().clone()))
        watch(min(first + batch, count))
    return Streams(**{name: torch.cat([part.need(name) for part in parts]) for name, _ in parts[0].items()})


def said_of(captioner: CaptionDecoder, text: Tensor) -> Tensor:
    """What a caption decoder says of text latents (B, L, d): tokens (B, T), `NO_TOKEN` after the stop."""
    return padded([found[0].tokens for found in captioner.decode(text, beams=1)])


def caption_tokens(captioner: CaptionDecoder, words: Sequence[str]) -> Tensor:
    """The tokens (B, T) that a caption decoder should say for captions, with the stop; long ones are cut."""
    most, stop = captioner.config.max_new_tokens, captioner.config.stop_token_id
    return padded([[*captioner.tokenizer.encode(text)[: most - 1], stop] for text in words])


def padded(rows: Sequence[Sequence[int]], length: int = 0) -> Tensor:
    """Rows of tokens as one tensor (B, T), `NO_TOKEN` after their ends."""
    length = max([length, *map(len, rows)])
    return torch.tensor([[*row, *[NO_TOKEN] * (length - len(row))] for row in rows])
