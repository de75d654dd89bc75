"""Types of the values in configs that come from files.

A config is checked against an example of itself, which has a value of the right type for every field. What a release does not
know is left out: transformers' configs take any field, and some of them load code.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..media.json_files import brief, read_object

TEXT_HEADS, IMAGE_HEADS = 8, 12  # of a CLIP config that does not say, as in transformers
LARGEST = 1e12  # of a number that is no size
LONGEST = 1000  # entries of a list, characters of a text
_TOWER = {"attention_dropout": 0.0, "initializer_factor": 1.0, "initializer_range": 0.02, "projection_dim": 1, "dropout": 0.0}
_MORE: Mapping[str, Any] = {  # fields that v1's config does not have; a tuple lists alternatives
    "uvit": {
        "img_size": (1, [1]), "sigma_data": (None, 0.5), "detail_width": 1, "detail_blocks": 1, "detail_features": 1,
        "detail_inner": 1, "detail_inner_blocks": 1, "detail_told": 1, "mlp_ratio": 4.0,
    },
    "vae": {
        "palette": (None, {"manners": [""], "colours": 1}),
        "upsampler": (None, {"features": 1, "width": 1}),
        "preview_rgb": (None, {"factors": [[0.0]], "bias": [0.0]}),
    },
    "clip_text": _TOWER,
    "clip_image": _TOWER | {"stem": {"unshuffle": 1, "channels": [1], "pool": 1}},
    "caption": {
        "gpt2": {
            "n_inner": (None, 1), "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "initializer_range": 0.02,
            "num_hidden_layers": 1, "max_position_embeddings": 1, "hidden_size": 1, "num_attention_heads": 1,
            "bos_token_id": (None, 1), "eos_token_id": (None, 1), "scale_attn_weights": True,
        },
    },
    "defaults": {
        "speeds": (None, [1.0]), "guidance": (1.0, [1.0]), "method": "", "spacing": "",
        "task_steps": dict.fromkeys(("text_to_image", "image_to_text", "joint", "image", "text"), 1),
    },
}  # fmt: skip


@functools.cache
def _example() -> dict[str, Any]:
    from .config import ModelConfig

    return _merged(ModelConfig().to_dict(), _MORE)


def _merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        k: _merged(base[k], v) if isinstance(base.get(k), Mapping) and isinstance(v, Mapping) else v for k, v in more.items()
    }
    return {**base, **both}


def checked_config(data: Mapping[str, Any]) -> dict[str, Any]:
    """The known fields of a model's config.

    Args:
        data: a `ModelConfig` as read from JSON; its vocabulary is left to `Vocabulary`.

    Raises:
        ValueError: a value of another type; begins with the field's name, such as "uvit.depth".
    """
    fields = {name: value for name, value in data.items() if name != "vocabulary"}
    known = {name: checked(value, _example()[name], name) for name, value in fields.items() if name in _example()}
    return known | ({"vocabulary": data["vocabulary"]} if "vocabulary" in data else {})


def checked(value: Any, example: Any, name: str) -> Any:
    """A value from JSON, if it has the type of an example.

    Args:
        value: the value.
        example: one of the same type: true or false, a whole number (none is negative), a number, a text, a list with one
            entry, an object with all known fields; a tuple of alternatives.
        name: subject of the message.

    Returns:
        The value; an object without fields that the example lacks.

    Raises:
        ValueError: a value of another type.
    """
    if isinstance(example, tuple):
        return _one_of(value, example, name)
    if isinstance(example, Mapping) and isinstance(value, Mapping):
        return {key: checked(value[key], kind, f"{name}.{key}") for key, kind in example.items() if key in value}
    if isinstance(example, list) and isinstance(value, (list, tuple)) and len(value) <= LONGEST:
        return [checked(item, example[0] if example else 1, name) for item in value]
    if _is_like(value, example):
        return value
    title = f"the configuration's {name!r}" if isinstance(example, Mapping) and "." not in name else name
    raise ValueError(f"{title} must be {_kind(example)}, not {brief(value)}")


def _one_of(value: Any, examples: tuple[Any, ...], name: str) -> Any:
    for example in examples:
        same = isinstance(value, (Mapping, list, tuple)) and isinstance(example, (Mapping, list))
        if (value is None and example is None) or (same and isinstance(value, Mapping) == isinstance(example, Mapping)):
            return None if value is None else checked(value, example, name)
        if example is not None and not isinstance(example, (Mapping, list)) and _is_like(value, example):
            return value
    raise ValueError(f"{name} must be {' or '.join(map(_kind, examples))}, not {brief(value)}")


def _is_like(value: Any, example: Any) -> bool:
    if isinstance(example, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(example, bool)
    if isinstance(example, int):
        return isinstance(value, int) and 0 <= value < 1 << 62  # torch's whole numbers have 64 bits
    if isinstance(example, float):
        return isinstance(value, (int, float)) and abs(value) <= LARGEST and math.isfinite(value)
    return isinstance(example, str) and isinstance(value, str) and len(value) <= LONGEST


def _kind(example: Any) -> str:
    if isinstance(example, bool):
        return "true or false"
    names = {int: "a whole number", float: "a number", str: "a text", list: "a list", dict: "an object", type(None): "null"}
    return names[type(example)]


def field_of(folder: Path, settings: Mapping[str, Any], name: str, example: Any, default: Any = None) -> Any:
    """A field of a folder's config.json.

    Args:
        folder: for the message.
        settings: the content of its config.json.
        name: of the field.
        example: a value of its type, see `checked`.
        default: where the field is absent; None if it must be there.

    Raises:
        ValueError: absent, or of another type; names the file.
    """
    if name not in settings and default is not None:
        return default
    try:
        if name not in settings:
            raise ValueError(f"{name} is missing")
        return checked(settings[name], example, name)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is damaged ({error}); download it again.") from None


def clip_fields(folder: Path, section: str, heads: int) -> dict[str, Any]:
    """Fields of a CLIP tower's config.json that shapes do not determine; {} without the file.

    Args:
        folder: folder of the config.json.
        section: key of the tower's fields in the config of a whole CLIP model.
        heads: attention heads where the file does not say: `TEXT_HEADS` or `IMAGE_HEADS`.
    """
    if not (folder / "config.json").is_file():
        return {}
    data = read_object(folder / "config.json")
    data = data.get(section, data)
    if not isinstance(data, Mapping):
        raise ValueError(f"{folder / 'config.json'} is damaged ({section} must be an object); download it again.")
    return {
        "num_attention_heads": field_of(folder, data, "num_attention_heads", 1, heads),
        "hidden_act": field_of(folder, data, "hidden_act", "", "quick_gelu"),
        "layer_norm_eps": field_of(folder, data, "layer_norm_eps", 1e-5, 1e-5),
    }
