"""UniDiffuser: every task of the model, each a choice of noise path and start.

    task            path             given            then
    text_to_image   text_to_image    clean text       decode the image
    image_to_text   image_to_text    clean image      decode the text
    joint           joint            -                decode both
    image, text     image, text      -                decode one
    vary_image      image_to_text, then text_to_image with the text latent of the first
    vary_text       text_to_image, then image_to_text with the image latent and CLIP token of the first
    gibbs           the two in turn, round after round
    interpolate     image_to_text, inverse text_to_image, text_to_image of interpolated noise and text

Seeds: candidate k of a prompt or picture draws all its random numbers (autoencoder sample, start noise, noise inside the
sampler) from one generator seeded with seed + k. So a result does not depend on its batch: `count=4, seed=0` gives the four
results of `count=1` with seeds 0, 1, 2 and 3.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from typing_extensions import Unpack

from .checkpoints.checkpoint import load_checkpoint
from .encoders.prompts import warning_about
from .engine import Engine, Generators
from .media.images import ImageSource
from .options import Options, resolve, whole_number
from .path import NoisePath
from .schedule import NUM_LABELS
from .streams import Streams, item_generators, noised

logger = logging.getLogger(__name__)


class UniDiffuser(Engine):
    """A loaded model and its tasks; `unidiffuser.load` opens one.

    Pictures are given as PIL images or paths and returned as PIL RGB images. All tasks take the `options.Options` as keywords.
    Each part of the checkpoint is loaded when a task first needs it. Bad input raises ValueError or FileNotFoundError with a
    text that says what to do. Words of a prompt that the model cannot follow (see `Engine.check_prompts`) are logged as one
    warning per call.
    """

    def text_to_image(
        self, prompt: str | Sequence[str], *, count: int = 1, negative: str | None = None, **options: Unpack[Options]
    ) -> list[Image.Image]:
        """Pictures of one prompt, or of each of several.

        Args:
            prompt: one or more prompts.
            count: pictures of each.
            negative: a negative prompt, which guidance moves away from; None moves away from the unconditional prediction.
            **options: see `options.Options`.
        """
        chosen = resolve(options, self.config)
        prompts = _prompts(prompt)
        generators = _generators(chosen, len(prompts), count)
        self._warn_about([*prompts, *([] if negative is None else [negative])])
        start = Streams(text=self.encode_texts(prompts).repeat_interleave(count, 0))
        away_from = None if negative is None else self.encode_texts([negative])
        return self.decode_images(
            self.run(_path(NoisePath.text_to_image, chosen), start, chosen, generators, away_from), chosen
        )

    def image_to_text(
        self, image: ImageSource | Sequence[ImageSource], *, count: int = 1, **options: Unpack[Options]
    ) -> list[str]:
        """Captions of one picture, or of each of several; `count` captions of each."""
        chosen = resolve(options, self.config)
        pictures = _pictures(image)
        generators = _generators(chosen, len(pictures), count)
        encoded = self.encode_images(pictures, count, chosen, generators)
        return self.decode_texts(self._to_text(encoded, chosen, generators), chosen)

    def joint(self, *, count: int = 1, **options: Unpack[Options]) -> list[tuple[Image.Image, str]]:
        """Image-caption pairs without a prompt, from the joint distribution."""
        chosen = resolve(options, self.config)
        path = _path(NoisePath.joint, chosen, speeds=chosen["speeds"])
        out = self.run(path, Streams(), chosen, _generators(chosen, 1, count))
        return list(zip(self.decode_images(out, chosen), self.decode_texts(out, chosen), strict=True))

    def image(self, *, count: int = 1, **options: Unpack[Options]) -> list[Image.Image]:
        """Unconditional pictures, from the marginal distribution p(image); it has no guidance."""
        chosen = resolve(options, self.config)
        out = self.run(_path(NoisePath.image, chosen), Streams(), chosen, _generators(chosen, 1, count))
        return self.decode_images(out, chosen)

    def text(self, *, count: int = 1, **options: Unpack[Options]) -> list[str]:
        """Unconditional captions, from the marginal distribution p(text); it has no guidance."""
        chosen = resolve(options, self.config)
        out = self.run(_path(NoisePath.text, chosen), Streams(), chosen, _generators(chosen, 1, count))
        return self.decode_texts(out, chosen)

    def vary_image(
        self, image: ImageSource | Sequence[ImageSource], *, count: int = 1, **options: Unpack[Options]
    ) -> list[Image.Image]:
        """Pictures of the same subject: picture -> text latent -> picture, without words in between."""
        chosen = resolve(options, self.config)
        pictures = _pictures(image)
        generators = _generators(chosen, len(pictures), count)
        encoded = self.encode_images(pictures, count, chosen, generators)
        return self.decode_images(self._to_image(self._to_text(encoded, chosen, generators), chosen, generators), chosen)

    def vary_text(self, prompt: str | Sequence[str], *, count: int = 1, **options: Unpack[Options]) -> list[str]:
        """Other captions with the meaning of a prompt: text -> image latent -> text, without pixels in between."""
        chosen = resolve(options, self.config)
        prompts = _prompts(prompt)
        generators = _generators(chosen, len(prompts), count)
        self._warn_about(prompts)
        encoded = Streams(text=self.encode_texts(prompts).repeat_interleave(count, 0))
        return self.decode_texts(self._to_text(self._to_image(encoded, chosen, generators), chosen, generators), chosen)

    def gibbs(
        self,
        start: Image.Image | os.PathLike[str] | str | None = None,
        *,
        rounds: int = 4,
        hold: float = 0.0,
        count: int = 1,
        **options: Unpack[Options],
    ) -> list[tuple[Image.Image, str]]:
        """Blocked Gibbs sampling: p(text | image) and p(image | text) in turn, each conditioned on the latent of the other.

        Args:
            start: a picture (PIL image or Path), a prompt (str), or None for an unconditional picture.
            rounds: pairs in a chain, each made from the one before.
            hold: noise level (label 0..1000) that a latent is noised to before it conditions the next half round. A little
                noise (40 to 100) keeps small errors from growing, so long chains stay on their topic; much noise lets the
                topic change.
            count: chains.
            **options: see `options.Options`.

        Returns:
            `rounds` pairs, in order; with several chains, chain after chain.
        """
        whole_number("rounds", rounds, least=1)
        if not 0 <= hold <= NUM_LABELS:  # checked before anything is computed
            raise ValueError(f"hold must be a label from 0 (clean) to {NUM_LABELS} (noise), got {hold:g}")
        chosen = resolve(options, self.config)
        generators = _generators(chosen, 1, count)
        halves = [self._to_text, self._to_image]
        if start is None:
            state = self.run(_path(NoisePath.image, chosen), Streams(), chosen, generators)
        elif isinstance(start, str):
            self._warn_about([start])
            state = Streams(text=self.encode_texts([start]).repeat_interleave(count, 0))
            halves.reverse()
        else:
            state = self.encode_images([start], count, chosen, generators)
        pairs = []
        for _ in range(rounds):
            for half in halves:
                state = half(state, chosen, generators, hold)
            pairs.append(list(zip(self.decode_images(state, chosen), self.decode_texts(state, chosen), strict=True)))
        return [pair for chain in zip(*pairs, strict=True) for pair in chain]

    def interpolate(
        self, image_a: ImageSource, image_b: ImageSource, *, frames: int = 8, **options: Unpack[Options]
    ) -> list[Image.Image]:
        """Pictures between two pictures, both ends included as the model reconstructs them.

        Each picture is captioned and, conditioned on its own text latent, inverted to noise. Noises and text latents are
        interpolated spherically and sampled deterministically (arXiv 2303.06555, applications).

        Args:
            image_a, image_b: the ends.
            frames: pictures, at least 2.
            **options: see `options.Options`. Guidance is 1 and steps are 100 by default, since only then the inversion is close
                to exact; `method` applies to the captions.
        """
        whole_number("frames", frames, least=2)
        chosen = resolve({"guidance": 1.0, "steps": 100, **options}, self.config)
        generators = _generators(chosen, 2, 1)
        encoded = self.encode_images([image_a, image_b], 1, chosen, generators)
        ends = self._to_text(encoded, chosen, generators)
        path = _path(NoisePath.text_to_image, chosen)
        noise = self.run(path.reversed(), ends, chosen, generators, method="ddim_inverse")
        weights = [frame / (frames - 1) for frame in range(frames)]
        mixed = noise.map(lambda stream: torch.stack([slerp(stream[0], stream[1], weight) for weight in weights]))
        return self.decode_images(self.run(path, mixed, chosen, _generators(chosen, 1, frames), method="ddim"), chosen)

    def _warn_about(self, prompts: Sequence[str]) -> None:
        if warning := warning_about(prompts, self.check_prompts(prompts)):
            logger.warning("%s", warning)

    def _to_text(self, state: Streams, options: Options, generators: Generators, hold: float = 0.0) -> Streams:
        """The image of `state` and a text sampled from it."""
        start = state.replace(text=None).map(lambda clean: noised(clean, hold, generators))
        out = self.run(_path(NoisePath.image_to_text, options, hold=hold), start, options, generators)
        return state.replace(text=out.text)

    def _to_image(self, state: Streams, options: Options, generators: Generators, hold: float = 0.0) -> Streams:
        """An image sampled from the text of `state`, and that text."""
        start = Streams(text=state.text).map(lambda clean: noised(clean, hold, generators))
        out = self.run(_path(NoisePath.text_to_image, options, hold=hold), start, options, generators)
        return out.replace(text=state.text)


def load(
    name_or_path: str | os.PathLike[str] = "emoji",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    lora: Sequence[tuple[str | os.PathLike[str], float]] = (),
    offload: bool = False,
    tiling: bool = False,
    compile: str | None = None,
) -> UniDiffuser:
    """Open a model. Only headers are read here; each part is loaded when a task first needs it.

    Args:
        name_or_path: "emoji", the bundled model, or a file or folder in one of the three checkpoint layouts.
        device, dtype, offload, tiling, compile: see `engine.Engine`.
        lora: LoRA files and their strengths, see `Engine.load_lora`.

    Raises:
        FileNotFoundError: no such model.
        ValueError: a file that is no model, or an option that is out of range.
    """
    model = UniDiffuser(
        load_checkpoint(os.fspath(name_or_path)), device, dtype, offload=offload, tiling=tiling, compile=compile
    )
    for path, strength in lora:
        model.load_lora(path, strength)
    return model


def _path(kind: Callable[..., NoisePath], options: Options, **more: Any) -> NoisePath:
    """A noise path with the steps and spacing of the options."""
    return kind(options["steps"], spacing=options["spacing"], **more)


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Spherical interpolation of two tensors as vectors, `weight` 0 = a, 1 = b; linear where they are parallel."""
    u, v = (x.flatten().cpu().double() for x in (a, b))  # not every device has float64
    angle = math.acos(float(torch.nn.functional.cosine_similarity(u, v, dim=0).clamp(-1, 1)))
    if math.sin(angle) < 1e-4:
        return torch.lerp(a, b, weight)
    return (math.sin((1 - weight) * angle) * a + math.sin(weight * angle) * b) / math.sin(angle)


T = TypeVar("T")


def _prompts(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else _not_empty(given)


def _pictures(given: ImageSource | Sequence[ImageSource]) -> list[ImageSource]:
    return [given] if isinstance(given, (str, os.PathLike, Image.Image)) else _not_empty(given)


def _not_empty(given: Sequence[T]) -> list[T]:
    items = list(given)
    if not items:
        raise ValueError("give at least one prompt or picture, got an empty list")
    return items


def _generators(options: Options, inputs: int, count: int) -> Generators:
    """`count` generators for each input, input after input; candidate k has the same seed for every input."""
    whole_number("count", count, least=1)
    return [generator for _ in range(inputs) for generator in item_generators(options["seed"], count)]
