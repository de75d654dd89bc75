"""The command `distill`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..media.files import check_folder
from .application import command
from .train import TRAINING, Model, Out, Quiet, Seed, announced, bar, is_main, samples_in

DEFAULT = ["text_to_image=4/2", "image_to_text=2/1", "joint=6"]


@command(
    "distill",
    panel=TRAINING,
    examples=[
        "unidiffuser distill latents/ --rank 32 --out runs/fast",
        "unidiffuser distill latents/ --task text_to_image=4 --model unidiffuser-v1 --learning-rate 3e-5",
    ],
)
def distill(
    latents: Annotated[
        Path,
        typer.Argument(help="Latent shards of pairs, from `unidiffuser data encode` with this model.", show_default=False),
    ],
    task: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="TASK=STEPS of the student; repeatable. 4/2: it learns four steps, and `--preset fast` takes two of them. "
            f"Default: {', '.join(DEFAULT)}.",
            show_default=False,
        ),
    ] = None,
    out: Out = Path("runs/distill"),
    model: Model = "emoji",
    teacher_steps: Annotated[int, typer.Option(help="Sampling steps of the teacher.", min=1)] = 20,
    guidance: Annotated[float, typer.Option(help="Guidance of the teacher. The student needs none.")] = 3.0,
    count: Annotated[int, typer.Option(help="Trajectories of each task.", min=1)] = 4096,
    steps: Annotated[int, typer.Option(help="Training steps.", min=1)] = 1000,
    batch_size: Annotated[int, typer.Option(help="Points of trajectories in a step.", min=1)] = 48,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.", min=0)] = 3e-4,
    rank: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Train a LoRA of this rank instead of all weights.", min=1),
    ] = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Distil a model to few sampling steps without guidance. An interrupted run continues."""
    tasks = [_task_of(entry) for entry in task or DEFAULT]
    wanted, fewest = ({name: numbers[k] for name, *numbers in tasks} for k in (0, 1))
    check_folder(out)
    from ..training.distill_run import distill as run
    from ..training.distill_run import distill_config, routes_for

    routes = routes_for(wanted, teacher_steps=teacher_steps, guidance=guidance, count=count)
    config = distill_config(out, steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed)
    done = 0
    with bar("drawing trajectories", "trajectory", quiet) as show:

        def watch(drawn: int) -> None:
            nonlocal done
            done += drawn
            show(done, count * len(routes))

        made = run(
            config,
            model,
            latents,
            routes,
            fewest=fewest,
            rank=rank,
            progress=not quiet,
            drawn=watch,
            watch=samples_in(out, quiet),
            estimate=announced(quiet),
        )
    if is_main():
        typer.echo(f"wrote {made}", err=True)


def _task_of(entry: str) -> tuple[str, int, int]:
    """Task, steps and fewest steps of "text_to_image=4/2" or "joint=6".

    Raises:
        ValueError: it is not of that form.
    """
    found = re.fullmatch(r"(\w+)=([1-9]\d*)(?:/([1-9]\d*))?", entry.replace("-", "_"), re.ASCII)
    if found is None:
        raise ValueError(f"--task is TASK=STEPS or TASK=STEPS/FEWEST, such as text_to_image=4/2; got {entry!r}")
    name, steps, fewest = found.groups()
    return name, int(steps), int(fewest or steps)
