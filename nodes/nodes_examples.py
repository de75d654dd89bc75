"""UniDiffuser Example Image: the pack's own images, so that every template runs on a fresh host."""

from __future__ import annotations

from pathlib import Path

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
            description="An example image that comes with the nodes, to try a workflow. Use Load Image for your own images.",
            search_aliases=["example", "sample image", "test image"],
            inputs=[
                io.Combo.Input(
                    "picture",
                    options=sorted(path.stem for path in FOLDER.glob("*.png")),
                    tooltip="Emoji from Google's Noto, licensed under Apache-2.0.",
                )
            ],
            outputs=[io.Image.Output(display_name="IMAGE", tooltip="The image, 256 x 256 pixels.")],
        )

    @classmethod
    def execute(cls, picture: str) -> io.NodeOutput:
        pixels = np.asarray(open_image(FOLDER / f"{picture}.png"), dtype=np.float32) / 255
        image = torch.from_numpy(pixels)[None]  # (1, H, W, 3)
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))


NODES = [ExamplePicture]
