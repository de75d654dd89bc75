"""Rewrite Words: a text with a mask of the words that a sampler replaces."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..unidiffuser.tasks.words import positions, token_mask
from .stream_inputs import TOKEN_MASK
from .types import CATEGORY


class RewriteWords(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniDiffuserRewriteWords",
            display_name="Rewrite Words",
            category=CATEGORY,
            description="Encodes a text with some words marked for rewriting. A UniDiffuser Sampler that generates text "
            "replaces them with words that fit the image and keeps the others.",
            search_aliases=["inpaint text", "partial caption", "mask words", "fill in"],
            inputs=[
                io.Clip.Input("clip", tooltip="From Load UniDiffuser."),
                io.String.Input("text", multiline=True, dynamic_prompts=True, default="a red apple", tooltip="The whole text."),
                io.String.Input("words", default="red", tooltip="The words to rewrite, separated by spaces."),
                io.Boolean.Input(
                    "rest", default=True, tooltip="Also rewrite what follows the text, so that it can grow longer."
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="CONDITIONING", tooltip="For the text input of a UniDiffuser Sampler.")
            ],
        )

    @classmethod
    def execute(cls, clip: Any, text: str, words: str, rest: bool) -> io.NodeOutput:
        encoded = clip.encode_from_tokens_scheduled(clip.tokenize(text, disable_weights=True))
        host = getattr(clip.tokenizer, clip.tokenizer.clip)
        start = host.tokens_start
        mask = token_mask(
            text,
            lambda word: len(host.tokenizer(word)["input_ids"]) - start - 1,
            getattr(clip.cond_stage_model, clip.cond_stage_model.clip).max_length,
            change=sorted(positions(text.split(), words, "'words'")),
            rest=rest,
            first=start,
        )
        return io.NodeOutput([[cond, {**extra, TOKEN_MASK: mask}] for cond, extra in encoded])


NODES = [RewriteWords]
