"""Streams: the state of a sample (image latent, CLIP image token, text latent), and the random numbers of a batch.

Every item has its own generator, so its result does not depend on the rest of the batch. The global generators are never used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType

import torch
from torch import Tensor

from .path import CLEAN, MARGINAL, NoisePath
from .schedule import NUM_LABELS, add_noise

MODALITIES: Mapping[str, tuple[str, ...]] = {"img": ("img", "clip_img"), "text": ("text",)}
"""The streams of each modality: the image latent and its CLIP token share one noise level and one guidance."""
MODALITY_OF: Mapping[str, str] = {name: modality for modality, names in MODALITIES.items() for name in names}


@dataclass(frozen=True)
class Streams:
    """A tensor for each stream; None for an absent one.

    Attributes:
        img: (B, C, H, W) image latent.
        clip_img: (B, 1, D) CLIP image token.
        text: (B, L, D) text latent.
    """

    img: Tensor | None = None
    clip_img: Tensor | None = None
    text: Tensor | None = None

    def __getitem__(self, name: str) -> Tensor | None:
        value: Tensor | None = getattr(self, name)
        return value

    def need(self, name: str) -> Tensor:
        """The stream; ValueError if it is absent."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise ValueError(f"The {name} stream is missing.")
        return value

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the present streams."""
        for field in fields(self):
            if (value := getattr(self, field.name)) is not None:
                yield field.name, value

    def replace(self, **streams: Tensor | None) -> Streams:
        """A copy with the named streams replaced."""
        return replace(self, **streams)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Streams:
        """fn applied to every present stream."""
        return Streams(**{name: fn(value) for name, value in self.items()})

    def zip(self, other: Streams, fn: Callable[[Tensor, Tensor], Tensor]) -> Streams:
        """fn applied to every stream present in both; None elsewhere."""
        pairs = ((name, value, other[name]) for name, value in self.items())
        return Streams(**{name: fn(value, theirs) for name, value, theirs in pairs if theirs is not None})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Streams:
        """The streams on a device or in a number format."""
        return self.map(lambda x: x.to(device=device, dtype=dtype))

    @property
    def batch(self) -> int:
        """Batch size, 0 without streams; ValueError if the streams differ in it."""
        sizes = {name: value.shape[0] for name, value in self.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"All streams must have one batch size, but they have {sizes}.")
        return next(iter(sizes.values()), 0)


def item_generators(seed: int, count: int) -> list[torch.Generator]:
    """`count` CPU generators; number k is seeded with `seed` + k.

    So item k of a batch sampled with `item_generators(s, n)` is the one sampled alone with `item_generators(s + k, 1)`.
    """
    return [torch.Generator().manual_seed((seed + k) % 2**63) for k in range(count)]


def generators_for(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[torch.Generator]:
    """One generator per item of a batch.

    A list is returned as it is (drawing from it advances it). From a single generator one base seed is drawn, and the items get
    `item_generators(base, count)`; None takes the base seed from the operating system's entropy.
    """
    if generator is None:
        return item_generators(torch.Generator().seed(), count)
    if isinstance(generator, torch.Generator):
        base = torch.randint(2**62, (), generator=generator, device=generator.device)
        return item_generators(int(base), count)
    if len(generator) != count:
        raise ValueError(f"Got {len(generator)} generators for {count} items; give one per item, or a single one.")
    return list(generator)


def draw_normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """N(0, I) in fp32 on the generator's device, whatever torch's default dtype and device are."""
    return torch.randn(tuple(shape), generator=generator, device=generator.device, dtype=torch.float32)


def draw_uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Uniform numbers in [0, 1) in fp32 on the generator's device, likewise."""
    return torch.rand(tuple(shape), generator=generator, device=generator.device, dtype=torch.float32)


def draw_noise(shape: Sequence[int], generators: Sequence[torch.Generator], device: torch.device | str) -> Tensor:
    """N(0, I) of shape (B, *shape) in fp32, item k from generator k: the same on every device and for every batch."""
    noise = [draw_normal(shape, g) for g in generators]
    # A copy to the device need not block; one from it may not be read too early.
    return torch.stack([n.to(device, non_blocking=n.device.type == "cpu") for n in noise])


def noised(clean: Tensor, label: float, generators: Sequence[torch.Generator]) -> Tensor:
    """A clean stream (B, ...) noised to a label of 0..1000 as the start of a path; item k is noised from generator k.

    At 0 it is the stream itself and nothing is drawn. At 1000 it is pure noise, so that nothing of the stream remains, while
    `schedule.add_noise` leaves the 7 % of signal that the schedule never removes.
    """
    if label == 0:
        return clean
    noise = draw_noise(clean.shape[1:], generators, clean.device)
    return noise if label == NUM_LABELS else add_noise(clean, noise, label)


STREAM_NAMES: Mapping[str, str] = {"img": "image", "clip_img": "image", "text": "text"}
"""What a caller gives for each stream, for messages."""


def start_streams(
    path: NoisePath,
    given: Streams,
    mask: Streams,
    generators: Sequence[torch.Generator],
    shapes: Mapping[str, tuple[int, ...]],
    levels: Mapping[str, float] = MappingProxyType({}),
    names: Mapping[str, str] = STREAM_NAMES,
) -> Streams:
    """Streams for `samplers.sample`, each at the noise level of the path's first point.

    The part that a mask keeps stays clean; the sampler noises it itself.

    Args:
        path: the path to sample along.
        given: clean streams; one that starts as pure noise may be absent.
        mask: 1 = generate, 0 = keep, for streams that are kept in part.
        generators: one per batch item.
        shapes: item shapes of the streams that are not given.
        levels: labels of the streams in `given` that are already noisy; these are used unchanged.
        names: what the caller calls the input of each stream, for messages.

    Raises:
        ValueError: the path needs a stream that is not given, or starts it at another level than it has.
    """
    start: dict[str, Tensor | None] = {}
    for modality, members in MODALITIES.items():
        first, *_, last = path.labels(modality)
        for name in members:
            clean = given[name]
            if name in levels:
                if not math.isclose(levels[name], first, abs_tol=1e-3):
                    raise ValueError(
                        f"'{names[name]}' is at noise level {levels[name]:g}, but the noise path starts the "
                        f"{STREAM_NAMES[name]} at {first:g}. Use a path that starts at {levels[name]:g}."
                    )
                start[name] = clean
                continue
            if first == MARGINAL and (clean is None or (mask[name] is None and last == MARGINAL)):
                continue  # the sampler draws it itself
            if clean is None and name == "clip_img" and first > CLEAN:
                clean = torch.zeros(len(generators), *shapes[name], dtype=torch.float32)  # unknown: generated with the image
            if clean is None or (first < MARGINAL and name == "img" and not torch.count_nonzero(clean)):
                also = f" and '{names['clip_img']}'" if name == "img" and names["clip_img"] != names["img"] else ""
                raise ValueError(
                    f"This noise path starts the {STREAM_NAMES[name]} at noise level {first:g}, not from pure noise. It "
                    f"needs '{names[name]}'{also}."
                )
            noisy, generate = noised(clean, first, generators), mask[name]
            start[name] = noisy if generate is None else torch.where(generate > 0, noisy, clean)
    return Streams(**start)
