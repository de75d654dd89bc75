"""Load UniDiffuser: a checkpoint as the host's own types."""

from __future__ import annotations

import dataclasses
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..unidiffuser.checkpoints.checkpoint import load_checkpoint
from ..unidiffuser.runtime.fast_lora import SUFFIX, distilled_routes, student_about, student_method
from . import folders, host_clip, host_parts
from .host_captions import HostCaptionDecoder
from .nodes_lora import on_model
from .saved_models import Origin
from .types import CATEGORY, CaptionDecoderType, show_text

SHOWN_CONCEPTS = 24  # below the node; Prompt Helper lists all


class LoadUniDiffuser(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniDiffuserLoader",
            display_name="Load UniDiffuser",
            category=CATEGORY,
            description="Loads a UniDiffuser checkpoint as standard ComfyUI models. 'emoji' is the small model that comes "
            "with the nodes; the help page lists the files of the published 1 B model.",
            search_aliases=["unidiffuser", "emoji", "checkpoint", "txt2img", "img2txt", "caption", "interrogate"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folders.model_names(),
                    default=folders.BUNDLED,
                    tooltip="'emoji' needs no download. Other files are those in models/unidiffuser and models/checkpoints; "
                    "for a diffusers folder choose its model_index.json. With (fast) a few steps are enough, without guidance.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="Diffusion model for KSampler and UniDiffuser Sampler."),
                io.Clip.Output(display_name="CLIP", tooltip="Text encoder for CLIP Text Encode."),
                io.Vae.Output(display_name="VAE", tooltip="For VAE Encode and VAE Decode. The 1 B model has the VAE of SD 1."),
                io.ClipVision.Output(display_name="CLIP_VISION", tooltip="Image encoder for CLIP Vision Encode."),
                CaptionDecoderType.Output(
                    display_name="CAPTION_DECODER", tooltip="Turns sampled text into words, for Decode Caption."
                ),
            ],
        )

    @classmethod
    def execute(cls, model_name: str) -> io.NodeOutput:
        name, fast = folders.split_choice(model_name)
        path = folders.model_path(name)
        origin = Origin.of_file(path)
        checkpoint = load_checkpoint(path if origin is None else folders.model_path(origin.name))
        if origin is None:
            model = host_parts.load_model(checkpoint, name)
        else:  # NOTE: the saved file has no VAE; the original's brings its preview colours.
            config = dataclasses.replace(origin.config, vae=checkpoint.config.vae)
            model = host_parts.load_saved_model(path, dataclasses.replace(origin, config=config))
        notes = [] if checkpoint.config.vocabulary is None else [checkpoint.config.vocabulary.summary(SHOWN_CONCEPTS)]
        if fast:
            model, note = _with_fast_lora(model, name)
            notes.insert(0, note)
        if notes and cls.hidden is not None:  # None: called outside a workflow
            show_text("\n".join(notes), cls.hidden.unique_id)
        return io.NodeOutput(
            model,
            host_clip.load_clip(checkpoint, folder_paths.get_folder_paths("embeddings")),
            host_parts.load_vae(checkpoint),
            host_parts.load_clip_vision(checkpoint),
            HostCaptionDecoder(checkpoint),
        )


def _with_fast_lora(model: Any, name: str) -> tuple[Any, str]:
    """A checkpoint's MODEL with the fast LoRA beside it, and the settings that it was distilled for.

    Raises:
        FileNotFoundError: there is no such LoRA.
        ValueError: it is damaged, or was not distilled.
    """
    path = folders.fast_lora(name)
    if path is None:
        raise FileNotFoundError(
            f"{name} has no fast LoRA beside it: a file of the same name that ends in {SUFFIX}. Put it there, or choose {name} "
            "without it."
        )
    about = student_about(path)
    learnt = distilled_routes(about, path)
    steps = ", ".join(f"{task.replace('_', ' ')} {settings['steps']}" for task, settings in learnt.items())
    note = f"Fast. Steps: {steps}; cfg or guidance 1, sampler {student_method(about)}, scheduler simple."
    return on_model(model, str(path), 1.0), note


NODES = [LoadUniDiffuser]
