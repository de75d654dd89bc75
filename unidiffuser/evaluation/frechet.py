"""How far two sets of pictures are apart, from features of theirs: FID and KID.

Both take features as (N, D) arrays of any extractor (see :mod:`unidiffuser.evaluation.features`); the numbers of different
extractors cannot be compared.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def gaussian(features: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), in float64.

    Raises:
        ValueError: fewer than two rows, another number of axes, or numbers that are not finite.
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
    """
    root = np.linalg.svd(_root(cov_a) @ _root(cov_b), compute_uv=False).sum()
    distance = float(np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2.0 * root)
    return max(distance, 0.0)  # rounding can bring equal sets a little below


def _root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T


def fid(real: Array, made: Array) -> float:
    """FID (Heusel et al. 2017, arXiv 1706.08500) of features (N, D) and (M, D); 0 is best.

    It is biased upwards, the more so the fewer pictures: compare only numbers of equally many, and see KID for few.
    """
    _same_width(real, made)
    return frechet_distance(*gaussian(real), *gaussian(made))


def kid(real: Array, made: Array, *, subsets: int = 100, size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """KID (Binkowski et al. 2018, arXiv 1801.01401): mean and standard deviation over random subsets; 0 is best.

    The unbiased squared maximum mean discrepancy with the kernel (x y / D + 1)^3. May be negative by chance.

    Args:
        real, made: features (N, D) and (M, D).
        subsets, size: as many draws of as many pictures, without replacement; the size is at most that of the smaller set.
        seed: of the draws.
    """
    _same_width(real, made)
    size = min(size, len(real), len(made))
    if size < 2:
        raise ValueError(f"KID needs two or more pictures of each kind, got {len(real)} and {len(made)}")
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(subsets if size < max(len(real), len(made)) else 1):
        x, y = (rows[rng.choice(len(rows), size, replace=False)].astype(np.float64) for rows in (real, made))
        within = sum((k.sum() - np.trace(k)) / (size * (size - 1)) for k in (_kernel(x, x), _kernel(y, y)))
        draws.append(within - 2.0 * _kernel(x, y).mean())
    return float(np.mean(draws)), float(np.std(draws))


def _kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def _same_width(real: Array, made: Array) -> None:
    if real.ndim != 2 or made.ndim != 2 or real.shape[1] != made.shape[1]:
        raise ValueError(f"both sets need features (N, D) of one extractor, got shapes {real.shape} and {made.shape}")
