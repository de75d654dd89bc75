"""Convex upsampling of a decoder's output to twice its sides.

Each fine pixel is a weighted mean of the 3 x 3 coarse pixels around it, with weights that convolutions predict (Teed and Deng,
"RAFT", arXiv 2003.12039, section 3.3). A mean of equal colours is that colour, so flat areas stay flat; weights that choose one
side of an edge keep it sharp; and no fine pixel leaves the range of its neighbours. Published autoencoders have no upsampler.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FACTOR = 2
FOLD = 4  # side of the squares of coarse pixels at one position of the decoder's features
NEIGHBOURS = 9
PIXELS_AT_ONCE = 2**16  # coarse pixels; a large batch at once would wait for fresh memory, 150 floats for each


class ConvexUpsampler(nn.Module):
    """Upsampler of pictures to twice their sides, guided by the decoder's features.

    Args:
        features: C, channels of the decoder's features.
        width: channels of the convolutions, at half the sides of the coarse picture.
    """

    def __init__(self, features: int, width: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3 * FOLD**2 + features, 4 * width, 3, padding=1)
        self.conv_mid = nn.Conv2d(width + 12, width, 3, padding=1)
        self.conv_last = nn.Conv2d(width, width, 3, padding=1)
        self.conv_out = nn.Conv2d(width, 4 * FACTOR**2 * NEIGHBOURS, 1)
        nn.init.zeros_(self.conv_out.weight)
        self.conv_out.bias = nn.Parameter(_bilinear_logits().repeat(4, 1).T.flatten())

    def forward(self, pixels: Tensor, features: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) and features (B, C, H/4, W/4) -> pictures (B, 3, 2H, 2W)."""
        size = max(1, PIXELS_AT_ONCE // (pixels.shape[2] * pixels.shape[3]))
        parts = zip(pixels.split(size), features.split(size), strict=True)
        return torch.cat([self._upsample(*part) for part in parts])

    def _upsample(self, pixels: Tensor, features: Tensor) -> Tensor:
        x = self.conv_in(torch.cat([F.pixel_unshuffle(pixels, FOLD), features.to(pixels)], dim=1))
        x = torch.cat([F.pixel_shuffle(F.silu(x), 2), F.pixel_unshuffle(pixels, 2)], dim=1)
        x = F.silu(self.conv_mid(x))
        x = F.silu(self.conv_last(x))
        logits = F.pixel_shuffle(self.conv_out(x), 2)  # (B, 4 * 9, H, W), the subpixel before the neighbour
        return convex_upsample(pixels, logits)


def convex_upsample(pixels: Tensor, logits: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) at twice their sides, each pixel a mean of nine weighted by softmax.

    Args:
        pixels: (B, 3, H, W).
        logits: (B, 4 * 9, H, W): for each of the 2 x 2 subpixels, nine weights, both row by row.
    """
    height, width = pixels.shape[2:]
    weights = logits.float().unflatten(1, (FACTOR**2, NEIGHBOURS)).softmax(dim=2)  # (B, 4, 9, H, W)
    padded = F.pad(pixels.float(), (1, 1, 1, 1), mode="replicate")
    out = weights.new_zeros(len(pixels), 3, FACTOR**2, height, width)
    for index, weight in enumerate(weights.unbind(2)):
        row, column = divmod(index, 3)
        out.addcmul_(padded[:, :, None, row : row + height, column : column + width], weight[:, None])
    return F.pixel_shuffle(out.flatten(1, 2), FACTOR).to(pixels)


def _bilinear_logits() -> Tensor:
    """(36,): the logarithms of bilinear interpolation's weights, with little for the neighbours that it leaves out."""
    side = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.75, 0.25]])
    weights = torch.einsum("ik,jl->ijkl", side, side)
    return (weights.flatten() + 0.01).log()
