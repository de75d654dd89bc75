"""Rewrite Words: a text with a mask of the words that a sampler replaces."""

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
        mask = token_mask(getattr(clip.tokenizer, clip.tokenizer.clip), text, words, rest)
        return io.NodeOutput([[cond, {**extra, TOKEN_MASK: mask}] for cond, extra in encoded])


def token_mask(tokenizer: Any, text: str, words: str, rest: bool) -> torch.Tensor:
    """Mask (1, L, 1) of a text: 1 = rewrite, 0 = keep.

    Args:
        tokenizer: the host's SDTokenizer.
        text: the whole text.
        words: the words of `text` to rewrite, separated by spaces; case and punctuation do not matter.
        rest: also rewrite the tokens after the end of the text.

    Raises:
        ValueError: no words are given, or one does not occur in the text.
    """
    wanted = {_bare(word) for word in words.split()}
    missing = wanted - {_bare(word) for word in text.split()}
    if missing or not wanted:
        raise ValueError(
            f"'words' contains {', '.join(sorted(missing))}, which 'text' does not contain. Copy the words from 'text'."
            if missing
            else "'words' is empty. Enter the words of 'text' to rewrite."
        )
    mask = torch.zeros(1, tokenizer.max_length, 1)
    position = tokenizer.tokens_start
    for word in text.split():  # byte pairs never span two words, so each word can be counted alone
        count = len(tokenizer.tokenizer(word)["input_ids"]) - tokenizer.tokens_start - 1
        mask[:, position : position + count] = float(_bare(word) in wanted)
        position += count
    mask[:, position:] = float(rest)
    return mask


def _bare(word: str) -> str:
    return word.strip(string.punctuation).lower()


NODES = [RewriteWords]
