"""A network adapted to the latents of another autoencoder."""

from __future__ import annotations

from torch import Tensor

from ..small.network import PictureUViTConfig
from ..training.growth import grown
from ..uvit import UViT, UViTConfig

IMAGE_LAYERS = ("patch_embed.proj.weight", "patch_embed.proj.bias", "decoder_pred.weight", "decoder_pred.bias")
_DETAIL = "detail."
_PATCHES = ("in_chans", "patch_size")
_OUTPUT = ("sigma_data", "detail_width", "detail_blocks", "detail_features")
_ADDED = ("detail_inner", "detail_told")


def transplanted(state: dict[str, Tensor], old: UViTConfig, new: UViT) -> dict[str, Tensor]:
    """The weights of a network, adapted to other image latents: other channels, patches, sides or another image head.

    Layers that read and write image patches start anew, as in `new`, if the patches differ; those that write them also if the
    output does (`sigma_data`, a detail head). Positions are resampled, all else is kept. A detail head that only gains an inner
    level or conditioning keeps its weights: the new layers add nothing at first.

    Args:
        state: all weights under the network's own names, in float32.
        old: its config.
        new: a fresh network of the wanted config.

    Raises:
        ValueError: the two differ in more than image latents and image head.
    """
    fresh = new.state_dict()
    before, after = (vars(PictureUViTConfig(**vars(config))) for config in (old, new.config))
    rows, columns = new.config.grid
    kept, _ = grown(state, old, (rows * old.patch_size, columns * old.patch_size))
    same = all(before[field] == after[field] for field in _PATCHES)
    anew = set() if same else {*IMAGE_LAYERS[:2]}
    if not same or any(before[field] != after[field] for field in _OUTPUT):
        anew |= {*IMAGE_LAYERS[2:], *(name for name in fresh if name.startswith(_DETAIL))}
        kept = {name: value for name, value in kept.items() if not name.startswith(_DETAIL)}
    elif any(before[field] == 0 < after[field] for field in _ADDED):
        anew |= {name for name in fresh if name.startswith(_DETAIL) and name not in kept}
    taken = {name: value if name in anew else kept.get(name, value) for name, value in fresh.items()}
    if wrong := [n for n, value in fresh.items() if taken[n].shape != value.shape or n not in {*kept, *anew}]:
        raise ValueError(f"only the image latents may differ between the two networks, but so does {wrong[0]}")
    if left := set(kept) - set(fresh):
        raise ValueError(f"the new network has no place for {min(left)}: give it the depth and the image head of the old one")
    return taken
