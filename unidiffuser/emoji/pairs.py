"""Training pairs of more pictures than the network draws: some to learn captions from, some to learn drawing from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..schedule import half_logsnr
from ..streams import MODALITY_OF, Streams, draw_uniform
from .groups import GroupSampler
from .image_folder import CONCEPT, STYLE
from .latents import Latents
from .network_options import Drawing


def where(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Items (B, ...) of `yes` where the condition (B,) holds, else of `no`."""
    return torch.where(condition.view(-1, *[1] * (yes.ndim - 1)), yes, no)


def form_weights(with_style: float, forms: int) -> Tensor:
    """Relative probability (forms,) of captions with the style, the first form, and of those without it.

    Raises:
        ValueError: the pictures have more than two captions, or one where both are needed.
    """
    if forms == 1 and with_style == 1:
        return torch.ones(1)
    if forms != 2:
        raise ValueError(
            f"the pictures have up to {forms} captions each; `with_style` {with_style:g} needs two, with and without the style"
        )
    return torch.tensor([with_style, 1 - with_style])


class CaptioningPairs:
    """Pairs for the part of a batch with clean pictures, from which the network learns captions with the style.

    Args:
        latents: of the pictures.
        other_latent: see `recipe.Captioning`.
    """

    def __init__(self, latents: Latents, other_latent: float):
        self.latents, self.other_latent = latents, other_latent
        self.forms = form_weights(1.0, latents.captions.shape[1])
        self.groups = GroupSampler([record.get(STYLE) for record in latents.records])

    def draw(self, count: int, generator: torch.Generator) -> Streams:
        """Random pairs; a fraction `other_latent` of them has the image latent of another picture in the same style."""
        index = self.latents.draw_index(count, generator)
        pairs = self.latents.draw(index, self.forms, generator)
        if not self.other_latent:
            return pairs
        swapped = draw_uniform((count,), generator) < self.other_latent
        others = self.latents.draw(self.groups.to(generator.device).draw(index, generator), self.forms, generator)
        return pairs.replace(img=where(swapped, others.need("img"), pairs.need("img")))


@dataclass(frozen=True)
class Drawn:
    """A batch of `DrawingPairs`.

    Attributes:
        pairs: B pairs.
        index: (B,) their pictures.
        used: (B,), True for items of the stage's batch that these pairs replace.
        changed: (B,), True where the picture may be mirrored and shifted.
        other_start: (B,), True where the noisy picture is to be that of another one.
    """

    pairs: Streams
    index: Tensor
    used: Tensor
    changed: Tensor
    other_start: Tensor


class DrawingPairs:
    """Pairs for the part of a batch with clean captions, from which the network learns to draw.

    Args:
        latents: of the pictures, each as it is and mirrored.
        options: those of the section `network.drawing`.
        seed: chooses the pictures whose captions are shown with another one.
    """

    def __init__(self, latents: Latents, options: Drawing, seed: int):
        self.latents, self.options = latents, options
        self.forms = form_weights(options.with_style, latents.captions.shape[1])
        self.with_style = form_weights(1.0, latents.captions.shape[1])
        self.groups = GroupSampler([record.get(CONCEPT) for record in latents.records])
        by_chance = draw_uniform((len(latents.records),), torch.Generator().manual_seed(seed)) < options.other_picture
        self.lent = by_chance & (self.groups.counts[self.groups.groups] > 1)  # captions shown with another picture

    def draw(self, labels: Mapping[str, Tensor], generator: torch.Generator) -> Drawn:
        """Pairs for a batch with these labels, "img" and "text", (B,) each."""
        count, device, given = len(labels["img"]), generator.device, self.options
        self._to(device)
        index = self.latents.draw_index(count, generator)
        below = labels["img"] < given.changed_below
        chance = draw_uniform((count,), generator)
        used = (labels["text"] == 0) & (chance < torch.where(below, given.fraction_below, given.fraction))
        chance = draw_uniform((count,), generator)
        other_start = (chance < given.other_start) & used & (labels["img"] >= given.other_start_from)
        changed, lent = below & ~other_start, self.lent[index]
        forms = torch.where((other_start | lent)[:, None], self.with_style, self.forms)
        pairs = self._lent(self.latents.draw(index, forms, generator, changed), index, lent, changed, generator)
        if given.shift:
            # Shifted without the code: a repeated border would spoil it.
            bare = self.latents.with_style_code(pairs.need("img"), None)
            moved = self.latents.with_style_code(shifted(bare, given.shift, generator), index)
            pairs = pairs.replace(img=where(changed, moved, pairs.need("img")))
        return Drawn(pairs, index, used, changed, other_start)

    def _lent(self, pairs: Streams, index: Tensor, lent: Tensor, changed: Tensor, generator: torch.Generator) -> Streams:
        """The pairs, where `lent` with another picture of the same concept in the style code of their own."""
        if not self.options.other_picture:
            return pairs
        others = self.latents.draw(self.groups.draw_other(index, generator), self.forms, generator, changed)
        img = self.latents.with_style_code(others.need("img"), index)
        return pairs.replace(
            img=where(lent, img, pairs.need("img")),
            clip_img=where(lent, others.need("clip_img"), pairs.need("clip_img")),
        )

    def noise(
        self, drawn: Drawn, clean: Streams, noise: Streams, labels: Mapping[str, Tensor], generator: torch.Generator
    ) -> Streams:
        """The noise, at `other_start` such that the noisy picture is that of another picture of the same concept."""
        if not self.options.other_start:
            return noise
        start = self.latents.draw(self.groups.draw(drawn.index, generator), self.forms, generator, drawn.changed)
        towards = noise_of_another(clean, start, noise, labels)
        names = ("img", "clip_img")
        return noise.replace(**{name: where(drawn.other_start, towards.need(name), noise.need(name)) for name in names})

    def _to(self, device: torch.device) -> None:
        self.groups.to(device)
        self.forms, self.with_style, self.lent = (x.to(device) for x in (self.forms, self.with_style, self.lent))


def shifted(x: Tensor, cells: int, generator: torch.Generator) -> Tensor:
    """Latents (B, C, H, W), each shifted by up to `cells` cells in each direction; uncovered cells repeat the border.

    Shifts are even, so that the style code of a `Palette` stays readable.

    Args:
        generator: source of the random numbers, on the device of `x`.
    """
    count, device = len(x), x.device

    def places(side: int) -> Tensor:
        moves = 2 * torch.randint(-(cells // 2), cells // 2 + 1, (count, 1), generator=generator, device=device)
        return (torch.arange(side, device=device) + moves).clamp(0, side - 1)  # (B, side)

    down, right = places(x.shape[2])[:, None, :, None], places(x.shape[3])[:, None, None, :]
    return x.take_along_dim(down, 2).take_along_dim(right, 3)


def noise_of_another(clean: Streams, other: Streams, noise: Streams, labels: Mapping[str, Tensor]) -> Streams:
    """Noise that turns `clean` into the noisy state of `other`.

    Trained to predict it, a network moves from the noisy state of another picture to the picture that the caption describes.

    Args:
        clean, other, noise: streams (B, ...) of the same shapes.
        labels: of each modality, (B,) in 0..1000; for streams at label 0, which hold no noise, `noise` is returned.

    Returns:
        noise + (alpha / sigma) (other - clean), so that alpha clean + sigma result = alpha other + sigma noise.
    """

    def one(name: str, x: Tensor) -> Tensor:
        label = labels[MODALITY_OF[name]].float()
        ratio = torch.where(label > 0, half_logsnr(label.clamp_min(1)).exp(), 0.0).view(-1, *[1] * (x.ndim - 1))
        return noise.need(name) + ratio.to(x) * (other.need(name) - x)

    return Streams(**{name: one(name, x) for name, x in clean.items()})
