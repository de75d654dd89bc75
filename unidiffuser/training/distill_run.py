"""From latent shards to a student: the conditions of the trajectories, and the two steps of a distillation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.checkpoint import load_checkpoint
from ..data.fingerprint import check_encoders
from ..data.shards import LatentShards, posterior_sample
from ..distributed import joined
from ..evaluation.digests import weights_digest
from ..runtime.precision import automatic_dtype
from ..streams import Streams
from ..uvit import UViT
from .config import TrainConfig
from .distill import LORA, MODEL, DistillStage, fewest_of
from .loop import Estimate, Watch, train
from .network import trainable_network
from .trajectories import Route, draw_trajectories

FOLDER = "trajectories"  # in the run folder
TEXT_FIRST = (0.0, 1.0)  # speeds of image and text


@dataclass(frozen=True)
class Conditions:
    """Clean streams of encoded pairs, as conditions of trajectories: pair k modulo their number, its captions in turn."""

    shards: LatentShards
    seed: int = 0

    def __call__(self, task: str, number: int) -> Streams:
        """The condition (1, ...) of trajectory `number`: captions for pictures, pictures for captions."""
        turn, index = divmod(number, len(self.shards))
        (row,) = self.shards.read(torch.tensor([index]))
        if task == "text_to_image":
            return Streams(text=row["text"][turn % len(row["text"])][None])
        img = posterior_sample(row, torch.Generator().manual_seed(self.seed + number))
        return Streams(img=img[None], clip_img=row["clip_img"][None])


def distill_config(
    out: str | Path, *, steps: int = 1000, batch_size: int = 48, learning_rate: float = 3e-4, **more: Any
) -> TrainConfig:
    """Settings of the training loop for a student; `more` are fields of `TrainConfig`."""
    values = {
        "warmup_steps": max(1, steps // 10),
        "decay": 0.9,
        "betas": (0.9, 0.95),
        "weight_decay": 0.01,
        "ema_decay": 0.998,
        "save_every": 100,
        "sample_every": max(1, steps // 4),
        **more,
    }
    return TrainConfig("distill", str(out), steps, batch_size, learning_rate=learning_rate, **values).checked()


def routes_for(wanted: Mapping[str, int], *, teacher_steps: int, guidance: float, count: int) -> list[Route]:
    """Routes of tasks; "joint" makes the caption first, then the picture (`TEXT_FIRST`).

    Few steps decide a caption, or a picture of a caption, but not both at once: a picture that takes shape while several
    captions are still possible is a blur of them.

    Args:
        wanted: steps of the student by task.
        teacher_steps: of the teacher, rounded to a multiple of the student's.
        guidance: of the teacher.
        count: trajectories of each route.
    """
    return [Route(task, few, max(1, round(teacher_steps / few)), guidance, count, TEXT_FIRST) for task, few in wanted.items()]


def distill(
    config: TrainConfig,
    model: str | Path,
    latents: str | Path,
    routes: Sequence[Route],
    *,
    fewest: Mapping[str, int] | None = None,
    rank: int | None = None,
    progress: bool = True,
    drawn: Callable[[int], None] = lambda count: None,
    watch: Watch | None = None,
    estimate: Estimate | None = None,
) -> Path:
    """Draw the trajectories of a model and train a student on them; what is finished of an earlier run is kept.

    Args:
        config: of the run, see `distill_config`.
        model: name or path of the teacher.
        latents: shards of pairs encoded by it (`unidiffuser data encode`). Keep pairs that the student shall not see out of it.
        routes: what the student learns.
        fewest: by task, the steps that `preset="fast"` takes; see `DistillStage`.
        rank: of a LoRA; None trains all weights.
        progress: show progress bars.
        drawn: called with the number of trajectories that were drawn, file by file.
        watch, estimate: see `training.loop.train`.

    Returns:
        The LoRA file, or the complete model.

    Raises:
        FileNotFoundError: no such checkpoint, or no shards.
        ValueError: a folder of other settings, or shards that other encoders made; see also `training.loop.train`.
    """
    fewest_of(fewest or {}, {route.task: route for route in routes})  # before anything is drawn
    out, shards = Path(config.out), LatentShards(latents)
    checkpoint = load_checkpoint(model)
    check_encoders(shards, checkpoint)
    with joined() as world:
        dtype = automatic_dtype(world.device)  # that in which the model samples there
        settings = {"model": weights_digest(checkpoint), "latents": shards.fingerprint, "dtype": str(dtype)}

        def teacher() -> UViT:
            weights = checkpoint.state_dict("uvit", dtype=torch.float32)
            return trainable_network(checkpoint.config.uvit, weights).to(world.device, dtype).eval()

        given = Conditions(shards, config.seed)
        draw_trajectories(teacher, routes, given, out / FOLDER, settings, world, seed=config.seed, watch=drawn)
    options: dict[str, Any] = {"checkpoint": str(model), "trajectories": str(out / FOLDER), "fewest": dict(fewest or {})}
    options |= {} if rank is None else {"rank": rank}
    config.options = {**options, **config.options}
    train(DistillStage(config), config, progress=progress, watch=watch, estimate=estimate)
    return out / (MODEL if rank is None else LORA)
