"""FID and KID: distances of two sets of pictures from features (N, D) of one extractor.

Not torchmetrics': equal to 14 digits for more pictures than features, but for fewer its eigenvalues of A B give equal sets an
FID of -4e-5 instead of 0, float32 features get a float32 result, and its KID draws from torch's global generator.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def gaussian(features: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), in float64.

    Raises:
        ValueError: fewer than two pictures, another number of axes, or values that are not finite.
    """
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < 2:
        raise ValueError(f"a covariance needs features of two or more pictures as (N, D), got shape {rows.shape}")
    if not np.isfinite(rows).all():
        raise ValueError("the features hold NaN or infinite values; use float32 for the feature extractor")
    return rows.mean(axis=0), np.atleast_2d(np.cov(rows, rowvar=False))


def frechet_distance(
    mean_a: NDArray[np.float64], cov_a: NDArray[np.float64], mean_b: NDArray[np.float64], cov_b: NDArray[np.float64]
) -> float:
    """Squared Fréchet distance of two Gaussians (Dowson and Landau 1982), the formula of FID (Heusel et al. 2017).

    |a - b|^2 + tr(A + B - 2 (A B)^(1/2)). The trace of the root is the sum of the singular values of A^(1/2) B^(1/2), which,
    unlike the root of A B itself, stays real where a covariance is singular (fewer pictures than features).

    Args:
        mean_a, mean_b: (D,).
        cov_a, cov_b: (D, D).
    """
    root = np.linalg.svd(_root(cov_a) @ _root(cov_b), compute_uv=False).sum()
    distance = float(np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2.0 * root)
    return max(distance, 0.0)  # rounding can make it slightly negative for equal sets


def _root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T


def fid(real: Array, generated: Array) -> float:
    """FID (Heusel et al. 2017, arXiv 1706.08500) of features (N, D) and (M, D); 0 is best.

    Biased upwards, more so for fewer pictures: compare it at equal numbers of pictures only, and use KID for few.
    """
    _same_width(real, generated)
    return frechet_distance(*gaussian(real), *gaussian(generated))


def kid(real: Array, generated: Array, *, subsets: int = 100, size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """KID (Binkowski et al. 2018, arXiv 1801.01401): mean and standard deviation over random subsets; 0 is best.

    The unbiased squared maximum mean discrepancy with the kernel (x y / D + 1)^3. May be slightly negative.

    Args:
        real, generated: features (N, D) and (M, D).
        subsets: number of random subsets; one where they hold all pictures.
        size: pictures in a subset, drawn without replacement; at most those of the smaller set.
        seed: of the draws.

    Raises:
        ValueError: fewer than two pictures of either kind, or features of different widths.
    """
    _same_width(real, generated)
    size = min(size, len(real), len(generated))
    if size < 2:
        raise ValueError(f"KID needs two or more pictures of each kind, got {len(real)} and {len(generated)}")
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(subsets if size < max(len(real), len(generated)) else 1):
        x, y = (rows[rng.choice(len(rows), size, replace=False)].astype(np.float64) for rows in (real, generated))
        within = sum((k.sum() - np.trace(k)) / (size * (size - 1)) for k in (_kernel(x, x), _kernel(y, y)))
        draws.append(within - 2.0 * _kernel(x, y).mean())
    return float(np.mean(draws)), float(np.std(draws))


def _kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def _same_width(real: Array, generated: Array) -> None:
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(f"both sets need features (N, D) of one extractor, got shapes {real.shape} and {generated.shape}")
