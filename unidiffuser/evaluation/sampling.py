"""Sampling with one seed for every item, so that a sample depends neither on its batch nor on a restart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from PIL import Image

from ..engine import Engine, Generators
from ..media.images import fit, to_tensor
from ..options import Options
from ..path import NoisePath
from ..runtime.fast_lora import IMAGE_TO_TEXT, JOINT, TEXT_TO_IMAGE
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
        self.model, self._given = model, options
        self.options = self._chosen()

    def autoencode(self, images: Sequence[Image.Image], seeds: Sequence[int]) -> list[Image.Image]:
        """Encodes and decodes pictures, at the model's size."""
        pixels = to_tensor([fit(image, self.options["width"], self.options["height"]) for image in images])
        latents = self.model.autoencoder.encode(pixels, _generators(seeds))
        return self.model.decode_images(Streams(img=latents.float()), self.options)

    def text_to_image(self, captions: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        chosen = self._chosen(TEXT_TO_IMAGE)
        given = Streams(text=self.model.encode_texts(captions))
        out = self.model.run(NoisePath.text_to_image(chosen["steps"]), given, chosen, _generators(seeds))
        return self.model.decode_images(out, chosen)

    def image_to_text(self, images: Sequence[Image.Image], seeds: Sequence[int]) -> list[str]:
        chosen, generators = self._chosen(IMAGE_TO_TEXT), _generators(seeds)
        given = self.model.encode_images(images, 1, chosen, generators)
        out = self.model.run(NoisePath.image_to_text(chosen["steps"]), given, chosen, generators)
        return self.model.decode_texts(out, chosen)

    def joint(self, seeds: Sequence[int]) -> list[tuple[Image.Image, str]]:
        chosen = self._chosen(JOINT)
        path = NoisePath.joint(chosen["steps"], speeds=chosen["speeds"])
        out = self.model.run(path, Streams(), chosen, _generators(seeds))
        return list(zip(self.model.decode_images(out, chosen), self.model.decode_texts(out, chosen), strict=True))

    def image(self, seeds: Sequence[int]) -> list[Image.Image]:
        chosen = self._chosen("image")
        out = self.model.run(NoisePath.image(chosen["steps"]), Streams(), chosen, _generators(seeds))
        return self.model.decode_images(out, chosen)

    def _chosen(self, *routes: str) -> Options:
        return self.model.resolve(self._given, *routes)  # type: ignore[arg-type]  # checked there


def _generators(seeds: Sequence[int]) -> Generators:
    return [generator for seed in seeds for generator in item_generators(seed, 1)]
