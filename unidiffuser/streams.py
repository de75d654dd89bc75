"""The state that every sampler moves: an image latent, the CLIP token of the same image, and a text latent.

Also the random numbers of a batch: every item has a generator of its own, so that what an item becomes does not depend
on which others are sampled beside it. The global generators are never used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .schedule import NUM_LABELS, add_noise

MODALITIES: Mapping[str, tuple[str, ...]] = {"img": ("img", "clip_img"), "text": ("text",)}
"""The streams of each modality: the image latent and its CLIP token share one noise level and one guidance."""
MODALITY_OF: Mapping[str, str] = {name: modality for modality, names in MODALITIES.items() for name in names}


@dataclass(frozen=True)
class Streams:
    """One tensor per stream, or None for one that is not there.

    img: (B, C, H, W) image latent. clip_img: (B, 1, D) CLIP image token. text: (B, L, D) text latent.
    """

    img: Tensor | None = None
    clip_img: Tensor | None = None
    text: Tensor | None = None

    def __getitem__(self, name: str) -> Tensor | None:
        value: Tensor | None = getattr(self, name)
        return value

    def need(self, name: str) -> Tensor:
        """The stream, or ValueError when it is not there."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise ValueError(f"The {name} stream is missing.")
        return value

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the streams that are there."""
        for field in fields(self):
            if (value := getattr(self, field.name)) is not None:
                yield field.name, value

    def replace(self, **streams: Tensor | None) -> Streams:
        """The same streams but for those named."""
        return replace(self, **streams)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Streams:
        """fn of every stream that is there."""
        return Streams(**{name: fn(value) for name, value in self.items()})

    def zip(self, other: Streams, fn: Callable[[Tensor, Tensor], Tensor]) -> Streams:
        """fn of every stream that is there in both; None elsewhere."""
        pairs = ((name, value, other[name]) for name, value in self.items())
        return Streams(**{name: fn(value, theirs) for name, value, theirs in pairs if theirs is not None})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Streams:
        return self.map(lambda x: x.to(device=device, dtype=dtype))

    @property
    def batch(self) -> int:
        """Batch size, 0 when no stream is there. ValueError when the streams disagree."""
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

    A list is used as it is (and advanced). A single generator gives one random base seed, advancing by that draw, and
    the items get `item_generators(base, count)`; None does the same from the operating system's entropy.
    """
    if generator is None:
        return item_generators(torch.Generator().seed(), count)
    if isinstance(generator, torch.Generator):
        base = torch.randint(2**62, (), generator=generator, device=generator.device)
        return item_generators(int(base), count)
    if len(generator) != count:
        raise ValueError(f"Got {len(generator)} generators for {count} items; give one per item, or a single one.")
    return list(generator)


def draw_noise(shape: Sequence[int], generators: Sequence[torch.Generator], device: torch.device | str) -> Tensor:
    """(B, *shape) of N(0, I) in fp32, item k from generator k: the same numbers for every device and batch."""
    noise = [torch.randn(tuple(shape), generator=g, device=g.device, dtype=torch.float32) for g in generators]
    # Towards the device no copy need be waited for; one from it may not be read too early.
    return torch.stack([n.to(device, non_blocking=n.device.type == "cpu") for n in noise])


def noised(clean: Tensor, label: float, generators: Sequence[torch.Generator]) -> Tensor:
    """One clean stream (B, ...) at a label of 0..1000, where a path shall begin; item k is noised from generator k.

    At 0 it is the stream itself, and nothing is drawn. At 1000 it is noise alone: a path that begins there knows nothing of
    what was given, while :func:`.schedule.add_noise` leaves the 7 % that the schedule never takes away.
    """
    if label == 0:
        return clean
    noise = draw_noise(clean.shape[1:], generators, clean.device)
    return noise if label == NUM_LABELS else add_noise(clean, noise, label)
