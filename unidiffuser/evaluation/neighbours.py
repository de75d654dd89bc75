"""How different made pictures are from each other and from the training set, in the space of an extractor's features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def unit(features: Array) -> NDArray[np.float64]:
    """Rows of length 1, so that distances run from 0 (equal) to 2 (opposite) whatever the extractor's scale."""
    rows = np.asarray(features, dtype=np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def nearest_distances(
    queries: Array, references: Array, own: Sequence[int] | None = None, chunk: int = 1024
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Distance to, and index of, the nearest reference of each query: (Q, D), (R, D) -> (Q,), (Q,).

    Args:
        own: for each query the reference that is the query itself and does not count, or -1.
        chunk: queries at once; bounds memory.
    """
    a, b = unit(queries), unit(references)
    distances, indices = [], []
    for first in range(0, len(a), chunk):
        similar = a[first : first + chunk] @ b.T
        if own is not None:
            for row, index in enumerate(own[first : first + chunk]):
                if index >= 0:
                    similar[row, index] = -np.inf
        best = similar.argmax(axis=1)
        indices.append(best)
        distances.append(np.sqrt(np.maximum(2.0 - 2.0 * similar[np.arange(len(best)), best], 0.0)))
    return np.concatenate(distances), np.concatenate(indices)


def mean_distance(features: Array, chunk: int = 1024) -> float:
    """Mean distance of all pairs of different rows: (N, D) -> number; how diverse the pictures are.

    Args:
        chunk: rows at once; bounds memory.

    Raises:
        ValueError: fewer than two pictures.
    """
    rows = unit(features)
    if len(rows) < 2:
        raise ValueError("the distance of pictures from each other needs two or more")
    total = 0.0
    for first in range(0, len(rows), chunk):
        part = rows[first : first + chunk]
        squared = np.maximum(2.0 - 2.0 * (part @ rows.T), 0.0)
        squared[np.arange(len(part)), first + np.arange(len(part))] = 0.0  # rounding: no picture differs from itself
        total += float(np.sqrt(squared).sum())
    return total / (len(rows) * (len(rows) - 1))
