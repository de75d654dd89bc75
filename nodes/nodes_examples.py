"""Example Picture: the pack's own pictures, so that every template runs on a fresh host."""

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
            display_name="UniDiffuser Example Picture",
            category=CATEGORY,
            description="One of the pictures that come with the nodes, to try a workflow with. Use Load Image for your own.",
            search_aliases=["example", "sample image", "test image"],
            inputs=[
                io.Combo.Input(
                    "picture",
                    options=sorted(path.stem for path in FOLDER.glob("*.png")),
                    tooltip="Emoji of Google's Noto, Apache-2.0.",
                )
            ],
            outputs=[io.Image.Output(display_name="IMAGE", tooltip="The picture, 128 x 128 pixels.")],
        )

    @classmethod
    def execute(cls, picture: str) -> io.NodeOutput:
        pixels = np.asarray(open_image(FOLDER / f"{picture}.png"), dtype=np.float32) / 255
        image = torch.from_numpy(pixels)[None]  # (1, H, W, 3)
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))


NODES = [ExamplePicture]
