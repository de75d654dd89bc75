"""Decode Caption: text latents to words."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..unidiffuser.streams import item_generators
from .host_parts import HostCaptionDecoder
from .shared_inputs import seed_input
from .types import CATEGORY, CaptionDecoderType, show_text


class DecodeCaption(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniDiffuserDecodeCaption",
            display_name="Decode Caption",
            category=CATEGORY,
            description="Writes the words of the text that a UniDiffuser Sampler has made, one caption for each item of the "
            "batch. The captions go into Preview as Text, or into CLIP Text Encode of any model.",
            search_aliases=["caption", "describe", "interrogate", "img2txt", "image to text", "beam search"],
            is_output_node=True,
            inputs=[
                CaptionDecoderType.Input("caption_decoder", tooltip="From Load UniDiffuser."),
                io.Conditioning.Input("text", tooltip="The CONDITIONING output of a UniDiffuser Sampler."),
                io.Combo.Input(
                    "method",
                    options=["beam", "nucleus"],
                    default="beam",
                    tooltip="beam finds the likeliest words, always the same; nucleus draws, for variety.",
                ),
                io.Int.Input(
                    "candidates",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Captions for each item, best first; with beam at most as many as beams.",
                ),
                io.Int.Input("beams", default=5, min=1, max=64, tooltip="Width of the beam search."),
                io.Float.Input(
                    "top_p",
                    default=0.8,
                    min=0.01,
                    max=1,
                    step=0.01,
                    tooltip="nucleus only: share of the probability to draw from; less is safer.",
                ),
                io.Float.Input(
                    "temperature",
                    default=1,
                    min=0.05,
                    max=5,
                    step=0.05,
                    tooltip="Above 1 flattens the choice of words, below 1 sharpens it.",
                ),
                seed_input("nucleus only: item k of the batch draws with seed + k."),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.String.Output(display_name="captions", is_output_list=True, tooltip="The best caption of each item."),
                io.String.Output(
                    display_name="candidates", is_output_list=True, tooltip="All captions, item after item, best first."
                ),
                io.Float.Output(
                    display_name="scores",
                    is_output_list=True,
                    tooltip="Mean log-probability of each candidate's words; 0 is certainty.",
                ),
            ],
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
        best = [item[0].text for item in found]
        every = [caption for item in found for caption in item]
        shown = "\n".join(f"{c.text}  ({c.score:.2f})" if candidates > 1 else c.text for c in every)
        show_text(shown, cls.hidden.unique_id)
        return io.NodeOutput(best, [c.text for c in every], [c.score for c in every], ui=ui.PreviewText(shown))


NODES = [DecodeCaption]
