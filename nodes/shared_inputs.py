"""The settings that several nodes have in common."""

from __future__ import annotations

from comfy_api.latest import io

from ..unidiffuser.samplers import METHODS

SAMPLING_METHODS = [name for name, method in METHODS.items() if not method.implicit]
MAX_SEED = 0xFFFFFFFFFFFFFFFF


def steps_input(what: str, default: int = 20) -> io.Int.Input:
    return io.Int.Input("steps", default=default, min=1, max=1000, tooltip=what)


def seed_input(what: str = "Item k of a batch is made with seed + k.") -> io.Int.Input:
    return io.Int.Input("seed", default=0, min=0, max=MAX_SEED, control_after_generate=True, tooltip=what)


def method_input() -> io.Combo.Input:
    return io.Combo.Input(
        "method", options=SAMPLING_METHODS, default="dpmpp_2m", tooltip="The solver; 'reference' is the authors' own."
    )


def guidance_input(name: str, what: str) -> io.Float.Input:
    return io.Float.Input(
        name,
        default=4,
        min=0,
        max=30,
        step=0.1,
        tooltip=f"How closely the {what} follows its counterpart: 1 is off, more is closer. The authors' scale plus 1.",
    )


def sampling_inputs() -> list[io.Input]:
    """Seed, solver and the guidance of both modalities."""
    return [seed_input(), method_input(), guidance_input("image_guidance", "picture"), guidance_input("text_guidance", "text")]
