"""UniDiffuser Sampler: samples picture and text together along any noise path."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import comfy.clip_vision
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..unidiffuser.path import LEAST, NoisePath
from ..unidiffuser.streams import MODALITIES, Streams, item_generators
from . import inputs, sampling
from .controls import sampling_inputs
from .types import CATEGORY, CaptionDecoderType, NoisePathType, show_text

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
        given, mask = inputs.given_streams(model, latent_image, clip_vision_output, text)
        empty = None if negative is None else inputs.text_latent(model, negative)
        watch = sampling.watcher(model, path.steps, draft_writer(caption_decoder, cls.hidden.unique_id))
        out = sample_streams(
            model,
            path,
            given,
            mask,
            seed,
            callback=watch,
            method=method,
            levels=inputs.given_levels(latent_image, clip_vision_output, text),
            guidance=(image_guidance, text_guidance),
            data_type=DATA_TYPES.index(data_type),
            unconditional="marginal" if empty is None else "empty_prompt",
            empty_text=empty,
        )
        return host_outputs(model, out, path, latent_image, given, mask)


def sample_streams(
    model: Any,
    path: NoisePath,
    given: Streams,
    mask: Streams,
    seed: int,
    *,
    levels: Mapping[str, float] = MappingProxyType({}),
    data_type: int = 1,
    **settings: Any,
) -> Streams:
    """Sample along `path` from what is given: see `inputs.start_streams`; `settings` as `unidiffuser.samplers.sample`."""
    config = inputs.require_model(model).diffusion_model.config
    count = max(1, given.batch)
    generators = item_generators(seed, count)
    start = inputs.start_streams(path, given, mask, generators, config.item_shapes, levels)
    return sampling.run(
        model,
        path,
        start,
        count,
        seed,
        generator=generators,
        mask=Streams(**{name: value for name, value in mask.items() if start[name] is not None}),
        data_type=min(data_type, max(config.data_types - 1, 0)),
        **settings,
    )


def host_outputs(
    model: Any,
    out: Streams,
    path: NoisePath,
    latent_image: dict[str, Any] | None = None,
    given: Streams | None = None,
    mask: Streams | None = None,
) -> io.NodeOutput:
    """LATENT, CLIP_VISION_OUTPUT and CONDITIONING of sampled streams; what the path leaves out stops its own branch.

    What the path leaves noisy is marked with its level, so that another path can go on from there, and brings along what
    was `given` where a `mask` keeps a part of it.
    """
    given, mask = given or Streams(), mask or Streams()
    level = {name: {inputs.LEVEL: path.labels(name)[-1]} if path.labels(name)[-1] > LEAST else {} for name in MODALITIES}
    latent = vision = cond = ExecutionBlocker(None)
    if out.img is not None:
        latent = {k: v for k, v in (latent_image or {}).items() if k not in (inputs.LEVEL, inputs.KEPT, inputs.SCALE)}
        latent |= {"samples": model.model.process_latent_out(out.img), **level["img"]}
        if level["img"] and mask.img is not None:
            latent[inputs.KEPT] = model.model.process_latent_out(given.need("img"))
    if out.clip_img is not None:
        vision = comfy.clip_vision.Output()
        for name, value in {"image_embeds": out.clip_img[:, 0], **level["img"]}.items():
            vision[name] = value
    if out.text is not None:
        kept = {inputs.TOKEN_MASK: mask.text, inputs.KEPT: given.text} if level["text"] and mask.text is not None else {}
        cond = [[out.text, level["text"] | kept]]
    return io.NodeOutput(latent, vision, cond)


def draft_writer(caption_decoder: Any, node_id: str) -> Any:
    """Shows the first words of a text latent in the node; None without a decoder."""
    if caption_decoder is None:
        return None
    return lambda text: show_text(caption_decoder.draft(text), node_id)


NODES = [UniDiffuserSampler]
