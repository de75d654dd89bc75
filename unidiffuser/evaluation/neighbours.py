"""Distances of pictures to each other and to the training set, between features of unit length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def unit(features: Array) -> NDArray[np.float64]:
    """Features (N, D) scaled to length 1, so that distances run from 0 (equal) to 2 (opposite) for every extractor."""
    rows = np.asarray(features, dtype=np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def nearest_distances(
    queries: Array, references: Array, own: Sequence[int] | None = None, chunk: int = 1024
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Distance to, and index of, the nearest reference of each query: (Q, D), (R, D) -> (Q,), (Q,).

    Args:
        queries, references: features.
        own: for each query the index of the same picture among the references, which is skipped, or -1.
        chunk: queries in one matrix product; bounds memory.
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
    """Mean distance of all pairs of different pictures, a measure of diversity: (N, D) -> number.

    Args:
        features: of N pictures.
        chunk: pictures in one matrix product; bounds memory.

    Raises:
        ValueError: fewer than two pictures.
    """
    rows = unit(features)
    if len(rows) < 2:
        raise ValueError("the distance among pictures needs two or more")
    total = 0.0
    for first in range(0, len(rows), chunk):
        part = rows[first : first + chunk]
        squared = np.maximum(2.0 - 2.0 * (part @ rows.T), 0.0)
        squared[np.arange(len(part)), first + np.arange(len(part))] = 0.0  # exactly 0 in spite of rounding
        total += float(np.sqrt(squared).sum())
    return total / (len(rows) * (len(rows) - 1))
