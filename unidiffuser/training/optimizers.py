"""The optimizers of a run: AdamW, or Muon for the matrices of the blocks and AdamW for the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .config import TrainConfig
from .muon import Muon


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of AdamW: weight decay for matrices, none for biases, norms and embeddings."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    plain = [p for n, p in named if p.ndim < 2 or "embedding" in n or "pos_embed" in n]
    ids = {id(p) for p in plain}
    return [
        {"params": [p for _, p in named if id(p) not in ids], "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def block_matrices(model: nn.Module, blocks: tuple[type[nn.Module], ...]) -> list[nn.Parameter]:
    """Trainable matrices inside the blocks, which Muon is made for; layers that read or write data are not among them."""
    inside = [m for m in model.modules() if isinstance(m, blocks)]
    return [p for block in inside for p in block.parameters() if p.ndim == 2 and p.requires_grad]


def make_optimizers(model: nn.Module, blocks: tuple[type[nn.Module], ...], config: TrainConfig) -> list[Optimizer]:
    """The optimizers of a run; all follow the learning rate of the config.

    Raises:
        ValueError: `optimizer: muon` for a stage without blocks.
    """
    groups = parameter_groups(model, config.weight_decay)
    others: list[Optimizer] = []
    if config.optimizer == "muon":
        matrices = block_matrices(model, blocks)
        if not matrices:
            raise ValueError(
                f"optimizer: muon is for stages with transformer blocks, {config.stage} has none; use optimizer: adamw"
            )
        ids = {id(p) for p in matrices}
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in ids]
        others = [Muon(matrices, lr=config.learning_rate, weight_decay=config.weight_decay)]
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=config.betas, eps=1e-8)
    return [adamw, *others]
