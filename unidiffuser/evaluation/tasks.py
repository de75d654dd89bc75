"""The tasks of an evaluation: each returns a function from a range of items to their outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..data.captioned import Pair
from ..media.images import fit, to_tensor
from .extractors import FeatureExtractors
from .metrics import psnr
from .parts import Outputs
from .sampling import Sampler

Generate = Callable[[range], Outputs]
SEEDS = 1_000_000_000  # seeds of one run: item k of run s has seed s * SEEDS + k


def item_seeds(items: range, seed: int) -> list[int]:
    """The seeds of some items of a run."""
    return [seed * SEEDS + k for k in items]


def encode_real(extractors: FeatureExtractors, pairs: Sequence[Pair]) -> Generate:
    """Features of real pictures and of their first captions."""

    def generate(items: range) -> Outputs:
        part = [pairs[k] for k in items]
        verdicts, arrays = extractors.encode_images([pair.image() for pair in part])
        return Outputs(verdicts, arrays | extractors.encode_captions([pair.caption for pair in part]))

    return generate


def autoencode(sampler: Sampler, extractors: FeatureExtractors, pairs: Sequence[Pair], seed: int) -> Generate:
    """Every picture through the autoencoder alone, with its `psnr` in dB: an upper bound for generated pictures."""

    def generate(items: range) -> Outputs:
        real = [pairs[k].image() for k in items]
        decoded = sampler.autoencode(real, item_seeds(items, seed))
        verdicts, arrays = extractors.encode_images(decoded)
        fitted = [fit(image, *other.size) for image, other in zip(real, decoded, strict=True)]
        ratios = psnr(to_tensor(decoded), to_tensor(fitted)).tolist()
        items_with_psnr = [v | {"psnr": round(ratio, 3)} for v, ratio in zip(verdicts, ratios, strict=True)]
        return Outputs(items_with_psnr, arrays, decoded)

    return generate


def text_to_image(sampler: Sampler, extractors: FeatureExtractors, captions: Sequence[str], seed: int) -> Generate:
    """A picture for every caption."""

    def generate(items: range) -> Outputs:
        prompts = [captions[k] for k in items]
        images = sampler.text_to_image(prompts, item_seeds(items, seed))
        verdicts, arrays = extractors.encode_images(images)
        return Outputs(verdicts, arrays | extractors.encode_captions(prompts), images)

    return generate


def image_to_text(sampler: Sampler, extractors: FeatureExtractors, pairs: Sequence[Pair], seed: int) -> Generate:
    """A `caption` for every picture."""

    def generate(items: range) -> Outputs:
        images = [pairs[k].image() for k in items]
        captions = sampler.image_to_text(images, item_seeds(items, seed))
        squares = [fit(image, extractors.side, extractors.side) for image in images]
        return Outputs([{"caption": caption} for caption in captions], extractors.encode_captions(captions), squares)

    return generate


def joint(sampler: Sampler, extractors: FeatureExtractors, seed: int) -> Generate:
    """Pictures with a `caption` each, without a prompt."""

    def generate(items: range) -> Outputs:
        pairs = sampler.joint(item_seeds(items, seed))
        images, captions = [image for image, _ in pairs], [caption for _, caption in pairs]
        verdicts, arrays = extractors.encode_images(images)
        captioned = [{"caption": caption} | verdict for caption, verdict in zip(captions, verdicts, strict=True)]
        return Outputs(captioned, arrays | extractors.encode_captions(captions), images)

    return generate


def image(sampler: Sampler, extractors: FeatureExtractors, seed: int) -> Generate:
    """Pictures without a prompt."""

    def generate(items: range) -> Outputs:
        images = sampler.image(item_seeds(items, seed))
        verdicts, arrays = extractors.encode_images(images)
        return Outputs(verdicts, arrays, images)

    return generate
