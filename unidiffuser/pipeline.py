"""UniDiffuser: every task of the model, each a choice of noise path and start.

    task            path             given clean     then
    text_to_image   text_to_image    text            decode the image
    image_to_text   image_to_text    image           decode the text
    joint           joint            -               decode both
    image, text     image, text      -               decode one
    vary_image      image_to_text, then text_to_image: the text latent is handed over
    vary_text       text_to_image, then image_to_text: the image latent and CLIP token are handed over
    gibbs           the two in turn, round after round
    interpolate     image_to_text, inverse text_to_image, text_to_image between the two

Seeds: candidate k of a prompt or picture draws everything (autoencoder sample, start noise, noise inside the sampler)
from one generator seeded with seed + k. So a result depends neither on its batch nor on how the batch is cut:
`count=4, seed=0` gives the four results of `count=1` with seeds 0, 1, 2 and 3.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from PIL import Image
from torch import Tensor

from .checkpoints.checkpoint import load_checkpoint
from .engine import Engine, Generators
from .media.images import ImageSource
from .options import Options, Plan, whole
from .path import NoisePath
from .schedule import NUM_LABELS
from .streams import Streams, item_generators, noised

if TYPE_CHECKING:
    from typing_extensions import Unpack


class UniDiffuser(Engine):
    """A loaded model. Its parts are built when a task first needs them; `load` in the package makes one.

    Pictures come as PIL images or paths and leave as PIL RGB. Bad input raises ValueError or FileNotFoundError that says
    what to do.
    """

    def text_to_image(
        self, prompt: str | Sequence[str], *, count: int = 1, negative: str | None = None, **options: Unpack[Options]
    ) -> list[Image.Image]:
        """Pictures of one prompt or of each of several, `count` for each.

        `negative` describes what to move away from: guidance then starts at this prompt instead of at no prompt.
        """
        plan = Plan.of(options, self.config)
        prompts = _prompts(prompt)
        generators = _generators(plan.seed, len(prompts), count)
        text = self.encode_texts(prompts).repeat_interleave(count, 0)
        avoid = None if negative is None else self.encode_texts([negative])
        out = self.run(NoisePath.text_to_image(plan.steps, spacing=plan.spacing), Streams(text=text), plan, generators, avoid)
        return self.decode_images(out, plan)

    def image_to_text(
        self, image: ImageSource | Sequence[ImageSource], *, count: int = 1, **options: Unpack[Options]
    ) -> list[str]:
        """Captions of one picture or of each of several, `count` for each."""
        plan = Plan.of(options, self.config)
        pictures = _pictures(image)
        generators = _generators(plan.seed, len(pictures), count)
        given = self.encode_images(pictures, count, plan, generators)
        return self.decode_texts(self._to_text(given, plan, generators), plan)

    def joint(self, *, count: int = 1, **options: Unpack[Options]) -> list[tuple[Image.Image, str]]:
        """Pairs of a picture and its caption, out of nothing."""
        plan = Plan.of(options, self.config)
        path = NoisePath.joint(plan.steps, speeds=plan.speeds, spacing=plan.spacing)
        out = self.run(path, Streams(), plan, _generators(plan.seed, 1, count))
        return list(zip(self.decode_images(out, plan), self.decode_texts(out, plan), strict=True))

    def image(self, *, count: int = 1, **options: Unpack[Options]) -> list[Image.Image]:
        """Pictures out of nothing; the marginal distribution p(image), which needs no guidance."""
        plan = Plan.of(options, self.config)
        out = self.run(NoisePath.image(plan.steps, spacing=plan.spacing), Streams(), plan, _generators(plan.seed, 1, count))
        return self.decode_images(out, plan)

    def text(self, *, count: int = 1, **options: Unpack[Options]) -> list[str]:
        """Captions out of nothing; the marginal distribution p(text), which needs no guidance."""
        plan = Plan.of(options, self.config)
        out = self.run(NoisePath.text(plan.steps, spacing=plan.spacing), Streams(), plan, _generators(plan.seed, 1, count))
        return self.decode_texts(out, plan)

    def vary_image(
        self, image: ImageSource | Sequence[ImageSource], *, count: int = 1, **options: Unpack[Options]
    ) -> list[Image.Image]:
        """Pictures of the same subject: picture -> text latent -> picture, without words in between."""
        plan = Plan.of(options, self.config)
        pictures = _pictures(image)
        generators = _generators(plan.seed, len(pictures), count)
        given = self.encode_images(pictures, count, plan, generators)
        return self.decode_images(self._to_image(self._to_text(given, plan, generators), plan, generators), plan)

    def vary_text(self, prompt: str | Sequence[str], *, count: int = 1, **options: Unpack[Options]) -> list[str]:
        """Other words for a prompt: text -> image latent -> text, without pixels in between."""
        plan = Plan.of(options, self.config)
        prompts = _prompts(prompt)
        generators = _generators(plan.seed, len(prompts), count)
        given = Streams(text=self.encode_texts(prompts).repeat_interleave(count, 0))
        return self.decode_texts(self._to_text(self._to_image(given, plan, generators), plan, generators), plan)

    def gibbs(
        self,
        start: Image.Image | os.PathLike[str] | str | None = None,
        *,
        rounds: int = 4,
        hold: float = 0.0,
        count: int = 1,
        **options: Unpack[Options],
    ) -> list[tuple[Image.Image, str]]:
        """Blocked Gibbs sampling: p(text | image) and p(image | text) in turn, latents handed over.

        Args:
            start: a picture (PIL image or Path), a prompt (str), or None for a picture out of nothing.
            rounds: pairs in a chain, each made from the one before.
            hold: label 0..1000 up to which a latent is noised before the other is made from it. What a network gets a little
                wrong it else gets more wrong in each round; a little noise (40 to 100) hides that from the next half, and the
                chain stays on its topic for longer. Much of it lets the topic change.
            count: chains.

        Returns:
            `rounds` pairs, in order; with several chains, chain after chain.
        """
        whole("rounds", rounds, least=1)
        if not 0 <= hold <= NUM_LABELS:  # here rather than by the first path that has it: nothing has been made yet
            raise ValueError(f"hold must be a label from 0 (clean) to {NUM_LABELS} (noise), got {hold:g}")
        plan = Plan.of(options, self.config)
        generators = _generators(plan.seed, 1, count)
        halves = [self._to_text, self._to_image]
        if start is None:
            state = self.run(NoisePath.image(plan.steps, spacing=plan.spacing), Streams(), plan, generators)
        elif isinstance(start, str):
            state = Streams(text=self.encode_texts([start]).repeat_interleave(count, 0))
            halves.reverse()
        else:
            state = self.encode_images([start], count, plan, generators)
        pairs = []
        for _ in range(rounds):
            for half in halves:
                state = half(state, plan, generators, hold)
            pairs.append(list(zip(self.decode_images(state, plan), self.decode_texts(state, plan), strict=True)))
        return [pair for chain in zip(*pairs, strict=True) for pair in chain]

    def interpolate(
        self, image_a: ImageSource, image_b: ImageSource, *, frames: int = 8, **options: Unpack[Options]
    ) -> list[Image.Image]:
        """Pictures on the way from one picture to another, both ends included as the model reproduces them.

        Each picture is captioned and, conditioned on its own text latent, inverted to noise; noises and text latents
        are interpolated on the sphere, and every mixture is sampled deterministically (arXiv 2303.06555, applications).
        Guidance is off and steps are 100 unless given, since the inversion is only then close to exact; `method` is
        for the captions.
        """
        whole("frames", frames, least=2)
        plan = Plan.of({"guidance": 1.0, "steps": 100, **options}, self.config)
        generators = _generators(plan.seed, 2, 1)
        given = self.encode_images([image_a, image_b], 1, plan, generators)
        ends = self._to_text(given, plan, generators)
        path = NoisePath.text_to_image(plan.steps, spacing=plan.spacing)
        noise = self.run(path.reversed(), ends, plan, generators, method="ddim_inverse")
        weights = [frame / (frames - 1) for frame in range(frames)]
        mixed = noise.map(lambda stream: torch.stack([slerp(stream[0], stream[1], weight) for weight in weights]))
        return self.decode_images(self.run(path, mixed, plan, _generators(plan.seed, 1, frames), method="ddim"), plan)

    def _to_text(self, state: Streams, plan: Plan, generators: Generators, hold: float = 0.0) -> Streams:
        """The image of ``state`` and a text made from it."""
        path = NoisePath.image_to_text(plan.steps, hold=hold, spacing=plan.spacing)
        given = state.replace(text=None).map(lambda clean: noised(clean, hold, generators))
        return state.replace(text=self.run(path, given, plan, generators).text)

    def _to_image(self, state: Streams, plan: Plan, generators: Generators, hold: float = 0.0) -> Streams:
        """An image made from the text of ``state``, and that text."""
        path = NoisePath.text_to_image(plan.steps, hold=hold, spacing=plan.spacing)
        given = Streams(text=state.text).map(lambda clean: noised(clean, hold, generators))
        return self.run(path, given, plan, generators).replace(text=state.text)


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
    """Open a model: the name of the bundled one ("emoji"), or a file or folder in one of the layouts that are read.

    Only the headers are read here; each part is loaded when a task first needs it. `lora`: files and strengths, as
    :meth:`~UniDiffuser.load_lora` takes them. `device`, `dtype`, `offload`, `tiling`, `compile`: see `Engine`.

    Raises:
        FileNotFoundError, ValueError: no such model, or not one; the text says which file and what to do.
    """
    model = UniDiffuser(
        load_checkpoint(os.fspath(name_or_path)), device, dtype, offload=offload, tiling=tiling, compile=compile
    )
    for path, strength in lora:
        model.load_lora(path, strength)
    return model


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Interpolation on the sphere, `weight` 0 = a, 1 = b, of two tensors as vectors; straight where they align."""
    u, v = (x.flatten().cpu().double() for x in (a, b))  # not every device has float64
    angle = math.acos(float(torch.nn.functional.cosine_similarity(u, v, dim=0).clamp(-1, 1)))
    if math.sin(angle) < 1e-4:
        return torch.lerp(a, b, weight)
    return (math.sin((1 - weight) * angle) * a + math.sin(weight * angle) * b) / math.sin(angle)


T = TypeVar("T")


def _prompts(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else _some(given)


def _pictures(given: ImageSource | Sequence[ImageSource]) -> list[ImageSource]:
    return [given] if isinstance(given, (str, os.PathLike, Image.Image)) else _some(given)


def _some(given: Sequence[T]) -> list[T]:
    items = list(given)
    if not items:
        raise ValueError("give at least one prompt or picture, got an empty list")
    return items


def _generators(seed: int, subjects: int, count: int) -> Generators:
    """Subject after subject, `count` generators each; candidate k has the same seed for every subject."""
    whole("count", count, least=1)
    return [generator for _ in range(subjects) for generator in item_generators(seed, count)]
