"""What every task takes besides its input, checked once and with the checkpoint's defaults filled in."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

from .checkpoints.config import ModelConfig
from .guidance import Guidance
from .path import SPACINGS
from .runtime.acceleration import EXACT, PRESETS
from .samplers import METHODS
from .streams import Streams

Scales = float | tuple[float, float]
Progress = Callable[[int, int, Streams, Streams], None]
SAMPLERS = tuple(name for name, method in METHODS.items() if not method.implicit)


class Options(TypedDict, total=False):
    """What every task takes besides its input and `count`.

    steps: network steps of each path, at least 1; the checkpoint's default when absent.
    guidance: 1 = off (the paper's scale + 1); or a pair (image, text); the checkpoint's default when absent.
    seed: see the module's text. Default 0.
    method: one of SAMPLERS. Default "dpmpp_2m".
    width, height: of the pictures, in pixels, multiples of `side_multiple(config)`; the trained size when absent.
    data_type: 1 = curated captions (default), 0 = web; v0 checkpoints have no such thing.
    batch_size: most items that are in the network at once; bounds memory and changes nothing else.
    preset: a name of `acceleration.PRESETS`, whose options stand in for those that are not given; "exact" by default.
    speeds: labels per step of (image, text) on the path of pairs out of nothing, see `NoisePath.joint`; the checkpoint's
        default when absent, the diagonal where it has none.
    spacing: of the steps over the noise levels, one of `path.SPACINGS`. Default "uniform".
    guidance_interval: labels (low, high) outside of which guidance is off; all of them when absent.
    uncond_interval: evaluate the unconditional branch of guidance every n-th step only. Default 1.
    cache_interval: evaluate the inside of the U every n-th step only (DeepCache). Default 1.
    cache_branch: how many of the outermost skip levels are always evaluated with it. Default 1.
    progress: True for a bar on stderr, or a callback (step, total steps, x0: Streams, x: Streams).
    """

    steps: int | None
    guidance: Scales | None
    seed: int
    method: str
    width: int | None
    height: int | None
    data_type: int
    batch_size: int | None
    preset: str
    speeds: tuple[float, float] | None
    spacing: str
    guidance_interval: tuple[float, float] | None
    uncond_interval: int
    cache_interval: int
    cache_branch: int
    progress: bool | Progress


@dataclass(frozen=True)
class Plan:
    """The options of one call with nothing left open; fields as in `Options`."""

    steps: int
    guidance: Scales
    width: int
    height: int
    seed: int = 0
    method: str = "dpmpp_2m"
    data_type: int = 1
    batch_size: int | None = None
    preset: str = EXACT
    speeds: tuple[float, float] = (1.0, 1.0)
    spacing: str = "uniform"
    guidance_interval: tuple[float, float] | None = None
    uncond_interval: int = 1
    cache_interval: int = 1
    cache_branch: int = 1
    progress: bool | Progress = False

    @classmethod
    def of(cls, options: Options, config: ModelConfig) -> Plan:
        """Raises ValueError for a value out of range and TypeError for an unknown option."""
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        unknown = given.keys() - Options.__annotations__.keys()
        if unknown:
            raise TypeError(f"unknown option {min(unknown)!r}; options are {', '.join(Options.__annotations__)}")
        trained = config.image_size
        defaults = {"steps": 50, "guidance": 8.0, "width": trained, "height": trained, **config.defaults}
        preset = given.get("preset", EXACT)
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        values = {**defaults, **PRESETS[preset](defaults), **given}
        positive = ("steps", "batch_size", "width", "height", "uncond_interval", "cache_interval", "cache_branch")
        for name, least in (*((name, 1) for name in positive), ("seed", None)):
            if name in values:
                values[name] = whole(name, values[name], least)
        multiple = side_multiple(config)
        for name in ("width", "height"):
            if values[name] % multiple:
                raise ValueError(f"{name} must be a multiple of {multiple} pixels, got {values[name]}")
        Guidance.of(values["guidance"], interval=values.get("guidance_interval"))
        values["speeds"] = _pair("speeds", values.get("speeds", (1.0, 1.0)))
        if values.get("spacing", "uniform") not in SPACINGS:
            raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, got {values['spacing']!r}")
        levels = config.uvit.depth // 2
        if values.get("cache_branch", 1) > levels:
            raise ValueError(f"cache_branch must be between 1 and {levels} for this network, got {values['cache_branch']}")
        if values.get("method", SAMPLERS[0]) not in SAMPLERS:
            raise ValueError(f"method must be one of {', '.join(SAMPLERS)}, got {values['method']!r}")
        return cls(**values)


def _pair(name: str, value: Any) -> tuple[float, float]:
    """Two positive numbers, for image and text; ValueError that names them otherwise."""
    try:
        image, text = (float(number) for number in value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be two numbers, for image and text, got {value!r}") from None
    if not all(math.isfinite(number) and number > 0 for number in (image, text)):
        raise ValueError(f"{name} must be positive, got {value!r}")
    return image, text


def side_multiple(config: ModelConfig) -> int:
    """What width and height must be multiples of, in pixels: a patch of the network."""
    return config.vae.downscale * config.uvit.patch_size


def whole(name: str, value: Any, least: int | None = None) -> int:
    """A whole number of any integer type as int; ValueError that names it otherwise."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        bound = "" if least is None else f" of at least {least}"
        raise ValueError(f"{name} must be a whole number{bound}, got {value!r}")
    return number
