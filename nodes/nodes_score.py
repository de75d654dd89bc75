"""Score Captions: ranks captions of an image by the denoising error of the image under each."""

from __future__ import annotations

from typing import Any

import comfy.utils
import torch
from comfy_api.latest import io, ui

from ..unidiffuser.media.files import lines_of
from ..unidiffuser.scoring import caption_fit
from ..unidiffuser.streams import Streams
from .prompt_notes import show_prompt_warning
from .run_on_host import in_host
from .shared_inputs import seed_input
from .stream_inputs import given_streams, text_latent
from .types import CATEGORY, show_text


class ScoreCaptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniDiffuserScoreCaptions",
            display_name="Score Captions",
            category=CATEGORY,
            description="Ranks captions by how well they fit an image. Takes the candidates of Decode Caption, or one caption "
            "per line; with labels as captions it classifies the image.",
            search_aliases=["rank", "clip score", "caption", "similarity", "classify", "zero-shot"],
            is_input_list=True,
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="From Load UniDiffuser."),
                io.Clip.Input("clip", tooltip="From Load UniDiffuser."),
                io.Latent.Input("latent_image", tooltip="The image, from VAE Encode. Only the first of a batch is used."),
                io.ClipVisionOutput.Input("clip_vision_output", tooltip="CLIP Vision Encode of the same image."),
                io.String.Input(
                    "captions",
                    multiline=True,
                    default="a cat\na dog",
                    tooltip="The captions to compare, one per line or as a list.",
                ),
                io.Int.Input(
                    "levels", default=8, min=1, max=100, tooltip="Noise levels to test. 8 is quick; 32 ranks more reliably."
                ),
                seed_input(),
            ],
            outputs=[
                io.String.Output(display_name="best", tooltip="The caption that fits best."),
                io.String.Output(display_name="ranked", is_output_list=True, tooltip="All captions, best first."),
                io.Float.Output(
                    display_name="scores",
                    is_output_list=True,
                    tooltip="How well each ranked caption fits. Higher is better; 0 is no better than no caption.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: list[Any],
        clip: list[Any],
        latent_image: list[Any],
        clip_vision_output: list[Any],
        captions: list[str],
        levels: list[int],
        seed: list[int],
    ) -> io.NodeOutput:
        texts = [line for text in captions for line in lines_of(text) if line]
        if not texts:
            raise ValueError("'captions' is empty. Enter one caption per line, or connect the candidates of 'Decode Caption'.")
        scores = score(model[0], clip[0], latent_image[0], clip_vision_output[0], texts, levels[0], seed[0])
        order = sorted(range(len(texts)), key=lambda i: -scores[i])
        ranked, best_first = [texts[i] for i in order], [scores[i] for i in order]
        shown = "\n".join(f"{value:+.4f}  {text}" for text, value in zip(ranked, best_first, strict=True))
        show_text(shown, cls.hidden.unique_id)
        return io.NodeOutput(ranked[0], ranked, best_first, ui=ui.PreviewText(shown))


def score(
    model: Any, clip: Any, latent_image: Any, clip_vision_output: Any, texts: list[str], levels: int, seed: int
) -> list[float]:
    """`caption_fit` of texts for the first image of a LATENT, sampled by the host."""
    encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in texts]
    show_prompt_warning(model, *encoded)
    conds = [text_latent(model, conditioning) for conditioning in encoded]
    clean, _ = given_streams(model, latent_image, clip_vision_output, None)
    image = Streams(img=clean.need("img")[:1], clip_img=clean.need("clip_img")[:1])
    bar = comfy.utils.ProgressBar(levels)
    return in_host(
        model,
        len(texts) + 1,
        seed,
        lambda net: caption_fit(
            net,
            image,
            torch.cat(conds).to(net.device),
            levels=levels,
            generator=torch.Generator().manual_seed(seed),
            callback=lambda k, total: bar.update_absolute(k + 1, total),
        ),
    ).tolist()


NODES = [ScoreCaptions]
