"""One training loop for every stage and any number of processes: bf16, gradient accumulation, EMA, exact resume.

Which examples a step sees, and every random number in it, depend on (seed, step, position in the batch) alone. A checkpoint
therefore holds only the weights, the optimizer, the averaged weights and the step. A run that was killed continues with the
losses of an uninterrupted one, on another number of processes too.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer

from ..distributed import World, joined
from ..media.files import locked, replacing, write_text
from .average import Average
from .batches import Pass, Steps, loader
from .config import TrainConfig
from .graphs import recorded
from .optimizers import make_optimizers
from .record import RunLog
from .saving import last_good, remove_unfinished, resume, save, whole_weights
from .sharding import autocast, distribute, is_sharded, synchronised, unwrapped, whole
from .stage import TrainingStage

Watch = Callable[[int, dict[str, float], Image.Image | None], None]
"""Callback after a step: steps done, loss terms, and the sample image if one was made."""
Estimate = Callable[[float], None]
"""Callback before the first step: the seconds that all steps will take, by a rehearsal of one."""


LOCK = ".lock"  # in the run folder, held while it is trained
REHEARSED_ONCE = 5.0  # seconds of a step from which it is not rehearsed a second time


def train(
    stage: TrainingStage,
    config: TrainConfig,
    *,
    progress: bool = True,
    device: str | None = None,
    watch: Watch | None = None,
    estimate: Estimate | None = None,
) -> nn.Module:
    """Run a stage to `config.steps`, from its newest checkpoint if there is one, and export it.

    Args:
        stage: model, data and loss.
        config: settings of the run.
        progress: show a progress bar.
        device: of this process; None is its GPU if there is one, else the CPU.
        watch: called in the main process after each step. An exception from it ends the run, which continues from its newest
            checkpoint when it is started again.
        estimate: called in the main process before the first step.

    Returns:
        the model with the averaged weights; with FSDP2, complete in the main process only.

    Raises:
        FloatingPointError: a loss or gradient is not finite. The message names the step and the examples; weights and
            checkpoints are those from before it.
        ValueError: the run's checkpoint belongs to another config, or another process trains in this folder.
        OSError: a checkpoint cannot be written; the last good one is kept.
    """
    with joined(device) as world, _alone(Path(config.out), world):
        return _train(stage, config, world, progress, watch, estimate)


@contextmanager
def _alone(out: Path, world: World) -> Iterator[None]:
    """Hold the run folder, so that a second run in it is refused, and remove what a killed one left unfinished."""
    if not world.main:
        yield
        return
    with locked(out / LOCK, f"the run folder {out}"):
        remove_unfinished(out)
        yield


def _train(
    stage: TrainingStage,
    config: TrainConfig,
    world: World,
    progress: bool,
    watch: Watch | None,
    estimate: Estimate | None,
) -> nn.Module:
    from tqdm import tqdm

    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    # With FSDP2 no process holds the whole model; the main one keeps a copy on its CPU to export.
    twin = copy.deepcopy(stage.model) if world.main and world.size > 1 and config.strategy == "fsdp" else None
    net = distribute(stage.model, stage.blocks, config, world)
    model, called = unwrapped(net), recorded(net, config, world)
    optimizers = make_optimizers(model, stage.blocks, config)
    average = Average(model, config.ema_decay)
    run = {"stage": config.stage, "batch_size": config.batch_size, "seed": config.seed, "data": stage.fingerprint()}
    start = resume(out, net, optimizers, average, run, world)
    log = RunLog(config, stage.cost(), start, world)
    if world.main:
        write_text(out / "config.json", json.dumps(asdict(config), indent=1))
    if estimate is not None and start < config.steps and not config.cuda_graphs:
        seconds = _rehearsed(stage, called, config, world, start) * (config.steps - start)
        if world.main:
            estimate(seconds)
    batches = loader(stage, config, world, start)
    bar = tqdm(batches, initial=start, total=config.steps, disable=not (progress and world.main), desc=config.stage)
    net.train()
    for step, passes in zip(range(start, config.steps), bar, strict=True):
        terms = _gradients(stage, called, config, world, step, passes)
        norm = _update(model, optimizers, config, step)
        average.update(step)
        if shown := log.add(step, terms, norm):
            bar.set_postfix(shown)
        done, picture = step + 1, None
        if done % config.sample_every == 0 or done in (config.first_sample, config.steps):
            with average.in_place():
                picture = _write_sample(stage, model, out / "samples" / f"{done:07d}.png", world)
            log.sampled(picture, done)
        if done % config.save_every == 0 or done == config.steps:
            log.flush()
            save(out, done, net, optimizers, average, run, config.keep, world)
        if watch is not None and world.main:
            watch(done, terms, picture)
    log.close()
    return _export(stage, model, average, twin, world)


def _rehearsed(stage: TrainingStage, net: Any, config: TrainConfig, world: World, step: int) -> float:
    """Seconds of the passes of one step on this machine; weights and random numbers stay as they are."""
    passes, seconds = Steps(stage, config, world)[step], 0.0
    for attempt in range(2):  # the first one warms up
        began = time.perf_counter()
        _gradients(stage, net, config, world, step, passes)
        seconds = time.perf_counter() - began
        net.zero_grad(set_to_none=True)
        if attempt == 0 and world.gather(seconds)[0] > REHEARSED_ONCE:
            break
    return seconds


def _gradients(
    stage: TrainingStage, net: Any, config: TrainConfig, world: World, step: int, passes: Sequence[Pass]
) -> dict[str, float]:
    """Forward and backward passes of this process; returns the mean of each loss term over the whole batch."""
    total: dict[str, Tensor] = {}
    bad: list[str] = []
    for number, part in enumerate(passes):
        batch = {k: v.to(world.device, non_blocking=True) for k, v in part["batch"].items()}
        generator = torch.Generator().manual_seed(part["seed"])
        fraction = len(part["indices"]) / config.batch_size
        with synchronised(net, last=number == len(passes) - 1):
            with autocast(net, config.precision, world.device):
                terms = stage.loss(net, batch, generator)
            # Gradients are averaged over the processes afterwards, hence the factor.
            (terms["loss"] * (fraction * world.size)).backward()
        if not torch.isfinite(terms["loss"]):
            names = [stage.example_name(i) for i in part["indices"][:4].tolist()]
            bad.append(f"process {world.rank}, pass {number}: {len(part['indices'])} examples, {', '.join(names)} ...")
        for name, value in terms.items():
            total[name] = total.get(name, 0) + value.detach().float() * fraction
    means = world.sum(torch.stack(list(total.values()))).tolist()
    values = dict(zip(total, means, strict=True))
    if not math.isfinite(values["loss"]):  # the same in every process, so all stop
        where = [line for lines in world.gather(bad) for line in lines]
        raise FloatingPointError(_not_finite(config, "loss", values["loss"], step, "; ".join(where)))
    return values


def _update(model: nn.Module, optimizers: Sequence[Optimizer], config: TrainConfig, step: int) -> float:
    """Clip the gradients and take the optimizers' step; returns the gradient norm before clipping."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    norm = whole(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)).item()
    if not math.isfinite(norm):
        raise FloatingPointError(_not_finite(config, "gradient", norm, step, "the batch as a whole"))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


def _not_finite(config: TrainConfig, what: str, value: float, step: int, where: str) -> str:
    return (
        f"{config.stage}: the {what} is {value} at step {step} ({where}); weights and checkpoints are unchanged, the last good "
        f"checkpoint is {last_good(Path(config.out))}. Look at these examples, lower learning_rate, or use precision: 'no'."
    )


def _write_sample(stage: TrainingStage, model: nn.Module, path: Path, world: World) -> Image.Image | None:
    """The stage's sample image, written by the main process."""
    if not (world.main or is_sharded(model)):  # a sharded model needs all processes to run at all
        return None
    model.eval()
    with torch.no_grad():
        picture: Image.Image | None = stage.sample(model)
    model.train()
    if picture is not None and world.main:
        with replacing(path) as partial:
            picture.save(partial)
    return picture


def _export(stage: TrainingStage, model: nn.Module, average: Average, twin: nn.Module | None, world: World) -> nn.Module:
    """Put the averaged weights into the model, complete in the main process, and let the stage write its result."""
    average.install()
    if is_sharded(model):
        weights = whole_weights(model)
        if twin is not None:
            twin.load_state_dict(weights)
            model = twin
    model = model.eval()
    if world.main:
        stage.export(model)
    world.barrier()
    return model
