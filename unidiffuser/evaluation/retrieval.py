"""Image-text retrieval: R@k in both directions from a matrix of scores, and the network's own scores.

A CLIP model scores by cosine; the network by how much a caption lowers its denoising error (Li et al. 2023,
arXiv 2303.16203).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..guidance import Net
from ..scoring import caption_fit
from ..streams import Streams

Array = NDArray[np.floating]


def ranks(scores: Array, captions: Sequence[str]) -> NDArray[np.int64]:
    """For each row of (N, N) scores the rank of the best matching column, from 0: (N,).

    Column j matches row i if their captions are equal, since a caption cannot tell its pictures apart. Ties count against the
    model, so that constant scores retrieve nothing.
    """
    _, names = np.unique(np.asarray(captions, dtype=str), return_inverse=True)
    right = names[:, None] == names[None, :]
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    return ((scores >= best) & ~right).sum(axis=1)


def recall(scores: Array, captions: Sequence[str], ks: Sequence[int] = (1, 5, 10)) -> dict[str, list[bool]]:
    """Whether a match is among the first k: `{"image to text R@1": [...], ...}`, one bool a picture or caption.

    Args:
        scores: (N, N), row i the picture and column j the caption; higher is better.
        captions: N; equal captions match each other.
        ks: values of k; those of N and above are left out.
    """
    if scores.shape != (len(captions), len(captions)):
        raise ValueError(f"{len(captions)} captions need scores of as many rows and columns, got {scores.shape}")
    found: dict[str, list[bool]] = {}
    for name, matrix in (("image to text", scores), ("text to image", scores.T)):
        place = ranks(matrix, captions)
        found |= {f"{name} R@{k}": (place < k).tolist() for k in ks if k < len(captions)}
    return found


def network_scores(net: Net, images: Streams, texts: Tensor, levels: int, seed: int, batch: int = 64) -> NDArray[np.float32]:
    """Scores (N, M) of M text latents for N pictures by the network's own denoising error.

    Args:
        net: the network.
        images: clean streams of N pictures.
        texts: (M, L, text_dim).
        levels: noise levels a pair is scored at; N * (M + 1) * levels network evaluations in all.
        seed: of the noise, the same for every picture and caption, so that only the pair makes a difference.
        batch: captions in one forward.
    """
    rows = []
    for k in range(images.batch):
        one = images.map(lambda stream, k=k: stream[k : k + 1])  # type: ignore[misc]
        parts = [
            caption_fit(net, one, part, levels=levels, generator=torch.Generator().manual_seed(seed))
            for part in texts.split(batch)
        ]
        rows.append(torch.cat(parts).numpy())
    return np.stack(rows).astype(np.float32)
