"""UniDiffuser Example Image: the pack's own images, so that every template runs on a fresh host, or an uploaded one."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import numpy as np
import torch
from comfy_api.latest import io, ui

from ..unidiffuser.media.images import open_image
from .types import CATEGORY

FOLDER = Path(__file__).with_name("pictures")


class ExamplePicture(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniDiffuserExamplePicture",
            display_name="UniDiffuser Example Image",
            category=CATEGORY,
            description="An example image to try a workflow, or your own: click the button below it, or drop a file on it.",
            search_aliases=["example", "sample image", "test image", "upload image", "load image"],
            inputs=[
                io.Combo.Input(
                    "picture",
                    options=sorted(path.stem for path in FOLDER.glob("*.png")),
                    tooltip="An example, or the name of an image in the input folder. The examples are emoji from Google's "
                    "Noto, licensed under Apache-2.0.",
                )
            ],
            outputs=[io.Image.Output(display_name="IMAGE", tooltip="The image. The examples are 256 x 256 pixels.")],
        )

    @classmethod
    def validate_inputs(cls, picture: str) -> bool | str:
        return True if path_of(picture) else missing(picture)

    @classmethod
    def fingerprint_inputs(cls, picture: str) -> str:
        path = path_of(picture)
        return f"{path} {path.stat().st_mtime_ns}" if path else picture

    @classmethod
    def execute(cls, picture: str) -> io.NodeOutput:
        path = path_of(picture)
        if path is None:
            raise FileNotFoundError(missing(picture))
        pixels = np.asarray(open_image(path), dtype=np.float32) / 255
        image = torch.from_numpy(pixels)[None]  # (1, H, W, 3)
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))


def path_of(picture: str) -> Path | None:
    """The file of an example, or of a name in the input folder; None if there is no such file."""
    example = FOLDER / f"{picture}.png"
    if example.parent == FOLDER and example.is_file():
        return example
    inputs = Path(folder_paths.get_input_directory()).resolve()
    path = (inputs / picture).resolve()
    return path if path.is_relative_to(inputs) and path.is_file() else None


def missing(picture: str) -> str:
    return f"'picture' is '{picture}', but the input folder has no such file. Choose an example, or upload the image again."


NODES = [ExamplePicture]
