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


IMAGE_LAYERS = ("patch_embed.proj.weight", "patch_embed.proj.bias", "decoder_pred.weight", "decoder_pred.bias")
_READ, _WRITTEN = IMAGE_LAYERS[:2], IMAGE_LAYERS[2:]
_DETAIL = "detail."
_PATCHES = ("in_chans", "patch_size")
_OUTPUT = ("sigma_data", "detail_width", "detail_blocks", "detail_features")
_ADDED = ("detail_inner", "detail_told")


def transplanted(state: dict[str, Tensor], old: UViTConfig, new: UViT) -> dict[str, Tensor]:
    """The weights of a network for image latents of another kind: other channels, patches or sides.

    What reads image patches and what writes them begins anew, as in ``new``, where patches are others than before; so does what
    writes them where something else is asked for (`sigma_data`, a detail head). The positions are resampled, all else is kept.
    A detail head that only gets an inner level, or is told of a token, goes on as it was: what is new adds nothing at first.

    Args:
        state: all weights under the network's own names, in float32.
        old: its sizes.
        new: a fresh network of the sizes that are wanted.

    Raises:
        ValueError: the two differ in more than the image latents.
    """
    fresh = new.state_dict()
    rows, columns = new.config.grid
    kept, _ = grown(state, old, (rows * old.patch_size, columns * old.patch_size))
    same = all(getattr(old, field) == getattr(new.config, field) for field in _PATCHES)
    anew = set() if same else {*_READ}
    if not same or any(getattr(old, field) != getattr(new.config, field) for field in _OUTPUT):
        anew |= {*_WRITTEN, *(name for name in fresh if name.startswith(_DETAIL))}
        kept = {name: value for name, value in kept.items() if not name.startswith(_DETAIL)}
    elif any(getattr(old, field) == 0 < getattr(new.config, field) for field in _ADDED):
        anew |= {name for name in fresh if name.startswith(_DETAIL) and name not in kept}
    taken = {name: value if name in anew else kept.get(name, value) for name, value in fresh.items()}
    if wrong := [n for n, value in fresh.items() if taken[n].shape != value.shape or n not in {*kept, *anew}]:
        raise ValueError(f"only the image latents may differ between the two networks, but so does {wrong[0]}")
    if left := set(kept) - set(fresh):
        raise ValueError(f"the new network has no place for {min(left)}: give it the depth of the old one")
    return taken


class _Positions(UViT):
    """A network of which there is only the position embedding."""

    def __init__(self, config: UViTConfig, table: Tensor):
        super().__init__(config, device="meta")
        self._table = table

    def position_tables(self) -> tuple[Tensor, Tensor | None]:
        return self._table, None
