"""From the inputs of a node to the streams that the library's sampler starts from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.utils
import torch
from torch import Tensor

from ..unidiffuser.path import CLEAN, MARGINAL, NoisePath
from ..unidiffuser.streams import MODALITIES, Streams, noised
from .host_model import UniDiffuserModel
from .packing import check_image_latent, clip_vision_token

WORDS = {"img": "picture", "text": "text"}
INPUT_OF = {"img": "latent_image", "clip_img": "clip_vision_output", "text": "text"}  # of the UniDiffuser Sampler
TOKEN_MASK = "unidiffuser_token_mask"  # in a CONDITIONING: (1, L, 1), 1 = rewrite this token
LEVEL = "unidiffuser_level"  # in what a path left noisy: its label; a path that begins there takes it as it is
SCALE = "downscale_ratio_spacial"  # the host's own: in an empty LATENT, the pixels that it means by one of its own
KEPT = "unidiffuser_kept"  # in what a path left noisy: what it was before, for the part that a mask keeps


def require_model(patcher: Any) -> UniDiffuserModel:
    """The network's host model behind a MODEL.

    Raises:
        ValueError: it is another architecture.
    """
    model = patcher.model
    if not isinstance(model, UniDiffuserModel):
        raise ValueError(
            f"The MODEL is a {type(model).__name__}, not a UniDiffuser. Connect the MODEL output of 'Load "
            f"UniDiffuser' (LoRA and model patches may lie in between)."
        )
    return model


def given_streams(
    patcher: comfy.model_patcher.ModelPatcher,
    latent: dict[str, Any] | None,
    clip_vision_output: Any,
    text: Sequence[Any] | None,
) -> tuple[Streams, Streams]:
    """Streams and masks (1 = generate) of the inputs of a node, in the model's units, all of one batch.

    Each stream is clean, or as noisy as `given_levels` says; what its mask keeps is always clean.

    Raises:
        ValueError: an input does not fit the model; the text names it.
    """
    model = require_model(patcher)
    net = model.diffusion_model.config
    samples = None if latent is None else _sized(patcher, latent)
    if samples is not None:
        check_image_latent(samples, net, model.latent_format.spacial_downscale_ratio)
    cond = None if text is None else text_latent(patcher, text)
    embeds = None if clip_vision_output is None else clip_vision_output["image_embeds"]
    batch = max((len(given) for given in (samples, cond, embeds) if given is not None), default=1)

    repeat = comfy.utils.repeat_to_batch_size
    mask = None if latent is None else latent.get("noise_mask")
    if mask is not None:
        mask = repeat(comfy.utils.reshape_mask(mask, samples.shape)[:, :1].round(), batch)
    masks = Streams(img=mask, text=None if text is None else text[0][1].get(TOKEN_MASK))
    if samples is not None:
        samples = _keep_clean(repeat(samples.float(), batch), masks.img, latent or {}, "latent_image")
    if cond is not None and text is not None:
        cond = _keep_clean(repeat(cond, batch), masks.text, text[0][1], "text")
    streams = Streams(
        img=None if samples is None else model.process_latent_in(samples),
        clip_img=None if embeds is None else clip_vision_token(clip_vision_output, batch, net.clip_img_dim),
        text=cond,
    )
    return streams, masks


def _sized(patcher: comfy.model_patcher.ModelPatcher, latent: Mapping[str, Any]) -> Tensor:
    """The samples of a LATENT; an empty one, of a node that counts on 8 pixels, becomes what this model has for as many."""
    samples: Tensor = latent["samples"]
    if samples.ndim == 4 and latent.get(SCALE) is not None:
        samples = comfy.sample.fix_empty_latent_channels(patcher, samples, latent[SCALE])
    return samples


def _keep_clean(values: Tensor, mask: Tensor | None, told: Mapping[str, Any], name: str) -> Tensor:
    """`values`, clean in what the mask keeps, where a path has left them noisy; `told` stands beside them in the input."""
    if mask is None or LEVEL not in told or bool(mask.all()):
        return values
    if KEPT not in told:
        raise ValueError(
            f"The mask of '{name}' keeps a part of it, but it is at noise level {told[LEVEL]:g} already. Set the mask before "
            f"the node that left it noisy."
        )
    return torch.where(mask > 0, values, comfy.utils.repeat_to_batch_size(told[KEPT], len(values)).to(values))


def given_levels(latent: dict[str, Any] | None, clip_vision_output: Any, text: Sequence[Any] | None) -> dict[str, float]:
    """Labels of those inputs that an earlier path, or an inversion, has left noisy."""
    tags = {
        "img": (latent or {}).get(LEVEL),
        "clip_img": getattr(clip_vision_output, LEVEL, None),
        "text": None if text is None else text[0][1].get(LEVEL),
    }
    return {name: level for name, level in tags.items() if level is not None}


def text_latent(patcher: comfy.model_patcher.ModelPatcher, conditioning: Sequence[Any]) -> Tensor:
    """The text latent (B, L, text_dim) of a CONDITIONING, on the CPU; loads the model, which holds the compressing Linear."""
    model = require_model(patcher)
    comfy.model_management.load_models_gpu([patcher])
    return model.text_latent(conditioning[0][0], patcher.load_device).cpu()


def start_streams(
    path: NoisePath,
    given: Streams,
    mask: Streams,
    generators: Sequence[torch.Generator],
    shapes: Mapping[str, tuple[int, ...]],
    levels: Mapping[str, float],
) -> Streams:
    """What the library's sampler starts from: each stream at the noise level of the path's first point.

    What a mask keeps stays clean, at whatever level the rest begins: the sampler noises that part itself.

    Args:
        given: what the artist gave; a stream that starts as pure noise needs none.
        mask: 1 = generate, 0 = keep, for the streams of which a part is kept.
        generators: one per item.
        shapes: of one item of each stream that is not given.
        levels: labels of the streams in `given` that are noisy already; they are taken as they are.

    Raises:
        ValueError: the path needs a stream that was not given, or begins one at another level than it has.
    """
    start: dict[str, Tensor | None] = {}
    for modality, names in MODALITIES.items():
        first, *_, last = path.labels(modality)
        for name in names:
            clean = given[name]
            if name in levels:
                if not math.isclose(levels[name], first, abs_tol=1e-3):
                    raise ValueError(
                        f"'{INPUT_OF[name]}' is at noise level {levels[name]:g}, but this noise path begins the "
                        f"{WORDS[modality]} at {first:g}. Choose a path that goes on where it is."
                    )
                start[name] = clean
                continue
            if first == MARGINAL and (clean is None or (mask[name] is None and last == MARGINAL)):
                continue  # the sampler draws it itself
            if clean is None and name == "clip_img" and first > CLEAN:
                clean = torch.zeros(len(generators), *shapes[name])  # nothing is known of the token: made with the picture
            if clean is None or (first < MARGINAL and name == "img" and not torch.count_nonzero(clean)):
                raise ValueError(
                    f"This noise path begins with the {WORDS[modality]} at level {first:g}, not from nothing: connect "
                    f"'{INPUT_OF[name]}'" + (" and 'clip_vision_output'." if name == "img" else ".")
                )
            noisy = noised(clean, first, generators)
            start[name] = noisy if mask[name] is None else torch.where(mask[name] > 0, noisy, clean)
    return Streams(**start)
