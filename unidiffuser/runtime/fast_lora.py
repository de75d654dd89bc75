"""The fast LoRA of a checkpoint: a student that was distilled to few steps without guidance (`unidiffuser distill --rank`).

It lies beside the checkpoint, as NAME-fast.safetensors, and `preset="fast"` switches it on for the paths that it has learnt.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..path import MARGINAL, NoisePath
from .lora import lora_about

SUFFIX = "-fast.safetensors"
TEXT_TO_IMAGE, IMAGE_TO_TEXT, JOINT = "text_to_image", "image_to_text", "joint"
MOST_STEPS = 1000


def fast_lora_of(checkpoint: str | os.PathLike[str]) -> Path | None:
    """The fast LoRA beside a checkpoint file or folder; None if there is none."""
    path = Path(checkpoint)
    found = path.with_name((path.stem if path.suffix in (".safetensors", ".pth") else path.name) + SUFFIX)
    return found if found.is_file() else None


def student_about(path: Path) -> dict[str, Any]:
    """The metadata of a fast LoRA.

    Raises:
        ValueError: a damaged file, or one that was not distilled.
    """
    about = lora_about(path)
    if not distilled_routes(about, path):
        raise ValueError(
            f"{path} is beside a checkpoint as its fast LoRA, but lists no distilled tasks. Make one with `unidiffuser distill "
            "--rank`, or rename the file."
        )
    return about


def route_of(path: NoisePath) -> str:
    """What a student must have learnt to follow a path: the task of its kind, by what moves and what is held.

    Returns:
        "text_to_image" or "image_to_text" where one modality moves and the other is held below pure noise, "image" or "text"
        where it is held at pure noise, "joint" where both move; "noising" for a path that ends with more noise than it begins.
    """
    if any(path.labels(modality)[-1] > path.labels(modality)[0] for modality in ("img", "text")):
        return "noising"
    img, text = (set(path.labels(modality)) for modality in ("img", "text"))
    if len(img) > 1 and len(text) > 1:
        return JOINT
    held = min(img if len(img) == 1 else text)
    if len(text) == 1:
        return TEXT_TO_IMAGE if held < MARGINAL else "image"
    return IMAGE_TO_TEXT if held < MARGINAL else "text"


def distilled_routes(about: Mapping[str, Any], name: object) -> dict[str, dict[str, Any]]:
    """The routes that a LoRA's metadata lists, checked: the fewest steps, and speeds for "joint"; empty if it is not distilled.

    Raises:
        ValueError: entries of another form.
    """
    routes = about.get("distilled", {})
    try:
        return {
            str(task): {"steps": _steps(route.get("fewest", route["steps"]))}
            | ({"speeds": _speeds(route["speeds"])} if task == JOINT else {})
            for task, route in routes.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{name} is damaged: its distilled tasks are not readable; distil or download it again.") from None


def student_settings(about: Mapping[str, Any], name: object, routes: Sequence[str]) -> dict[str, Any] | None:
    """The sampling options of a student for a task that follows these routes; None if it has not learnt all of them."""
    learnt = distilled_routes(about, name)
    if not routes or any(route not in learnt for route in routes):
        return None
    settings: dict[str, Any] = {"steps": max(learnt[route]["steps"] for route in routes), "guidance": 1.0}
    settings["method"] = student_method(about)
    return settings | ({"speeds": learnt[JOINT]["speeds"]} if JOINT in routes else {})


def student_method(about: Mapping[str, Any]) -> str:
    """The sampling method of a student."""
    return str(about.get("method", "ddim"))


def _steps(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_STEPS:
        raise ValueError(value)
    return value


def _speeds(value: Any) -> tuple[float, float]:
    image, text = (float(number) for number in value)
    return image, text
