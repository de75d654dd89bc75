"""The training part of the command line: ``prepare-emoji``, ``train`` and ``assemble``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Optional

import typer


def prepare_emoji(
    out: Annotated[Path, typer.Argument(help="Folder to make: pictures, captions and the split.")] = Path("data/emoji"),
    size: Annotated[int, typer.Option(help="Side of the pictures in pixels.", min=16)] = 128,
    workers: Annotated[int, typer.Option(help="Rendering processes.", min=1)] = 2,
) -> None:
    """Make the demonstration data: fetch the emoji sets with npm, render them, caption them, split them."""
    from ..emoji.prepare import prepare

    records = prepare(out, size, workers=workers)
    typer.echo(f"{len(records)} pictures in {out}")


def train(
    config: Annotated[Path, typer.Argument(help="YAML file of one run; see unidiffuser/training/configs.")],
    steps: Annotated[Optional[int], typer.Option(help="Instead of the config's number of steps.", min=1)] = None,  # noqa: UP045
    out: Annotated[Optional[str], typer.Option(help="Instead of the config's folder.")] = None,  # noqa: UP045
) -> None:
    """Train one stage, or go on where it was stopped."""
    from ..training.loop import TrainConfig
    from ..training.loop import train as run
    from ..training.stages import make_stage

    settings = TrainConfig.from_file(config, steps=steps, out=out)
    run(make_stage(settings), settings)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"done: {settings.out}")


def assemble(
    runs: Annotated[Path, typer.Argument(help="Folder of the runs autoencoder, encoders and captioner.")],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write; the uvit stage starts from it.")],
) -> None:
    """Put trained encoders together into one file, ready for training the network."""
    from ..training.stages import assemble as run

    typer.echo(f"wrote {run(runs, out)}")


def train_lora(
    pictures: Annotated[Path, typer.Argument(help="Folder of 4 to 8 pictures of the new thing.", show_default=False)],
    word: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Caption of pictures that have none in metadata.jsonl or in a text file beside them."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run.")] = Path("runs/lora"),
    model: Annotated[str, typer.Option("--model", "-m", help='"emoji" (bundled), or a checkpoint file or folder.')] = "emoji",
    steps: Annotated[int, typer.Option(help="Training steps.", min=1)] = 800,
    batch_size: Annotated[int, typer.Option(help="Pairs to learn in a step, and as many to keep.", min=1)] = 8,
    learning_rate: Annotated[float, typer.Option(help="At its highest.", min=0)] = 2e-3,
    rank: Annotated[int, typer.Option(help="Of the matrices; more can hold more, and forgets more.", min=1)] = 32,
    kept: Annotated[int, typer.Option(help="Pairs of the model's own that keep what it knows.", min=1)] = 320,
    variations: Annotated[int, typer.Option(help="Of each picture, slightly moved; 1: as they are.", min=1)] = 4,
    captions: Annotated[bool, typer.Option(help="Teach the caption decoder to write the words.")] = True,
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Teach a model a new thing: its word calls the picture, and its picture calls the word. Goes on where it was stopped."""
    from ..training.loop import train as run
    from ..training.teach import FILE, lora_run, lora_stage

    options = {"data": str(pictures), "word": word, "checkpoint": model, "rank": rank, "kept": kept}
    config = lora_run(
        out,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        options={**options, "variations": variations, "captions": captions},
    )
    run(lora_stage(config), config, progress=not quiet)
    typer.echo(f"wrote {out / FILE}", err=True)


def train_memory(
    model: Annotated[Optional[str], typer.Option("--model", "-m", help="Checkpoint; the published sizes if not given.")] = None,  # noqa: UP045
    image_size: Annotated[Optional[list[int]], typer.Option(help="In pixels; repeatable.")] = None,  # noqa: UP045
) -> None:
    """How much GPU memory training needs, and how many examples of one pass fit. Computed, nothing is allocated."""
    from dataclasses import replace

    from rich.console import Console
    from rich.table import Table

    from ..checkpoints.checkpoint import load_checkpoint
    from ..checkpoints.config import V1
    from ..training.memory import GB, GPUS, SETUPS, need

    config = V1 if model is None else load_checkpoint(model).config
    for side in image_size or [256, 512]:
        sizes = replace(config.uvit, img_size=side // config.vae.downscale)
        columns = [f"{gpu} GB" for gpu in GPUS]
        table = Table("bf16", "GB fixed", "GB an example", *columns, title=f"{side} px: examples of one pass that fit")
        for setup in SETUPS:
            of = need(sizes, setup)
            fits = [str(of.batch(gpu * GB) or "-") for gpu in GPUS]
            table.add_row(setup.name, f"{of.fixed / GB:.1f}", f"{of.example / GB:.3f}", *fits)
        Console().print(table)


COMMANDS: dict[str, Callable[..., None]] = {
    "prepare-emoji": prepare_emoji,
    "train": train,
    "train-lora": train_lora,
    "train-memory": train_memory,
    "assemble": assemble,
}
