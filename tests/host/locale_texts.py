"""locales/<language>/nodeDefs.json: the English file is generated from the schemas, the Chinese one is written by hand."""

from __future__ import annotations

from typing import Any

Texts = dict[str, Any]


def english_texts(info: dict[str, Any]) -> Texts:
    """The texts of the schemas in the format of nodeDefs.json; `info` is the host's /object_info."""
    return {name: _node(node) for name, node in info.items() if name.startswith("UniDiffuser")}


def _node(node: dict[str, Any]) -> Texts:
    outputs = zip(node["output_name"], node["output_tooltips"], strict=True)
    return {
        "display_name": node["display_name"],
        "description": node["description"],
        "inputs": _inputs(node["input"]),
        "outputs": {str(i): {"name": name, "tooltip": tooltip} for i, (name, tooltip) in enumerate(outputs)},
    }


def _inputs(groups: dict[str, Any], prefix: str = "") -> Texts:
    """Inputs by name; those of a dynamic combo's options follow it, prefixed with its name."""
    texts: Texts = {}
    for name, (_, options) in (item for group in ("required", "optional") for item in groups.get(group, {}).items()):
        texts[prefix + name] = {"name": name, "tooltip": options["tooltip"]}
        for option in options.get("options", []):
            if isinstance(option, dict):
                nested = _inputs(option["inputs"], f"{prefix}{name}_")
                differing = [key for key in nested if texts.get(key, nested[key]) != nested[key]]
                if differing:
                    raise ValueError(f"{differing[0]} has one text in the front end, but another tooltip in each option.")
                texts |= nested
    return texts
