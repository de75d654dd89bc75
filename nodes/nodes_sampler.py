"""UniDiffuser Sampler: samples image and text together along any noise path."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..unidiffuser.path import NoisePath
from .caption_drafts import CaptionDrafts
from .prompt_notes import show_prompt_warning
from .run_on_host import sample_streams, watcher
from .shared_inputs import sampling_inputs
from .stream_inputs import given_levels, given_streams
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
            description="Samples an image and its caption along a noise path: text to image, image to text, both together, or "
            "anything in between. Connect what the path follows or starts from.",
            search_aliases=[
                "joint",
                "img2txt",
                "txt2img",
                "img2img",
                "image to text",
                "caption",
                "describe",
                "interrogate",
                "ksampler",
            ],
            inputs=[
                io.Model.Input("model", tooltip="From Load UniDiffuser. LoRAs and other patches may be in between."),
                NoisePathType.Input("path", tooltip="From UniDiffuser Noise Path. Sets the task and the steps."),
                *sampling_inputs(),
                io.Combo.Input(
                    "data_type",
                    options=DATA_TYPES,
                    default="curated",
                    tooltip="Style of the captions. curated gives clean ones, web those of web pages. v0 models have only one.",
                ),
                io.Latent.Input(
                    "latent_image",
                    optional=True,
                    tooltip="The image to follow or start from (VAE Encode), or an empty latent for size and batch. A noise "
                    "mask limits the change to the masked area.",
                ),
                io.ClipVisionOutput.Input(
                    "clip_vision_output",
                    optional=True,
                    tooltip="CLIP Vision Encode of the same image. Connect it if the path follows or starts from an image.",
                ),
                io.Conditioning.Input(
                    "text",
                    optional=True,
                    tooltip="The text to follow or start from: CLIP Text Encode, Rewrite Words, or another UniDiffuser "
                    "Sampler.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What the image should avoid, at image_guidance above 1. It may stay unconnected.",
                ),
                CaptionDecoderType.Input(
                    "caption_decoder", optional=True, tooltip="Connect it to see the captions while sampling."
                ),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="LATENT", tooltip="The image, for VAE Decode; with the 1 B model also for SD 1.x nodes."
                ),
                io.ClipVisionOutput.Output(display_name="CLIP_VISION_OUTPUT", tooltip="The CLIP image embedding."),
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
        given, mask = given_streams(model, latent_image, clip_vision_output, text, path.t_img[0])
        show_prompt_warning(model, text, negative)
        drafts = CaptionDrafts(caption_decoder, path, cls.hidden.unique_id)
        watch = watcher(model, path.steps, drafts.show)
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
            text=text,
            negative=negative,
            batch_index=None if latent_image is None else latent_image.get("batch_index"),
        )
        drafts.finish(out.text)
        return host_outputs(model, out, path, latent_image, given, mask)


NODES = [UniDiffuserSampler]
