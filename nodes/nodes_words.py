"""Rewrite Words: marks the words of a text that a sampler should replace, and keeps the others."""

from __future__ import annotations

import string
from typing import Any

import torch
from comfy_api.latest import io

from .stream_inputs import TOKEN_MASK
from .types import CATEGORY


class RewriteWords(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniDiffuserRewriteWords",
            display_name="Rewrite Words",
            category=CATEGORY,
            description="Encodes a text of which some words are to be rewritten. A UniDiffuser Sampler whose path makes text "
            "keeps the other words and finds new ones, to fit the picture, in their place.",
            search_aliases=["inpaint text", "partial caption", "mask words", "fill in"],
            inputs=[
                io.Clip.Input("clip", tooltip="From Load UniDiffuser."),
                io.String.Input("text", multiline=True, dynamic_prompts=True, default="a red apple", tooltip="The whole text."),
                io.String.Input("words", default="red", tooltip="The words of the text to rewrite, with spaces between them."),
                io.Boolean.Input(
                    "rest", default=True, tooltip="Rewrite what stands after the text too, so that it may become longer."
                ),
            ],
            outputs=[io.Conditioning.Output(display_name="CONDITIONING", tooltip="For a UniDiffuser Sampler.")],
        )

    @classmethod
    def execute(cls, clip: Any, text: str, words: str, rest: bool) -> io.NodeOutput:
        encoded = clip.encode_from_tokens_scheduled(clip.tokenize(text, disable_weights=True))
        mask = token_mask(getattr(clip.tokenizer, clip.tokenizer.clip), text, words, rest)
        return io.NodeOutput([[cond, {**extra, TOKEN_MASK: mask}] for cond, extra in encoded])


def token_mask(tokenizer: Any, text: str, words: str, rest: bool) -> torch.Tensor:
    """(1, L, 1): 1 at the tokens of those words of `text` that are among `words`, and after its end if `rest`.

    `tokenizer` is the host's SDTokenizer.

    Raises:
        ValueError: a word does not occur in the text.
    """
    wanted = {_bare(word) for word in words.split()}
    missing = wanted - {_bare(word) for word in text.split()}
    if missing or not wanted:
        raise ValueError(
            f"'words' must be words of 'text'; {', '.join(sorted(missing)) or 'it'} is not."
            if missing
            else "'words' is empty: write which words of 'text' to rewrite."
        )
    mask = torch.zeros(1, tokenizer.max_length, 1)
    position = tokenizer.tokens_start
    for word in text.split():  # byte pairs never join two words, so each can be counted alone
        count = len(tokenizer.tokenizer(word)["input_ids"]) - tokenizer.tokens_start - 1
        mask[:, position : position + count] = float(_bare(word) in wanted)
        position += count
    mask[:, position:] = float(rest)
    return mask


def _bare(word: str) -> str:
    return word.strip(string.punctuation).lower()


NODES = [RewriteWords]
