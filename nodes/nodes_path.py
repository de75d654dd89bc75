"""UniDiffuser Noise Path: which way a sample takes through the square of image noise and text noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..unidiffuser.path import SPACINGS, NoisePath
from ..unidiffuser.schedule import NUM_LABELS, sigma_of_label
from .shared_inputs import steps_input
from .types import CATEGORY, NoisePathType

CORNERS = "through a corner"


def _level(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=0, max=NUM_LABELS, step=1, tooltip=tooltip)


def _start(default: float = NUM_LABELS) -> io.Float.Input:
    return _level("start", default, "Noise level to begin at: 1000 makes it from nothing, less keeps something of the input.")


def _hold(what: str) -> io.Float.Input:
    return _level(
        "hold",
        0,
        f"Noise level at which the {what} is held: 0 follows it closely, more takes it as a hint, 1000 leaves it out.",
    )


def _speed(what: str) -> io.Float.Input:
    return io.Float.Input(
        "speed_" + what,
        default=1,
        min=0.01,
        max=100,
        step=0.05,
        tooltip=f"How fast the {what} loses its noise; the faster of the two is clean first and waits.",
    )


class NoisePathNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        option = io.DynamicCombo.Option
        ends = [
            (f"{what}_{end}", level)
            for end, level in (("start", NUM_LABELS), ("corner", 500), ("end", 0))
            for what in ("image", "text")
        ]
        return io.Schema(
            node_id="UniDiffuserNoisePath",
            display_name="UniDiffuser Noise Path",
            category=CATEGORY,
            description="Chooses what UniDiffuser does, as a way through the square of image noise (to the right) and text "
            "noise (upwards): along an edge it turns text into a picture or a picture into text, down the "
            "diagonal it makes both. The node shows the way.",
            search_aliases=["schedule", "timesteps", "noise schedule", "joint", "img2txt", "txt2img", "task"],
            inputs=[
                io.DynamicCombo.Input(
                    "task",
                    tooltip="What is made, and from what.",
                    options=[
                        option("text to image", [_start(), _hold("text")]),
                        option("image to text", [_start(), _hold("picture")]),
                        option(
                            "joint",
                            [
                                _level("image_start", NUM_LABELS, "Noise level at which the picture begins."),
                                _level("text_start", NUM_LABELS, "Noise level at which the text begins."),
                                _speed("image"),
                                _speed("text"),
                            ],
                        ),
                        option("image", [_start()]),
                        option("text", [_start()]),
                        option(
                            CORNERS,
                            [
                                _level(
                                    name,
                                    level,
                                    f"Noise level of the {name.split('_')[0]} at the {name.split('_')[1]} of the way.",
                                )
                                for name, level in ends
                            ],
                        ),
                    ],
                ),
                steps_input("Network steps along the way."),
                io.Combo.Input(
                    "spacing",
                    options=list(SPACINGS),
                    default="uniform",
                    tooltip="How the steps are spread: uniform as the authors do, logsnr or karras for few steps.",
                ),
            ],
            outputs=[
                NoisePathType.Output(display_name="path", tooltip="For the UniDiffuser Sampler."),
                io.Sigmas.Output(
                    display_name="sigmas", tooltip="The image's noise levels along the way, for SamplerCustomAdvanced."
                ),
            ],
        )

    @classmethod
    def execute(cls, task: dict[str, Any], steps: int, spacing: str) -> io.NodeOutput:
        path = make_path(task, steps, spacing)
        picture = torch.from_numpy(np.asarray(path.picture(), dtype=np.float32) / 255)[None]
        sigmas = sigma_of_label(torch.tensor(path.t_img, dtype=torch.float64)).float()
        return io.NodeOutput(path, sigmas, ui=ui.PreviewImage(picture, cls=cls))


def make_path(task: dict[str, Any], steps: int, spacing: str) -> NoisePath:
    """The path of the node's inputs; `task` holds the chosen preset under "task" and its levels beside it."""
    levels = dict(task)
    kind = levels.pop("task")
    if kind == CORNERS:
        corners = [(levels[f"image_{end}"], levels[f"text_{end}"]) for end in ("start", "corner", "end")]
        return NoisePath.through(*dict.fromkeys(corners), steps=steps, spacing=spacing)
    if kind == "joint":
        return NoisePath.joint(
            steps,
            start=(levels["image_start"], levels["text_start"]),
            speeds=(levels["speed_image"], levels["speed_text"]),
            spacing=spacing,
        )
    presets = {
        "text to image": NoisePath.text_to_image,
        "image to text": NoisePath.image_to_text,
        "image": NoisePath.image,
        "text": NoisePath.text,
    }
    return presets[kind](steps, spacing=spacing, **levels)


NODES = [NoisePathNode]
