"""Inputs that several nodes share."""

from __future__ import annotations

from comfy_api.latest import io

from ..unidiffuser.samplers import METHODS

SAMPLING_METHODS = [name for name, method in METHODS.items() if not method.implicit]
MAX_SEED = 0xFFFFFFFFFFFFFFFF
SEED = "Random seed. The same seed and settings give the same result. Batch item k uses seed + k, counted from 0."


def steps_input(tooltip: str, default: int = 20) -> io.Int.Input:
    return io.Int.Input("steps", default=default, min=1, max=1000, tooltip=tooltip)


def seed_input(tooltip: str = SEED) -> io.Int.Input:
    return io.Int.Input("seed", default=0, min=0, max=MAX_SEED, control_after_generate=True, tooltip=tooltip)


def method_input() -> io.Combo.Input:
    return io.Combo.Input(
        "method",
        options=SAMPLING_METHODS,
        default="dpmpp_2m",
        tooltip="The sampling algorithm. dpmpp_2m is good with 20 steps, lcm is for models with (fast), reference is the "
        "authors' own. Use ddim for the noise of UniDiffuser Invert.",
    )


def guidance_input(name: str, what: str) -> io.Float.Input:
    """`what`: which output follows which input, such as "the image follows the text"."""
    return io.Float.Input(
        name,
        default=4,
        min=0,
        max=30,
        step=0.1,
        tooltip=f"How strongly {what} (prompt strength, CFG). 1 is off; 3 to 8 is usual.",
    )


def sampling_inputs() -> list[io.Input]:
    """Seed, method, and the guidance of both modalities."""
    return [
        seed_input(),
        method_input(),
        guidance_input("image_guidance", "the image follows the text"),
        guidance_input("text_guidance", "the caption follows the image"),
    ]
