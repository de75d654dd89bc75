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
                data = json.loads(bytes(file.get_tensor(KEY).tolist()))
        except (SafetensorError, OSError):
            return None  # the library reports damaged files
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: its entry {KEY} is not JSON ({error}). Save the model again.") from error
        if not (isinstance(data, dict) and isinstance(data.get("name"), str) and isinstance(data.get("config"), dict)):
            raise ValueError(f"{path} is damaged: its entry {KEY} names no checkpoint. Save the model again.")
        return cls(data["name"], ModelConfig.from_dict(data["config"]))


def read_network(path: str) -> dict[str, Tensor]:
    """State dict of a `HostUViT` from a file that the host saved."""
    weights: dict[str, Any] = comfy.utils.load_torch_file(path, safe_load=True)
    return {name.removeprefix(PREFIX): tensor for name, tensor in weights.items() if name.startswith(PREFIX)}
