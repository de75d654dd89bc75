"""Augmentation of pictures: small changes that keep content and style.

Written by hand: torchvision is no dependency, and its transforms draw from the global generator, which a resume cannot restore.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..streams import draw_normal, draw_uniform


def augmented(
    pixels: Tensor,
    generator: torch.Generator,
    *,
    place: float = 1.0,
    colour: float = 1.0,
    mirror: bool = False,
    shade: float = 0.0,
    noise: float = 0.0,
) -> Tensor:
    """Rotate, zoom, stretch, shift, recolour and soften each picture by its own random amounts.

    Args:
        pixels: (B, 3, H, W) in [-1, 1]; uncovered areas become white.
        generator: source of the random numbers, on the CPU wherever the pictures are.
        place: strength of the geometric changes; 1 rotates by up to 0.2 rad, zooms by 20 % and shifts by 8 % of the side.
        colour: strength of the recolouring; 1 rotates the hue by up to 0.15 rad and changes saturation and contrast by up to
            15 %, less than the palettes of two styles differ.
        mirror: flip half of the pictures, at random.
        shade: standard deviation of the slope of a brightness gradient, per half side of the picture.
        noise: largest standard deviation of white noise, added to half of the pictures at random.

    Returns:
        (B, 3, H, W) in [-1, 1].
    """
    count, device = len(pixels), pixels.device

    def uniform(low: float, high: float) -> Tensor:
        return (draw_uniform((count,), generator) * (high - low) + low).to(device)

    if mirror:
        pixels = mirrored(pixels, generator)
    turn, shear = uniform(-0.2, 0.2) * place, uniform(-0.1, 0.1) * place
    zoom, stretch = torch.exp(uniform(-0.2, 0.2) * place), torch.exp(uniform(-0.1, 0.1) * place)
    x = moved(pixels, turn, shear, zoom, stretch, uniform(-0.16, 0.16) * place, uniform(-0.16, 0.16) * place)

    turned = hue_turn(uniform(-0.15, 0.15) * colour)
    saturation = (1 + uniform(-0.15, 0.15) * colour)[:, None, None]
    grey = torch.full((3, 3), 1 / 3, dtype=torch.float32, device=device)
    recolour = turned @ (saturation * torch.eye(3, dtype=torch.float32, device=device) + (1 - saturation) * grey)
    # About white, so that a white background stays white.
    x = 1 + torch.einsum("bij,bjhw->bihw", recolour, x - 1) * (1 + uniform(-0.15, 0.15) * colour)[:, None, None, None]

    softness = (uniform(-1, 1) * colour).clamp(0, 1)[:, None, None, None]
    x = torch.lerp(x, softened(x), softness)
    if shade:
        slope = (draw_normal((count, 2, 1, 1), generator) * shade).to(device)
        across, down = (
            torch.linspace(-1.0, 1.0, side, dtype=torch.float32, device=device) for side in (x.shape[3], x.shape[2])
        )
        x = x + (slope[:, 0] * across[None, None, :] + slope[:, 1] * down[None, :, None])[:, None]
    if noise:
        strength = (draw_uniform((count,), generator) < 0.5).to(device) * uniform(0.0, noise)
        x = x + strength[:, None, None, None] * draw_normal(x.shape, generator).to(device)
    return x.clamp(-1, 1)


def mirrored(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, H, W), half of them flipped, at random."""
    flip = (draw_uniform((len(pixels),), generator) < 0.5).to(pixels.device)
    return torch.where(flip[:, None, None, None], pixels.flip(3), pixels)


def moved(x: Tensor, turn: Tensor, shear: Tensor, zoom: Tensor, stretch: Tensor, right: Tensor, down: Tensor) -> Tensor:
    """Affine transform of pictures (B, 3, H, W) in [-1, 1] on white; each argument is (B,), shifts in half sides."""
    moves = torch.stack(
        [
            torch.stack([turn.cos() / zoom * stretch, turn.sin() / zoom + shear, right], dim=1),
            torch.stack([-turn.sin() / zoom, turn.cos() / zoom / stretch, down], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(moves, list(x.shape), align_corners=False)
    return F.grid_sample(x - 1, grid, align_corners=False) + 1


def hue_turn(angle: Tensor) -> Tensor:
    """Matrices (B, 3, 3) that rotate RGB by angles (B,) in rad about the grey axis (Rodrigues' formula)."""
    hue = angle[:, None, None]
    axis = torch.tensor(
        [[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]], dtype=torch.float32, device=angle.device
    ) / math.sqrt(3.0)
    return hue.cos() * torch.eye(3, dtype=torch.float32, device=angle.device) + (1 - hue.cos()) / 3 + hue.sin() * axis


def softened(x: Tensor) -> Tensor:
    """Pictures of even sides, halved in resolution and scaled back."""
    return F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear", align_corners=False)
