"""Reader and writer of this project's layout, one safetensors file.

Keys are `<part>.<canonical name>` (see `keys`). The metadata, all strings, holds

- "format" = "unidiffuser" and "version" = "1",
- "config": a `ModelConfig` as JSON,
- "clip_tokenizer" and "gpt2_tokenizer": {"vocab": {token: id}, "merges": ["a b", ...]} as JSON; absent for the published ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..media.json_files import parse_object
from .config import ModelConfig
from .fields import checked_config
from .keys import PARTS, Recipe
from .parts import CheckpointContents, ModelPart
from .sizes import check_sizes
from .tokenizers import Spec
from .weights import WeightFiles, write_safetensors

FORMAT = "unidiffuser"
TOKENIZERS = ("clip_tokenizer", "gpt2_tokenizer")


def read_own(files: WeightFiles, metadata: dict[str, str]) -> CheckpointContents:
    """Read the single safetensors file that `save_checkpoint` writes.

    Raises:
        ValueError: a newer version, damaged metadata, or a config whose sizes the tensors contradict.
    """
    if metadata.get("version") != "1":
        raise ValueError(
            f"{files.name} has format version {metadata.get('version')!r}, this release reads '1'; update unidiffuser."
        )
    parts = {}
    for name in PARTS:
        prefix = name + "."
        recipes = {key.removeprefix(prefix): Recipe((key,)) for key in files.shapes if key.startswith(prefix)}
        if recipes:
            parts[name] = ModelPart(files, recipes)
    try:
        config = ModelConfig.from_dict(checked_config(parse_object(metadata["config"], "the config", "")))
        check_sizes(config, {name: part.shapes for name, part in parts.items()})
        tokenizers = {name: parse_object(metadata[name], name, "") for name in TOKENIZERS if name in metadata}
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"the metadata of {files.name} is damaged ({error}); convert it again.") from error
    return CheckpointContents(config, parts, tokenizers)


def write_own(
    path: Path, config: ModelConfig, parts: Mapping[str, ModelPart], tokenizers: dict[str, Spec], dtype: torch.dtype | None
) -> None:
    """Write the single file tensor by tensor; arguments as for `save_checkpoint`."""
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype must be float32, float16 or bfloat16, not {dtype}.")
    shapes = {
        f"{part}.{name}": tensor.to(target_dtype(tensor, dtype))
        for part, found in parts.items()
        for name, tensor in sorted(found.shapes.items())  # so that equal models are equal files
    }

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for part, found in parts.items():
            for name, tensor in found.stream(sorted(found.shapes)):
                yield f"{part}.{name}", _cast(tensor, dtype, f"{part}.{name}")

    metadata = {"format": FORMAT, "version": "1", "config": json.dumps(config.to_dict())}
    metadata |= {name: json.dumps(spec, ensure_ascii=False) for name, spec in tokenizers.items()}
    write_safetensors(path, shapes, tensors, metadata)


def target_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype after a conversion: `dtype` if the tensor is floating-point."""
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _cast(tensor: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    cast = tensor.to(target_dtype(tensor, dtype))
    if cast.dtype != tensor.dtype and torch.isinf(cast).any() and not torch.isinf(tensor).any():
        raise ValueError(f"{name} has values too large for {dtype}; use bfloat16 or float32.")
    return cast
