"""Palettes: a style code in the latent, and a decoder that knows the exact colours of each style.

Pictures of one icon set share a few dozen exact colours, and these identify the set more than anything else. A network whose
latents have an error of a twentieth of their spread misses every such colour by a few levels. So the style is written into the
latent as a code, which a network conditioned on the style's name learns at once, and the decoder's output is pulled towards the
colours of that style. Published autoencoders have no palettes.
"""

from __future__ import annotations

import math
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CODE_AMPLITUDE = 0.4  # in latents of unit variance: no more than the decoder tolerates as noise
CODE_SHARPNESS = 12.0  # difference in logits between the style at the code's angle and one at a right angle to it
FOLD = 4  # side of the squares of pixels that share one position of the convolutions
TOLERANCE = 6 / 127.5  # distance in [-1, 1] below which a pixel counts as painted in a colour
WHITE = 0.93  # pixels whose channels are all above this are background


class Palette(nn.Module):
    """The colours of a few styles, the style code in latents, and a classifier of styles by their colours.

    Styles are given as weights (B, M): 1 for the style of an item, all 0 for no style.

    Args:
        styles: M, number of styles.
        colours: K, number of colours of each.
        width: channels of the convolutions that decide how strongly each pixel is pulled.

    Attributes:
        colours: (M, K, 3) in [-1, 1].
        prior: (M, K), logit of each colour beside its distance.
        spread: (M,), logarithm of the distance at which a colour still attracts.
        gate: (M,), logit of how strongly all pixels of a style are pulled; the convolutions add to it pixel by pixel.
    """

    def __init__(self, styles: int, colours: int, width: int = 48):
        super().__init__()
        self.colours = nn.Parameter(torch.zeros(styles, colours, 3))
        self.prior = nn.Parameter(torch.zeros(styles, colours))
        self.spread = nn.Parameter(torch.full((styles,), math.log(0.1)))
        self.gate = nn.Parameter(torch.zeros(styles))
        self.usage = nn.Linear(styles * colours + 1, styles + 1)
        self.conv_in = nn.Conv2d(3 * FOLD**2 + styles, width, 3, padding=1)
        self.conv_mid = nn.Conv2d(width, width, 3, padding=1)
        self.conv_out = nn.Conv2d(width, 4 * FOLD**2, 1)
        for layer in (self.usage, self.conv_out):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    # ---- The code: two patterns in the last channel that alternate from cell to cell, as pictures hardly do ----

    def read_code(self, latents: Tensor) -> Tensor:
        """Style probabilities (B, M) from the code in latents (B, C, H, W); all near 0 where there is no code."""
        logits = self._amplitudes(latents) @ self._directions(latents).T * CODE_SHARPNESS
        no_style = logits.new_full((len(logits), 1), CODE_SHARPNESS / 2)
        return torch.cat([logits, no_style], dim=1).softmax(dim=1)[:, :-1]

    def write_code(self, latents: Tensor, styles: Tensor) -> Tensor:
        """The latents (B, C, H, W) with their code replaced by that of the styles (B, M)."""
        missing = styles.to(latents) @ self._directions(latents) - self._amplitudes(latents)
        plane = CODE_AMPLITUDE * torch.einsum("bp,phw->bhw", missing.to(latents), _patterns(latents))
        return torch.cat([latents[:, :-1], (latents[:, -1] + plane)[:, None]], dim=1)

    def remove_code(self, latents: Tensor) -> Tensor:
        """The latents (B, C, H, W) without a code."""
        return self.write_code(latents, latents.new_zeros(len(latents), len(self.gate)))

    def _amplitudes(self, latents: Tensor) -> Tensor:
        """(B, 2) of the two patterns, in units of `CODE_AMPLITUDE`."""
        area = latents.shape[2] * latents.shape[3] * CODE_AMPLITUDE
        return torch.einsum("bhw,phw->bp", latents[:, -1], _patterns(latents)) / area

    def _directions(self, like: Tensor) -> Tensor:
        """(M, 2), evenly around a circle: stronger guidance lengthens the code and keeps its angle, the style."""
        angles = 2 * math.pi * torch.arange(len(self.gate), dtype=torch.float32, device=like.device) / len(self.gate)
        return torch.stack([angles.cos(), angles.sin()], dim=1).to(like)

    # ---- The classifier ----

    def style_logits(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> logits (B, M + 1) of the styles; the last is that of no style."""
        logits: Tensor = self.usage(self.colour_usage(pixels).to(self.usage.weight.dtype))
        return logits

    def recognise(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> probabilities (B, M) of the styles; they sum to less than 1."""
        return self.style_logits(pixels).softmax(dim=1)[:, :-1]

    def colour_usage(self, pixels: Tensor) -> Tensor:
        """Features (B, M K + 1) for the classifier: log use of each colour in the drawing, and the fraction near none."""
        x = pixels[:, :, 1::4, 1::4].flatten(2).transpose(1, 2)  # one pixel of sixteen is enough
        colours = self.colours.detach().flatten(0, 1)  # the classifier must not move the colours
        distance = torch.cdist(x.float(), colours.float()[None].expand(len(x), -1, -1))
        near = torch.exp(-(distance.amin(2, keepdim=True) / TOLERANCE).square() / 8)
        fraction = (-(distance / TOLERANCE).square() / 2).softmax(dim=2) * near
        drawn = (x.amin(2, keepdim=True) < WHITE).float()
        used = (fraction * drawn).sum(1) / drawn.sum(1).clamp_min(1)
        return torch.cat([(1 + 200 * used).log(), 1 - used.sum(1, keepdim=True)], dim=1)

    # ---- The colours ----

    def forward(self, pixels: Tensor, styles: Tensor) -> Tensor:
        """A decoder's output (B, 3, H, W), pulled towards the colours of the styles (B, M): (B, 3, H, W)."""
        index = styles.argmax(dim=1)
        planes = styles[:, :, None, None].expand(-1, -1, pixels.shape[2] // FOLD, pixels.shape[3] // FOLD)
        x = self.conv_in(torch.cat([F.pixel_unshuffle(pixels, FOLD), planes.to(pixels)], dim=1))
        x = F.pixel_shuffle(self.conv_out(F.silu(self.conv_mid(F.silu(x)))), FOLD)
        pixels, gates = pixels + x[:, :3].to(pixels), x[:, 3:]
        gates = torch.sigmoid(gates + self.gate[index][:, None, None, None]) * styles.amax(1)[:, None, None, None]
        with torch.autocast(pixels.device.type, enabled=False):  # a colour is exact to a level or two, which bf16 is not
            return torch.lerp(pixels, self._nearest_colours(pixels, index), gates.to(pixels))

    def _nearest_colours(self, pixels: Tensor, index: Tensor) -> Tensor:
        """Each pixel as the mean of its style's colours, weighted by nearness."""
        x, colours = pixels.float().flatten(2).transpose(1, 2), self.colours[index].float()  # (B, H W, 3), (B, K, 3)
        sharpness = torch.exp(-2 * self.spread[index].float())[:, None, None] / 2
        bias = self.prior[index][..., None] - sharpness * colours.square().sum(2, keepdim=True)  # (B, K, 1)
        # this is attention of the pixels to the colours, with the bias as a fourth coordinate; torch fuses its softmax
        query = F.pad(x, (0, 1), value=1.0)[:, None]
        key, value = torch.cat([2 * sharpness * colours, bias], dim=2)[:, None], F.pad(colours, (0, 1))[:, None]
        means = F.scaled_dot_product_attention(query, key, value, scale=1.0)[:, 0, :, :3]
        return means.transpose(1, 2).unflatten(2, pixels.shape[2:]).to(pixels)

    # ---- Before training ----

    @torch.no_grad()
    def init_colours(self, levels: Tensor, styles: Tensor) -> None:
        """Set the colours of each style to those that its pictures use most.

        Args:
            levels: (N, H, W, 3) pictures, uint8.
            styles: (N,) the style of each, 0..M-1.

        Raises:
            ValueError: a style has no picture.
        """
        for style in range(len(self.gate)):
            rgb = levels[styles == style].reshape(-1, 3).long()
            if not len(rgb):
                raise ValueError(f"style {style} has no pictures, so its colours are unknown; remove it from the palette.")
            keys, counts = (rgb[:, 0] << 16 | rgb[:, 1] << 8 | rgb[:, 2]).unique(return_counts=True)
            found = _commonest(dict(zip(keys.tolist(), counts.tolist(), strict=True)), self.colours.shape[1])
            colours = torch.tensor(found).float() / 127.5 - 1
            self.colours[style] = colours
            every = torch.stack([keys >> 16, keys >> 8 & 255, keys & 255], dim=1).float() / 127.5 - 1
            distance, nearest = torch.cdist(every, colours).min(1)
            weight = counts / counts.sum() * (distance < TOLERANCE)
            fractions = torch.zeros(len(colours)).index_add_(0, nearest, weight)
            self.prior[style] = (fractions + 1e-4).log() / 2
            self.gate[style] = 4 * (weight.sum() - 0.7)

    def fit_classifier(self, usage: Tensor, styles: Tensor, steps: int = 400) -> float:
        """Train the classifier alone.

        Args:
            usage: (N, M K + 1) from `colour_usage`.
            styles: (N,) the true styles, M for none.

        Returns:
            its accuracy on these.
        """
        optimizer = torch.optim.AdamW(self.usage.parameters(), lr=1e-2, weight_decay=1e-3)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(self.usage(usage), styles).backward()
            optimizer.step()
            decay.step()
        with torch.no_grad():
            return (self.usage(usage).argmax(1) == styles).float().mean().item()


def _patterns(like: Tensor) -> Tensor:
    """(2, H, W) of 1 and -1, orthogonal: the first changes sign with every cell, the second with every column."""
    rows, columns = (torch.arange(side, device=like.device) for side in like.shape[2:])
    stripes = 1 - 2 * (columns % 2)
    return torch.stack([(1 - 2 * (rows % 2))[:, None] * stripes, stripes.expand(len(rows), -1)]).to(like)


def _commonest(counts: dict[int, int], number: int, apart: int = 6) -> list[tuple[int, int, int]]:
    """The most frequent colours, at least `apart` levels from each other; white first, and repeated if there are too few.

    Args:
        counts: pixels of each colour, by the key 0xRRGGBB.
    """
    found: list[tuple[int, int, int]] = [(255, 255, 255)]
    for key, _ in Counter(counts).most_common(50 * number):
        colour = key >> 16, key >> 8 & 255, key & 255
        if len(found) < number and min(math.dist(colour, other) for other in found) >= apart:
            found.append(colour)
    return found + [found[0]] * (number - len(found))
