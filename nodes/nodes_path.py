"""UniDiffuser Noise Path: the task of a sampler, as a path through the noise levels of image and caption."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..unidiffuser.path import SPACINGS
from ..unidiffuser.schedule import NUM_LABELS, sigma_of_label
from .path_inputs import CORNERS, DRAWN, HAS_CURVES, make_path
from .shared_inputs import steps_input
from .types import CATEGORY, NoisePathType

SHOWN = "unidiffuser_path"  # what the node shows: its points (image noise, caption noise), for the editor in web/js
WORDS = {"image": "image", "text": "caption"}  # in input ids, and in texts


def _level(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=0, max=NUM_LABELS, step=1, tooltip=tooltip)


def _start() -> io.Float.Input:
    return _level(
        "start",
        NUM_LABELS,
        "Noise level to start from. 1000 generates from scratch; 400 to 800 keeps part of the connected input, like a lower "
        "denoise in KSampler.",
    )


def _hold() -> io.Float.Input:
    return _level(
        "hold",
        0,
        "Noise on the input that is followed: the text, or the image when captioning. 0 follows it closely, 100 to 300 "
        "loosely, 1000 ignores it.",
    )


def _start_of(what: str) -> io.Float.Input:
    tooltip = (
        f"Noise level the {WORDS[what]} starts from. 1000 generates it from scratch; less keeps part of the connected one."
    )
    return _level(f"{what}_start", NUM_LABELS, tooltip)


def _corner_of(what: str) -> io.Float.Input:
    tooltip = f"Noise level of the {WORDS[what]} where the path turns: 1000 not started, 0 finished."
    return _level(f"{what}_corner", 500, tooltip)


def _end_of(what: str) -> io.Float.Input:
    tooltip = (
        f"Noise level of the {WORDS[what]} at the end of the path. 0 finishes it; more leaves it for a second sampler. At "
        "least one of the two ends at 0."
    )
    return _level(f"{what}_end", 0, tooltip)


def _speed_of(what: str) -> io.Float.Input:
    return io.Float.Input(
        f"speed_{what}",
        default=1,
        min=0.01,
        max=100,
        step=0.05,
        tooltip=f"Denoising speed of the {WORDS[what]}. The faster of the two is finished first, and the other follows it. Try "
        "2 or 3 against 1.",
    )


def _drawn() -> list[io.Input]:
    points = io.String.Input(
        "points",
        default="1000,1000 400,300 0,0",
        tooltip="The points of the path, each as image noise,caption noise from 0 (clean) to 1000 (noise). No level rises, and "
        "the last point has a 0. Drag them in the square, or type them.",
    )
    if not HAS_CURVES:
        return [points]
    curve = io.Custom("CURVE").Input(
        "curve",
        optional=True,
        tooltip="A curve used instead of the points: caption noise (y axis) over image noise (x axis), sampled from right to "
        "left. From Curve Editor.",
        extra_dict={"forceInput": True},
    )
    return [points, curve]


class NoisePathNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        option = io.DynamicCombo.Option
        both = ("image", "text")
        return io.Schema(
            node_id="UniDiffuserNoisePath",
            display_name="UniDiffuser Noise Path",
            category=CATEGORY,
            description="Chooses the task: text to image, image to text, both together, or anything in between. A task is a "
            "path through two noise levels, the image's (x axis) and the caption's (y axis). Drag it in "
            "the square.",
            search_aliases=["schedule", "timesteps", "noise schedule", "joint", "img2txt", "txt2img", "task"],
            inputs=[
                io.DynamicCombo.Input(
                    "task",
                    tooltip="What is generated. joint generates an image and its caption together; through a corner and drawn "
                    "are paths of your own.",
                    options=[
                        option("text to image", [_start(), _hold()]),
                        option("image to text", [_start(), _hold()]),
                        option("joint", [*map(_start_of, both), *map(_speed_of, both)]),
                        option("image", [_start()]),
                        option("text", [_start()]),
                        option(CORNERS, [*map(_start_of, both), *map(_corner_of, both), *map(_end_of, both)]),
                        option(DRAWN, _drawn()),
                    ],
                ),
                steps_input("Sampling steps along the path. 20 is usual; more is slower and slightly finer."),
                io.Combo.Input(
                    "spacing",
                    options=list(SPACINGS),
                    default="uniform",
                    tooltip="How the steps are spaced. uniform is the authors' choice; try logsnr or karras with 10 steps or "
                    "fewer.",
                ),
            ],
            outputs=[
                NoisePathType.Output(display_name="path", tooltip="For UniDiffuser Sampler."),
                io.Sigmas.Output(
                    display_name="sigmas", tooltip="Noise levels of the image along the path, for SamplerCustomAdvanced."
                ),
            ],
        )

    @classmethod
    def execute(cls, task: dict[str, Any], steps: int, spacing: str) -> io.NodeOutput:
        path = make_path(task, steps, spacing)
        sigmas = sigma_of_label(torch.tensor(path.t_img, dtype=torch.float64)).float()
        # NOTE: no picture, because the host would show it as the result of the run.
        return io.NodeOutput(path, sigmas, ui={SHOWN: list(zip(path.t_img, path.t_text, strict=True))})


NODES = [NoisePathNode]
