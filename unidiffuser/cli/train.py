"""The training commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..media.files import check_folder, shown
from ..media.formats import PICTURE_FORMATS, is_picture_name
from .application import announce, command

if TYPE_CHECKING:
    from PIL import Image

    from ..training.stages import Build

TRAINING = "Training"

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the run.")]
Model = Annotated[str, typer.Option("--model", "-m", help='"emoji" (bundled), or a checkpoint file or folder.')]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and no estimate.")]
Kept = Annotated[int, typer.Option(help="Samples of the model itself, for prior preservation.", min=1)]
Captions = Annotated[bool, typer.Option(help="Train the caption decoder to write the words.")]
Variations = Annotated[
    int,
    typer.Option(help="Variations of each picture, slightly rotated, zoomed and shifted. 1: the pictures as they are.", min=1),
]


@command(
    "train",
    panel=TRAINING,
    examples=["unidiffuser train train.yaml", "torchrun --nproc-per-node 8 -m unidiffuser train train.yaml --out runs/a"],
)
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the run; see unidiffuser/training/configs.")],
    steps: Annotated[Optional[int], typer.Option(help="Replaces the number of steps in the config.", min=1)] = None,  # noqa: UP045
    out: Annotated[Optional[str], typer.Option(help="Replaces the run folder in the config.")] = None,  # noqa: UP045
) -> None:
    """Train one stage; an interrupted run continues from its last checkpoint."""
    from ..training.stages import STAGES

    run_stage(config, steps, out, STAGES)


def run_stage(config: Path, steps: int | None, out: str | None, stages: Mapping[str, Build]) -> None:
    """Train the stage of a config file; `steps` and `out` replace the file's unless None."""
    from ..training.config import TrainConfig
    from ..training.loop import train as run
    from ..training.stages import make_stage

    settings = TrainConfig.from_file(config, steps=steps, out=out)
    run(make_stage(settings, stages), settings, watch=samples_in(Path(settings.out)), estimate=announced())
    if is_main():
        typer.echo(f"done: {settings.out}")


@command(
    "train-lora",
    panel=TRAINING,
    examples=[
        "unidiffuser train-lora pictures/ --word zorbi --out runs/zorbi",
        "unidiffuser train-lora photos/ --word zorbi --variations 1 --steps 400",
    ],
)
def train_lora(
    pictures: Annotated[Path, typer.Argument(help="Folder of 4 to 8 pictures of the new thing.", show_default=False)],
    word: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Caption of the pictures that have none in metadata.jsonl or in a .txt file beside them."),
    ] = None,
    out: Out = Path("runs/lora"),
    model: Model = "emoji",
    steps: Annotated[int, typer.Option(help="Training steps.", min=1)] = 800,
    batch_size: Annotated[int, typer.Option(help="New pairs in a step, with as many prior samples.", min=1)] = 8,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.", min=0)] = 2e-3,
    rank: Annotated[int, typer.Option(help="Rank of the adapters. A higher rank learns more and forgets more.", min=1)] = 32,
    kept: Kept = 320,
    variations: Variations = 4,
    captions: Captions = True,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Train a LoRA: a new word produces a picture, and the picture gets the word. An interrupted run continues."""
    check_pictures(pictures)
    check_folder(out)
    from ..training.loop import train as run
    from ..training.lora_run import FILE, lora_config, lora_stage

    options = {"data": str(pictures), "word": word, "checkpoint": model, "rank": rank, "kept": kept}
    config = lora_config(
        out,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        options={**options, "variations": variations, "captions": captions},
    )
    with _sampling_prior(kept, quiet) as watch:
        stage = lora_stage(config, watch)
    run(stage, config, progress=not quiet, watch=samples_in(out, quiet), estimate=announced(quiet))
    typer.echo(f"wrote {out / FILE}", err=True)


@command(
    "fine-tune",
    panel=TRAINING,
    examples=[
        "unidiffuser fine-tune pictures/ --out runs/mine",
        "unidiffuser fine-tune photos/ --model unidiffuser-v1 --learning-rate 2e-5 --variations 1",
    ],
)
def fine_tune(
    pictures: Annotated[
        Path,
        typer.Argument(
            help="Folder of pictures, each with its caption in a .txt file beside it or in metadata.jsonl.", show_default=False
        ),
    ],
    out: Out = Path("runs/fine-tune"),
    model: Model = "emoji",
    steps: Annotated[int, typer.Option(help="Training steps.", min=1)] = 200,
    batch_size: Annotated[int, typer.Option(help="New pairs in a step, with as many prior samples.", min=1)] = 8,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.", min=0)] = 3e-4,
    image_size: Annotated[Optional[int], typer.Option(help="Side in pixels; the model's if not given.", min=1)] = None,  # noqa: UP045
    kept: Kept = 320,
    keep: Annotated[float, typer.Option(help="Weight of what the model knew against the new pairs.", min=0)] = 2.0,
    variations: Variations = 4,
    captions: Captions = True,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints, from which a killed run continues.", min=1)] = 25,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a model on captioned pictures, and write a complete checkpoint. An interrupted run continues."""
    check_pictures(pictures)
    check_folder(out)
    from ..training.fine_tune import FILE, fine_tune_config, fine_tune_stage, prepare
    from ..training.loop import train as run

    with bar("encoding", "pair", quiet) as encoded:
        prepared = prepare(pictures, out, model, image_size=image_size, variations=variations, seed=seed, report=encoded)
    for line in prepared.warnings() if is_main() else ():
        typer.echo(line, err=True)
    config = fine_tune_config(
        out,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        save_every=save_every,
        options={
            "latents": str(prepared.latents),
            "checkpoint": model,
            "kept": kept,
            "keep": keep,
            "captions": captions,
        },
    )
    with _sampling_prior(kept, quiet) as watch:
        stage = fine_tune_stage(config, watch)
    run(stage, config, progress=not quiet, watch=samples_in(out, quiet), estimate=announced(quiet))
    if is_main():
        typer.echo(f"wrote {out / FILE}", err=True)


def check_pictures(folder: Path) -> None:
    """FileNotFoundError if there is no such folder, or no picture in it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {shown(folder)}; put your pictures into one")
    if not any(is_picture_name(path) for path in folder.rglob("*")) and not (folder / "metadata.jsonl").is_file():
        raise FileNotFoundError(f"{shown(folder)} holds no picture ({', '.join(PICTURE_FORMATS)})")


def is_main() -> bool:
    """Whether this process is the first that the launcher started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def bar(work: str, unit: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, as a function of what is done and the total."""
    from tqdm import tqdm

    with tqdm(desc=work, unit=unit, disable=quiet or not is_main()) as shown_bar:

        def show(done: int, total: int) -> None:
            shown_bar.total = total
            shown_bar.update(done - shown_bar.n)

        yield show


@contextmanager
def _sampling_prior(total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar for prior samples."""
    with bar("sampling what the model knows", "pair", quiet) as show:
        show(0, total)
        yield lambda done: show(done, total)


def announced(quiet: bool = False) -> Callable[[float], None] | None:
    """Says how long the training takes, before it starts."""
    if quiet:
        return None

    def say(seconds: float) -> None:
        from ..distributed import own_device

        announce(seconds, own_device(), "training")

    return say


def samples_in(out: Path, quiet: bool = False) -> Callable[[int, dict[str, float], Image.Image | None], None]:
    """Says where each sample is, as soon as it is there."""
    from tqdm import tqdm

    def watch(done: int, terms: Mapping[str, Any], picture: Image.Image | None) -> None:
        if picture is not None and not quiet:
            tqdm.write(f"step {done}: {out / 'samples' / f'{done:07d}.png'}", file=sys.stderr)

    return watch
