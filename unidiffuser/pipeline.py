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
    sample          any              any              decode what ends clean

`tasks.editing` has img2img, inpaint, invert, reconstruct and sample, `tasks.captions` caption, rewrite and score.

Seeds: candidate k of a prompt or picture draws all its random numbers (autoencoder sample, start noise, noise inside the
sampler) from one generator seeded with seed + k. So a result does not depend on its batch: `count=4, seed=0` gives the four
results of `count=1` with seeds 0, 1, 2 and 3.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from typing_extensions import Unpack

from .checkpoints.checkpoint import load_checkpoint
from .engine import Generators
from .media.images import ImageSource
from .media.json_files import brief
from .options import DIFFUSERS_METHODS, Options, number, whole_number
from .path import NoisePath
from .runtime.fast_lora import IMAGE_TO_TEXT, JOINT, TEXT_TO_IMAGE
from .runtime.precision import weight_dtype
from .schedule import NUM_LABELS
from .streams import Streams, noised
from .tasks.captions import Captions
from .tasks.editing import ALWAYS, EXACT, FORWARD, INVERSE
from .tasks.inputs import (
    Pictures,
    Prompts,
    chain_start,
    generators_of,
    negative_latents,
    read_pictures,
    read_prompts,
    texts_of,
)


class UniDiffuser(Captions):
    """A loaded model and its tasks; `unidiffuser.load` opens one.

    Pictures are given in any form of `media.images.ImageSource` and returned as PIL RGB images. All tasks take the
    `options.Options` as keywords. Each part of the checkpoint is loaded when a task first needs it. Bad input raises ValueError
    or FileNotFoundError with a text that says what to do. Words of a prompt that the model cannot follow (see
    `Engine.check_prompts`) are logged as one warning per call.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Not a task: each task has a method of its own.

        Raises:
            TypeError: always; names the methods.
        """
        raise TypeError("each task is a method: model.text_to_image(prompt), model.image_to_text(image), model.joint(), ...")

    if not TYPE_CHECKING:  # or type checkers would believe in any attribute

        def __getattr__(self, name: str) -> Any:
            """Names what to write here for an attribute of diffusers' pipeline."""
            if name in DIFFUSERS_METHODS:
                raise AttributeError(f"{name!r} is diffusers' name; here it is {DIFFUSERS_METHODS[name]}")
            return object.__getattribute__(self, name)  # raises, with the usual words

    def text_to_image(
        self, prompt: Prompts, *, count: int = 1, negative: Prompts | None = None, **options: Unpack[Options]
    ) -> list[Image.Image]:
        """Pictures of one prompt, or of each of several.

        Args:
            prompt: one or more prompts.
            count: pictures of each.
            negative: a negative prompt, or one for each prompt, which guidance moves away from; None moves away from the
                unconditional prediction.
            **options: see `options.Options`.
        """
        chosen = self.resolve(options, TEXT_TO_IMAGE)
        given = read_prompts(prompt, chosen)
        generators = generators_of(chosen, len(given.items), count)
        self.warn_about(texts_of(given.items, negative))
        start = Streams(text=self.encode_texts(given.items).repeat_interleave(count, 0))
        away_from = negative_latents(self.encode_texts, negative, given.places, given.total, count, chosen)
        out = self.run(_path(NoisePath.text_to_image, chosen), start, chosen, generators, away_from)
        return given.spread(self.results(out, chosen, "img"), count)

    def image_to_text(self, image: Pictures, *, count: int = 1, **options: Unpack[Options]) -> list[str]:
        """Captions of one picture, or of each of several; `count` captions of each."""
        chosen = self.resolve(options, IMAGE_TO_TEXT)
        given = read_pictures(image, chosen)
        generators = generators_of(chosen, len(given.items), count)
        encoded = self.encode_images(given.items, count, chosen, generators)
        return given.spread(self.results(self._to_text(encoded, chosen, generators), chosen, "text"), count)

    def joint(self, *, count: int = 1, **options: Unpack[Options]) -> list[tuple[Image.Image, str]]:
        """Image-caption pairs without a prompt, from the joint distribution."""
        chosen = self.resolve(options, JOINT)
        path = _path(NoisePath.joint, chosen, speeds=chosen["speeds"])
        return self.results(self.run(path, Streams(), chosen, generators_of(chosen, 1, count)), chosen, "img", "text")

    def image(self, *, count: int = 1, **options: Unpack[Options]) -> list[Image.Image]:
        """Unconditional pictures, from the marginal distribution p(image); it has no guidance."""
        chosen = self.resolve(options, "image")
        out = self.run(_path(NoisePath.image, chosen), Streams(), chosen, generators_of(chosen, 1, count))
        return self.results(out, chosen, "img")

    def text(self, *, count: int = 1, **options: Unpack[Options]) -> list[str]:
        """Unconditional captions, from the marginal distribution p(text); it has no guidance."""
        chosen = self.resolve(options, "text")
        out = self.run(_path(NoisePath.text, chosen), Streams(), chosen, generators_of(chosen, 1, count))
        return self.results(out, chosen, "text")

    def vary_image(self, image: Pictures, *, count: int = 1, **options: Unpack[Options]) -> list[Image.Image]:
        """Pictures of the same subject: picture -> text latent -> picture, without words in between."""
        chosen = self.resolve(options, IMAGE_TO_TEXT, TEXT_TO_IMAGE)
        given = read_pictures(image, chosen)
        generators = generators_of(chosen, len(given.items), count)
        encoded = self.encode_images(given.items, count, chosen, generators)
        out = self._to_image(self._to_text(encoded, chosen, generators), chosen, generators)
        return given.spread(self.results(out, chosen, "img"), count)

    def vary_text(self, prompt: Prompts, *, count: int = 1, **options: Unpack[Options]) -> list[str]:
        """Other captions with the meaning of a prompt: text -> image latent -> text, without pixels in between."""
        chosen = self.resolve(options, TEXT_TO_IMAGE, IMAGE_TO_TEXT)
        given = read_prompts(prompt, chosen)
        generators = generators_of(chosen, len(given.items), count)
        self.warn_about(given.items)
        encoded = Streams(text=self.encode_texts(given.items).repeat_interleave(count, 0))
        out = self._to_text(self._to_image(encoded, chosen, generators), chosen, generators)
        return given.spread(self.results(out, chosen, "text"), count)

    def gibbs(
        self,
        start: ImageSource | None = None,
        *,
        rounds: int = 4,
        hold: float = 0.0,
        count: int = 1,
        **options: Unpack[Options],
    ) -> list[tuple[Image.Image, str]]:
        """Blocked Gibbs sampling: p(text | image) and p(image | text) in turn, each conditioned on the latent of the other.

        Args:
            start: a prompt (str), a picture in any other form (a file by its Path), or None for an unconditional picture.
            rounds: pairs in a chain, each made from the one before.
            hold: noise level (label 0..1000) that a latent is noised to before it conditions the next half round. A little
                noise (40 to 100) keeps small errors from growing, so long chains stay on their topic; much noise lets the
                topic change.
            count: chains.
            **options: see `options.Options`.

        Returns:
            `rounds` pairs, in order; with several chains, chain after chain. With output="latent", the streams of each round.
        """
        whole_number("rounds", rounds, least=1)
        number("hold", hold, 0, NUM_LABELS)  # checked before anything is computed
        chosen = self.resolve({**options, "on_error": "raise"}, TEXT_TO_IMAGE, IMAGE_TO_TEXT)
        start = chain_start(start)
        generators = generators_of(chosen, 1, count)
        halves = [self._to_text, self._to_image]
        if start is None:
            first = self.resolve({**options, "on_error": "raise"}, "image")
            state = self.run(_path(NoisePath.image, first), Streams(), first, generators)
        elif isinstance(start, str):
            prompts = read_prompts(start, chosen).items
            self.warn_about(prompts)
            state = Streams(text=self.encode_texts(prompts).repeat_interleave(count, 0))
            halves.reverse()
        else:
            pictures = read_pictures(start, chosen).items
            if len(pictures) != 1:
                raise ValueError(f"a chain starts from one picture, got {len(pictures)}; use count= for several chains")
            state = self.encode_images(pictures, count, chosen, generators)
        pairs: list[Any] = []
        for _ in range(rounds):
            for half in halves:
                state = half(state, chosen, generators, hold)
            pairs.append(self.results(state, chosen, "img", "text"))
        return pairs if chosen["output"] == "latent" else [pair for chain in zip(*pairs, strict=True) for pair in chain]

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
        chosen = self.resolve({**EXACT, **options, **ALWAYS})
        generators = generators_of(chosen, 2, 1)
        encoded = self.encode_images(read_pictures([image_a, image_b], chosen).items, 1, chosen, generators)
        ends = self._to_text(encoded, chosen, generators)
        path = _path(NoisePath.text_to_image, chosen)
        noise = self.run(path.reversed(), ends, chosen, generators, method=INVERSE)
        out = self.run(path, between(noise, frames), chosen, generators_of(chosen, 1, frames), method=FORWARD)
        return self.results(out, chosen, "img")

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
    dtype: torch.dtype | str | None = None,
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
        ValueError: a file that is no model, an option that is out of range, or a device that this machine lacks.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise ValueError(f"name the model as a text or path, got a {type(name_or_path).__name__}")
    weight_dtype(dtype)
    checkpoint = load_checkpoint(os.fspath(name_or_path))
    model = UniDiffuser(checkpoint, device, dtype, offload=offload, tiling=tiling, compile=compile)
    for path, strength in _listed_loras(lora):
        model.load_lora(path, strength)
    return model


def _listed_loras(lora: Any) -> list[tuple[Any, Any]]:
    """The LoRAs of `load`; ValueError for anything but a list of pairs."""
    entries = list(lora) if isinstance(lora, Iterable) and not isinstance(lora, (str, bytes, Mapping)) else [lora]
    if all(isinstance(entry, (list, tuple)) and len(entry) == 2 for entry in entries):
        return [(path, strength) for path, strength in entries]
    raise ValueError(f'lora must be a list of files with their strengths, as in [("my.safetensors", 1.0)], got {brief(lora)}')


def _path(kind: Callable[..., NoisePath], options: Options, **more: Any) -> NoisePath:
    """A noise path with the steps and spacing of the options."""
    return kind(options["steps"], spacing=options["spacing"], **more)


def between(ends: Streams, frames: int) -> Streams:
    """`frames` items between the two items of `ends`, both included, by spherical interpolation of each stream."""
    weights = [frame / (frames - 1) for frame in range(frames)]
    return ends.map(lambda stream: torch.stack([slerp(stream[0], stream[1], weight) for weight in weights]))


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Spherical interpolation of two tensors as vectors, `weight` 0 = a, 1 = b; linear where they are parallel."""
    u, v = (x.flatten().cpu().double() for x in (a, b))  # not every device has float64
    angle = math.acos(float(torch.nn.functional.cosine_similarity(u, v, dim=0).clamp(-1, 1)))
    if math.sin(angle) < 1e-4:
        return torch.lerp(a, b, weight)
    return (math.sin((1 - weight) * angle) * a + math.sin(weight * angle) * b) / math.sin(angle)
