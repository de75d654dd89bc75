"""Resizing a network to another resolution, such as 256 -> 512 px in the paper's stage 2."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..uvit import UViT, UViTConfig


def grown(state: dict[str, Tensor], old: UViTConfig, img_size: int | tuple[int, int]) -> tuple[dict[str, Tensor], UViTConfig]:
    """Weights and config of a network resized to another latent size.

    The image part of `pos_embed` is resampled bilinearly, exactly as the network does when it is sampled at another size: the
    outputs stay equal, and the positions of the new size can be trained.

    Args:
        state: all weights under the network's own names, in float32.
        old: its config.
        img_size: new latent side, or (H, W).
    """
    sizes = replace(old, img_size=img_size)
    if sizes.grid == old.grid:
        return state, sizes
    positions = _Positions(old, state["pos_embed"])
    with torch.no_grad():
        return {**state, "pos_embed": positions.position_embedding(sizes.grid).clone()}, sizes


class _Positions(UViT):
    """A network without weights, except for its position embedding."""

    def __init__(self, config: UViTConfig, table: Tensor):
        super().__init__(config, device="meta")
        self._table = table

    def position_tables(self) -> tuple[Tensor, Tensor | None]:
        return self._table, None
