"""UniDiffuser Sampler: samples picture and text together along any noise path."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..unidiffuser.path import NoisePath
from .run_on_host import draft_writer, sample_streams, watcher
from .shared_inputs import sampling_inputs
from .stream_inputs import given_levels, given_streams, text_latent
from .stream_outputs import host_outputs
from .types import CATEGORY, CaptionDecoderType, NoisePathType

DATA_TYPES = ["web", "curated"]  # in the order of the network's data-type tokens


class UniDiffuserSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniDiffuserSampler",
            display_name="UniDiffuser Sampler",
            category=CATEGORY,
            description="Samples a picture and its text together along a noise path: text to image, image to text, both out "
            "of nothing, or anything between. What the path keeps clean or begins from is connected here.",
            search_aliases=["joint", "img2txt", "txt2img", "caption", "describe", "interrogate", "ksampler", "variation"],
            inputs=[
                io.Model.Input("model", tooltip="From Load UniDiffuser; LoRA and other patches may lie in between."),
                NoisePathType.Input("path", tooltip="From UniDiffuser Noise Path: what is made, and from what."),
                *sampling_inputs(),
                io.Combo.Input(
                    "data_type",
                    options=DATA_TYPES,
                    default="curated",
                    tooltip="The kind of captions to write or expect; v0 models have only one.",
                ),
                io.Latent.Input(
                    "latent_image",
                    optional=True,
                    tooltip="The picture to keep or begin from, from VAE Encode, or an empty one for the size. "
                    "Its noise mask says which part is made anew.",
                ),
                io.ClipVisionOutput.Input(
                    "clip_vision_output",
                    optional=True,
                    tooltip="CLIP Vision Encode of the same picture, where the path begins from one.",
                ),
                io.Conditioning.Input(
                    "text",
                    optional=True,
                    tooltip="The text to follow or begin from: CLIP Text Encode, Rewrite Words, or the "
                    "CONDITIONING of another UniDiffuser Sampler.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="What the picture is guided away from; without it, from no text at all."
                ),
                CaptionDecoderType.Input(
                    "caption_decoder", optional=True, tooltip="Shows a draft of the caption while sampling."
                ),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="LATENT", tooltip="The picture, for VAE Decode or any node of Stable Diffusion 1."
                ),
                io.ClipVisionOutput.Output(display_name="CLIP_VISION_OUTPUT", tooltip="The picture's CLIP token."),
                io.Conditioning.Output(display_name="CONDITIONING", tooltip="The text, for Decode Caption or as a prompt."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        path: NoisePath,
        seed: int,
        method: str,
        image_guidance: float,
        text_guidance: float,
        data_type: str = "curated",
        latent_image: Any = None,
        clip_vision_output: Any = None,
        text: Any = None,
        negative: Any = None,
        caption_decoder: Any = None,
    ) -> io.NodeOutput:
        given, mask = given_streams(model, latent_image, clip_vision_output, text)
        empty = None if negative is None else text_latent(model, negative)
        watch = watcher(model, path.steps, draft_writer(caption_decoder, cls.hidden.unique_id))
        out = sample_streams(
            model,
            path,
            given,
            mask,
            seed,
            callback=watch,
            method=method,
            levels=given_levels(latent_image, clip_vision_output, text),
            guidance=(image_guidance, text_guidance),
            data_type=DATA_TYPES.index(data_type),
            negative=empty,
        )
        return host_outputs(model, out, path, latent_image, given, mask)


NODES = [UniDiffuserSampler]
