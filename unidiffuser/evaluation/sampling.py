"""Sampling with one seed for every item, so that a sample depends neither on its batch nor on a restart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from PIL import Image

from ..engine import Engine, Generators
from ..media.images import fit, to_tensor
from ..options import resolve
from ..path import NoisePath
from ..streams import Streams, item_generators


class Sampler(Protocol):
    """A model with sampling options; every method returns one result for each seed."""

    def autoencode(self, images: Sequence[Image.Image], seeds: Sequence[int]) -> list[Image.Image]: ...

    def text_to_image(self, captions: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]: ...

    def image_to_text(self, images: Sequence[Image.Image], seeds: Sequence[int]) -> list[str]: ...

    def joint(self, seeds: Sequence[int]) -> list[tuple[Image.Image, str]]: ...

    def image(self, seeds: Sequence[int]) -> list[Image.Image]: ...


class ModelSampler:
    """The sampler of a loaded model.

    Args:
        model: as `unidiffuser.load` returns it.
        options: `steps`, `guidance`, `method`, `speeds`; the checkpoint's default where absent.
    """

    def __init__(self, model: Engine, **options: Any):
        self.model = model
        self.options = resolve(options, model.config)  # type: ignore[arg-type]  # checked there

    def autoencode(self, images: Sequence[Image.Image], seeds: Sequence[int]) -> list[Image.Image]:
        """Encodes and decodes pictures, at the model's size."""
        pixels = to_tensor([fit(image, self.options["width"], self.options["height"]) for image in images])
        latents = self.model.autoencoder.encode(pixels, _generators(seeds))
        return self.model.decode_images(Streams(img=latents.float()), self.options)

    def text_to_image(self, captions: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        given = Streams(text=self.model.encode_texts(captions))
        return self.model.decode_images(self._run(NoisePath.text_to_image(self.options["steps"]), given, seeds), self.options)

    def image_to_text(self, images: Sequence[Image.Image], seeds: Sequence[int]) -> list[str]:
        generators = _generators(seeds)
        given = self.model.encode_images(images, 1, self.options, generators)
        out = self.model.run(NoisePath.image_to_text(self.options["steps"]), given, self.options, generators)
        return self.model.decode_texts(out, self.options)

    def joint(self, seeds: Sequence[int]) -> list[tuple[Image.Image, str]]:
        out = self._run(NoisePath.joint(self.options["steps"], speeds=self.options["speeds"]), Streams(), seeds)
        return list(zip(self.model.decode_images(out, self.options), self.model.decode_texts(out, self.options), strict=True))

    def image(self, seeds: Sequence[int]) -> list[Image.Image]:
        return self.model.decode_images(self._run(NoisePath.image(self.options["steps"]), Streams(), seeds), self.options)

    def _run(self, path: NoisePath, given: Streams, seeds: Sequence[int]) -> Streams:
        return self.model.run(path, given, self.options, _generators(seeds))


def _generators(seeds: Sequence[int]) -> Generators:
    return [generator for seed in seeds for generator in item_generators(seed, 1)]
