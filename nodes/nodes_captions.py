"""Decode Caption: text latents to words."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..unidiffuser.streams import item_generators
from .caption_results import caption_outputs, caption_results
from .host_captions import HostCaptionDecoder
from .shared_inputs import seed_input
from .types import CATEGORY, CaptionDecoderType


class DecodeCaption(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniDiffuserDecodeCaption",
            display_name="Decode Caption",
            category=CATEGORY,
            description="Writes the text of a UniDiffuser Sampler as words, one caption per batch item. Connect the captions "
            "to Preview as Text, or to CLIP Text Encode of any model.",
            search_aliases=[
                "caption",
                "describe image",
                "image captioning",
                "interrogate",
                "img2txt",
                "image to text",
                "prompt from image",
                "beam search",
            ],
            is_output_node=True,
            inputs=[
                CaptionDecoderType.Input("caption_decoder", tooltip="From Load UniDiffuser."),
                io.Conditioning.Input("text", tooltip="The CONDITIONING output of a UniDiffuser Sampler."),
                io.Combo.Input(
                    "method",
                    options=["beam", "nucleus"],
                    default="beam",
                    tooltip="beam searches for the most likely caption and always finds the same one. nucleus draws words at "
                    "random, for variety.",
                ),
                io.Int.Input(
                    "candidates",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Captions per batch item, best first. With beam, at most as many as beams.",
                ),
                io.Int.Input(
                    "beams",
                    default=5,
                    min=1,
                    max=64,
                    tooltip="For beam only: captions searched in parallel. 5 is usual; more is slower and slightly better.",
                ),
                io.Float.Input(
                    "top_p",
                    default=0.8,
                    min=0.01,
                    max=1,
                    step=0.01,
                    tooltip="For nucleus only: draws from the most likely words that together have this probability. 0.8 is "
                    "usual; lower is safer, higher more surprising.",
                ),
                io.Float.Input(
                    "temperature",
                    default=1,
                    min=0.05,
                    max=5,
                    step=0.05,
                    tooltip="1 is neutral. Try 0.7 for more predictable captions and 1.3 for more varied ones.",
                ),
                seed_input("For nucleus only: random seed. Batch item k uses seed + k, counted from 0."),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=caption_outputs("batch item"),
        )

    @classmethod
    def execute(
        cls,
        caption_decoder: HostCaptionDecoder,
        text: list[Any],
        method: str,
        candidates: int,
        beams: int,
        top_p: float,
        temperature: float,
        seed: int,
    ) -> io.NodeOutput:
        latents = text[0][0]
        found = caption_decoder.decode(
            latents,
            method=method,
            count=candidates,
            beams=beams,
            top_p=top_p,
            temperature=temperature,
            generator=item_generators(seed, latents.shape[0]),
        )
        *results, shown = caption_results(found, cls.hidden.unique_id)
        return io.NodeOutput(*results, ui=ui.PreviewText(shown))


NODES = [DecodeCaption]
