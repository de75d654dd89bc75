"""What a reader of any layout returns: the parts of a model that it found, under canonical names, and their sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import ModelConfig
from .keys import RECIPES, Recipes, apply
from .tokenizers import Spec
from .weights import WeightFiles, read_json, shape_of, windows

_TIED = "gpt.lm_head.weight"
LANDMARKS = {  # a tensor every part of that kind has
    "uvit": "pos_embed",
    "vae": "decoder.conv_out.weight",
    "clip_text": "text_model.embeddings.token_embedding.weight",
    "clip_image": "vision_model.embeddings.patch_embedding.weight",
    "caption": "encode_prefix.weight",
}


class InMemory:
    """Tensors in memory behind the interface of WeightFiles."""

    name = "the given state dict"

    def __init__(self, tensors: dict[str, Tensor]):
        self.shapes = tensors

    def open(self) -> dict[str, Tensor]:
        return self.shapes


class Part:
    """The tensors of one part under canonical names, made from stored ones when asked for.

    `shapes` has a "meta" tensor (shape and dtype) for each name.
    """

    def __init__(self, source: WeightFiles | InMemory, recipes: Recipes):
        self.source, self.recipes = source, recipes
        self.shapes = apply(recipes, {key: shape_of(tensor) for key, tensor in source.shapes.items()})

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, memory-mapped where the source is a file."""
        return apply(self.recipes, self.source.open())

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) in the given order, through mappings so short-lived that little of the file stays resident."""
        sizes = {name: self.shapes[name].numel() * self.shapes[name].element_size() for name in names}
        for group in windows(sizes):
            stored = self.source.open()
            for name in group:
                yield name, self.recipes[name].make(*(stored[key] for key in self.recipes[name].keys))


@dataclass(frozen=True)
class Contents:
    """What a reader found. `notes` tell why files that might have helped were passed over."""

    config: ModelConfig
    parts: dict[str, Part]
    tokenizers: dict[str, Spec] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def make_part(name: str, source: WeightFiles | InMemory) -> Part:
    """A part from tensors in any dialect. GPT-2's output matrix is left out where it equals the input embedding."""
    part = Part(source, RECIPES[name](source.shapes))
    if name == "caption" and _TIED in part.recipes:
        both = (part.recipes[key].keys[0] for key in (_TIED, "gpt.transformer.wte.weight"))
        stored = source.open()
        head, embedding = (stored.get(key) for key in both)
        if head is not None and embedding is not None and torch.equal(head, embedding):
            part = Part(source, {key: recipe for key, recipe in part.recipes.items() if key != _TIED})
    return part


def infer(sizes: Callable[..., Any], part: Part) -> Any:
    try:
        return sizes(part.shapes)
    except KeyError as error:
        raise ValueError(f"{part.source.name} is incomplete: {error.args[0]} is missing.") from error
    except ValueError as error:
        raise ValueError(f"{part.source.name}: {error}") from error


def hf_fields(folder: Path, kind: str, section: str) -> dict[str, Any]:
    """The fields a transformers config.json settles that shapes do not; {} without one."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    import transformers

    data = read_json(path)
    config = getattr(transformers, kind)(**data.get(section, data)).to_dict()
    return {name: config[name] for name in ("num_attention_heads", "hidden_act", "layer_norm_eps")}
