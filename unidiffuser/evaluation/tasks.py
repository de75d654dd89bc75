"""What is asked in each task, and what is kept of the answers: functions from a range of items to their answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from unidiffuser.data.captioned import Pair
from unidiffuser.evaluation.eyes import Eyes
from unidiffuser.evaluation.metrics import psnr
from unidiffuser.evaluation.parts import Answers
from unidiffuser.evaluation.sampling import Sampler
from unidiffuser.media.images import fit

Make = Callable[[range], Answers]
SEEDS = 1_000_000_000  # seeds of one run: item k of run s has seed s * SEEDS + k


def seeds_of(items: range, seed: int) -> list[int]:
    return [seed * SEEDS + k for k in items]


def look(eyes: Eyes, pairs: Sequence[Pair]) -> Make:
    """Real pictures and their first captions."""

    def make(items: range) -> Answers:
        part = [pairs[k] for k in items]
        images = [pair.image() for pair in part]
        seen, arrays = eyes.see(images)
        return Answers(seen, arrays | eyes.read([pair.caption for pair in part]))

    return make


def autoencode(sampler: Sampler, eyes: Eyes, pairs: Sequence[Pair], seed: int) -> Make:
    """Every picture through the autoencoder alone, with its ``psnr`` in dB: what a made picture can be at best."""

    def make(items: range) -> Answers:
        real = [pairs[k].image() for k in items]
        made = sampler.autoencode(real, seeds_of(items, seed))
        seen, arrays = eyes.see(made)
        ratios = [psnr(fit(r, *m.size), m) for r, m in zip(real, made, strict=True)]
        return Answers([s | {"psnr": round(p, 3)} for s, p in zip(seen, ratios, strict=True)], arrays, made)

    return make


def text_to_image(sampler: Sampler, eyes: Eyes, captions: Sequence[str], seed: int) -> Make:
    """Every caption -> a picture."""

    def make(items: range) -> Answers:
        asked = [captions[k] for k in items]
        made = sampler.text_to_image(asked, seeds_of(items, seed))
        seen, arrays = eyes.see(made)
        return Answers(seen, arrays | eyes.read(asked), made)

    return make


def image_to_text(sampler: Sampler, eyes: Eyes, pairs: Sequence[Pair], seed: int) -> Make:
    """Every picture -> a ``caption``."""

    def make(items: range) -> Answers:
        shown = [pairs[k].image() for k in items]
        captions = sampler.image_to_text(shown, seeds_of(items, seed))
        squares = [fit(image, eyes.side, eyes.side) for image in shown]
        return Answers([{"caption": caption} for caption in captions], dict(eyes.read(captions)), squares)

    return make


def joint(sampler: Sampler, eyes: Eyes, seed: int) -> Make:
    """Pairs of a picture and its ``caption`` out of nothing."""

    def make(items: range) -> Answers:
        made = sampler.joint(seeds_of(items, seed))
        images, captions = [image for image, _ in made], [caption for _, caption in made]
        seen, arrays = eyes.see(images)
        said = [{"caption": caption} | s for caption, s in zip(captions, seen, strict=True)]
        return Answers(said, arrays | eyes.read(captions), images)

    return make


def image(sampler: Sampler, eyes: Eyes, seed: int) -> Make:
    """Pictures out of nothing."""

    def make(items: range) -> Answers:
        made = sampler.image(seeds_of(items, seed))
        seen, arrays = eyes.see(made)
        return Answers(seen, arrays, made)

    return make
