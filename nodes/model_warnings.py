"""Warnings of nodes behind a MODEL that spoil the pictures of UniDiffuser: they are made for another kind of model."""

from __future__ import annotations

from typing import Any

from comfy.model_sampling import EPS, V_PREDICTION, X0
from comfy.patcher_extension import WrappersMP


def model_warnings(patcher: Any) -> list[str]:
    """A sentence for each such node, with what to do."""
    found = (_cache_warning(patcher), _sampling_warning(patcher), _tile_warning(patcher))
    return [warning for warning in found if warning]


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
    if not patcher.get_wrappers(WrappersMP.PREDICT_NOISE, "lazycache"):
        return None
    return (
        "'LazyCache' adds an earlier step's change to the picture, which leaves noise in models of Stable Diffusion's noise "
        "schedule. Use 'EasyCache' instead."
    )


def _sampling_warning(patcher: Any) -> str | None:
    """Of a node that replaces the model's sampling by that of another prediction."""
    sampling = patcher.get_model_object("model_sampling")
    if isinstance(sampling, EPS) and not isinstance(sampling, (V_PREDICTION, X0)):
        return None
    kind = (
        "v_prediction" if isinstance(sampling, V_PREDICTION) else "x0" if isinstance(sampling, X0) else "that of a flow model"
    )
    return (
        f"A node sets the sampling of the MODEL to {kind}, but UniDiffuser predicts noise ('eps'), so the picture is wrong. "
        f"Remove that ModelSampling node, or choose 'eps' in it."
    )


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
