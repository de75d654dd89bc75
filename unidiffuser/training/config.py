"""The settings of a training run, as YAML."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

PRECISIONS = ("auto", "bf16", "no")
STRATEGIES = ("ddp", "fsdp")
OPTIMIZERS = ("adamw", "muon")


@dataclass
class TrainConfig:
    """Settings of one run; read from YAML, kept beside the run as ``config.json``. The same file serves one process on a CPU
    and many nodes: how many processes there are is said to the launcher (torchrun, `accelerate launch`), not here.

    Attributes:
        stage: name of the stage, see :data:`unidiffuser.training.stages.STAGES`.
        out: folder of the run: ``config.json``, ``checkpoints/``, ``losses.jsonl``, ``losses.png``, ``speed.json``,
            ``samples/``, ``tensorboard/``.
        steps: optimizer steps in all.
        batch_size: of one step, all processes together.
        micro_batch: most examples of one forward pass; gradients are accumulated over as many passes as it takes. 0: all of
            the process's share at once.
        optimizer: "adamw", or "muon" for the matrices of the transformer blocks and AdamW for the rest: fewer steps to the
            same loss, for stages of the network.
        learning_rate: peak; reached after ``warmup_steps``, kept, and brought linearly to 0 over the last ``decay`` share.
        ema_decay: horizon of the averaged weights, which are what a stage exports.
        precision: "bf16" (weights and optimizer stay float32), "no", or "auto": bf16 where the device multiplies it. A CPU
            that does not is 20 to 80 times slower in it.
        strategy: with several processes, "ddp" (each holds everything) or "fsdp" (FSDP2: weights, gradients, optimizer and
            average are cut over the processes).
        checkpoint_activations: keep only the inputs of the blocks and compute the rest again going backwards: less memory, a
            third more work.
        compile: let torch compile the transformer blocks: a GPU then waits less for small kernels, which pays after a few
            hundred steps. Needs a C++ compiler (CPU) or Triton (CUDA). Same results up to rounding.
        cuda_graphs: record the forward and backward pass once and replay it: a step of a small network then takes what its
            kernels take, not what launching them takes. For one process with a GPU; elsewhere nothing changes. Same results.
        workers: processes that read and prepare batches ahead; 0 does it in between.
        keep: how many checkpoints stay.
        tensorboard: write curves and samples for TensorBoard too.
        peak_tflops: of one device for the precision's matrix products, for the share of peak; known GPUs need none.
        options: what the stage itself needs (sizes, data, mix).
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
    log_every: int = 10
    tensorboard: bool = False
    peak_tflops: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_file(cls, path: str | Path, **overrides: Any) -> TrainConfig:
        """Read YAML; ``overrides`` that are not None win. Unknown or impossible settings raise ValueError."""
        import yaml

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no training config at {path}")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"{path} is not a YAML mapping of training settings")
        values |= {k: v for k, v in overrides.items() if v is not None}
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"{path}: unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        if missing := [name for name in ("stage", "out") if name not in values]:
            raise ValueError(f"{path}: missing {' and '.join(missing)}")
        config = cls(**values)
        config.betas = (float(config.betas[0]), float(config.betas[1]))
        for name in ("steps", "batch_size", "save_every", "sample_every", "log_every", "keep"):
            if getattr(config, name) < 1:
                raise ValueError(f"{path}: {name} must be at least 1, got {getattr(config, name)}")
        for name, choices in (("precision", PRECISIONS), ("strategy", STRATEGIES), ("optimizer", OPTIMIZERS)):
            if getattr(config, name) not in choices:
                raise ValueError(f"{path}: {name} must be one of {', '.join(choices)}, got {getattr(config, name)!r}")
        return config

    def rate(self, step: int) -> float:
        """Learning rate of 0-based ``step``."""
        up = min(1.0, (step + 1) / max(1, self.warmup_steps))
        down = min(1.0, (self.steps - step) / max(1.0, self.decay * self.steps))
        return self.learning_rate * min(up, down)
