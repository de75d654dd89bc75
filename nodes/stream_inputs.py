"""From the inputs of a node to the streams that the library's sampler starts from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.utils
import torch
from torch import Tensor

from ..unidiffuser.path import CLEAN
from ..unidiffuser.schedule import NUM_LABELS
from ..unidiffuser.streams import Streams
from .host_model import UniDiffuserModel
from .input_checks import check_conditioning, check_image_latent, clip_vision_token, ignored_unclip_warning
from .node_warnings import Warnings

WORDS = {"img": "image", "text": "text"}
INPUT_OF = {"img": "latent_image", "clip_img": "clip_vision_output", "text": "text"}  # of the UniDiffuser Sampler
TOKEN_MASK = "unidiffuser_token_mask"  # in a CONDITIONING: (1, L, 1), 1 = rewrite the token
LEVEL = "unidiffuser_level"  # in an output that a path left noisy: its label, so that a second path can continue
SCALE = "downscale_ratio_spacial"  # in an empty LATENT of the host: the pixels per cell that it assumed
KEPT = "unidiffuser_kept"  # beside LEVEL: the clean values, for the part that a mask keeps


def require_model(patcher: Any) -> UniDiffuserModel:
    """The host model of a MODEL.

    Raises:
        ValueError: the MODEL is of another architecture.
    """
    model = patcher.model
    if not isinstance(model, UniDiffuserModel):
        raise ValueError(
            f"The MODEL is a {type(model).__name__}, not a UniDiffuser. Connect the MODEL output of 'Load UniDiffuser'; LoRAs "
            f"and other patches may be in between."
        )
    return model


def given_streams(
    patcher: comfy.model_patcher.ModelPatcher,
    latent: dict[str, Any] | None,
    clip_vision_output: Any,
    text: Sequence[Any] | None,
    start: float = CLEAN,
) -> tuple[Streams, Streams]:
    """Streams and masks (1 = generate) of a node's inputs, scaled as the model expects, all of one batch size.

    Each stream is clean or at the noise level that `given_levels` reports; the part that its mask keeps is always clean.
    `start` is the label at which the sampling of a given image begins, 0 for one that is held.

    Raises:
        ValueError: an input does not fit the model.
    """
    model = require_model(patcher)
    net = model.diffusion_model.config
    samples = None if latent is None else _sized(patcher, latent)
    texts = [extra for _, extra in text or ()]
    advice = [check_conditioning(texts), ignored_unclip_warning(texts)]
    if samples is not None:
        tiled = "model_function_wrapper" in patcher.model_options
        downscale = model.latent_format.spacial_downscale_ratio
        start = (start or NUM_LABELS - 1) if samples.any() else NUM_LABELS
        advice.append(check_image_latent(samples, net, downscale, texts, tiled, start))
    for warning in filter(None, advice):
        Warnings().warn(warning)
    cond = None if text is None else text_latent(patcher, text)
    embeds = None if clip_vision_output is None else clip_vision_output["image_embeds"]
    batch = max((len(given) for given in (samples, cond, embeds) if given is not None), default=1)

    repeat = comfy.utils.repeat_to_batch_size
    mask = None if latent is None else latent.get("noise_mask")
    if mask is not None:
        mask = repeat(comfy.utils.reshape_mask(mask, samples.shape)[:, :1], batch)
        mask = mask.round() if LEVEL in (latent or {}) else mask  # the soft part of a noisy latent has no clean values
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
    """The samples of a LATENT; an empty one made for 8 pixels per cell is resized to this model's pixels per cell."""
    samples: Tensor = latent["samples"]
    if samples.ndim == 4 and latent.get(SCALE) is not None:
        samples = comfy.sample.fix_empty_latent_channels(patcher, samples, latent[SCALE])
    return samples


def _keep_clean(values: Tensor, mask: Tensor | None, extras: Mapping[str, Any], name: str) -> Tensor:
    """`values` of an input that a path left noisy, with the part that the mask keeps clean; `extras` are its LEVEL and KEPT."""
    if mask is None or LEVEL not in extras or bool(mask.all()):
        return values
    if KEPT not in extras:
        raise ValueError(
            f"'{name}' has a mask but is already at noise level {extras[LEVEL]:g}, so the masked part has no clean values. Set "
            f"the mask before the sampler that left it noisy."
        )
    return torch.where(mask > 0, values, comfy.utils.repeat_to_batch_size(extras[KEPT], len(values)).to(values))


def given_levels(latent: dict[str, Any] | None, clip_vision_output: Any, text: Sequence[Any] | None) -> dict[str, float]:
    """Noise levels (labels) of the inputs that an earlier path or an inversion left noisy."""
    tags = {
        "img": (latent or {}).get(LEVEL),
        "clip_img": getattr(clip_vision_output, LEVEL, None),
        "text": None if text is None else text[0][1].get(LEVEL),
    }
    return {name: level for name, level in tags.items() if level is not None}


def text_latent(patcher: comfy.model_patcher.ModelPatcher, conditioning: Sequence[Any]) -> Tensor:
    """Text latent (B, L, text_dim) of a CONDITIONING, on the CPU. Loads the model, whose Linear compresses CLIP text."""
    model = require_model(patcher)
    comfy.model_management.load_models_gpu([patcher])
    return model.text_latent(conditioning[0][0], patcher.load_device).cpu()
