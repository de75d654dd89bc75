"""Scoring captions by the network's denoising error.

A caption that fits its image lowers the error of the noise prediction: averaged over all labels, the mean squared error of
eps(x_t, y, t, 0) bounds -log p(x | y), so ranking captions by it is the diffusion classifier of Li et al. (arXiv 2303.16203).
The error of UniDiffuser's marginal, eps(x_t, noise, t, 1000), is the zero of the scale.

Weighted by the schedule the same errors are a log-likelihood (Kong et al., arXiv 2302.03792, equation 9): with the log
signal-to-noise ratio l and the squared error of all elements,

    log p(x | a) - log p(x | b) = 1/2 integral (error(b) - error(a)) dl
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .guidance import Net
from .path import CLEAN, MARGINAL
from .samplers import adapted
from .schedule import add_noise, half_logsnr
from .streams import Streams, draw_noise

LOW, HIGH = 100.0, 900.0  # outside, the image is too clear or too noisy for a caption to matter


@dataclass(frozen=True)
class CaptionScore:
    """How well a caption fits a picture.

    Attributes:
        caption: the caption.
        rank: 1 for the best of the captions.
        fit: reduction of the denoising error by conditioning on it; 0 means no effect, higher is better.
        log_odds_empty: log p(picture | caption) - log p(picture | empty caption), in nats. Above 0 the caption says something
            true of the picture; each 2.3 are a factor of 10.
        log_odds_shuffled: the same against other captions, as if pictures and captions had been shuffled: the logarithm of
            p(picture | caption) over the mean of theirs. Above 0 it fits better than a caption drawn at random.
    """

    caption: str
    rank: int
    fit: float
    log_odds_empty: float
    log_odds_shuffled: float


@dataclass(frozen=True)
class Errors:
    """Denoising errors of one image under N texts and without one.

    Attributes:
        labels: (K,) the noise levels, rising.
        mean_squared: (K, N + 1) float64, mean over the elements of the image's streams; the last column is the marginal's.
        elements: number of these elements.
    """

    labels: Tensor
    mean_squared: Tensor
    elements: int

    def fit(self) -> Tensor:
        """(N,) reduction of the mean error by each text, the score of `caption_fit`."""
        error = sum(self.mean_squared) / len(self.labels)
        return (error[-1] - error[:-1]).float()  # type: ignore[index]  # a tensor

    def log_likelihood(self) -> Tensor:
        """(N,) log p(image | text) in nats, up to a constant of the image and the noise levels that are left out."""
        logsnr = 2 * half_logsnr(self.labels.double())
        if len(logsnr) == 1:
            low, high = (half_logsnr(torch.tensor(label, dtype=torch.float32)) for label in (LOW, HIGH))
            widths = 2 * (low - high)[None].double()
        else:  # the trapezoid rule
            steps = -logsnr.diff()
            widths = (torch.cat([steps, steps[-1:] * 0]) + torch.cat([steps[:1] * 0, steps])) / 2
        return -0.5 * self.elements * (widths[:, None] * self.mean_squared[:, :-1]).sum(0)


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

    Arguments and errors are those of `denoising_errors`.

    Returns:
        Differences of mean squared errors, on the CPU; 0 means no effect, higher is better.
    """
    return denoising_errors(net, image, texts, levels=levels, generator=generator, data_type=data_type, callback=callback).fit()


@torch.no_grad()
def denoising_errors(
    net: Net,
    image: Streams,
    texts: Tensor,
    *,
    levels: int = 8,
    generator: torch.Generator,
    data_type: int = 1,
    batch_size: int | None = None,
    callback: Callable[[int, int], None] | None = None,
) -> Errors:
    """Denoising errors of one image under N texts and without one.

    All texts are evaluated with the same noise at the same labels, so that errors differ by the texts alone.

    Args:
        net: a UViT, or any function of its inputs, in any number format.
        image: clean img (1, C, H, W) and clip_img (1, 1, D).
        texts: clean text latents (N, L, text_dim).
        levels: noise levels, spread between labels 100 and 900; N + 1 evaluations each.
        generator: for the noise.
        data_type: data-type token of v1 networks.
        batch_size: most evaluations in one forward; None for all of a level.
        callback: called after each level with (level from 0, levels); may raise to interrupt.

    Raises:
        ValueError: no texts, or no levels, or more than one image.
    """
    if levels < 1 or texts.shape[0] < 1 or image.batch != 1:
        raise ValueError(f"Scoring takes one image, texts and levels, not {image.batch}, {texts.shape[0]} and {levels}.")
    run, device = adapted(net, Streams(text=texts))
    texts = texts.to(device, torch.float32)
    image = image.to(device, torch.float32)
    count = texts.shape[0]
    labels = (
        torch.linspace(LOW, HIGH, levels, dtype=torch.float32)
        if levels > 1
        else torch.tensor([(LOW + HIGH) / 2], dtype=torch.float32)
    )
    t_text = torch.tensor([CLEAN] * count + [MARGINAL], dtype=torch.float32, device=device)
    rows: list[Tensor] = []
    for k, label in enumerate(labels.tolist()):
        noise = {name: _draw(image.need(name), generator, device) for name in ("img", "clip_img")}
        noised = {name: add_noise(image.need(name), eps, label) for name, eps in noise.items()}
        text = torch.cat([texts, _draw(texts[:1], generator, device)])
        errors = []
        for part, t in zip(text.split(batch_size or count + 1), t_text.split(batch_size or count + 1), strict=True):
            img, clip_img = (noised[name].expand(len(part), *noise[name].shape[1:]) for name in ("img", "clip_img"))
            t_img = torch.full((len(part),), label, dtype=torch.float32, device=device)
            kinds = torch.full((len(part),), data_type, device=device)
            eps_img, eps_clip, _ = run(img, clip_img, part, t_img, t, kinds, heads=("img", "clip_img"))
            errors.append(_squared_error((eps_img, eps_clip), (noise["img"], noise["clip_img"])))
        rows.append(torch.cat(errors))
        if callback is not None:
            callback(k, levels)
    elements = sum(eps[0].numel() for eps in noise.values())
    return Errors(labels, torch.stack(rows), elements)


def caption_scores(captions: Sequence[str], errors: Errors, given: int) -> list[CaptionScore]:
    """Scores of captions, best first.

    Args:
        captions: the N captions.
        errors: under the N captions, then the empty one, then those to compare with, at least one.
        given: N.
    """
    fit, likelihood = errors.fit(), errors.log_likelihood()
    empty, shuffled = likelihood[given], likelihood[given + 1 :]
    mean = shuffled.logsumexp(0) - torch.tensor(float(len(shuffled)), dtype=torch.float64).log()
    order = likelihood[:given].argsort(descending=True, stable=True).tolist()
    return [
        CaptionScore(captions[k], rank, float(fit[k]), float(likelihood[k] - empty), float(likelihood[k] - mean))
        for rank, k in enumerate(order, start=1)
    ]


def _draw(like: Tensor, generator: torch.Generator, device: torch.device) -> Tensor:
    return draw_noise(like.shape[1:], [generator], device)


def _squared_error(predicted: Sequence[Tensor | None], true: Sequence[Tensor]) -> Tensor:
    """Mean over all elements of both streams: (N,) float64 on the CPU."""
    difference = torch.cat([(p - t).flatten(1) for p, t in zip(predicted, true, strict=True) if p is not None], dim=1)
    return difference.double().square().mean(dim=1).cpu()
