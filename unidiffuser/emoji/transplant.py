"""A network that goes on with the latents of another autoencoder."""

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
    was, wanted = (vars(PictureUViTConfig(**vars(config))) for config in (old, new.config))
    rows, columns = new.config.grid
    kept, _ = grown(state, old, (rows * old.patch_size, columns * old.patch_size))
    same = all(was[field] == wanted[field] for field in _PATCHES)
    anew = set() if same else {*IMAGE_LAYERS[:2]}
    if not same or any(was[field] != wanted[field] for field in _OUTPUT):
        anew |= {*IMAGE_LAYERS[2:], *(name for name in fresh if name.startswith(_DETAIL))}
        kept = {name: value for name, value in kept.items() if not name.startswith(_DETAIL)}
    elif any(was[field] == 0 < wanted[field] for field in _ADDED):
        anew |= {name for name in fresh if name.startswith(_DETAIL) and name not in kept}
    taken = {name: value if name in anew else kept.get(name, value) for name, value in fresh.items()}
    if wrong := [n for n, value in fresh.items() if taken[n].shape != value.shape or n not in {*kept, *anew}]:
        raise ValueError(f"only the image latents may differ between the two networks, but so does {wrong[0]}")
    if left := set(kept) - set(fresh):
        raise ValueError(f"the new network has no place for {min(left)}: give it the depth of the old one")
    return taken
