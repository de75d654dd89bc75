"""Parts of a checkpoint under canonical names, for the readers of all layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .config import ModelConfig
from .keys import RECIPES, Recipes, apply
from .tokenizers import Spec
from .weights import WeightFiles, shape_of, windows

_TIED = "gpt.lm_head.weight"
IDENTIFYING_KEYS = {  # a tensor by which a part is recognised
    "uvit": "pos_embed",
    "vae": "decoder.conv_out.weight",
    "clip_text": "text_model.embeddings.token_embedding.weight",
    "clip_image": "vision_model.embeddings.patch_embedding.weight",
    "caption": "encode_prefix.weight",
}
TITLES = {
    "uvit": "diffusion network",
    "vae": "autoencoder",
    "caption": "caption decoder",
    "clip_text": "CLIP text encoder",
    "clip_image": "CLIP image encoder",
}


class InMemoryTensors:
    """Tensors in memory, with the interface of `WeightFiles`."""

    name = "the given state dict"

    def __init__(self, tensors: dict[str, Tensor]):
        self.shapes = tensors

    def open(self) -> dict[str, Tensor]:
        return self.shapes


class ModelPart:
    """Tensors of one part under canonical names, converted on access.

    Attributes:
        source: the stored tensors.
        recipes: for each canonical name, the stored tensors it is made from.
        shapes: for each canonical name, a tensor on "meta" of its shape and dtype.
    """

    def __init__(self, source: WeightFiles | InMemoryTensors, recipes: Recipes):
        self.source, self.recipes = source, recipes
        self.shapes = apply(recipes, {key: shape_of(tensor) for key, tensor in source.shapes.items()})

    def tensors(self) -> dict[str, Tensor]:
        """All tensors; memory-mapped if the source is a file."""
        return apply(self.recipes, self.source.open())

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) in the given order.

        The file is mapped anew for each window of tensors, so that little of it stays resident.
        """
        sizes = {name: self.shapes[name].numel() * self.shapes[name].element_size() for name in names}
        for group in windows(sizes):
            stored = self.source.open()
            for name in group:
                yield name, self.recipes[name].make(*(stored[key] for key in self.recipes[name].keys))


@dataclass(frozen=True)
class CheckpointContents:
    """Result of reading a checkpoint.

    Attributes:
        config: sizes of all parts; those of an absent part are v1's.
        parts: the parts found, by name.
        tokenizers: the tokenizers found, by name.
        skipped: for each unreadable file that may hold an absent part, the reason.
    """

    config: ModelConfig
    parts: dict[str, ModelPart]
    tokenizers: dict[str, Spec] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()


def make_part(name: str, source: WeightFiles | InMemoryTensors) -> ModelPart:
    """Convert tensors of any known naming to a part.

    GPT-2's output matrix is left out if it equals the input embedding.

    Args:
        name: one of `keys.PARTS`.
        source: the stored tensors.

    Raises:
        ValueError: modules of a numbered list are missing.
    """
    try:
        part = ModelPart(source, RECIPES[name](source.shapes))
    except ValueError as error:
        raise ValueError(f"{source.name}: {error}") from error
    if name == "caption" and _TIED in part.recipes:
        both = (part.recipes[key].keys[0] for key in (_TIED, "gpt.transformer.wte.weight"))
        stored = source.open()
        head, embedding = (stored.get(key) for key in both)
        if head is not None and embedding is not None and torch.equal(head, embedding):
            part = ModelPart(source, {key: recipe for key, recipe in part.recipes.items() if key != _TIED})
    return part


def infer(sizes: Callable[..., Any], part: ModelPart) -> Any:
    """`sizes` of the part's shapes, with errors that name the file."""
    try:
        return sizes(part.shapes)
    except KeyError as error:
        raise ValueError(f"{part.source.name} is incomplete: {error.args[0]} is missing.") from error
    except ValueError as error:
        raise ValueError(f"{part.source.name}: {error}") from error
