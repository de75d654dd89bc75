"""Convolutional refinement head for large patches, and the output preconditioning of networks that predict the picture.

Large patches make a transformer cheap, but its whole output goes through the width of its tokens, and noise, which has no
structure, fills that width. So a network with this head predicts the picture rather than the noise (Li & He, "Back to Basics:
Let Denoising Generative Models Denoise", arXiv 2511.13720), and convolutions at half the latent resolution, which see the noisy
latent itself, refine the coarse prediction across patch borders (Chen et al., "DiP: Taming Diffusion Models in Pixel Space",
arXiv 2511.18822). Published networks have neither.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..schedule import sigma_of_label

FOLD = 2  # side of the squares of latent cells that become channels for the convolutions


class DetailBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, conditioned by a scale and a shift of every channel between the two.

    Args:
        width: channels.
        cond: size of the conditioning vector; 0 for none.
        ops: namespace of Conv2d and Linear, see `UViT`.
    """

    def __init__(self, width: int, cond: int, ops: Any, **factory: Any):
        super().__init__()
        self.conv1 = ops.Conv2d(width, width, 3, padding=1, **factory)
        self.conv2 = ops.Conv2d(width, width, 3, padding=1, **factory)
        if cond:
            self.told = ops.Linear(cond, 2 * width, **factory)  # named so in checkpoints

    def forward(self, x: Tensor, cond: Tensor | None) -> Tensor:
        hidden = self.conv1(F.silu(x))
        if cond is not None:
            scale, shift = self.told(cond)[:, :, None, None].chunk(2, dim=1)
            hidden = hidden * (1 + scale) + shift
        out: Tensor = x + self.conv2(F.silu(hidden))
        return out


class DetailHead(nn.Module):
    """Refines the transformer's coarse prediction of an image latent with convolutions that also see the noisy latent.

    Args:
        channels: C of the latent.
        features: channels of the transformer's output beside the coarse prediction; conditioning for the convolutions.
        width, blocks: channels and number of the blocks at half the latent resolution.
        inner, inner_blocks: the same at a quarter of it: these stand after the first block and have twice the receptive field
            at a quarter of the cost. None if `inner` is 0.
        token, cond: size of the time token, and of the conditioning vector made from it for all blocks; 0 for none.
        ops: namespace of Conv2d and Linear, see `UViT`.
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
        cond: int = 0,
        **factory: Any,
    ):
        super().__init__()
        self.coarse_channels = FOLD**2 * channels
        self.conv_in = ops.Conv2d(2 * self.coarse_channels + features, width, 3, padding=1, **factory)
        self.blocks = nn.ModuleList([DetailBlock(width, cond, ops, **factory) for _ in range(blocks)])
        self.conv_out = ops.Conv2d(width, self.coarse_channels, 3, padding=1, **factory)
        self.inner = nn.ModuleList([DetailBlock(inner, cond, ops, **factory) for _ in range(inner_blocks if inner else 0)])
        if inner:
            self.conv_down = ops.Conv2d(width, inner, 2, stride=2, **factory)
            self.conv_up = ops.Conv2d(inner, width, 1, **factory)
        if cond:
            self.told = ops.Linear(token, cond, **factory)  # named so in checkpoints

    def forward(self, latent: Tensor, coarse: Tensor, token: Tensor) -> Tensor:
        """Args:
            latent: (B, C, H, W), noisy.
            coarse: (B, 4 C + features, H/2, W/2) from the patches; the first 4 C channels are the prediction to refine.
            token: (B, D), the normalised time token.

        Returns:
            (B, C, H, W).
        """
        x = torch.cat([F.pixel_unshuffle(latent, FOLD), coarse], dim=1).contiguous(memory_format=torch.channels_last)
        cond = F.silu(self.told(token)) if hasattr(self, "told") else None
        x = self.conv_in(x)
        for block in self.blocks[:1]:
            x = block(x, cond)
        x = self._inner_level(x, cond)
        for block in self.blocks[1:]:
            x = block(x, cond)
        return F.pixel_shuffle(coarse[:, : self.coarse_channels] + self.conv_out(F.silu(x)), FOLD)

    def _inner_level(self, x: Tensor, cond: Tensor | None) -> Tensor:
        if not hasattr(self, "conv_down"):
            return x
        h = self.conv_down(x)
        for block in self.inner:
            h = block(h, cond)
        return x + F.interpolate(self.conv_up(h), scale_factor=2, mode="nearest")

    @torch.no_grad()
    def start_from_coarse_prediction(self) -> None:
        """Zero the last layer of every branch, so that training starts from the coarse prediction as it is."""
        blocks = [*self.blocks, *self.inner]
        last = [self.conv_out, *(block.conv2 for block in blocks), *(block.told for block in blocks if hasattr(block, "told"))]
        if hasattr(self, "conv_up"):
            last.append(self.conv_up)
        for layer in last:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


def noise_of_output(output: Tensor, latent: Tensor, labels: Tensor, sigma_data: float) -> Tensor:
    """The noise in a latent, from the output F of a network that predicts a mixture of picture and noise.

    With s = sigma / alpha and the latent x = alpha x_0 + sigma eps, the picture is

        x_0 = sigma_data^2 / (s^2 + sigma_data^2) x / alpha + s / sqrt(s^2 + sigma_data^2) F,

    the preconditioning of Karras et al. (arXiv 2206.00364, section 5) up to a scale of F. With sigma_data near 0 the network
    predicts the picture (F = x_0), with 1 the velocity, with a large one the noise. It is the spread, in scaled latents, of
    what is still undecided about a latent where noise begins to hide it: well below 1, as its surroundings decide most of it.

    Args:
        output, latent: (B, C, H, W).
        labels: (B,) in 0..1000; label 0 is allowed, since nothing is divided by sigma.
        sigma_data: above 0.
    """
    sigma = sigma_of_label(labels)
    scale = (sigma.square() + sigma_data**2).rsqrt()
    kept = sigma * scale.square() * torch.hypot(sigma, torch.ones_like(sigma))  # 1 / alpha = sqrt(1 + s^2)
    kept, scale = (factor.to(latent.dtype).view(-1, 1, 1, 1) for factor in (kept, scale))
    return kept * latent - scale * output
