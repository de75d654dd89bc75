"""Warnings of nodes behind a MODEL that spoil the pictures of UniDiffuser: they are made for another kind of model."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from comfy.model_sampling import EPS, V_PREDICTION, X0
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..unidiffuser.schedule import NUM_LABELS, label_of_sigma, sigma_of_label
from .host_patches import node_of

MOST_REUSED = 0.05  # reuse_threshold of EasyCache up to which 20 steps keep their colours
MOST_NAG = 2.0  # nag_scale of NAGuidance from which pictures break up
ADAPTIVE = "dpm_adaptive_function"  # of the host's sampler that chooses its own steps
NEUTRAL = 8  # cfg that Automatic CFG leaves as it is
STEPS_PER_MOMENTUM = 50  # steps over the whole schedule, per momentum, from which there are few spots


def model_warnings(patcher: Any) -> list[str]:
    """A sentence for each such node, with what to do."""
    found = (
        _cache_warning(patcher),
        _attention_warning(patcher),
        _sampling_warning(patcher),
        _tile_warning(patcher),
        _position_warning(patcher),
    )
    return [warning for warning in found if warning]


def cfg_warning(patcher: Any, cfg: float) -> str | None:
    """A sentence for a node that makes its own of the guidance scale `cfg`, if that is too low for it."""
    function = patcher.model_options.get("sampler_cfg_function")
    if "automaticcfg" not in str(getattr(function, "__module__", "")).lower() or cfg >= NEUTRAL or cfg == 1:
        return None
    if _closed_over(function, "automatic_cfg") == "None":  # a preset of it that leaves the guidance alone
        return None
    return (
        f"'Automatic CFG' counts from a cfg of {NEUTRAL}, so at {cfg:g} the guidance is too weak for a clear picture. Set cfg "
        f"(image_guidance in the nodes of UniDiffuser) to {NEUTRAL}."
    )


def momentum_warning(patcher: Any, sigmas: Tensor, sampler: str = "") -> str | None:
    """A sentence for "Momentum Guidance" if the steps of a run, down to a clean image, are far apart.

    Args:
        patcher: the MODEL.
        sigmas: noise levels of the run, in the host's scale.
        sampler: `sampler_name`; one that chooses its own steps gets no warning.
    """
    functions = patcher.model_options.get("sampler_post_cfg_function", [])
    momenta = [_closed_over(function, "momentum", 0.0) for function in functions if node_of(function) == "MomentumGuidance"]
    if len(sigmas) < 3 or sigmas[-1] != 0 or sampler == ADAPTIVE:  # the first step has no earlier one to take a change from
        return None
    momentum, covered = max(momenta, default=0.0), float(label_of_sigma(sigmas[:1])) / NUM_LABELS
    fewest = math.ceil(STEPS_PER_MOMENTUM * momentum * covered - 0.5)
    if len(sigmas) > fewest:
        return None
    return (
        f"'Momentum Guidance' with a momentum of {momentum:g} in fewer than {fewest} steps adds the change of earlier steps "
        f"too strongly, so the picture gets spots. Set steps to {fewest} or more, or lower the momentum."
    )


def schedule_warning(patcher: Any) -> str | None:
    """A sentence for a node that sets a noise schedule, in a node that takes its noise levels from a path."""
    sampling = patcher.get_model_object("model_sampling")
    sigmas, own = getattr(sampling, "sigmas", None), sigma_of_label(torch.arange(1, NUM_LABELS + 1))
    if sigmas is None or not _predicts_noise(sampling):  # another prediction has a warning of its own
        return None
    if sigmas.shape == own.shape and torch.allclose(sigmas.float().cpu(), own.float(), rtol=1e-3):
        return None
    return (
        "A node sets another noise schedule on the MODEL, but this node takes its noise levels from its path, so they stay as "
        "they are. Remove that node and choose the spacing of 'UniDiffuser Noise Path', or use KSampler."
    )


def sampler_name(sampler: Any) -> str:
    """The name of the function of a host sampler, such as "sample_lcm"; "" for one without."""
    return getattr(getattr(sampler, "sampler_function", None), "__name__", "")


def sampler_warning(sampler: Any) -> str | None:
    """A sentence for a sampler of another pack that spoils the pictures of UniDiffuser."""
    if sampler_name(sampler) != "sample_ttmcustom":
        return None
    return (
        "The sampler TTM follows the derivative of the image alone, but in UniDiffuser the CLIP image token moves with it, so "
        "pictures get spots. Use another sampler."
    )


def _cache_warning(patcher: Any) -> str | None:
    if patcher.get_wrappers(WrappersMP.PREDICT_NOISE, "lazycache"):
        return (
            "'LazyCache' adds an earlier step's change to the picture, which leaves noise in models of Stable Diffusion's "
            f"noise schedule. Use 'EasyCache' with a reuse_threshold of {MOST_REUSED} instead."
        )
    cache = patcher.model_options.get("transformer_options", {}).get("easycache")
    threshold = getattr(cache, "reuse_threshold", 0.0)
    if threshold <= MOST_REUSED:
        return None
    return (
        f"'EasyCache' with a reuse_threshold of {threshold:g} skips so many evaluations that colours wash out. Set it to "
        f"{MOST_REUSED}."
    )


def _attention_warning(patcher: Any) -> str | None:
    """Of "Normalized Attention Guidance" at a strength for networks whose text has an attention of its own."""
    patches = patcher.model_options.get("transformer_options", {}).get("patches", {}).get("attn1_output_patch", [])
    for patch in patches:
        scale = _closed_over(patch, "nag_scale", 0.0) if node_of(patch) == "NAGuidance" else 0.0
        if scale > MOST_NAG:
            return (
                f"'Normalized Attention Guidance' with a nag_scale of {scale:g} is too strong for UniDiffuser, whose image and "
                f"text share one attention: the picture breaks up. Set it to 1.5 or {MOST_NAG:g}."
            )
    return None


def _predicts_noise(sampling: Any) -> bool:
    return isinstance(sampling, EPS) and not isinstance(sampling, (V_PREDICTION, X0))


def _sampling_warning(patcher: Any) -> str | None:
    """Of a node that replaces the model's sampling by that of another prediction."""
    sampling = patcher.get_model_object("model_sampling")
    if _predicts_noise(sampling):
        return None
    kind = (
        "v_prediction" if isinstance(sampling, V_PREDICTION) else "x0" if isinstance(sampling, X0) else "that of a flow model"
    )
    return (
        f"A node sets the sampling of the MODEL to {kind}, but UniDiffuser predicts noise ('eps'), so the picture is wrong. "
        f"Remove that ModelSampling node, or choose 'eps' in it."
    )


def _position_warning(patcher: Any) -> str | None:
    """Of a node for rotary positions."""
    if patcher.model_options.get("transformer_options", {}).get("rope_options") is None:
        return None
    return "'ScaleROPE' has no effect: UniDiffuser has learned positions, not rotary ones. Remove it."


def shifts_tiles(patcher: Any) -> bool:
    """Whether the MODEL has "Tiled Diffusion" with the method SpotDiffusion, which reads the levels of a host sampler."""
    return type(patcher.model_options.get("model_function_wrapper")).__name__ == "SpotDiffusion"


def _tile_warning(patcher: Any) -> str | None:
    if shifts_tiles(patcher):
        return (
            "'Tiled Diffusion' with the method SpotDiffusion moves the tiles across the edges of the picture, which "
            "UniDiffuser draws as seams. Use the method Mixture of Diffusers."
        )
    tiles = patcher.model_options.get("model_function_wrapper")
    sides = getattr(tiles, "tile_height", None), getattr(tiles, "tile_width", None)  # in latent cells
    trained, pixels = patcher.model.diffusion_model.config.latent_size, patcher.model.latent_format.spacial_downscale_ratio
    if not all(isinstance(side, int) for side in sides) or all(
        side >= least for side, least in zip(sides, trained, strict=True)
    ):
        return None
    return (
        f"'{type(tiles).__name__}' samples tiles of {sides[1] * pixels} x {sides[0] * pixels} pixels, smaller than the "
        f"pictures that this model was trained on, so every tile becomes a picture of its own. Use tiles of at least "
        f"{trained[1] * pixels} x {trained[0] * pixels}."
    )


def _closed_over(function: Any, name: str, default: Any = None) -> Any:
    """The value of a name that a node's inner function takes from the node's inputs."""
    if not inspect.isfunction(function):
        return default
    try:
        return inspect.getclosurevars(function).nonlocals.get(name, default)
    except ValueError:  # a name that is not bound yet
        return default
