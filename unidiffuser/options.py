"""What every task takes besides its input, checked once and with the checkpoint's defaults filled in."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

from .guidance import Guidance
from .model_config import ModelConfig
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
        values = defaults | given
        for name, least in (("steps", 1), ("batch_size", 1), ("width", 1), ("height", 1), ("seed", None)):
            if name in values:
                values[name] = whole(name, values[name], least)
        multiple = side_multiple(config)
        for name in ("width", "height"):
            if values[name] % multiple:
                raise ValueError(f"{name} must be a multiple of {multiple} pixels, got {values[name]}")
        Guidance.of(values["guidance"])
        if values.get("method", SAMPLERS[0]) not in SAMPLERS:
            raise ValueError(f"method must be one of {', '.join(SAMPLERS)}, got {values['method']!r}")
        return cls(**values)


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
