"""Scoring captions by the network's denoising error.

A caption that fits its image lowers the error of the noise prediction: averaged over all labels, the mean squared error of
eps(x_t, y, t, 0) bounds -log p(x | y), so ranking captions by it is the diffusion classifier of Li et al. (arXiv 2303.16203).
The error of UniDiffuser's marginal, eps(x_t, noise, t, 1000), is the zero of the scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .guidance import Net
from .path import CLEAN, MARGINAL
from .schedule import add_noise
from .streams import Streams, draw_noise

LOW, HIGH = 100.0, 900.0  # outside, the image is too clear or too noisy for a caption to matter


@torch.no_grad()
def caption_fit(
    net: Net,
    image: Streams,
    texts: Tensor,
    *,
    levels: int = 8,
    generator: torch.Generator,
    data_type: int = 1,
    callback: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Scores (N,) of N texts for one image: the reduction of its denoising error by conditioning on the text.

    All texts are evaluated with the same noise at the same labels, so that scores differ by the texts alone.

    Args:
        net: a UViT, or any function of its inputs.
        image: clean img (1, C, H, W) and clip_img (1, 1, D).
        texts: clean text latents (N, L, text_dim).
        levels: noise levels to average over, spread between labels 100 and 900; one forward of N + 1 items each.
        generator: for the noise.
        data_type: data-type token of v1 networks.
        callback: called after each level with (level from 0, levels); may raise to interrupt.

    Returns:
        Differences of mean squared errors, on the CPU; 0 means no effect, higher is better.

    Raises:
        ValueError: no texts, or no levels, or more than one image.
    """
    if levels < 1 or texts.shape[0] < 1 or image.batch != 1:
        raise ValueError(f"Scoring takes one image, texts and levels, not {image.batch}, {texts.shape[0]} and {levels}.")
    count, device = texts.shape[0], texts.device
    labels = torch.linspace(LOW, HIGH, levels) if levels > 1 else torch.tensor([(LOW + HIGH) / 2])
    t_text = torch.tensor([CLEAN] * count + [MARGINAL], device=device)
    kinds = torch.full((count + 1,), data_type, device=device)
    total = torch.zeros(count + 1, dtype=torch.float64)
    for k, label in enumerate(labels.tolist()):
        noise = {name: _draw(image.need(name), generator, device) for name in ("img", "clip_img")}
        img, clip_img = (add_noise(image.need(name).to(device), noise[name], label).expand(count + 1, *_one(noise[name]))
                         for name in ("img", "clip_img"))  # fmt: skip
        text = torch.cat([texts, _draw(texts[:1], generator, device)])
        t_img = torch.full((count + 1,), label, device=device)
        eps_img, eps_clip, _ = net(img, clip_img, text, t_img, t_text, kinds, heads=("img", "clip_img"))
        total += _squared_error((eps_img, eps_clip), (noise["img"], noise["clip_img"]))
        if callback is not None:
            callback(k, levels)
    error = total / levels
    return (error[-1] - error[:-1]).float()


def _one(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape[1:])


def _draw(like: Tensor, generator: torch.Generator, device: torch.device) -> Tensor:
    return draw_noise(_one(like), [generator], device)


def _squared_error(predicted: Sequence[Tensor | None], true: Sequence[Tensor]) -> Tensor:
    """Mean over all elements of both streams: (N,) float64 on the CPU."""
    difference = torch.cat([(p - t).flatten(1) for p, t in zip(predicted, true, strict=True) if p is not None], dim=1)
    return difference.double().square().mean(dim=1).cpu()
