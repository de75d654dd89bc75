"""Files of the host's ModelSave and CheckpointSave, for instance a merge or a model with a merged LoRA.

The host writes only the network, under "model.diffusion_model.". The MODEL adds one tensor with the config and the name of
the original checkpoint, from which the other parts are loaded.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import comfy.utils
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..unidiffuser.checkpoints.config import ModelConfig
from ..unidiffuser.checkpoints.fields import checked_config
from ..unidiffuser.checkpoints.sizes import check_sizes
from ..unidiffuser.checkpoints.skeleton import skeleton
from ..unidiffuser.media.json_files import parse_json
from .host_network import host_network

KEY, PREFIX = "unidiffuser_origin", "model.diffusion_model."


@dataclasses.dataclass(frozen=True)
class Origin:
    """The checkpoint that a saved MODEL came from: its `name` in "Load UniDiffuser", and its config."""

    name: str
    config: ModelConfig

    def tensor(self) -> Tensor:
        """The stored form, uint8 (N,): JSON in UTF-8."""
        text = json.dumps({"name": self.name, "config": self.config.to_dict()})
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    @classmethod
    def of_file(cls, path: str) -> Origin | None:
        """The origin stored in a file; None if the host did not save it from a MODEL of this pack."""
        if not path.endswith(".safetensors"):
            return None
        try:
            with safe_open(path, framework="pt") as file:
                if KEY not in file.keys():  # noqa: SIM118 (not a dict)
                    return None
                stored = file.get_tensor(KEY)
                if stored.dtype != torch.uint8 or stored.ndim != 1:
                    raise ValueError(f"numbers of {stored.dtype} in {stored.ndim} dimensions")
                data = parse_json(stored.numpy().tobytes(), "it", "")
        except (SafetensorError, OSError):
            return None  # the library reports damaged files
        except ValueError as error:
            raise ValueError(f"{path} is damaged: its entry {KEY} is not JSON ({error}). Save the model again.") from error
        if not (isinstance(data, dict) and isinstance(data.get("name"), str) and isinstance(data.get("config"), dict)):
            raise ValueError(f"{path} is damaged: its entry {KEY} names no checkpoint. Save the model again.")
        try:
            return cls(data["name"], ModelConfig.from_dict(checked_config(data["config"])))
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{path} is damaged: the config in its entry {KEY} has {error}. Save the model again.") from error


def read_network(path: str, config: ModelConfig) -> dict[str, Tensor]:
    """State dict of a `HostUViT` from a file that the host saved.

    Raises:
        ValueError: its tensors are not those of the config; checked before the host builds the network, which fills in what is
            missing with random numbers.
    """
    stored: dict[str, Any] = comfy.utils.load_torch_file(path, safe_load=True)
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in stored.items() if name.startswith(PREFIX)}
    table = weights.get("position.weight")
    names: dict[str, Tensor] = weights if table is None else {"pos_embed": table[None], **weights}
    try:
        check_sizes(config, {"uvit": names})
        with skeleton():
            needed = host_network(config.uvit, config.caption.prefix_dim, torch.nn).state_dict()
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{path} is damaged: its config describes no network ({reason}). Save the model again.") from error
    missing = [name for name in needed if name not in weights]
    quantised = any(name.endswith("comfy_quant") for name in weights)  # some of those formats pack several numbers into one
    misshapen = [
        name
        for name, tensor in needed.items()
        if name in weights and not quantised and (weights[name].shape != tensor.shape or not weights[name].is_floating_point())
    ]
    for kind, found in (("missing", missing), ("of another shape or type", misshapen)):
        if found:
            raise ValueError(f"{path} is damaged: {len(found)} of its tensors are {kind}, as {found[0]}. Save the model again.")
    return weights
