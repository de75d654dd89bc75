"""The training objective of UniDiffuser (arXiv 2303.06555, equation 9), and an optional mix of timesteps.

    E || eps_theta(x_tx, y_ty, tx, ty) - [eps_x, eps_y] ||^2,   tx, ty independent and uniform on {1..1000}

eps_x covers the image latent and the CLIP image token. Plain regression: no loss weights, no dropout of conditions. `mix`,
`lean` and `logit_normal` change only how often each noise level is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..schedule import NUM_LABELS, add_noise, half_logsnr, sigma_of_label
from ..streams import MODALITY_OF, Streams, draw_normal

MIXES = ("independent", "clean_text", "clean_image", "equal", "no_text")
PAPER: Mapping[str, float] = {"independent": 1.0}
LABELS = torch.arange(1.0, NUM_LABELS + 1, dtype=torch.float32)  # all but 0, which is clean


def draw_labels(
    count: int,
    mix: Mapping[str, float],
    generator: torch.Generator,
    lean: float = 0.0,
    logit_normal: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """Draw noise levels: labels (B,) of each modality, "img" and "text", 0..1000, on the generator's device.

    Args:
        count: B.
        mix: fraction of the batch for each region of the (t_img, t_text) square, normalised to 1. "independent" is the paper's
            objective; the others are edges that sampling uses: "clean_text" (t_text = 0, text-to-image), "clean_image"
            (t_img = 0, captioning), "equal" (t_img = t_text, joint) and "no_text" (t_text = 1000, which guidance and pictures
            without a prompt need). They help a small model trained briefly; a large one does not need them.
        generator: source of the random numbers.
        lean: labels are drawn in proportion to (sigma / alpha)^lean; 0 is the paper's uniform. High noise decides what a
            picture shows, and there an error in the noise says least about the picture. At 1 the loss has the weights of Yu
            et al., "Debias the Training of Diffusion Models" (arXiv 2310.08442), as a frequency rather than a factor, which
            would let a few examples outweigh the rest of the batch.
        logit_normal: (mean, std) of log(sigma / alpha) for images, which is then normally distributed; `lean` then applies to
            texts only. In rectified flow's time this is the logit-normal density of Esser et al., "Scaling Rectified Flow
            Transformers" (arXiv 2403.03206, section 3.1): it favours medium noise, around label 600 for a mean of 0.8.

    Raises:
        ValueError: an unknown region; fractions that are negative or sum to 0; `lean` below 0; `logit_normal` that is not a
            mean and a positive std.
    """
    if unknown := set(mix) - set(MIXES):
        raise ValueError(f"mix has unknown regions {sorted(unknown)}; known are {', '.join(MIXES)}")
    fractions = tuple(float(mix.get(name, 0)) for name in MIXES)
    if min(fractions) < 0 or sum(fractions) <= 0:
        raise ValueError(f"the fractions of mix must be positive, got {dict(mix)}")
    if lean < 0:
        raise ValueError(f"lean must be 0 or more, got {lean}")
    if logit_normal is not None and (len(logit_normal) != 2 or logit_normal[1] <= 0):
        raise ValueError(f"logit_normal must be a mean and a std above 0, got {list(logit_normal)}")
    device = generator.device
    kind = torch.multinomial(_on(device, fractions), count, replacement=True, generator=generator)
    density = _lean_density(lean, device) if lean else None
    t_img = _noisy_labels(count, generator, density if logit_normal is None else _logit_normal_density(*logit_normal, device))
    t_text = _noisy_labels(count, generator, density)
    t_text = torch.where(kind == MIXES.index("equal"), t_img, t_text)
    t_text = t_text.masked_fill(kind == MIXES.index("clean_text"), 0)
    t_img = t_img.masked_fill(kind == MIXES.index("clean_image"), 0)
    t_text = t_text.masked_fill(kind == MIXES.index("no_text"), NUM_LABELS)
    return {"img": t_img, "text": t_text}


@cache  # like the two below: a stage may draw for one example at a time, and a GPU would wait for each copy
def _on(device: torch.device, numbers: tuple[float, ...]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device=device)


@cache
def _lean_density(lean: float, device: torch.device) -> Tensor:
    """Relative probability (1000,) of each label 1..1000, in proportion to (sigma / alpha)^lean."""
    return torch.exp(-lean * half_logsnr(LABELS)).to(device)


@cache
def _logit_normal_density(mean: float, std: float, device: torch.device) -> Tensor:
    """Relative probability (1000,) of each label 1..1000, when log(sigma / alpha) is normally distributed."""
    log_noise = -half_logsnr(LABELS)
    (width,) = torch.gradient(log_noise)  # the labels are not evenly spaced in it
    return (torch.exp(-0.5 * ((log_noise - mean) / std).square()) * width).to(device)


def _noisy_labels(count: int, generator: torch.Generator, density: Tensor | None) -> Tensor:
    """Labels (B,) in 1..1000, drawn in proportion to `density` (1000,); uniform if None."""
    if density is None:
        return torch.randint(1, NUM_LABELS + 1, (count,), generator=generator, device=generator.device)
    return 1 + torch.multinomial(density, count, replacement=True, generator=generator)


def row_errors(
    name: str, predicted: Tensor, noise: Tensor, labels: Mapping[str, Tensor], velocity: bool = False
) -> tuple[Tensor, Tensor]:
    """Squared error of a stream's predicted noise, summed over each item, and the number of elements summed; both (B,).

    Args:
        name: the stream, "img", "clip_img" or "text".
        predicted, noise: (B, ...) of this stream.
        labels: of each modality, (B,); a clean stream (label 0) has no noise to predict and counts no elements.
        velocity: as in `diffusion_loss`.
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
        net: a U-ViT.
        clean: latents of pairs: img (B, C, H, W), clip_img (B, 1, D), text (B, L, D).
        generator: source of all random numbers, on any device.
        labels: of each modality, "img" and "text" (B,), see `draw_labels`; None draws the paper's.
        noise: in the shapes of `clean`; None draws it.
        data_type: (B,) data types of a v1 network; None is 1, curated.
        velocity: use the error of the image's velocity, alpha eps - sigma x_0 (Salimans & Ho, arXiv 2202.00512), 1 / alpha^2
            times that of the noise. For networks that do not predict noise (`sigma_data`): at high noise, where they learn
            what a picture shows, an error in the noise is close to 0.
        weights: factor of a stream's elements ("img", "clip_img", "text"), 1 if absent. A caption has few elements, so beside
            large latents or the velocity's error it gets little of the gradient.

    Returns:
        "loss" and the error of each stream, scalars. A clean stream (label 0) has no noise to predict and does not count.
    """
    labels = draw_labels(clean.batch, PAPER, generator) if labels is None else labels
    labels = {modality: value.to(clean.need("img").device) for modality, value in labels.items()}
    noise = clean.map(lambda x: draw_normal(x.shape, generator).to(x)) if noise is None else noise
    noised = {name: add_noise(x, noise.need(name), labels[MODALITY_OF[name]].float()) for name, x in clean.items()}
    if data_type is None:
        data_type = torch.ones(clean.batch, dtype=torch.long, device=labels["img"].device)
    predicted = Streams(*net(noised["img"], noised["clip_img"], noised["text"], labels["img"], labels["text"], data_type))
    errors = {}
    total, elements = torch.zeros(2, dtype=torch.float32, device=labels["img"].device).unbind()
    for name, eps in noise.items():
        error, counts = row_errors(name, predicted.need(name), eps, labels, velocity)
        count = counts.sum()
        errors[name] = (error.sum() / count.clamp_min(1)).detach()
        total = total + (1.0 if weights is None else weights.get(name, 1.0)) * error.sum()
        elements = elements + count
    return {"loss": total / elements.clamp_min(1), **errors}
