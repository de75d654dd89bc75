"""UniDiffuser Gibbs Chain: blocked Gibbs sampling (arXiv 2303.06555, section 5) of image and text in turn.

The chain expands into nodes, so the host caches finished rounds and previews each image. Latents are passed from step to
step, never words or pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import GraphBuilder

from ..unidiffuser.streams import MODALITIES
from .nodes_pairs import shown_pairs
from .prompt_notes import show_prompt_warning
from .saved_pairs import paired, save_pairs
from .shared_inputs import MAX_SEED, sampling_inputs, steps_input
from .stream_inputs import INPUT_OF
from .types import CATEGORY, CaptionDecoderType, show_text

SAMPLED = {"image": "img", "text to image": "img", "image to text": "text"}  # the modality that each task replaces
ShownType = io.Custom("UNIDIFFUSER_SHOWN")  # previews of a chain so far: a list of {"filename", "subfolder", "type"}
PREVIEW_PREFIX = "UniDiffuser_round"
SEED_STRIDE = 1000  # between the steps of a chain, so that no two steps share a seed within a batch


def _tasks(rounds: int, image: bool, text: bool) -> list[list[str]]:
    """The tasks of each round in order. A chain from an image starts with its caption, one from a text with an image."""
    pair = ["text to image", "image to text"] if text and not image else ["image to text", "text to image"]
    first = pair if image or text else ["image", *pair]
    return [first, *[pair] * (rounds - 1)]


class GibbsChain(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniDiffuserGibbsChain",
            display_name="UniDiffuser Gibbs Chain",
            category=CATEGORY,
            description="Captions an image, generates an image from the caption, and so on. Every round shows its image and "
            "caption. Finished rounds are kept when you add rounds or interrupt the run.",
            search_aliases=["gibbs", "loop", "chain", "variation", "dream", "telephone game"],
            enable_expand=True,
            inputs=[
                # NOTE: raw links, so that the expanded nodes link to the same outputs and the host can cache them.
                io.Model.Input("model", raw_link=True, tooltip="From Load UniDiffuser. LoRAs may be in between."),
                io.Vae.Input("vae", raw_link=True, tooltip="From Load UniDiffuser. Decodes the image of each round."),
                CaptionDecoderType.Input(
                    "caption_decoder", raw_link=True, tooltip="From Load UniDiffuser. Writes the caption of each round."
                ),
                io.Int.Input(
                    "rounds",
                    default=4,
                    min=1,
                    max=100,
                    tooltip="Number of rounds, each with one caption and one image. Raise it to continue a finished chain.",
                ),
                steps_input("Sampling steps for each caption and for each image. 20 is usual."),
                *sampling_inputs(),
                io.Float.Input(
                    "hold",
                    default=0,
                    min=0,
                    max=1000,
                    step=10,
                    optional=True,
                    tooltip="Noise added to what each step passes to the next. Try 40 to 100 for long chains that stay on "
                    "topic, 300 or more to let the topic drift. 0 passes it on unchanged.",
                ),
                io.Latent.Input(
                    "latent_image",
                    optional=True,
                    raw_link=True,
                    tooltip="The image to start from. An empty latent sets only the size.",
                ),
                io.ClipVisionOutput.Input(
                    "clip_vision_output",
                    optional=True,
                    raw_link=True,
                    tooltip="CLIP Vision Encode of the same image. Connect it to start from the image.",
                ),
                io.Conditioning.Input(
                    "text", optional=True, raw_link=True, tooltip="The text to start from if there is no image."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="pictures", tooltip="The images of all rounds, in order."),
                io.String.Output(display_name="captions", tooltip="The captions of all rounds, one per line."),
                io.Latent.Output(display_name="LATENT", tooltip="The last image."),
                io.ClipVisionOutput.Output(
                    display_name="CLIP_VISION_OUTPUT", tooltip="The CLIP image embedding of the last image."
                ),
                io.Conditioning.Output(
                    display_name="CONDITIONING", tooltip="The last text, for Decode Caption or as a prompt."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        vae: Any,
        caption_decoder: Any,
        rounds: int,
        steps: int,
        seed: int,
        method: str,
        image_guidance: float,
        text_guidance: float,
        hold: float = 0.0,
        latent_image: Any = None,
        clip_vision_output: Any = None,
        text: Any = None,
    ) -> io.NodeOutput:
        graph = GraphBuilder()
        state = {"latent_image": latent_image, "clip_vision_output": clip_vision_output, "text": text}
        state = {name: link for name, link in state.items() if link is not None}
        shown: dict[str, Any] = {}
        step = 0
        for number, tasks in enumerate(_tasks(rounds, clip_vision_output is not None, text is not None)):
            for task in tasks:
                levels = {"task.start": 1000.0} if task == "image" else {"task.start": 1000.0, "task.hold": hold}
                path = graph.node("UniDiffuserNoisePath", f"path {step}", task=task, steps=steps, spacing="uniform", **levels)
                sampled = graph.node(
                    "UniDiffuserSampler",
                    f"sample {step}",
                    model=model,
                    path=path.out(0),
                    method=method,
                    seed=(seed + step * SEED_STRIDE) % (MAX_SEED + 1),
                    image_guidance=image_guidance,
                    text_guidance=text_guidance,
                    data_type="curated",
                    **state,
                )
                outputs = dict(zip(INPUT_OF, map(sampled.out, range(3)), strict=True))
                # A held condition comes out noisy, so only the sampled modality replaces its link.
                state |= {INPUT_OF[name]: outputs[name] for name in MODALITIES[SAMPLED[task]]}
                step += 1
            picture = graph.node("VAEDecode", f"picture {number}", samples=state["latent_image"], vae=vae)
            words = graph.node(
                "UniDiffuserDecodeCaption",
                f"words {number}",
                caption_decoder=caption_decoder,
                method="beam",
                text=state["text"],
                candidates=1,
                beams=5,
                top_p=0.8,
                temperature=1.0,
                seed=0,
            )
            pair = graph.node(
                "UniDiffuserGibbsRound",
                f"round {number}",
                pictures=picture.out(0),
                captions=words.out(0),
                show_in=cls.hidden.unique_id,
                **shown,
                **({} if text is None else {"model": model, "text": text}),
            )
            shown = {"pictures_before": pair.out(0), "captions_before": pair.out(1), "shown_before": pair.out(2)}
        last = [state[name] for name in INPUT_OF.values()]
        return io.NodeOutput(shown["pictures_before"], shown["captions_before"], *last, expand=graph.finalize())


class GibbsRound(io.ComfyNode):
    """Collects and previews the rounds so far; GibbsChain adds these nodes, not the user."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniDiffuserGibbsRound",
            display_name="UniDiffuser Gibbs Round",
            category=CATEGORY,
            description="Shows one round of a UniDiffuser Gibbs Chain. The chain adds these nodes itself.",
            is_dev_only=True,
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.Image.Input("pictures", tooltip="The images of this round."),
                io.String.Input("captions", force_input=True, tooltip="The captions of this round."),
                io.Image.Input("pictures_before", optional=True, tooltip="The images of earlier rounds."),
                io.String.Input("captions_before", optional=True, force_input=True, tooltip="The captions of earlier rounds."),
                io.String.Input("show_in", default="", tooltip="Id of the chain node that shows the captions."),
                io.Model.Input("model", optional=True, tooltip="The model of the chain."),
                io.Conditioning.Input("text", optional=True, tooltip="The text that the chain starts from."),
                ShownType.Input("shown_before", optional=True, tooltip="The previews of earlier rounds."),
            ],
            outputs=[
                io.Image.Output(display_name="pictures", tooltip="All images so far."),
                io.String.Output(display_name="captions", tooltip="All captions so far, one per line."),
                ShownType.Output(display_name="shown", tooltip="The previews of all rounds so far."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls,
        pictures: list[Any],
        captions: list[str],
        show_in: list[str],
        pictures_before: list[Any] | None = None,
        captions_before: list[str] | None = None,
        model: list[Any] | None = None,
        text: list[Any] | None = None,
        shown_before: list[Any] | None = None,
    ) -> io.NodeOutput:
        if model and text:
            show_prompt_warning(model[0], text[0])
        new = paired(pictures, captions)
        images = [*(shown_before or [[]])[0], *save_pairs(new, PREVIEW_PREFIX, cls.hidden, keep=False)]
        lines = "\n".join([*(captions_before or []), *(caption for _, caption in new)])
        show_text(lines, show_in[0])
        shown = shown_pairs(images, lines.split("\n"))
        return io.NodeOutput(torch.cat([*(pictures_before or []), *pictures]), lines, images, ui=shown)


NODES = [GibbsChain, GibbsRound]
