"""Blocked Gibbs sampling (arXiv 2303.06555, section 5): picture and text are made from each other in turn.

Two ways: the chain expands into nodes, so that finished rounds stay in the host's cache and each shows its picture; the quick
loop runs inside one node. Latents are handed over in both, never words or pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import GraphBuilder

from ..unidiffuser.path import NoisePath
from ..unidiffuser.streams import MODALITIES, Streams
from .run_on_host import draft_writer, sample_streams, shifted, watcher
from .shared_inputs import MAX_SEED, sampling_inputs, steps_input
from .stream_inputs import INPUT_OF, given_streams
from .stream_outputs import host_outputs
from .types import CATEGORY, CaptionDecoderType, show_text

MADE = {"image": "img", "text to image": "img", "image to text": "text"}  # a task only borrows the other modality
SEED_STRIDE = 1000  # between the halves of the rounds, so that the items of a batch do not share seeds with them


def _chain_inputs() -> list[Any]:
    return [
        io.Int.Input("rounds", default=4, min=1, max=100, tooltip="Pairs of a text and a picture, each made from the last."),
        steps_input("Network steps of each half of a round."),
        *sampling_inputs(),
        io.Float.Input(
            "hold",
            default=0,
            min=0,
            max=1000,
            step=10,
            optional=True,
            tooltip="Noise on what one half hands to the next, from 0 (none) to 1000 (all of it): 40 to 100 hides what the "
            "network gets a little wrong, so that long chains stay on their topic; much lets the topic change.",
        ),
    ]


def _start_inputs(**options: Any) -> list[Any]:
    return [
        io.Latent.Input(
            "latent_image", optional=True, **options, tooltip="The picture to begin with; an empty one gives only the size."
        ),
        io.ClipVisionOutput.Input(
            "clip_vision_output",
            optional=True,
            **options,
            tooltip="CLIP Vision Encode of the same picture, with which the chain then begins.",
        ),
        io.Conditioning.Input("text", optional=True, **options, tooltip="The text to begin with, where there is no picture."),
    ]


def _tasks(rounds: int, picture: bool, text: bool) -> list[list[str]]:
    """What each round does in order: a chain from a picture describes first, one from a text paints first."""
    pair = ["text to image", "image to text"] if text and not picture else ["image to text", "text to image"]
    first = pair if picture or text else ["image", *pair]
    return [first, *[pair] * (rounds - 1)]


def _seed(seed: int, half: int) -> int:
    return (seed + half * SEED_STRIDE) % (MAX_SEED + 1)


class GibbsChain(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniDiffuserGibbsChain",
            display_name="UniDiffuser Gibbs Chain",
            category=CATEGORY,
            description="Describes a picture, paints the description, describes that, and so on. Each round becomes nodes of "
            "its own: its picture and caption are shown, finished rounds are kept when rounds are added, and an "
            "interrupted chain goes on where it stopped.",
            search_aliases=["gibbs", "loop", "chain", "variation", "dream", "telephone game"],
            enable_expand=True,
            inputs=[
                # NOTE: raw links, so that the nodes of the rounds hang on the same outputs and the host can cache them.
                io.Model.Input("model", raw_link=True, tooltip="From Load UniDiffuser."),
                io.Vae.Input("vae", raw_link=True, tooltip="Decodes each round's picture."),
                CaptionDecoderType.Input("caption_decoder", raw_link=True, tooltip="Writes each round's caption."),
                *_chain_inputs(),
                *_start_inputs(raw_link=True),
            ],
            outputs=[
                io.Image.Output(display_name="pictures", tooltip="The pictures of all rounds, in order."),
                io.String.Output(display_name="captions", tooltip="A line for each caption of all rounds, in order."),
                io.Latent.Output(display_name="LATENT", tooltip="The last picture."),
                io.ClipVisionOutput.Output(display_name="CLIP_VISION_OUTPUT", tooltip="The last picture's CLIP token."),
                io.Conditioning.Output(display_name="CONDITIONING", tooltip="The last text."),
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
        half = 0
        for number, tasks in enumerate(_tasks(rounds, clip_vision_output is not None, text is not None)):
            for task in tasks:
                levels = {"task.start": 1000.0} if task == "image" else {"task.start": 1000.0, "task.hold": hold}
                path = graph.node("UniDiffuserNoisePath", f"path {half}", task=task, steps=steps, spacing="uniform", **levels)
                made = graph.node(
                    "UniDiffuserSampler",
                    f"sample {half}",
                    model=model,
                    path=path.out(0),
                    method=method,
                    seed=_seed(seed, half),
                    image_guidance=image_guidance,
                    text_guidance=text_guidance,
                    data_type="curated",
                    **state,
                )
                outputs = dict(zip(INPUT_OF, map(made.out, range(3)), strict=True))
                # What was held is noisy in the outputs, so only what was made is taken from them.
                state |= {INPUT_OF[name]: outputs[name] for name in MODALITIES[MADE[task]]}
                half += 1
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
            )
            shown = {"pictures_before": pair.out(0), "captions_before": pair.out(1)}
        last = [state[name] for name in INPUT_OF.values()]
        return io.NodeOutput(*shown.values(), *last, expand=graph.finalize())


class GibbsRound(io.ComfyNode):
    """Collects and shows what a chain has made so far; made by GibbsChain, not by hand."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniDiffuserGibbsRound",
            display_name="UniDiffuser Gibbs Round",
            category=CATEGORY,
            description="Shows one round of a UniDiffuser Gibbs Chain, which makes these nodes itself.",
            is_dev_only=True,
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.Image.Input("pictures", tooltip="The round's pictures."),
                io.String.Input("captions", force_input=True, tooltip="The round's captions."),
                io.Image.Input("pictures_before", optional=True, tooltip="Those of the rounds before."),
                io.String.Input("captions_before", optional=True, force_input=True, tooltip="Those of the rounds before."),
                io.String.Input("show_in", default="", tooltip="The node of the chain."),
            ],
            outputs=[
                io.Image.Output(display_name="pictures", tooltip="All pictures so far."),
                io.String.Output(display_name="captions", tooltip="All captions so far, a line each."),
            ],
        )

    @classmethod
    def execute(
        cls,
        pictures: list[Any],
        captions: list[str],
        show_in: list[str],
        pictures_before: list[Any] | None = None,
        captions_before: list[str] | None = None,
    ) -> io.NodeOutput:
        lines = "\n".join([*(captions_before or []), *captions])
        show_text(lines, show_in[0])
        shown = ui.PreviewImage(pictures[0], cls=cls).as_dict() | ui.PreviewText("\n".join(captions)).as_dict()
        return io.NodeOutput(torch.cat([*(pictures_before or []), pictures[0]]), lines, ui=shown)


class GibbsLoop(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniDiffuserGibbsLoop",
            display_name="UniDiffuser Gibbs (Quick)",
            category=CATEGORY,
            description="The chain of UniDiffuser Gibbs Chain in one node with one progress bar: quicker to wire, but adding "
            "a round runs all of them again. The outputs hold every round, one after the other.",
            search_aliases=["gibbs", "loop", "variation", "dream"],
            inputs=[
                io.Model.Input("model", tooltip="From Load UniDiffuser."),
                *_chain_inputs(),
                *_start_inputs(),
                CaptionDecoderType.Input("caption_decoder", optional=True, tooltip="Shows drafts of the captions meanwhile."),
            ],
            outputs=[
                io.Latent.Output(display_name="LATENT", tooltip="The pictures of all rounds as a batch."),
                io.ClipVisionOutput.Output(display_name="CLIP_VISION_OUTPUT", tooltip="Their CLIP tokens."),
                io.Conditioning.Output(display_name="CONDITIONING", tooltip="The texts of all rounds, for Decode Caption."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
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
        caption_decoder: Any = None,
    ) -> io.NodeOutput:
        clean, mask = given_streams(model, latent_image, clip_vision_output, text)
        tasks = _tasks(rounds, clean.clip_img is not None, clean.text is not None)
        total = steps * sum(map(len, tasks))
        made, half = [], 0
        watch = watcher(model, total, draft_writer(caption_decoder, cls.hidden.unique_id))
        paths = {"image": NoisePath.image, "image to text": NoisePath.image_to_text, "text to image": NoisePath.text_to_image}
        for tasks_of_round in tasks:
            for task in tasks_of_round:
                path = paths[task](steps) if task == "image" else paths[task](steps, hold=hold)
                out = sample_streams(
                    model,
                    path,
                    clean,
                    mask,
                    _seed(seed, half),
                    method=method,
                    guidance=(image_guidance, text_guidance),
                    callback=shifted(watch, half * steps, total),
                )
                clean = clean.replace(**{name: out[name] for name in MODALITIES[MADE[task]]})
                half += 1
            made.append(clean)
        every = Streams(**{name: torch.cat([m.need(name) for m in made]) for name, _ in clean.items()})
        return host_outputs(model, every, paths["text to image"](steps))


NODES = [GibbsChain, GibbsRound, GibbsLoop]
