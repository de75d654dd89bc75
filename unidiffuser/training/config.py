"""Settings of a training run, read from YAML."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from ..media.json_files import brief, shown_list
from ..media.yaml_settings import read_mapping, typed, typed_values

PRECISIONS = ("auto", "bf16", "no")
STRATEGIES = ("ddp", "fsdp")
OPTIMIZERS = ("adamw", "muon")
MOST_STEPS = 10**9
BELOW_ONE = (0.0, 0.9999999)
RANGES = {"learning_rate": (0.0, 100.0), "weight_decay": (0.0, 100.0), "decay": (0.0, 1.0), "ema_decay": BELOW_ONE,
          "max_grad_norm": (1e-12, 1e12)}  # fmt: skip


@dataclass
class TrainConfig:
    """Settings of one run. The number of processes is the launcher's (torchrun, `accelerate launch`), not the config's.

    Attributes:
        stage: name of the training stage, see `unidiffuser.training.stages.STAGES`.
        out: folder of the run; `config.json` in it keeps these settings.
        steps: optimizer steps in total.
        batch_size: examples of one step, over all processes.
        micro_batch: most examples in one forward pass of one process; gradients are accumulated over the passes. 0: one pass.
        optimizer: "adamw", or "muon" for the matrices of the transformer blocks and AdamW for the rest.
        learning_rate: peak learning rate.
        warmup_steps: steps of linear warm-up to it.
        decay: last fraction of the steps, 0 to 1, over which it falls linearly to 0; 0 keeps it constant.
        betas: of AdamW.
        weight_decay: of matrices; biases, norms and embeddings have none.
        ema_decay: of the exponential moving average of the weights, which is what a stage exports.
        max_grad_norm: gradients are clipped to this norm.
        precision: "bf16" (weights and optimizer stay float32), "no" (float32), or "auto": bf16 on devices that are faster in
            it. A CPU that is not takes 20 to 80 times as long.
        strategy: for several processes: "ddp", or "fsdp" (FSDP2: weights, gradients, optimizer and average are sharded).
        checkpoint_activations: keep only the inputs of the blocks and recompute the rest in the backward pass: less memory, a
            third more compute.
        compile: compile the transformer blocks with torch.compile; equal results up to rounding. Needs a C++ compiler (CPU) or
            Triton (CUDA), and pays after a few hundred steps.
        cuda_graphs: record the forward and backward pass once and replay it, which saves a small network the launch times of
            its kernels. One process with a GPU; ignored on a CPU. Equal results.
        workers: processes that prepare batches ahead; 0 prepares them in the training process.
        seed: of initial weights, order of the data and all random numbers.
        save_every: steps between checkpoints.
        keep: newest checkpoints that are kept.
        sample_every: steps between samples.
        first_sample: step of an earlier first sample; 0 for none.
        tensorboard: also log to TensorBoard.
        peak_tflops: bf16 peak of one device, for the logged fraction of peak; known for common GPUs.
        options: settings of the stage itself.
    """

    stage: str
    out: str
    steps: int = 1000
    batch_size: int = 64
    micro_batch: int = 0
    optimizer: str = "adamw"
    learning_rate: float = 2e-4
    warmup_steps: int = 100
    decay: float = 0.3
    betas: tuple[float, float] = (0.9, 0.9)
    weight_decay: float = 0.03
    ema_decay: float = 0.999
    max_grad_norm: float = 1.0
    precision: str = "auto"
    strategy: str = "ddp"
    checkpoint_activations: bool = False
    compile: bool = False
    cuda_graphs: bool = False
    workers: int = 0
    seed: int = 0
    save_every: int = 500
    keep: int = 2
    sample_every: int = 1000
    first_sample: int = 0
    tensorboard: bool = False
    peak_tflops: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_file(cls, path: str | Path, **overrides: Any) -> TrainConfig:
        """Read a YAML file.

        Args:
            path: the file.
            overrides: settings that replace the file's, unless None.

        Raises:
            FileNotFoundError: no such file.
            ValueError: an unknown, missing or impossible setting.
        """
        path = Path(path)
        values = read_mapping(path, "training")
        values |= {k: v for k, v in overrides.items() if v is not None}
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"{path}: unknown settings {shown_list(unknown)}; known are {', '.join(sorted(known))}")
        if missing := [name for name in ("stage", "out") if name not in values]:
            raise ValueError(f"{path}: missing {' and '.join(missing)}")
        config = cls(**typed(cls, values, str(path)))
        return config.checked(str(path))

    def checked(self, where: str = "the settings of the training") -> TrainConfig:
        """These settings, once all numbers are in their ranges; ValueError that begins with `where` otherwise."""
        for name in ("steps", "batch_size", "save_every", "sample_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{where}: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("micro_batch", "warmup_steps", "workers", "first_sample"):
            if getattr(self, name) < 0:
                raise ValueError(f"{where}: {name} must be at least 0, got {getattr(self, name)}")
        numbers = {"betas[0]": self.betas[0], "betas[1]": self.betas[1]} | {name: getattr(self, name) for name in RANGES}
        for name, value in numbers.items():
            low, high = RANGES.get(name, BELOW_ONE)
            if not low <= value <= high:
                raise ValueError(f"{where}: {name} must be a number from {low:g} to {high:g}, got {value}")
        if self.steps > MOST_STEPS:
            raise ValueError(f"{where}: steps must be at most {MOST_STEPS}, got {brief(self.steps)}")
        for name, choices in (("precision", PRECISIONS), ("strategy", STRATEGIES), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{where}: {name} must be one of {', '.join(choices)}, got {brief(getattr(self, name))}")
        return self

    def rate(self, step: int) -> float:
        """Learning rate of a 0-based step."""
        up = min(1.0, (step + 1) / max(1, self.warmup_steps))
        down = min(1.0, (self.steps - step) / max(1.0, self.decay * self.steps))
        return self.learning_rate * min(up, down)


def stage_options(options: Mapping[str, Any], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a stage, each one known and of its type.

    Args:
        options: `TrainConfig.options`.
        kinds: the type of each option; a message lists their names in this order.

    Raises:
        ValueError: an unknown option, or a value of another type.
    """
    if unknown := sorted(map(str, options.keys() - kinds.keys())):
        raise ValueError(f"unknown options {shown_list(unknown)}; known are {', '.join(kinds)}")
    plain = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in options.items()}
    return typed_values(kinds, plain, "options")


def kinds_of(settings: type) -> dict[str, Any]:
    """Types of a dataclass's fields in alphabetical order, without the seed, which is the run's."""
    hints = get_type_hints(settings)
    return {each.name: hints[each.name] for each in sorted(fields(settings), key=lambda f: f.name) if each.name != "seed"}
