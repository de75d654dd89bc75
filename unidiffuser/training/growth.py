"""A network that goes on at another resolution (256 -> 512 px in the paper's stage 2), or on another autoencoder's latents."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..uvit import UViT, UViTConfig


def grown(state: dict[str, Tensor], old: UViTConfig, img_size: int | tuple[int, int]) -> tuple[dict[str, Tensor], UViTConfig]:
    """The weights of a network for another latent size, and its sizes.

    The image part of ``pos_embed`` is resampled bilinearly, exactly as the network itself does it when it is sampled at
    another size; so growing changes nothing that the network says at the new size, but now the positions can learn.

    Args:
        state: all weights under the network's own names, in float32.
        old: its sizes.
        img_size: new latent side, or (H, W).
    """
    sizes = replace(old, img_size=img_size)
    if sizes.grid == old.grid:
        return state, sizes
    positions = _Positions(old, state["pos_embed"])
    with torch.no_grad():
        return {**state, "pos_embed": positions.position_embedding(sizes.grid).clone()}, sizes


class _Positions(UViT):
    """A network of which there is only the position embedding."""

    def __init__(self, config: UViTConfig, table: Tensor):
        super().__init__(config, device="meta")
        self._table = table

    def position_tables(self) -> tuple[Tensor, Tensor | None]:
        return self._table, None
