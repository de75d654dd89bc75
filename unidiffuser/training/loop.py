"""One training loop for every stage: accelerate, bf16, EMA, warm-up and decay, clipping, exact resume.

Which pictures a step sees, and every random number it draws, are functions of (seed, step) alone. A checkpoint therefore
needs only the weights, the optimizer, the EMA and the step, and a run that was killed continues with the losses of an
unbroken one. A checkpoint is one file, written to a temporary name and renamed.
"""

from __future__ import annotations

import json
import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


@dataclass
class TrainConfig:
    """Settings of one run; read from and kept beside the run as YAML.

    Attributes:
        stage: name of the stage, see :data:`unidiffuser.training.stages.STAGES`.
        out: folder of the run: ``config.yaml``, ``checkpoint.pt``, ``losses.jsonl``, ``losses.png``, ``samples/``.
        steps: optimizer steps in all.
        batch_size: of one step, shared among the processes of `accelerate launch`.
        learning_rate: peak; reached after ``warmup_steps``, kept, and brought linearly to 0 over the last ``decay`` share.
        ema_decay: horizon of the averaged weights, which are what a stage exports.
        precision: "bf16" (autocast), "fp16" or "no".
        options: what the stage itself needs (sizes, data, mix).
    """

    stage: str
    out: str
    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 2e-4
    warmup_steps: int = 100
    decay: float = 0.3
    betas: tuple[float, float] = (0.9, 0.9)
    weight_decay: float = 0.03
    ema_decay: float = 0.999
    max_grad_norm: float = 1.0
    precision: str = "bf16"
    seed: int = 0
    save_every: int = 500
    sample_every: int = 1000
    log_every: int = 10
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
        for name in ("steps", "batch_size", "save_every", "sample_every", "log_every"):
            if getattr(config, name) < 1:
                raise ValueError(f"{path}: {name} must be at least 1, got {getattr(config, name)}")
        return config

    def rate(self, step: int) -> float:
        """Learning rate of 0-based ``step``."""
        up = min(1.0, (step + 1) / max(1, self.warmup_steps))
        down = min(1.0, (self.steps - step) / max(1.0, self.decay * self.steps))
        return self.learning_rate * min(up, down)


@contextmanager
def seeded_init(seed: int) -> Iterator[None]:
    """Module initialisers know only the global generator: seed it for the time of building, then give its state back."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.random.set_rng_state(state)


class Stage(ABC):
    """What a stage adds to the loop: a model, data and a loss. ``size`` is the number of examples in an epoch."""

    model: nn.Module
    size: int

    @abstractmethod
    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """The examples of these indices, on the CPU."""

    @abstractmethod
    def loss(self, model: Any, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Scalars by name; "loss" is the one that is minimised. All randomness comes from ``generator`` (CPU)."""

    def sample(self, model: Any) -> Any:
        """A PIL picture of where training stands, or None."""
        return None

    @abstractmethod
    def export(self, model: Any) -> None:
        """Write what the next stage reads; called with the averaged weights when the run ends."""


def step_indices(size: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Indices of one step's batch: epochs are seeded permutations laid end to end, so any step can be computed alone."""
    first = step * batch_size
    out: list[int] = []
    while len(out) < batch_size:
        epoch, offset = divmod(first + len(out), size)
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        out += order[offset : offset + batch_size - len(out)].tolist()
    return torch.tensor(out)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms, position and token embeddings do not."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    plain = [p for n, p in named if p.ndim < 2 or "embedding" in n or "pos_embed" in n]
    ids = {id(p) for p in plain}
    return [
        {"params": [p for _, p in named if id(p) not in ids], "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """``torch.save`` to a temporary name, flushed to disk, then renamed: the file is complete or it is the old one."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def train(stage: Stage, config: TrainConfig, *, progress: bool = True) -> nn.Module:
    """Run (or resume) a stage to ``config.steps`` and export it.

    Returns:
        the model with the averaged weights.

    Raises:
        FloatingPointError: the loss is not finite; the last checkpoint is kept, and the message names the step.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from diffusers.training_utils import EMAModel
    from tqdm import tqdm

    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    AcceleratorState._reset_state()  # a process may train several stages; accelerate otherwise insists on one precision
    accelerator = Accelerator(mixed_precision=config.precision)
    model = stage.model
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.learning_rate, betas=config.betas, eps=1e-8
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ema = EMAModel(parameters, decay=config.ema_decay, use_ema_warmup=True, power=0.8, foreach=True)
    ema.to(accelerator.device)
    start = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        accelerator.unwrap_model(model).load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        ema.to(accelerator.device)
        start = state["step"]
        log.info("resuming %s at step %d", out, start)
    rank, ranks, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    if main:  # one process keeps the log and the checkpoints; all hold the same weights
        losses = _LossLog(out, start)
        (out / "config.json").write_text(json.dumps(asdict(config), indent=1), encoding="utf-8")

    steps = range(start, config.steps)
    bar = tqdm(steps, initial=start, total=config.steps, disable=not (progress and main), desc=config.stage)
    model.train()
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        batch = stage.batch(step_indices(stage.size, config.batch_size, config.seed, step)[rank::ranks])
        batch = {k: v.to(accelerator.device) for k, v in batch.items()}
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + step) * 1_009 + rank)
        with accelerator.autocast():
            terms = stage.loss(model, batch, generator)
        loss = terms["loss"]
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"{config.stage}: the loss is {loss.item()} at step {step}; the last good checkpoint is {checkpoint}. "
                "Lower learning_rate, or use precision: 'no'."
            )
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(parameters)
        done = step + 1
        if not main:
            continue
        losses.add(step, {k: v.item() for k, v in terms.items()})
        if done % config.log_every == 0:
            bar.set_postfix({k: f"{v:.4f}" for k, v in losses.recent().items()})
        if done % config.sample_every == 0 or done == config.steps:
            ema.store(parameters)
            ema.copy_to(parameters)
            _write_sample(stage, accelerator.unwrap_model(model), out / "samples" / f"{done:07d}.png")
            ema.restore(parameters)
            losses.draw()
        if done % config.save_every == 0 or done == config.steps:
            losses.flush()
            state = {
                "model": accelerator.unwrap_model(model).state_dict(),
                "optimizer": optimizer.state_dict(),
                "ema": ema.state_dict(),
                "step": done,
            }
            save_atomically(state, checkpoint)
    ema.copy_to(parameters)
    trained: nn.Module = accelerator.unwrap_model(model).eval()
    if main:
        stage.export(trained)
    accelerator.wait_for_everyone()
    return trained


def averaged_weights(model: nn.Module, checkpoint: Path) -> nn.Module:
    """Load the averaged weights of a (possibly unfinished) run into ``model``."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    model.load_state_dict(state["model"])
    shadow = iter(state["ema"]["shadow_params"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(next(shadow))
    return model.eval()


def _write_sample(stage: Stage, model: nn.Module, path: Path) -> None:
    model.eval()
    with torch.no_grad():
        picture = stage.sample(model)
    model.train()
    if picture is not None:
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(path.stem + ".partial.png")
        picture.save(partial)
        partial.replace(path)


class _LossLog:
    """``losses.jsonl`` (one line a step) and its curve; lines after the step that is resumed are dropped."""

    def __init__(self, out: Path, start: int):
        self.path = out / "losses.jsonl"
        self.rows: list[dict[str, float]] = []
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                if row["step"] < start:
                    self.rows.append(row)
        self._write(self.rows)
        self.pending: list[dict[str, float]] = []

    def _write(self, rows: list[dict[str, float]]) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        partial.replace(self.path)

    def add(self, step: int, terms: dict[str, float]) -> None:
        row = {"step": step, **terms}
        self.rows.append(row)
        self.pending.append(row)

    def flush(self) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.pending)
        self.pending = []

    def recent(self, window: int = 50) -> dict[str, float]:
        rows = self.rows[-window:]
        return {k: sum(r[k] for r in rows) / len(rows) for k in rows[-1] if k != "step"}

    def draw(self) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        width = max(1, len(self.rows) // 200)
        for key in [k for k in self.rows[-1] if k != "step"]:
            points = [self.rows[i : i + width] for i in range(0, len(self.rows), width)]
            axes.plot([p[-1]["step"] for p in points], [sum(r[key] for r in p) / len(p) for p in points], label=key)
        axes.set(xlabel="step", ylabel="loss", yscale="log")
        axes.legend()
        partial = self.path.with_name("losses.partial.png")
        figure.savefig(partial, dpi=110)
        partial.replace(self.path.with_name("losses.png"))
