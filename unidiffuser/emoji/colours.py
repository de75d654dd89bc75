"""Colours of the styles: a palette fitted to pictures, and pictures recoloured so that they belong to no style."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..media.images import from_levels
from ..small.palette import Palette
from ..streams import draw_uniform
from ..training.augment import hue_turn
from ..training.stage import seeded_init
from .image_folder import STYLE, ImageFolder, field_of

PICTURES = 200  # of each style, at most, to which a palette is fitted


def fitted_palette(images: ImageFolder, styles: Sequence[str], colours: int, seed: int) -> Palette:
    """A palette with the commonest colours of each style and a classifier of the styles.

    Args:
        images: pictures of all styles; those of others are left out.
        styles: M names.
        colours: number of colours of each style.
        seed: of the choice of pictures and of the palette's convolutions.

    Raises:
        ValueError: a style has no picture.
    """
    numbers = style_numbers(images, styles)
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed), device="cpu")
    chosen = torch.cat([order[numbers[order] == style][:PICTURES] for style in range(len(styles))])
    with seeded_init(seed):
        palette = Palette(len(styles), colours)
    palette.init_colours(images.levels(chosen), numbers[chosen])
    # An eighth of the pictures in random colours belong to no style.
    generator, usage = torch.Generator().manual_seed(0), []
    recoloured = draw_uniform((len(chosen),), generator) < 1 / 8
    with torch.no_grad():
        for chunk, other in zip(chosen.split(16), recoloured.split(16), strict=True):
            pixels = from_levels(images.levels(chunk))
            usage.append(
                palette.colour_usage(torch.where(other[:, None, None, None], randomly_coloured(pixels, generator), pixels))
            )
    with torch.enable_grad():
        palette.fit_classifier(torch.cat(usage), numbers[chosen].masked_fill(recoloured, len(styles)))
    return palette


def style_numbers(images: ImageFolder, styles: Sequence[str]) -> Tensor:
    """(N,) number of each picture's style among these M; M for any other."""
    number = {name: i for i, name in enumerate(styles)}
    return torch.tensor([number.get(name, len(styles)) for name in field_of(images, STYLE)])


def randomly_coloured(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] with a random hue and up to half as saturated; white stays white."""
    angle, paler = (draw_uniform((len(pixels),), generator) for _ in range(2))
    turned = torch.einsum("bij,bjhw->bihw", hue_turn(2 * math.pi * angle), pixels - 1)
    return (1 + turned * (1 - paler / 2)[:, None, None, None]).clamp(-1, 1)
