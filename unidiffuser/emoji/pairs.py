"""Training pairs of more pictures than the network draws: some to learn captions from, some to learn drawing from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..schedule import NUM_LABELS, half_logsnr
from ..streams import MODALITY_OF, Streams
from .groups import GroupSampler
from .latents import Latents


def where(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Items (B, ...) of `yes` where the condition (B,) holds, else of `no`."""
    return torch.where(condition.view(-1, *[1] * (yes.ndim - 1)), yes, no)


def form_weights(given: list[float] | None, forms: int, name: str) -> Tensor:
    """Relative probability (forms,) of each caption form; equal when None.

    Raises:
        ValueError: not one number for each form; the text has the option's name.
    """
    weights = torch.tensor([1.0] * forms if given is None else [float(weight) for weight in given])
    if len(weights) != forms:
        raise ValueError(f"{name} has {len(weights)} entries, but the pictures have {forms} captions each")
    return weights


class CaptioningPairs:
    """Pairs for the part of a batch with clean pictures, from which the network learns captions.

    Args:
        latents: of the pictures.
        options: "swap", "swap_within" and "caption_shares" of the stage's option "captioning", see `UViTStage`.
        forms: relative probability of each caption form where "caption_shares" is absent.
    """

    OPTIONS = frozenset({"swap", "swap_within", "caption_shares"})

    def __init__(self, latents: Latents, options: Mapping[str, Any], forms: Tensor):
        self.latents = latents
        self.forms = form_weights(options.get("caption_shares", forms.tolist()), len(forms), "caption_shares of captioning")
        self.swap = float(options.get("swap", 0.0))
        self.groups = GroupSampler([record.get(options.get("swap_within", "style")) for record in latents.records])

    def draw(self, count: int, generator: torch.Generator) -> Streams:
        """Random pairs; a fraction `swap` of them has the image latent of another picture of the same group."""
        index = self.latents.draw_index(count, generator)
        pairs = self.latents.draw(index, self.forms, generator)
        if not self.swap:
            return pairs
        swapped = torch.rand(count, generator=generator, device=generator.device) < self.swap
        others = self.latents.draw(self.groups.to(generator.device).draw(index, generator), self.forms, generator)
        return pairs.replace(img=where(swapped, others.need("img"), pairs.need("img")))


@dataclass(frozen=True)
class Drawn:
    """A batch of `DrawingPairs`.

    Attributes:
        pairs: B pairs.
        index: (B,) their pictures.
        used: (B,), True for items of the stage's batch that these pairs replace.
        changed: (B,), True where the picture may be augmented.
        repainted: (B,), True where the noisy picture is to be that of another one.
    """

    pairs: Streams
    index: Tensor
    used: Tensor
    changed: Tensor
    repainted: Tensor


class DrawingPairs:
    """Pairs for the part of a batch with clean captions, from which the network learns to draw.

    Args:
        latents: of the pictures.
        options: those of the stage's option "drawing" (`OPTIONS`), see `UViTStage`.
        forms: relative probability of each caption form where "caption_shares" is absent.
        seed: chooses the pictures that are set aside for "borrow".
    """

    OPTIONS = frozenset(
        {"share", "share_below", "changed_below", "shift", "repaint", "repaint_within", "repaint_from"}
        | {"borrow", "caption_shares", "mixed_shares"}
    )

    def __init__(self, latents: Latents, options: Mapping[str, Any], forms: Tensor, seed: int):
        self.latents = latents
        self.fraction = float(options.get("share", 1.0))
        self.fraction_below = float(options.get("share_below", self.fraction))
        self.changed_below = int(options.get("changed_below", NUM_LABELS + 1))
        self.shift = int(options.get("shift", 0))
        self.repaint, self.repaint_from = float(options.get("repaint", 0.0)), int(options.get("repaint_from", 1))
        self.forms = form_weights(options.get("caption_shares", forms.tolist()), len(forms), "caption_shares of drawing")
        self.mixed_forms = form_weights(options.get("mixed_shares", self.forms.tolist()), len(forms), "mixed_shares of drawing")
        self.groups = GroupSampler([record.get(options.get("repaint_within", "label")) for record in latents.records])
        self.aside: Tensor | None = None
        if borrow := float(options.get("borrow", 0.0)):
            by_chance = torch.rand(len(latents.records), generator=torch.Generator().manual_seed(seed)) < borrow
            self.aside = by_chance & (self.groups.counts[self.groups.groups] > 1)

    def draw(self, labels: Mapping[str, Tensor], generator: torch.Generator) -> Drawn:
        """Pairs for a batch with these labels, "img" and "text", (B,) each."""
        count, device = len(labels["img"]), generator.device
        self._to(device)
        index = self.latents.draw_index(count, generator)
        below = labels["img"] < self.changed_below
        chance = torch.rand(count, generator=generator, device=device)
        used = (labels["text"] == 0) & (chance < torch.where(below, self.fraction_below, self.fraction))
        repainted = torch.zeros_like(used)
        if self.repaint:
            chance = torch.rand(count, generator=generator, device=device)
            repainted = (chance < self.repaint) & used & (labels["img"] >= self.repaint_from)
        changed = below & ~repainted
        mixed = repainted if self.aside is None else repainted | self.aside[index]
        pairs = self.latents.draw(index, torch.where(mixed[:, None], self.mixed_forms, self.forms), generator, changed)
        if self.aside is not None:
            pairs = self._borrowed(pairs, index, self.aside[index], changed, generator)
        if self.shift:
            # Shifted without the code: a repeated border would spoil it.
            bare = self.latents.with_style_code(pairs.need("img"), None)
            moved = self.latents.with_style_code(shifted(bare, self.shift, generator), index)
            pairs = pairs.replace(img=where(changed, moved, pairs.need("img")))
        return Drawn(pairs, index, used, changed, repainted)

    def _borrowed(self, pairs: Streams, index: Tensor, aside: Tensor, changed: Tensor, generator: torch.Generator) -> Streams:
        """The pairs, but those set aside with another picture of their group, in the style code of their own."""
        others = self.latents.draw(self.groups.draw_other(index, generator), self.forms, generator, changed)
        img = self.latents.with_style_code(others.need("img"), index)
        return pairs.replace(
            img=where(aside, img, pairs.need("img")),
            clip_img=where(aside, others.need("clip_img"), pairs.need("clip_img")),
        )

    def repainted_noise(
        self, drawn: Drawn, clean: Streams, noise: Streams, labels: Mapping[str, Tensor], generator: torch.Generator
    ) -> Streams:
        """The noise, where repainted such that the noisy picture is that of another picture of the same group."""
        if not self.repaint:
            return noise
        begun = self.latents.draw(self.groups.draw(drawn.index, generator), self.forms, generator, drawn.changed)
        towards = noise_of_another(clean, begun, noise, labels)
        names = ("img", "clip_img")
        return noise.replace(**{name: where(drawn.repainted, towards.need(name), noise.need(name)) for name in names})

    def _to(self, device: torch.device) -> None:
        self.groups.to(device)
        self.forms, self.mixed_forms = self.forms.to(device), self.mixed_forms.to(device)
        self.aside = None if self.aside is None else self.aside.to(device)


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
