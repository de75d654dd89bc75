"""Models that the host's own ModelSave or CheckpointSave has written, for instance a merge or one with a LoRA in it.

The host writes the network under "model.diffusion_model." and nothing that tells its sizes, so the MODEL adds one tensor with
them; the parts that do not change stay where they are and are named in it.
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
    """What a saved MODEL came from: `name` as in "Load UniDiffuser", and the sizes of everything."""

    name: str
    config: ModelConfig

    def tensor(self) -> Tensor:
        """uint8 (N,), as it is stored."""
        text = json.dumps({"name": self.name, "config": self.config.to_dict()})
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    @classmethod
    def of_file(cls, path: str) -> Origin | None:
        """That of a file; None if the host did not write it from a MODEL of this pack."""
        if not path.endswith(".safetensors"):
            return None
        try:
            with safe_open(path, framework="pt") as file:
                if KEY not in file.keys():  # noqa: SIM118 (not a dict)
                    return None
                data = json.loads(bytes(file.get_tensor(KEY).tolist()))
        except (SafetensorError, OSError):
            return None  # the library says what is wrong with it
        return cls(data["name"], ModelConfig.from_dict(data["config"]))


def read_network(path: str) -> dict[str, Tensor]:
    """State dict of a `HostUViT` from a file that the host has written."""
    weights: dict[str, Any] = comfy.utils.load_torch_file(path, safe_load=True)
    return {name.removeprefix(PREFIX): tensor for name, tensor in weights.items() if name.startswith(PREFIX)}
