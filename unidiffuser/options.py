"""Sampling options, defined once for the library, the command line and the evaluation.

Importing this module and `check` need no torch, so that the command line answers a mistake at once.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, TypedDict, cast, get_type_hints

from .media.json_files import brief

Scales = float | tuple[float, float]
Progress = Callable[[int, int, Any, Any], None]
"""Called with (step, total steps, x_0 prediction: `Streams`, state: `Streams`)."""
Skipped = Callable[[int, Exception], None]
"""Called with the position of an input that is skipped, and the reason."""

METHODS = ("ddim", "dpmpp_2m", "dpmpp_3m", "euler", "lcm", "reference")
SPACINGS = ("uniform", "logsnr", "karras")
PRESETS = ("exact", "fast")
OUTPUTS = ("pil", "numpy", "tensor", "latent")


class Options(TypedDict, total=False):
    """Options of every task. Absent, or None, means the default: the checkpoint's own where it has one."""

    steps: Annotated[int, "Sampling steps; the model's default if not given."]
    guidance: Annotated[Scales, "How strongly the condition is followed, 1 = off; a pair is for (image, text)."]
    seed: Annotated[int, "Random seed; candidate k of each input uses seed + k."]
    method: Annotated[str, "Sampling method: ddim, dpmpp_2m (usual), dpmpp_3m, euler, lcm (for distilled models) or reference."]
    width: Annotated[int, "Width of pictures in pixels; the trained size if not given."]
    height: Annotated[int, "Height of pictures in pixels; the trained size if not given."]
    data_type: Annotated[int, "Kind of captions: 1 = curated (default), 0 = web; v0 has none."]
    batch_size: Annotated[int | None, "Maximum results computed at once; lower it to save memory. Results do not depend on it."]
    preset: Annotated[str, "exact, or fast: few steps with the fast LoRA of the model, half of the steps if it has none."]
    speeds: Annotated[
        tuple[float, float], "How fast (image, text) lose their noise in `joint`; 1, 2 = text first; 0 waits for the other."
    ]
    spacing: Annotated[str, "Spacing of the steps over the noise levels: uniform (default), logsnr or karras."]
    guidance_interval: Annotated[tuple[float, float] | None, "Labels (low, high) outside of which guidance is off."]
    cache_interval: Annotated[int, "Evaluate the inner blocks at every n-th step only (DeepCache). Default 1."]
    cache_branch: Annotated[int, "How many outer levels DeepCache evaluates at every step. Default 1."]
    progress: Annotated[bool | Progress, "True for a bar on stderr, or a callback (step, total, x0, x)."]
    output: Annotated[
        str,
        "Form of the results: pil (default); numpy, uint8 (B, H, W, 3); tensor, (B, 3, H, W) in [0, 1]; or latent, `Streams`. "
        "Type checkers see the form of pil.",
    ]
    on_error: Annotated[
        str | Skipped,
        "What an input that cannot be used does in a list: raise (default) ends the call; skip logs it and gives None in its "
        "place, and a function (position, error) is called instead of logging.",
    ]


MOST = {"steps": 10_000, "width": 8192, "height": 8192}
"""Upper bounds: beyond them a slip of the finger fills the memory before anything is said."""

DEFAULTS: Options = {
    "seed": 0, "method": "dpmpp_2m", "data_type": 1, "batch_size": None, "preset": "exact", "speeds": (1.0, 1.0),
    "spacing": "uniform", "guidance_interval": None, "cache_interval": 1, "cache_branch": 1, "progress": False, "output": "pil",
    "on_error": "raise",
}  # fmt: skip
"""Defaults where neither the call nor the checkpoint gives a value; `steps` and `guidance` are 50 and 8 then."""

DIFFUSERS: Mapping[str, str] = {
    "num_inference_steps": "steps=",
    "guidance_scale": "guidance=",
    "negative_prompt": "negative=",
    "num_images_per_prompt": "count=",
    "num_prompts_per_image": "count=",
    "generator": "seed=, a whole number; candidate k of each input uses seed + k",
    "output_type": 'output="pil", "numpy", "tensor" or "latent"',
    "callback_on_step_end": "progress=, a function (step, total, x0, x)",
    "callback": "progress=, a function (step, total, x0, x)",
    "callback_steps": "progress=, a function that is called after every step",
    "return_dict": "nothing: tasks return lists",
    "eta": 'method="ddim", whose eta is 0',
    "latents": "`sample(path, latents=Streams(...))`",
    "prompt_latents": "`sample(path, latents=Streams(text=...))`",
    "vae_latents": "`sample(path, latents=Streams(img=...))`",
    "clip_latents": "`sample(path, latents=Streams(clip_img=...))`",
    "prompt_embeds": "`sample(path, latents=Streams(text=...))`",
    "negative_prompt_embeds": "negative=, a text",
    "mask_image": "mask=",
}
"""Options of diffusers' UniDiffuserPipeline and of its other pipelines, and what to write here instead."""

DIFFUSERS_METHODS: Mapping[str, str] = {
    "set_text_to_image_mode": "model.text_to_image(prompt)",
    "set_image_to_text_mode": "model.image_to_text(image)",
    "set_joint_mode": "model.joint()",
    "set_image_mode": "model.image()",
    "set_text_mode": "model.text()",
    "reset_mode": "nothing: each task is a method",
    "from_pretrained": 'unidiffuser.load(folder, dtype="float16")',
    "enable_model_cpu_offload": "unidiffuser.load(..., offload=True)",
    "enable_sequential_cpu_offload": "unidiffuser.load(..., offload=True)",
    "enable_vae_tiling": "unidiffuser.load(..., tiling=True)",
    "enable_vae_slicing": "batch_size=1 in a call",
    "scheduler": "method= in a call",
    "load_lora_weights": "model.load_lora(file, strength)",
    "set_progress_bar_config": "progress=False in a call",
}
"""Methods and attributes of diffusers' pipeline, likewise."""


def option_help() -> dict[str, str]:
    """What each option means, by name."""
    return {name: hint.__metadata__[0] for name, hint in get_type_hints(Options, include_extras=True).items()}


def check(options: Options) -> dict[str, Any]:
    """The options of a call that are given, as far as they can be checked without a model.

    Raises:
        ValueError: a value out of range.
        TypeError: an unknown option.
    """
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if unknown := given.keys() - Options.__annotations__.keys():
        name = min(unknown)
        if name in DIFFUSERS:
            raise TypeError(f"{name!r} is diffusers' name; here it is {DIFFUSERS[name]}")
        raise TypeError(f"unknown option {name!r}; options are {', '.join(Options.__annotations__)}")
    for name in ("steps", "width", "height", "cache_interval", "cache_branch", "batch_size"):
        if name in given:
            given[name] = whole_number(name, given[name], least=1)
            if given[name] > MOST.get(name, given[name]):
                raise ValueError(f"{name} must be at most {MOST[name]}, got {brief(given[name])}")
    if "seed" in given:
        given["seed"] = whole_number("seed", given["seed"])
    if "data_type" in given and whole_number("data_type", given["data_type"]) not in (0, 1):
        raise ValueError(f"data_type must be 1 (curated) or 0 (web), got {given['data_type']}")
    if "guidance" in given:
        _check_guidance(given["guidance"])
    if "guidance_interval" in given:
        _check_interval(given["guidance_interval"])
    if "speeds" in given:
        given["speeds"] = _pair("speeds", given["speeds"])
    for name, choices in (("method", METHODS), ("spacing", SPACINGS), ("preset", PRESETS), ("output", OUTPUTS)):
        if name in given:
            one_of(name, given[name], choices)
    if "progress" in given and not (isinstance(given["progress"], bool) or callable(given["progress"])):
        raise ValueError(f"progress must be True, False or a function (step, total, x0, x), got {brief(given['progress'])}")
    if "on_error" in given and not callable(given["on_error"]):
        one_of("on_error", given["on_error"], ("raise", "skip"))
    return given


def resolve(
    options: Options,
    config: Any,
    routes: Sequence[str] = (),
    student: Callable[[], Mapping[str, Any] | None] = lambda: None,
) -> Options:
    """All options of a call, checked, with the defaults of a model filled in.

    Args:
        options: the options of the call.
        config: the model's `ModelConfig`; not annotated as such, since importing it imports torch.
        routes: the kinds of path that the task follows; its steps are the most that the model suggests for one of them.
        student: called for the preset "fast" alone; returns what it sets, of a fast LoRA, or None for half of the steps.

    Raises:
        ValueError: a value out of range.
        TypeError: an unknown option.
    """
    from .runtime.acceleration import PRESETS as CHANGES

    given = check(options)
    side = config.image_size
    defaults = {**DEFAULTS, "steps": 50, "guidance": 8.0, "width": side, "height": side, **config.defaults}
    by_task = defaults.pop("task_steps", {})
    defaults["steps"] = max((by_task.get(route, defaults["steps"]) for route in routes), default=defaults["steps"])
    preset = given.get("preset", defaults["preset"])
    one_of("preset", preset, PRESETS)
    learnt = student() if preset == "fast" else None
    values: dict[str, Any] = {**defaults, **(CHANGES[preset](defaults) if learnt is None else learnt), **given}
    values |= check(cast("Options", values))  # the model's defaults
    multiple = side_multiple(config)
    for name in ("width", "height"):
        if values[name] % multiple:
            raise ValueError(f"{name} must be a multiple of {multiple} pixels, got {values[name]}")
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
        raise ValueError(f"{name} must be a whole number{bound}, got {brief(value)}")
    return number


def number(name: str, value: Any, low: float, high: float) -> float:
    """A number between two bounds as float; ValueError that names it otherwise."""
    try:
        found = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not low <= found <= high:
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {brief(value)}")
    return found


def one_of(name: str, value: Any, choices: Iterable[str]) -> None:
    """Check a choice; ValueError that names it otherwise."""
    if value not in tuple(choices):
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {brief(value)}")


def _check_guidance(value: Any) -> None:
    scales = value if isinstance(value, (tuple, list)) else (value,)
    if len(scales) not in (1, 2):
        raise ValueError(f"guidance must be one number or an (image, text) pair, not {brief(value)}")
    for scale in scales:
        if isinstance(scale, (bool, str)) or not is_finite(scale):
            raise ValueError(f"guidance must be a finite number (1 = off) or an (image, text) pair, got {brief(value)}")


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number."""
    try:
        return math.isfinite(value)
    except TypeError:
        return False


def _check_interval(value: Any) -> None:
    try:
        low, high = (float(label) for label in value)
    except (TypeError, ValueError):
        raise ValueError(f"guidance_interval must be two labels (low, high), got {brief(value)}") from None
    if not low <= high:
        raise ValueError(f"guidance_interval must be labels (low, high) with low <= high, got {brief(value)}")


def _pair(name: str, value: Any) -> tuple[float, float]:
    """Two numbers for image and text, above 0 or one of them 0; ValueError that names them otherwise."""
    try:
        image, text = (float(number) for number in value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be two numbers, for image and text, got {brief(value)}") from None
    if not all(math.isfinite(number) and number >= 0 for number in (image, text)) or not image + text:
        raise ValueError(f"{name} must be positive, or 0 for one that waits for the other; got {brief(value)}")
    return image, text
