"""The text encoder of a checkpoint as the host's CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.clip_model
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import torch
import torch.nn.functional as F

from ..unidiffuser.checkpoints.checkpoint import Checkpoint
from ..unidiffuser.checkpoints.tokenizers import END, START, BytePairTokenizer
from .prompt_notes import NOTE, check_tokens, rows_of_prompt


class TextTower(comfy.clip_model.CLIPTextModel):
    """The host's CLIP text model with the checkpoint's vocabulary size, and without the unused projection."""

    def __init__(self, config: dict[str, Any], dtype: Any, device: Any, operations: Any):
        super().__init__(config, dtype, device, operations)
        self.text_projection = torch.nn.Identity()
        self.set_input_embeddings(operations.Embedding(config["vocab_size"], config["hidden_size"], dtype=dtype, device=device))


def load_clip(checkpoint: Checkpoint, embeddings: list[str]) -> comfy.sd.CLIP:
    """CLIP with the checkpoint's vocabulary; `embeddings` are the host's folders of textual inversions.

    Its prompts have at least the 77 rows that the world of Stable Diffusion counts on, of which the model reads the first.
    """
    from transformers import CLIPTextConfig

    config, tokenizer = CLIPTextConfig(**checkpoint.config.clip_text).to_dict(), checkpoint.clip_tokenizer()
    length = checkpoint.config.uvit.num_text_tokens
    rows = rows_of_prompt(length)

    class Tokens(comfy.sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None):
            super().__init__(
                "",
                max_length=rows,
                embedding_directory=embedding_directory,
                embedding_size=config["hidden_size"],
                tokenizer_class=_HostTokenizer(tokenizer),
            )

    class Tower(comfy.sd1_clip.SDClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None):
            end = config["eos_token_id"]
            special = {"start": config["bos_token_id"], "end": end, "pad": end}
            super().__init__(
                device,
                length,
                textmodel_json_config=dict(config),
                dtype=dtype,
                special_tokens=special,
                model_class=TextTower,
                return_projected_pooled=False,
                model_options=model_options or {},
            )

        def forward(self, tokens: list[list[Any]]) -> tuple[Any, ...]:
            """Encodes the first `length` tokens of each chunk; the rows of the others are zero."""
            out, *rest = super().forward([_read_tokens(chunk, length, config["eos_token_id"]) for chunk in tokens])
            return (F.pad(out, (0, 0, 0, max(0, len(tokens[0]) - length))), *rest)

    class Tokenizer(comfy.sd1_clip.SD1Tokenizer):
        vocabulary = checkpoint.config.vocabulary

        def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None):
            super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=Tokens)

    class Model(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None):
            super().__init__(device, dtype, model_options or {}, clip_model=Tower)

        def encode_token_weights(self, tokens: Any) -> Any:
            check = check_tokens(tokens[self.clip_name], tokenizer, Tokenizer.vocabulary, length)
            encoded = super().encode_token_weights(tokens)
            return (*encoded, {NOTE: check}) if check else encoded

    weights = checkpoint.state_dict("clip_text")
    return comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(Tokenizer, Model),
        embedding_directory=embeddings,
        parameters=comfy.utils.calculate_parameters(weights),
        state_dict=[weights],
    )


def _read_tokens(chunk: list[Any], length: int, end: int) -> list[Any]:
    """The first tokens of a chunk of ids and textual inversions, closed by the end token as the encoder was trained."""
    read = chunk[:length]
    if len(chunk) > length and not any(isinstance(token, int) and token == end for token in read):
        read[-1] = end
    return read


class _HostTokenizer:
    """Adapts a checkpoint's tokenizer to the interface and constructor that the host's SDTokenizer expects."""

    def __init__(self, tokenizer: BytePairTokenizer):
        self.tokenizer = tokenizer

    def from_pretrained(self, path: str, **kwargs: Any) -> _HostTokenizer:
        return self

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [self.tokenizer.vocab[START], *self.tokenizer.encode(text), self.tokenizer.vocab[END]]}

    def get_vocab(self) -> dict[str, int]:
        return self.tokenizer.vocab

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens)
