"""The training objective of UniDiffuser (arXiv 2303.06555, equation 9), and an optional mix of timesteps.

    E || eps_theta(x_tx, y_ty, tx, ty) - [eps_x, eps_y] ||^2,   tx, ty independent and uniform on {1..1000}

eps_x covers the image latent and the CLIP image token. Plain regression: no weighting, no dropout of conditions. What departs
from it, `mix`, `lean` and `logit_normal`, only says which labels are seen how often.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..schedule import NUM_LABELS, add_noise, half_logsnr, sigma_of_label
from ..streams import MODALITY_OF, Streams

MIXES = ("independent", "clean_text", "clean_image", "equal", "no_text")
PAPER: Mapping[str, float] = {"independent": 1.0}
LABELS = torch.arange(1.0, NUM_LABELS + 1)  # all that are noisy


def draw_labels(
    count: int,
    mix: Mapping[str, float],
    generator: torch.Generator,
    lean: float = 0.0,
    logit_normal: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """Labels (B,) of each modality, "img" and "text", on the generator's device.

    Args:
        mix: shares of a batch. "independent" is the paper's objective. The others spend part of the batch on the edges of
            the (t_img, t_text) square that sampling walks along: "clean_text" (t_text = 0), "clean_image" (t_img = 0) and
            "equal" (t_img = t_text), and "no_text" (t_text = 1000), where guidance and pictures without a prompt need it. They
            help a small model trained briefly; a large one needs none of them.
        lean: labels are seen in proportion to (sigma / alpha)^lean; 0 is the paper's uniform. What a picture shows is
            decided where there is much noise, and an error in the noise says least about the picture just there. At 1 the
            loss has the weights of Yu et al., "Debias the Training of Diffusion Models" (arXiv 2310.08442), by how often a
            label is seen rather than by a factor, which would let few examples of a batch outweigh the others.
        logit_normal: (mean, std) of log(sigma / alpha) of the labels of images, which are then normally distributed in it, and
            only those of texts lean. In rectified flow's time it is the logit-normal density of Esser et al., "Scaling
            Rectified Flow Transformers" (arXiv 2403.03206, section 3.1): most of the steps go to middling noise, here to about
            label 600 at a mean of 0.8, where what a picture shows is known and how it is drawn is not.

    Raises:
        ValueError: an unknown share, or shares that do not sum to a positive number; a `lean` below 0; a `logit_normal` that is
            not a mean and a positive std.
    """
    if unknown := set(mix) - set(MIXES):
        raise ValueError(f"unknown share {sorted(unknown)} in the mix; known are {', '.join(MIXES)}")
    shares = tuple(float(mix.get(name, 0)) for name in MIXES)
    if min(shares) < 0 or sum(shares) <= 0:
        raise ValueError(f"the shares of the mix must be positive, got {dict(mix)}")
    if lean < 0:
        raise ValueError(f"lean must be 0 or more, got {lean}")
    if logit_normal is not None and (len(logit_normal) != 2 or logit_normal[1] <= 0):
        raise ValueError(f"logit_normal must be a mean and a std above 0, got {list(logit_normal)}")
    device = generator.device
    kind = torch.multinomial(_on(device, shares), count, replacement=True, generator=generator)
    leaning = _leaning(lean, device) if lean else None
    t_img = _noisy_labels(count, generator, leaning if logit_normal is None else _logit_normal(*logit_normal, device))
    t_text = _noisy_labels(count, generator, leaning)
    t_text = torch.where(kind == MIXES.index("equal"), t_img, t_text)
    t_text = t_text.masked_fill(kind == MIXES.index("clean_text"), 0)
    t_img = t_img.masked_fill(kind == MIXES.index("clean_image"), 0)
    t_text = t_text.masked_fill(kind == MIXES.index("no_text"), NUM_LABELS)
    return {"img": t_img, "text": t_text}


@cache  # all three: a stage may draw for one example at a time, and a GPU would wait for each of them to come
def _on(device: torch.device, numbers: tuple[float, ...]) -> Tensor:
    return torch.tensor(numbers, device=device)


@cache
def _leaning(lean: float, device: torch.device) -> Tensor:
    """Relative probability (1000,) of each label 1..1000, in proportion to (sigma / alpha)^lean."""
    return torch.exp(-lean * half_logsnr(LABELS)).to(device)


@cache
def _logit_normal(mean: float, std: float, device: torch.device) -> Tensor:
    """Relative probability (1000,) of each label 1..1000, when log(sigma / alpha) is normally distributed."""
    log_noise = -half_logsnr(LABELS)
    (width,) = torch.gradient(log_noise)  # the labels are not evenly spaced in it
    return (torch.exp(-0.5 * ((log_noise - mean) / std).square()) * width).to(device)


def _noisy_labels(count: int, generator: torch.Generator, density: Tensor | None) -> Tensor:
    """Labels (B,) in 1..1000, each with a probability in proportion to ``density`` (1000,); uniform when None."""
    if density is None:
        return torch.randint(1, NUM_LABELS + 1, (count,), generator=generator, device=generator.device)
    return 1 + torch.multinomial(density, count, replacement=True, generator=generator)


def noise_of_another(clean: Streams, other: Streams, noise: Streams, labels: Mapping[str, Tensor]) -> Streams:
    """The noise with which the pairs ``clean`` look as the pairs ``other`` look with ``noise``.

    A network that is asked for it goes from another picture's noisy form to the picture that the caption asks for.

    Args:
        clean, other, noise: of the same shapes.
        labels: of each modality, (B,) in 0..1000; streams at label 0 hold no noise and give ``noise`` back.

    Returns:
        noise + (alpha / sigma) (other - clean), so that alpha clean + sigma result = alpha other + sigma noise.
    """

    def one(name: str, x: Tensor) -> Tensor:
        label = labels[MODALITY_OF[name]].float()
        ratio = torch.where(label > 0, half_logsnr(label.clamp_min(1)).exp(), 0.0).view(-1, *[1] * (x.ndim - 1))
        return noise.need(name) + ratio.to(x) * (other.need(name) - x)

    return Streams(**{name: one(name, x) for name, x in clean.items()})


def row_errors(
    name: str, predicted: Tensor, noise: Tensor, labels: Mapping[str, Tensor], velocity: bool = False
) -> tuple[Tensor, Tensor]:
    """Squared error of a stream's predicted noise, summed over each item's elements, and how many elements count; both (B,).

    Args:
        name: the stream, "img", "clip_img" or "text"; predicted, noise: (B, ...) of it.
        labels: of each modality, (B,); a stream that is given clean (label 0) has no noise to predict and does not count.
        velocity: as in :func:`diffusion_loss`.
    """
    label = labels[MODALITY_OF[name]]
    live = (label > 0).float()
    squared = (predicted.float() - noise.float()).square().flatten(1)
    error = squared.sum(1) * live
    if name == "img" and velocity:
        error = error * (1 + sigma_of_label(label.float()).square())
    return error, live * squared.shape[1]


def diffusion_loss(
    net: Callable[..., Any],
    clean: Streams,
    generator: torch.Generator,
    *,
    labels: Mapping[str, Tensor] | None = None,
    noise: Streams | None = None,
    data_type: Tensor | None = None,
    velocity: bool = False,
    weights: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """Mean squared error of the predicted noise over all elements that were noised.

    Args:
        net: a UViT.
        clean: latents of pairs, one batch: img (B, C, H, W), clip_img (B, 1, D), text (B, L, D).
        generator: the only source of randomness, on any device.
        labels: of each modality, "img" and "text" (B,), see :func:`draw_labels`; None draws them by the paper's objective.
        noise: in the shapes of ``clean``; None draws it.
        data_type: (B,) labels of a v1 network; 1 = curated.
        velocity: count the error of an image's velocity, alpha eps - sigma x_0 (Salimans & Ho, arXiv 2202.00512), instead of
            its noise's: 1 / alpha^2 times as much. For networks that predict something else than the noise (`sigma_data`): they
            learn pictures where there is much of it, at which an error in the noise is next to nothing.
        weights: how many times the elements of a stream ("img", "clip_img", "text") count; once when absent. Large latents, and
            the velocity's error, leave a caption of a few hundred elements next to nothing of the gradient.

    Returns:
        "loss" and the error of each stream, scalars. A stream that is given clean (label 0) has no noise to predict and
        does not count.
    """
    labels = draw_labels(clean.batch, PAPER, generator) if labels is None else labels
    labels = {modality: value.to(clean.need("img").device) for modality, value in labels.items()}
    noise = (
        clean.map(lambda x: torch.randn(x.shape, generator=generator, device=generator.device).to(x))
        if noise is None
        else noise
    )
    noised = {name: add_noise(x, noise.need(name), labels[MODALITY_OF[name]].float()) for name, x in clean.items()}
    if data_type is None:
        data_type = torch.ones(clean.batch, dtype=torch.long, device=labels["img"].device)
    predicted = Streams(*net(noised["img"], noised["clip_img"], noised["text"], labels["img"], labels["text"], data_type))
    errors = {}
    total, elements = torch.zeros(2, device=labels["img"].device).unbind()
    for name, eps in noise.items():
        error, counts = row_errors(name, predicted.need(name), eps, labels, velocity)
        count = counts.sum()
        errors[name] = (error.sum() / count.clamp_min(1)).detach()
        total = total + (1.0 if weights is None else weights.get(name, 1.0)) * error.sum()
        elements = elements + count
    return {"loss": total / elements.clamp_min(1), **errors}
