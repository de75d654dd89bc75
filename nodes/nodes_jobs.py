"""Whole jobs in one node: Encode Picture, Caption Picture, Text to Pair."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..unidiffuser.path import NoisePath
from ..unidiffuser.streams import Streams
from .caption_drafts import CaptionDrafts
from .caption_results import caption_outputs, caption_results
from .host_captions import HostCaptionDecoder
from .picture_inputs import BATCH, FITS, Frame, encode
from .prompt_notes import show_prompt_warning
from .run_on_host import sample_streams, shifted, watcher
from .shared_inputs import guidance_input, seed_input, steps_input
from .stream_inputs import given_streams, text_latent
from .stream_outputs import host_outputs
from .types import CATEGORY, CaptionDecoderType, show_text

BEAMS = 5  # of the caption search, as in Decode Caption


def image_inputs() -> list[io.Input]:
    """The models that encode an image, the image, and how it is made to fit."""
    return [
        io.Model.Input("model", tooltip="From Load UniDiffuser. LoRAs and other patches may be in between."),
        io.Vae.Input("vae", tooltip="From Load UniDiffuser."),
        io.ClipVision.Input("clip_vision", tooltip="From Load UniDiffuser."),
        io.Image.Input("image", tooltip="One or more images of any size."),
        io.Combo.Input(
            "fit",
            options=list(FITS),
            default="crop",
            tooltip="How an image gets a size that the model takes: "
            + "; ".join(f"{name} {what}" for name, what in FITS.items())
            + ".",
        ),
    ]


class EncodePicture(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniDiffuserEncodePicture",
            display_name="Encode Picture",
            category=CATEGORY,
            description="Encodes images of any size for a UniDiffuser Sampler: crops or pads them, then encodes the latent and "
            "the CLIP embedding. Replaces scaling, VAE Encode and CLIP Vision Encode.",
            search_aliases=["img2img", "image to latent", "vae encode", "clip vision encode", "resize", "crop", "load picture"],
            inputs=[
                *image_inputs(),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    tooltip="Side of the square in pixels, rounded to the next size that the model takes. 0 is the size that "
                    "it was trained on, which works best.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Area of the image to change, as from Load Image. It is cropped or padded with the image.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="LATENT", tooltip="The image, for latent_image of a sampler."),
                io.ClipVisionOutput.Output(
                    display_name="CLIP_VISION_OUTPUT", tooltip="The CLIP image embedding, for clip_vision_output of a sampler."
                ),
                io.Image.Output(display_name="IMAGE", tooltip="The image as the model sees it."),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, vae: Any, clip_vision: Any, image: Tensor, fit: str, size: int, mask: Tensor | None = None
    ) -> io.NodeOutput:
        frame = Frame.of(model, image, fit, size)
        shown, samples, token = encode(model, vae, clip_vision, image, frame)
        latent = {"samples": samples} if mask is None else {"samples": samples, "noise_mask": frame.masks(mask, image)}
        return io.NodeOutput(latent, token, shown)


class CaptionPicture(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniDiffuserCaptionPicture",
            display_name="Caption Picture",
            category=CATEGORY,
            description="Describes images of any size in words. Connect the captions to Preview as Text, or to CLIP Text "
            "Encode of any model.",
            search_aliases=[
                "describe image",
                "image captioning",
                "caption image",
                "clip interrogator",
                "prompt from image",
                "image to text",
                "img2txt",
                "interrogate",
            ],
            is_output_node=True,
            inputs=[
                *image_inputs(),
                CaptionDecoderType.Input("caption_decoder", tooltip="From Load UniDiffuser."),
                steps_input("Sampling steps. 20 is usual."),
                guidance_input("text_guidance", "the caption follows the image"),
                io.Int.Input("candidates", default=1, min=1, max=64, tooltip="Captions for each image, best first."),
                seed_input("Random seed. The same seed and settings give the same result. Image k uses seed + k, from 0."),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                *caption_outputs("image"),
                io.Conditioning.Output(
                    display_name="CONDITIONING", tooltip="The captions as the model's own text, to vary the images with."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        vae: Any,
        clip_vision: Any,
        image: Tensor,
        fit: str,
        caption_decoder: HostCaptionDecoder,
        steps: int,
        text_guidance: float,
        candidates: int,
        seed: int,
    ) -> io.NodeOutput:
        _, samples, token = encode(model, vae, clip_vision, image, Frame.of(model, image, fit))
        given, _ = given_streams(model, {"samples": samples}, token, None)
        text = captioned(model, given, steps, text_guidance, seed, caption_decoder, cls.hidden.unique_id)
        found = caption_decoder.decode(text, count=candidates, beams=max(BEAMS, candidates))
        *results, shown = caption_results(found, cls.hidden.unique_id)
        return io.NodeOutput(*results, [[text, {}]], ui=ui.PreviewText(shown))


def captioned(
    model: Any, images: Streams, steps: int, guidance: float, seed: int, decoder: HostCaptionDecoder, node_id: str
) -> Tensor:
    """Text latents (B, L, text_dim) of clean image streams, `BATCH` at once, with progress and previews in the node."""
    path = NoisePath.image_to_text(steps)
    starts = range(0, images.batch, BATCH)
    watch = watcher(model, steps * len(starts), CaptionDrafts(decoder, path, node_id).show)
    texts = []
    for number, start in enumerate(starts):
        part = images.map(lambda stream, start=start: stream[start : start + BATCH])
        show = shifted(watch, number * steps, steps * len(starts))
        out = sample_streams(model, path, part, Streams(), seed + start, guidance=(1.0, guidance), callback=show)
        texts.append(out.need("text"))
    return torch.cat(texts)


class TextToPair(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniDiffuserTextToPair",
            display_name="Text to Pair",
            category=CATEGORY,
            description="Generates images from a prompt, and a caption of each in the model's own words. A caption that "
            "differs from the prompt shows what the model made of it.",
            search_aliases=["txt2img", "text to image", "prompt to image", "image and caption", "rewrite prompt", "emoji"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="From Load UniDiffuser. LoRAs and other patches may be in between."),
                io.Clip.Input("clip", tooltip="From Load UniDiffuser."),
                io.Vae.Input("vae", tooltip="From Load UniDiffuser."),
                CaptionDecoderType.Input("caption_decoder", tooltip="From Load UniDiffuser."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="red apple, twemoji",
                    tooltip="What the images show. Words that the model does not know are named below.",
                ),
                io.Int.Input("count", default=4, min=1, max=64, tooltip="Number of pairs."),
                steps_input("Sampling steps for the images, and again for their captions. 20 is usual."),
                guidance_input("image_guidance", "the image follows the prompt"),
                guidance_input("text_guidance", "the caption follows the image"),
                seed_input(),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Image.Output(display_name="IMAGE", tooltip="The images, as a batch."),
                io.String.Output(display_name="captions", is_output_list=True, tooltip="The caption of each image."),
                io.Latent.Output(display_name="LATENT", tooltip="The images as latents."),
                io.ClipVisionOutput.Output(display_name="CLIP_VISION_OUTPUT", tooltip="The CLIP embeddings of the images."),
                io.Conditioning.Output(display_name="CONDITIONING", tooltip="The captions as the model's own text."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        caption_decoder: HostCaptionDecoder,
        prompt: str,
        count: int,
        steps: int,
        image_guidance: float,
        text_guidance: float,
        seed: int,
    ) -> io.NodeOutput:
        encoded = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        show_prompt_warning(model, encoded)
        text = text_latent(model, encoded).repeat(count, 1, 1)
        path = NoisePath.text_to_image(steps)
        guidance, watch = (image_guidance, 1.0), watcher(model, steps, None)
        pair = sample_streams(model, path, Streams(text=text), Streams(), seed, guidance=guidance, callback=watch)
        images = pair.replace(text=None)
        words = captioned(model, images, steps, text_guidance, seed, caption_decoder, cls.hidden.unique_id)
        captions = [item[0].text for item in caption_decoder.decode(words, beams=BEAMS)]
        show_text("\n".join(captions), cls.hidden.unique_id)
        latent, vision, conditioning = host_outputs(model, images.replace(text=words), NoisePath.joint(steps)).args
        pictures = vae.decode(latent["samples"])
        shown = ui.PreviewImage(pictures, cls=cls).as_dict() | ui.PreviewText("\n".join(captions)).as_dict()
        return io.NodeOutput(pictures, captions, latent, vision, conditioning, ui=shown)


NODES = [EncodePicture, CaptionPicture, TextToPair]
