"""Image heads for large patches: what a few wide tokens cannot say of a latent, convolutions add that see it themselves.

Large patches make a transformer cheap, but all that leaves it goes through the width of its tokens, and noise, which has no
pattern, fills that width. So a network with a head like this predicts the picture rather than the noise (Li & He, "Back to
Basics: Let Denoising Generative Models Denoise", arXiv 2511.13720), and convolutions at half the latent resolution finish
what the patches begin, across their borders (Chen et al., "DiP: Taming Diffusion Models in Pixel Space", arXiv 2511.18822).
Published networks have neither.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..schedule import sigma_of_label

FOLD = 2  # side of the squares of latents that become channels for the convolutions


class DetailBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; the second begins as nothing.

    ``told`` is the width of what all squares are told between the two: a factor and a summand for each channel.
    """

    def __init__(self, width: int, told: int, ops: Any, **factory: Any):
        super().__init__()
        self.conv1 = ops.Conv2d(width, width, 3, padding=1, **factory)
        self.conv2 = ops.Conv2d(width, width, 3, padding=1, **factory)
        if told:
            self.told = ops.Linear(told, 2 * width, **factory)

    def forward(self, x: Tensor, told: Tensor | None) -> Tensor:
        hidden = self.conv1(F.silu(x))
        if told is not None:
            factor, summand = self.told(told)[:, :, None, None].chunk(2, dim=1)
            hidden = hidden * (1 + factor) + summand
        out: Tensor = x + self.conv2(F.silu(hidden))
        return out


class DetailHead(nn.Module):
    """A noisy latent (B, C, H, W), what the patches say of it (B, 4 C + features, H/2, W/2), a token (B, D) -> (B, C, H, W).

    The first 4 C channels of the patches are a draft of the result, to which the convolutions add.

    Args:
        channels: C.
        features: channels beside the draft, in which the patches tell the convolutions what they need to know.
        width, blocks: of the convolutions at half the resolution.
        inner, inner_blocks: width and number of those at a quarter of it, which stand after the first of the others and see
            four times as much of a picture at the cost of a quarter; none where ``inner`` is 0.
        token, told: D, and how many numbers of the token all blocks are told, such as how a thing is to be drawn; 0 for none.
        ops: where Conv2d and Linear come from, see :class:`.uvit.UViT`.
    """

    def __init__(
        self,
        channels: int,
        features: int,
        width: int,
        blocks: int,
        ops: Any,
        *,
        inner: int = 0,
        inner_blocks: int = 0,
        token: int = 0,
        told: int = 0,
        **factory: Any,
    ):
        super().__init__()
        self.drafted = FOLD**2 * channels
        self.conv_in = ops.Conv2d(2 * self.drafted + features, width, 3, padding=1, **factory)
        self.blocks = nn.ModuleList([DetailBlock(width, told, ops, **factory) for _ in range(blocks)])
        self.conv_out = ops.Conv2d(width, self.drafted, 3, padding=1, **factory)
        self.inner = nn.ModuleList([DetailBlock(inner, told, ops, **factory) for _ in range(inner_blocks if inner else 0)])
        if inner:
            self.conv_down = ops.Conv2d(width, inner, 2, stride=2, **factory)
            self.conv_up = ops.Conv2d(inner, width, 1, **factory)
        if told:
            self.told = ops.Linear(token, told, **factory)

    def forward(self, latent: Tensor, said: Tensor, token: Tensor) -> Tensor:
        x = torch.cat([F.pixel_unshuffle(latent, FOLD), said], dim=1).contiguous(memory_format=torch.channels_last)
        told = F.silu(self.told(token)) if hasattr(self, "told") else None
        x = self.conv_in(x)
        for block in self.blocks[:1]:
            x = block(x, told)
        x = self._through_the_inside(x, told)
        for block in self.blocks[1:]:
            x = block(x, told)
        return F.pixel_shuffle(said[:, : self.drafted] + self.conv_out(F.silu(x)), FOLD)

    def _through_the_inside(self, x: Tensor, told: Tensor | None) -> Tensor:
        if not hasattr(self, "conv_down"):
            return x
        h = self.conv_down(x)
        for block in self.inner:
            h = block(h, told)
        return x + F.interpolate(self.conv_up(h), scale_factor=2, mode="nearest")

    @torch.no_grad()
    def begin_with_the_draft(self) -> None:
        """Weights with which the convolutions add nothing and blocks are told nothing, but can learn to."""
        blocks = [*self.blocks, *self.inner]
        anew = [self.conv_out, *(block.conv2 for block in blocks), *(block.told for block in blocks if hasattr(block, "told"))]
        if hasattr(self, "conv_up"):
            anew.append(self.conv_up)
        for layer in anew:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


def noise_of_output(output: Tensor, latent: Tensor, labels: Tensor, sigma_data: float) -> Tensor:
    """The noise in a latent, from a network's output F for it.

    With s = sigma / alpha and the latent x = alpha x_0 + sigma eps, the picture is

        x_0 = sigma_data^2 / (s^2 + sigma_data^2) x / alpha + s / sqrt(s^2 + sigma_data^2) F,

    the preconditioning of Karras et al. (arXiv 2206.00364, section 5) but for a scale of F. A sigma_data near 0 asks for the
    picture (F = x_0), 1 for the velocity, a large one for the noise. It is the spread, in scaled latents, of what is still open
    about a latent where noise begins to hide it: well below 1, as most of a picture is told by what is around it.

    Args:
        output, latent: (B, C, H, W).
        labels: (B,) in 0..1000; nothing is divided by sigma, so label 0 is allowed.
    """
    sigma = sigma_of_label(labels)
    scale = (sigma.square() + sigma_data**2).rsqrt()
    kept = sigma * scale.square() * torch.hypot(sigma, torch.ones_like(sigma))  # 1 / alpha = sqrt(1 + s^2)
    kept, scale = (factor.to(latent.dtype).view(-1, 1, 1, 1) for factor in (kept, scale))
    return kept * latent - scale * output
