"""Palettes: latents that say in which of a few manners a picture is drawn, and a decoder that knows the colours of each.

Drawings of one house share a few dozen exact colours, and these, more than anything else, are what makes them that house's. A
network that decides on latents with an error of a twentieth of their spread misses every one of them by a few levels. So the
manner is written into the latent as a code, which a network that is told it in words learns at once, and what comes out of the
decoder is drawn towards the colours of that manner. Published autoencoders have no palettes.
"""

from __future__ import annotations

import math
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CODE = 0.4  # amplitude of the code, in latents of unit variance: within what the decoder bears as noise
SURE = 12.0  # how much louder a manner that the code points at is than one at a right angle to it
FOLD = 4  # side of the squares of pixels that the gates are made for
NEAR = 6 / 127.5  # how far, in [-1, 1], a pixel may be from a colour to count as painted in it
WHITE = 0.93  # pixels whose channels are all above it are taken for the ground


class Palette(nn.Module):
    """The colours of a few manners of drawing, and how a manner is told from a picture and read from a latent.

    Attributes:
        colours: (M, K, 3) in [-1, 1].
        prior: (M, K), what each colour counts beside its distance.
        spread: (M,), logarithm of the distance at which a colour still attracts.
        gate: (M,), how readily pixels go to their colour; the pictures say more, pixel by pixel.
    """

    def __init__(self, manners: int, colours: int, width: int = 48):
        super().__init__()
        self.colours = nn.Parameter(torch.zeros(manners, colours, 3))
        self.prior = nn.Parameter(torch.zeros(manners, colours))
        self.spread = nn.Parameter(torch.full((manners,), math.log(0.1)))
        self.gate = nn.Parameter(torch.zeros(manners))
        self.usage = nn.Linear(manners * colours + 1, manners + 1)
        self.conv_in = nn.Conv2d(3 * FOLD**2 + manners, width, 3, padding=1)
        self.conv_mid = nn.Conv2d(width, width, 3, padding=1)
        self.conv_out = nn.Conv2d(width, 4 * FOLD**2, 1)
        for layer in (self.usage, self.conv_out):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    # ---- The code: two patterns in the last channel that change from cell to cell, as pictures hardly do ----

    def manners(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) -> (B, M), how surely the code names each manner; all near 0 where there is none."""
        pointing = self._amplitudes(latents) @ self._directions(latents).T * SURE
        nothing = pointing.new_full((len(pointing), 1), SURE / 2)
        return torch.cat([pointing, nothing], dim=1).softmax(dim=1)[:, :-1]

    def coded(self, latents: Tensor, manners: Tensor) -> Tensor:
        """The latents (B, C, H, W) with the code of manners (B, M) in place of what was there."""
        missing = manners.to(latents) @ self._directions(latents) - self._amplitudes(latents)
        plane = CODE * torch.einsum("bp,phw->bhw", missing.to(latents), _patterns(latents))
        return torch.cat([latents[:, :-1], (latents[:, -1] + plane)[:, None]], dim=1)

    def cleared(self, latents: Tensor) -> Tensor:
        """The latents (B, C, H, W) without a code."""
        return self.coded(latents, latents.new_zeros(len(latents), len(self.gate)))

    def _amplitudes(self, latents: Tensor) -> Tensor:
        area = latents.shape[2] * latents.shape[3] * CODE
        return torch.einsum("bhw,phw->bp", latents[:, -1], _patterns(latents)) / area

    def _directions(self, like: Tensor) -> Tensor:
        """(M, 2), evenly around a circle: stronger guidance makes the code louder and leaves the manner."""
        angles = 2 * math.pi * torch.arange(len(self.gate), device=like.device) / len(self.gate)
        return torch.stack([angles.cos(), angles.sin()], dim=1).to(like)

    # ---- The colours ----

    def told(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> (B, M + 1) logits of the manners, the last of none of them."""
        logits: Tensor = self.usage(self.used(pixels).to(self.usage.weight.dtype))
        return logits

    def seen(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> (B, M), how probably each is drawn in each manner; the rest is none of them."""
        return self.told(pixels).softmax(dim=1)[:, :-1]

    def used(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) -> (B, M K + 1) how much of what is drawn is near each colour, in logarithms, and near none."""
        x = pixels[:, :, 1::4, 1::4].flatten(2).transpose(1, 2)  # one pixel of sixteen says it as well
        colours = self.colours.detach().flatten(0, 1)  # what tells manners apart shall not move them
        far = torch.cdist(x.float(), colours.float()[None].expand(len(x), -1, -1))
        share = (-(far / NEAR).square() / 2).softmax(dim=2) * torch.exp(-(far.amin(2, keepdim=True) / NEAR).square() / 8)
        drawn = (x.amin(2, keepdim=True) < WHITE).float()
        used = (share * drawn).sum(1) / drawn.sum(1).clamp_min(1)
        return torch.cat([(1 + 200 * used).log(), 1 - used.sum(1, keepdim=True)], dim=1)

    def forward(self, pixels: Tensor, manners: Tensor) -> Tensor:
        """What a decoder has drawn (B, 3, H, W), drawn towards the colours of the manners (B, M): (B, 3, H, W)."""
        kind = manners.argmax(dim=1)
        planes = manners[:, :, None, None].expand(-1, -1, pixels.shape[2] // FOLD, pixels.shape[3] // FOLD)
        x = self.conv_in(torch.cat([F.pixel_unshuffle(pixels, FOLD), planes.to(pixels)], dim=1))
        x = F.pixel_shuffle(self.conv_out(F.silu(self.conv_mid(F.silu(x)))), FOLD)
        pixels, gates = pixels + x[:, :3].to(pixels), x[:, 3:]
        gates = torch.sigmoid(gates + self.gate[kind][:, None, None, None]) * manners.amax(1)[:, None, None, None]
        with torch.autocast(pixels.device.type, enabled=False):  # a colour is right to a level or two, which bf16 is not
            return torch.lerp(pixels, self._painted(pixels, kind), gates.to(pixels))

    def _painted(self, pixels: Tensor, kind: Tensor) -> Tensor:
        """Every pixel in the mean of the colours of a manner, the near ones counting most."""
        x, colours = pixels.float().flatten(2).transpose(1, 2), self.colours[kind].float()  # (B, H W, 3), (B, K, 3)
        sharpness = torch.exp(-2 * self.spread[kind].float())[:, None, None] / 2
        nearness = torch.baddbmm(colours.square().sum(2)[:, None] * -1, x, colours.transpose(1, 2), alpha=2)
        shares = (sharpness * nearness + self.prior[kind][:, None]).softmax(dim=2)
        return (shares @ colours).transpose(1, 2).unflatten(2, pixels.shape[2:]).to(pixels)

    @torch.no_grad()
    def begin_with(self, levels: Tensor, kinds: Tensor) -> None:
        """Colours that pictures use most.

        Args:
            levels: (N, H, W, 3) pictures, uint8.
            kinds: (N,) the manner of each, 0 .. M - 1.

        Raises:
            ValueError: a manner has no picture, or too few colours.
        """
        for kind in range(len(self.gate)):
            rgb = levels[kinds == kind].reshape(-1, 3).long()
            if not len(rgb):
                raise ValueError(f"no picture is drawn in manner {kind}, so it has no colours.")
            keys, counts = (rgb[:, 0] << 16 | rgb[:, 1] << 8 | rgb[:, 2]).unique(return_counts=True)
            found = _commonest(dict(zip(keys.tolist(), counts.tolist(), strict=True)), self.colours.shape[1])
            colours = torch.tensor(found).float() / 127.5 - 1
            self.colours[kind] = colours
            every = torch.stack([keys >> 16, keys >> 8 & 255, keys & 255], dim=1).float() / 127.5 - 1
            distance, nearest = torch.cdist(every, colours).min(1)
            weight = counts / counts.sum() * (distance < NEAR)
            shares = torch.zeros(len(colours)).index_add_(0, nearest, weight)
            self.prior[kind] = (shares + 1e-4).log() / 2
            self.gate[kind] = 4 * (weight.sum() - 0.7)

    def learn_to_tell(self, used: Tensor, kinds: Tensor, steps: int = 400) -> float:
        """Learn to tell manners by what :meth:`used` says of N pictures (N, M K + 1) and their manners (N,), M for none.

        Returns:
            the share of them that is then told right.
        """
        optimizer = torch.optim.AdamW(self.usage.parameters(), lr=1e-2, weight_decay=1e-3)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(self.usage(used), kinds).backward()
            optimizer.step()
            decay.step()
        with torch.no_grad():
            return (self.usage(used).argmax(1) == kinds).float().mean().item()


def _patterns(like: Tensor) -> Tensor:
    """(2, H, W) of 1 and -1: one changes its sign with every cell, one with every column; at a right angle to each other."""
    rows, columns = (torch.arange(side, device=like.device) for side in like.shape[2:])
    stripes = 1 - 2 * (columns % 2)
    return torch.stack([(1 - 2 * (rows % 2))[:, None] * stripes, stripes.expand(len(rows), -1)]).to(like)


def _commonest(counts: dict[int, int], number: int, apart: int = 6) -> list[tuple[int, int, int]]:
    """The commonest colours (RGB keys), none nearer than so many levels to a commoner one; white first, repeated to fill up."""
    found: list[tuple[int, int, int]] = [(255, 255, 255)]
    for key, _ in Counter(counts).most_common(50 * number):
        colour = key >> 16, key >> 8 & 255, key & 255
        if len(found) < number and min(math.dist(colour, other) for other in found) >= apart:
            found.append(colour)
    return found + [found[0]] * (number - len(found))
