"""The noise schedule: labels and their signal and noise levels.

x_t = alpha(t) x_0 + sigma(t) eps, alpha^2 + sigma^2 = 1, with Stable Diffusion's "scaled linear" betas. Labels run from
0 (clean) to 1000 (pure noise); label n belongs to alphas_cumprod[n - 1], timestep n - 1 of libraries that count 0..999.
Between two labels log alpha is interpolated linearly, as in the discrete schedule of DPM-Solver (arXiv 2206.00927);
label 0 is exactly alpha = 1, so the same rule holds between 0 and 1.

Tensor functions compute in float64 for float64 inputs and in float32 otherwise, on the device of their input.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_LABELS = 1000
BETA_START, BETA_END = 0.00085, 0.0120


def betas() -> Tensor:
    """(1000,) float64: linspace(sqrt(0.00085), sqrt(0.0120), 1000)^2."""
    return torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_LABELS, dtype=torch.float64) ** 2


def alphas_cumprod() -> Tensor:
    """(1000,) float64: alpha^2 of the labels 1..1000."""
    return torch.cumprod(1 - betas(), dim=0)


@lru_cache(maxsize=8)
def _log_alpha_table(device: torch.device, dtype: torch.dtype) -> Tensor:
    """(1001,) log alpha of the labels 0..1000."""
    with torch.inference_mode(False):  # kept for later calls, which may need a gradient
        table = F.pad(0.5 * torch.log1p(-betas()).cumsum(0), (1, 0))
        return table.to(dtype).to(device)


@lru_cache(maxsize=8)
def _neg_log_alpha_table(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """-log alpha of the labels 0..1000, which is ascending, and its (1000,) differences."""
    with torch.inference_mode(False):
        falls = -_log_alpha_table(device, dtype)
        return falls, falls.diff()


def _floating(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def log_alpha(labels: Tensor) -> Tensor:
    """log alpha of labels in [0, 1000], any shape; fractions interpolate linearly."""
    labels = _floating(labels)
    table = _log_alpha_table(labels.device, labels.dtype)
    low = labels.floor().clamp(0, NUM_LABELS - 1).long()
    return torch.lerp(table[low], table[low + 1], labels - low)


def alpha_sigma(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Signal and noise level (alpha, sigma) of labels in [0, 1000], any shape."""
    la = log_alpha(labels)
    return la.exp(), (-torch.expm1(2 * la)).sqrt()  # expm1: near label 0 the difference 1 - alpha^2 would cancel


def half_logsnr(labels: Tensor) -> Tensor:
    """lambda = log(alpha / sigma) of labels in [0, 1000]; +inf at label 0. The time axis of DPM-Solver."""
    la = log_alpha(labels)
    return la - 0.5 * torch.log(-torch.expm1(2 * la))


def label_of_half_logsnr(lam: Tensor) -> Tensor:
    """Inverse of `half_logsnr`: labels, clamped to [0, 1000]."""
    return _label_of_log_alpha(-0.5 * F.softplus(-2 * _floating(lam), threshold=50.0))


def _label_of_log_alpha(log_alpha: Tensor) -> Tensor:
    """Inverse of `log_alpha`, clamped to [0, 1000]."""
    falls, widths = _neg_log_alpha_table(log_alpha.device, log_alpha.dtype)
    fall = -log_alpha
    low = (torch.searchsorted(falls, fall.contiguous()) - 1).clamp_(0, NUM_LABELS - 1)
    return ((fall - falls[low]) / widths[low] + low).clamp_(0, NUM_LABELS)


def sigma_of_label(labels: Tensor) -> Tensor:
    """sigma / alpha, the noise level of k-diffusion (arXiv 2206.00364): 0 at label 0, about 14.6 at label 1000."""
    return torch.expm1(-2 * log_alpha(labels)).sqrt()


def label_of_sigma(sigma: Tensor) -> Tensor:
    """Inverse of `sigma_of_label`, clamped to [0, 1000]."""
    return _label_of_log_alpha(-0.5 * torch.log1p(_floating(sigma).square()))  # alpha^2 = 1 / (1 + sigma^2)


def add_noise(x0: Tensor, noise: Tensor, labels: Tensor | float) -> Tensor:
    """x_t = alpha x0 + sigma noise.

    Args:
        x0, noise: (B, ...) of one shape.
        labels: (B,) or one number, 0..1000.
    """
    alpha, sigma = alpha_sigma(torch.as_tensor(labels, device=x0.device))
    shape = (-1,) + (1,) * (x0.ndim - 1) if alpha.ndim else ()
    return alpha.to(x0.dtype).reshape(shape) * x0 + sigma.to(x0.dtype).reshape(shape) * noise
