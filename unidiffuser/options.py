"""Sampling options, defined once for the library, the command line and the evaluation.

This module imports torch only inside `resolve`, so that the command line can read the options without it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Annotated, Any, TypedDict, cast, get_type_hints

Scales = float | tuple[float, float]
Progress = Callable[[int, int, Any, Any], None]
"""Called with (step, total steps, x_0 prediction: `Streams`, state: `Streams`)."""


class Options(TypedDict, total=False):
    """Options of every task. Absent, or None, means the default: the checkpoint's own where it has one."""

    steps: Annotated[int, "Sampling steps; the model's default if not given."]
    guidance: Annotated[Scales, "How strongly the condition is followed, 1 = off; a pair is for (image, text)."]
    seed: Annotated[int, "Random seed; candidate k of each input uses seed + k."]
    method: Annotated[str, "Sampling method: ddim, dpmpp_2m, dpmpp_3m, euler or reference."]
    width: Annotated[int, "Width of pictures in pixels; the trained size if not given."]
    height: Annotated[int, "Height of pictures in pixels; the trained size if not given."]
    data_type: Annotated[int, "Kind of captions: 1 = curated (default), 0 = web; v0 has none."]
    batch_size: Annotated[int | None, "Maximum results computed at once; lower it to save memory. Results do not depend on it."]
    preset: Annotated[str, "exact, or fast: half the work at a small price in quality."]
    speeds: Annotated[tuple[float, float], "How fast (image, text) lose their noise in `joint`; 1, 2 = text first."]
    spacing: Annotated[str, "Spacing of the steps over the noise levels: uniform (default), logsnr or karras."]
    guidance_interval: Annotated[tuple[float, float] | None, "Labels (low, high) outside of which guidance is off."]
    cache_interval: Annotated[int, "Evaluate the inner blocks at every n-th step only (DeepCache). Default 1."]
    cache_branch: Annotated[int, "How many outer levels DeepCache evaluates at every step. Default 1."]
    progress: Annotated[bool | Progress, "True for a bar on stderr, or a callback (step, total, x0, x)."]


DEFAULTS: Options = {
    "seed": 0, "method": "dpmpp_2m", "data_type": 1, "batch_size": None, "preset": "exact", "speeds": (1.0, 1.0),
    "spacing": "uniform", "guidance_interval": None, "cache_interval": 1, "cache_branch": 1, "progress": False,
}  # fmt: skip
"""Defaults where neither the call nor the checkpoint gives a value; `steps` and `guidance` are 50 and 8 then."""


def option_help() -> dict[str, str]:
    """What each option means, by name."""
    return {name: hint.__metadata__[0] for name, hint in get_type_hints(Options, include_extras=True).items()}


def resolve(options: Options, config: Any) -> Options:
    """All options of a call, checked, with the defaults of a model filled in.

    Args:
        options: the options of the call.
        config: the model's `ModelConfig`; not annotated as such, since importing it imports torch.

    Raises:
        ValueError: a value out of range.
        TypeError: an unknown option.
    """
    from .guidance import Guidance
    from .path import SPACINGS
    from .runtime.acceleration import PRESETS
    from .samplers import SAMPLING_METHODS

    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if unknown := given.keys() - Options.__annotations__.keys():
        raise TypeError(f"unknown option {min(unknown)!r}; options are {', '.join(Options.__annotations__)}")
    side = config.image_size
    defaults = {**DEFAULTS, "steps": 50, "guidance": 8.0, "width": side, "height": side, **config.defaults}
    _one_of("preset", given.get("preset", defaults["preset"]), PRESETS)
    values: dict[str, Any] = {**defaults, **PRESETS[given.get("preset", defaults["preset"])](defaults), **given}
    for name in ("steps", "width", "height", "cache_interval", "cache_branch"):
        values[name] = whole_number(name, values[name], least=1)
    if values["batch_size"] is not None:
        values["batch_size"] = whole_number("batch_size", values["batch_size"], least=1)
    values["seed"] = whole_number("seed", values["seed"])
    multiple = side_multiple(config)
    for name in ("width", "height"):
        if values[name] % multiple:
            raise ValueError(f"{name} must be a multiple of {multiple} pixels, got {values[name]}")
    Guidance.of(values["guidance"], interval=values["guidance_interval"])
    values["speeds"] = _pair("speeds", values["speeds"])
    _one_of("spacing", values["spacing"], SPACINGS)
    _one_of("method", values["method"], SAMPLING_METHODS)
    levels = max(1, config.uvit.depth // 2)
    if values["cache_branch"] > levels:
        raise ValueError(f"cache_branch must be between 1 and {levels} for this network, got {values['cache_branch']}")
    return cast("Options", values)


def side_multiple(config: Any) -> int:
    """Pixels that width and height of a model with this `ModelConfig` must be multiples of."""
    return int(config.vae.downscale * config.uvit.patch_size)


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """A whole number of any integer type as int; ValueError that names it otherwise."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        bound = "" if least is None else f" of at least {least}"
        raise ValueError(f"{name} must be a whole number{bound}, got {value!r}")
    return number


def _one_of(name: str, value: Any, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _pair(name: str, value: Any) -> tuple[float, float]:
    """Two positive numbers, for image and text; ValueError that names them otherwise."""
    try:
        image, text = (float(number) for number in value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be two numbers, for image and text, got {value!r}") from None
    if not all(math.isfinite(number) and number > 0 for number in (image, text)):
        raise ValueError(f"{name} must be positive, got {value!r}")
    return image, text
