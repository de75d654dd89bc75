"""Show Pairs: images with their captions beneath, saved like Save Image."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .saved_pairs import paired, save_pairs
from .types import CATEGORY

SHOWN_CAPTIONS = "unidiffuser_captions"  # beside a node's images: their captions, for web/js/pairs.js


class ShowPairs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniDiffuserShowPairs",
            display_name="Show Pairs",
            category=CATEGORY,
            description="Shows images with their captions beneath, and saves them with caption and workflow inside each file.",
            search_aliases=["save image", "caption", "gallery", "preview", "image with caption", "save caption"],
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="Images of any number and size."),
                io.String.Input(
                    "captions",
                    force_input=True,
                    tooltip="One caption per image, from Decode Caption or UniDiffuser Gibbs Chain, or one for all.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="pairs/pair",
                    tooltip="Start of the file names, with a folder if you like. Placeholders such as %date:yyyy-MM-dd% work "
                    "as in Save Image.",
                ),
                io.Boolean.Input(
                    "save",
                    default=True,
                    tooltip="Saves into the output folder. Switch it off to look only.",
                ),
                io.Boolean.Input(
                    "text_files",
                    default=False,
                    tooltip="Writes each caption into a .txt beside its image too, as training tools expect.",
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            outputs=[],
        )

    @classmethod
    def execute(
        cls,
        images: list[Any],
        captions: list[str],
        filename_prefix: list[str],
        save: list[bool],
        text_files: list[bool],
    ) -> io.NodeOutput:
        pairs = paired(images, captions)
        saved = save_pairs(pairs, filename_prefix[0], cls.hidden, keep=save[0], text_files=text_files[0] and save[0])
        return io.NodeOutput(ui=shown_pairs(saved, [caption for _, caption in pairs]))


def shown_pairs(images: list[dict[str, str]], captions: list[str]) -> dict[str, list[Any]]:
    """What a node shows: images, and their captions as a text and one by one."""
    return {"images": images, "text": ["\n".join(captions)], SHOWN_CAPTIONS: captions}


NODES = [ShowPairs]
