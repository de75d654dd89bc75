"""The command line: `unidiffuser text-to-image "red apple, twemoji"` and its sisters, one command per task.

Results go to files, captions also to stdout, bars and messages to stderr. Exit codes: 0 done, 2 bad input (one line says
what to do), 130 interrupted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..version import __version__
from .application import Dtype, Settings, app, command, numbers, task, torch_dtype

if TYPE_CHECKING:
    from .bulk import Item, Work

EXAMPLE = Path(__file__).parents[1] / "assets" / "example.png"

Prompt = Annotated[str, typer.Argument(help='The prompt; "" is the empty caption.', show_default=False)]
Picture = Annotated[Path, typer.Argument(help="A picture of any size; it is cropped to the model's shape.", show_default=False)]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _start(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")


@task("text-to-image", count=4)
def text_to_image(
    settings: Settings,
    prompt: Prompt,
    negative: Annotated[str | None, typer.Option(help="Negative prompt; needs guidance above 1.")] = None,
) -> None:
    """Generate pictures from a prompt."""
    from ..media.results import Result

    model = settings.load()
    images = model.text_to_image(prompt, count=settings.count, negative=negative, **settings.options())
    results = [Result(settings.seed + k, image, prompt=prompt) for k, image in enumerate(images)]
    settings.save("text-to-image", results, model, negative=negative)


@task("image-to-text")
def image_to_text(
    settings: Settings,
    pictures: Annotated[list[Path], typer.Argument(help="One or more pictures.", show_default=False)],
) -> None:
    """Caption pictures."""
    from ..media.results import Result

    model = settings.load()
    captions = model.image_to_text(pictures, count=settings.count, **settings.options())
    sources = [(picture, k) for picture in pictures for k in range(settings.count)]
    results = [
        Result(settings.seed + k, caption=caption, picture=str(picture))
        for (picture, k), caption in zip(sources, captions, strict=True)
    ]
    settings.save("image-to-text", results, model)


@task("joint", count=4)
def joint(
    settings: Settings,
    speeds: Annotated[
        str | None,
        typer.Option(help="Denoising speeds of image and text, as in 1,2 for text first; the model's default if not given."),
    ] = None,
) -> None:
    """Generate image-caption pairs without a prompt."""
    from ..media.results import Result
    from ..options import Options, resolve

    options: Options = settings.options()
    if speeds is not None:
        image, text = numbers("--speeds", speeds)
        options["speeds"] = image, text
    model = settings.load()
    pairs = model.joint(count=settings.count, **options)
    results = [Result(settings.seed + k, *pair) for k, pair in enumerate(pairs)]
    settings.save("joint", results, model, speeds=resolve(options, model.config)["speeds"])


@task("image", count=4)
def image(settings: Settings) -> None:
    """Generate pictures without a prompt."""
    from ..media.results import Result

    model = settings.load()
    images = model.image(count=settings.count, **settings.options())
    settings.save("image", [Result(settings.seed + k, picture) for k, picture in enumerate(images)], model)


@task("text", count=4)
def text(settings: Settings) -> None:
    """Generate captions without a picture."""
    from ..media.results import Result

    model = settings.load()
    captions = model.text(count=settings.count, **settings.options())
    settings.save("text", [Result(settings.seed + k, caption=c) for k, c in enumerate(captions)], model)


@task("vary-image", count=4)
def vary_image(settings: Settings, picture: Picture) -> None:
    """Generate variations of a picture."""
    from ..media.results import Result

    model = settings.load()
    images = model.vary_image(picture, count=settings.count, **settings.options())
    results = [Result(settings.seed + k, image, picture=str(picture)) for k, image in enumerate(images)]
    settings.save("vary-image", results, model)


@task("vary-text", count=4)
def vary_text(settings: Settings, prompt: Prompt) -> None:
    """Generate other captions with the meaning of a prompt."""
    from ..media.results import Result

    model = settings.load()
    captions = model.vary_text(prompt, count=settings.count, **settings.options())
    results = [Result(settings.seed + k, caption=c, prompt=prompt) for k, c in enumerate(captions)]
    settings.save("vary-text", results, model)


@task("gibbs")
def gibbs(
    settings: Settings,
    prompt: Annotated[str | None, typer.Option(help="Start from this prompt.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Start from this picture.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds in a chain; each gives a pair.")] = 4,
    hold: Annotated[
        float, typer.Option(help="Noise on each half's condition, 0..1000; 40 to 100 keeps long chains on their topic.")
    ] = 0.0,
) -> None:
    """Caption a picture, illustrate the caption, and so on (blocked Gibbs sampling); --count chains."""
    from ..media.results import Result

    if prompt is not None and picture is not None:
        raise ValueError("a chain starts from --prompt or from --picture, not from both")
    model = settings.load()
    start = prompt if picture is None else picture
    pairs = model.gibbs(start, rounds=rounds, hold=hold, count=settings.count, **settings.options())
    source = None if picture is None else str(picture)
    results = [Result(settings.seed + k // rounds, *pair, prompt, source) for k, pair in enumerate(pairs)]
    settings.save("gibbs", results, model, rounds=rounds, hold=hold)


@task("interpolate")
def interpolate(
    settings: Settings,
    picture_a: Picture,
    picture_b: Picture,
    frames: Annotated[int, typer.Option(help="Number of pictures, both ends included.")] = 8,
) -> None:
    """Interpolate between two pictures; steps are 100 and guidance 1 if not given."""
    from ..media.results import Result

    if settings.count != 1:
        raise ValueError("--count does not apply to interpolate; use --frames for more pictures")
    settings.sampling["steps"] = settings.sampling["steps"] or 100
    settings.sampling["guidance"] = settings.sampling["guidance"] or "1"
    model = settings.load()
    images = model.interpolate(picture_a, picture_b, frames=frames, **settings.options())
    results = [Result(settings.seed, image, picture=f"{picture_a} - {picture_b}") for image in images]
    settings.save("interpolate", results, model, frames=frames)


@task("demo", count=4)
def demo(
    settings: Settings,
    prompt: Annotated[str, typer.Option(help="The prompt.")] = "red apple, twemoji",
    picture: Annotated[Path, typer.Option(help="A picture to caption; an example if not given.", show_default=False)] = EXAMPLE,
) -> None:
    """Show both directions: pictures from a prompt, and a caption of a picture."""
    text_to_image(settings, prompt)
    settings.count = 1
    image_to_text(settings, [picture])


@task("generate")
def generate(
    settings: Settings,
    prompts: Annotated[Path, typer.Argument(help="A text file, one prompt a line.", show_default=False)],
) -> None:
    """Generate a picture for each line of a file; torchrun or `accelerate launch` spread the work over processes."""
    from .bulk import pictures_of, prompt_items

    items = prompt_items(prompts, settings.seed, settings.count)
    _many(settings, "generate", items, lambda model, options, made: pictures_of(model, settings.out, options, made))


@task("caption")
def caption(
    settings: Settings,
    folder: Annotated[Path, typer.Argument(help="A folder of pictures.", show_default=False)],
) -> None:
    """Caption each picture of a folder; torchrun or `accelerate launch` spread the work over processes."""
    from .bulk import captions_of, picture_items

    if settings.count != 1:
        raise ValueError("caption writes one caption for each picture; for more use image-to-text")
    items = picture_items(folder, settings.seed)
    _many(settings, "caption", items, lambda model, options, _: captions_of(model, folder, settings.out, options))


def _many(settings: Settings, name: str, items: list[Item], work: Callable[..., Work]) -> None:
    from datetime import timedelta

    from tqdm import tqdm

    from ..distributed import joined
    from ..media.files import read_lines
    from .bulk import run_items

    with joined(settings.device, patience=timedelta(days=7)) as world:
        model = settings.load()
        options = {**settings.options(), "progress": False, "batch_size": None}
        made_with = {"task": name, "model": settings.model, "dtype": str(model.dtype).removeprefix("torch."), **options}
        with tqdm(total=len(items), disable=settings.quiet or not world.main, unit="item") as bar:
            manifest = run_items(
                items,
                settings.sampling["batch_size"] or 16,
                settings.out,
                made_with,
                work(model, options, made_with),
                world,
                bar.update,
            )
        if world.main:
            failed = sum('"error": ' in line for line in read_lines(manifest))
            note = f", {failed} of them failed" if failed else ""
            typer.echo(f"wrote {manifest}: {len(items)} items{note}", err=True)


@command("convert")
def convert_checkpoint(
    source: Annotated[Path, typer.Argument(help="A folder with uvit_v1.pth, a diffusers folder, or a single file.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Number format of the weights; unchanged if not given.")] = None,
) -> None:
    """Convert a checkpoint of any layout into one safetensors file."""
    from ..checkpoints.checkpoint import convert

    convert(source, target, torch_dtype(dtype))
    typer.echo(f"wrote {target}", err=True)


@command("info")
def info(model: Annotated[str, typer.Argument(help='"emoji", or a checkpoint file or folder.')] = "emoji") -> None:
    """Describe a checkpoint: its parts, sizes, defaults and words."""
    from rich.console import Console
    from rich.table import Table

    from ..checkpoints.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(model)
    table = Table("part", "parameters", "dtype", title=str(checkpoint.path))
    for part in checkpoint.parts():
        tensors = list(checkpoint.state_dict(part).values())
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
        table.add_row(part, f"{sum(tensor.numel() for tensor in tensors):,}", ", ".join(dtypes))
    console = Console()
    console.print(table)
    vocabulary = checkpoint.config.vocabulary
    for name, value in replace(checkpoint.config, vocabulary=None).to_dict().items():
        console.print(f"[bold]{name}[/bold] {value}", highlight=False, soft_wrap=True)
    if vocabulary is not None:
        words = "; ".join(reversed(vocabulary.summary(12).splitlines()))
        console.print(f"[bold]vocabulary[/bold] {words}", highlight=False, soft_wrap=True)
