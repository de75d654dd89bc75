"""The command line: `unidiffuser text-to-image "red apple"` and its sisters, one command per task.

Only commands import torch, so that help and mistakes answer at once. Results go to files, captions also to stdout, bars and
messages to stderr. Exit codes: 0 done, 2 bad input (one line says what to do), 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from . import __version__
from .training.commands import COMMANDS

if TYPE_CHECKING:
    from .pipeline import Options, UniDiffuser
    from .results import Result

EXAMPLE = Path(__file__).with_name("assets") / "example.png"

app = typer.Typer(
    help="Words to pictures, pictures to words, or both at once, with UniDiffuser.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Dtype(str, Enum):
    """Number formats for weights."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class TextFormat(str, Enum):
    """How captions are written."""

    json = "json"
    txt = "txt"


ModelName = Annotated[str, typer.Option("--model", "-m", help='"emoji" (bundled), or a checkpoint file or folder.')]


@dataclass
class Settings:
    """The options that every task takes."""

    model: ModelName = "emoji"
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")] = Path("out")
    seed: Annotated[int, typer.Option(help="Result k is made from seed + k.")] = 0
    count: Annotated[int, typer.Option("--count", "-n", help="How many results for each input.")] = 1
    steps: Annotated[int | None, typer.Option(help="Sampling steps; the model's default if not given.")] = None
    guidance: Annotated[str | None, typer.Option(help="Guidance, 1 = off; or two for image and text, as in 4,2.")] = None
    sampler: Annotated[str, typer.Option(help="ddim, dpmpp_2m, dpmpp_3m, euler or reference.")] = "dpmpp_2m"
    width: Annotated[int | None, typer.Option(help="Width of pictures in pixels; the model's own if not given.")] = None
    height: Annotated[int | None, typer.Option(help="Height of pictures in pixels.")] = None
    batch_size: Annotated[int | None, typer.Option(help="Most results made at once; lower it to save memory.")] = None
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the best there is if not given.")] = None
    dtype: Annotated[Dtype | None, typer.Option(help="float32 on CPU and float16 elsewhere if not given.")] = None
    captions: Annotated[TextFormat, typer.Option(help="File format of captions.")] = TextFormat.json
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no list of files.")] = False

    def load(self) -> UniDiffuser:
        """The model, after a look at whether its results can be written."""
        from .results import check_folder

        check_folder(self.out)
        return _load(self.model, self.device, self.dtype)

    def options(self) -> Options:
        """For the methods of the model."""
        return {
            "seed": self.seed,
            "steps": self.steps,
            "guidance": None if self.guidance is None else _guidance(self.guidance),
            "method": self.sampler,
            "width": self.width,
            "height": self.height,
            "batch_size": self.batch_size,
            "progress": not self.quiet,
        }

    def save(self, task: str, results: Sequence[Result], model: UniDiffuser, **more: Any) -> None:
        """Write the results, print captions to stdout and the names of the files to stderr."""
        from .results import save_results

        plan = {key: value for key, value in self.options().items() if value is not None and key != "progress"}
        size = {"width": model.config.image_size, "height": model.config.image_size}
        made_with = {"model": self.model, "dtype": str(model.dtype).removeprefix("torch.")}
        chosen = {key: value for key, value in more.items() if value is not None}
        settings = {**model.config.defaults, **size, **plan, **made_with, **chosen}
        for result in results:
            if result.caption is not None:
                typer.echo(result.caption)
        for path in save_results(results, self.out, task, settings, self.captions.value):
            if not self.quiet:
                typer.echo(f"wrote {path}", err=True)


def command(name: str, **kwargs: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command whose errors end as one line on stderr and an exit code."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            with _clear_errors():
                function(*args, **kwargs)

        app.command(name, **kwargs)(run)
        return function

    return register


def task(name: str, count: int = 1) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command that takes a `Settings` first; its fields become options of the command."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        own = [p.replace(annotation=hints[p.name]) for p in inspect.signature(function).parameters.values()][1:]
        types = get_type_hints(Settings, include_extras=True)
        shared = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=count if field.name == "count" else field.default,
                annotation=types[field.name],
            )
            for field in dataclasses.fields(Settings)
        ]

        def run(**values: Any) -> None:
            settings = Settings(**{field.name: values.pop(field.name) for field in dataclasses.fields(Settings)})
            function(settings, **values)

        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        run.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*own, *shared)}
        run.__doc__ = function.__doc__
        command(name)(run)
        return function

    return register


@app.callback()
def _start(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    if version:
        typer.echo(__version__)
        raise typer.Exit


Prompt = Annotated[str, typer.Argument(help='What to show; "" is the empty caption.', show_default=False)]
Picture = Annotated[Path, typer.Argument(help="A picture of any kind and size.", show_default=False)]


@task("text-to-image", count=4)
def text_to_image(
    settings: Settings,
    prompt: Prompt,
    negative: Annotated[str | None, typer.Option(help="What to move away from; needs guidance above 1.")] = None,
) -> None:
    """Make pictures of a prompt."""
    from .results import Result

    model = settings.load()
    images = model.text_to_image(prompt, count=settings.count, negative=negative, **settings.options())
    results = [Result(settings.seed + k, image, source=prompt) for k, image in enumerate(images)]
    settings.save("text-to-image", results, model, negative=negative)


@task("image-to-text")
def image_to_text(
    settings: Settings,
    pictures: Annotated[list[Path], typer.Argument(help="One or more pictures.", show_default=False)],
) -> None:
    """Caption pictures."""
    from .results import Result

    model = settings.load()
    captions = model.image_to_text(pictures, count=settings.count, **settings.options())
    sources = [(picture, k) for picture in pictures for k in range(settings.count)]
    results = [
        Result(settings.seed + k, caption=caption, source=str(picture))
        for (picture, k), caption in zip(sources, captions, strict=True)
    ]
    settings.save("image-to-text", results, model)


@task("joint", count=4)
def joint(settings: Settings) -> None:
    """Make pairs of a picture and its caption out of nothing."""
    from .results import Result

    model = settings.load()
    pairs = model.joint(count=settings.count, **settings.options())
    settings.save("joint", [Result(settings.seed + k, *pair) for k, pair in enumerate(pairs)], model)


@task("image", count=4)
def image(settings: Settings) -> None:
    """Make pictures out of nothing."""
    from .results import Result

    model = settings.load()
    images = model.image(count=settings.count, **settings.options())
    settings.save("image", [Result(settings.seed + k, picture) for k, picture in enumerate(images)], model)


@task("text", count=4)
def text(settings: Settings) -> None:
    """Make captions out of nothing."""
    from .results import Result

    model = settings.load()
    captions = model.text(count=settings.count, **settings.options())
    settings.save("text", [Result(settings.seed + k, caption=c) for k, c in enumerate(captions)], model)


@task("vary-image", count=4)
def vary_image(settings: Settings, picture: Picture) -> None:
    """Make pictures of the same subject as a picture."""
    from .results import Result

    model = settings.load()
    images = model.vary_image(picture, count=settings.count, **settings.options())
    results = [Result(settings.seed + k, image, source=str(picture)) for k, image in enumerate(images)]
    settings.save("vary-image", results, model)


@task("vary-text", count=4)
def vary_text(settings: Settings, prompt: Prompt) -> None:
    """Put a prompt in other words."""
    from .results import Result

    model = settings.load()
    captions = model.vary_text(prompt, count=settings.count, **settings.options())
    results = [Result(settings.seed + k, caption=c, source=prompt) for k, c in enumerate(captions)]
    settings.save("vary-text", results, model)


@task("gibbs")
def gibbs(
    settings: Settings,
    prompt: Annotated[str | None, typer.Option(help="Start from these words.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Start from this picture.")] = None,
    rounds: Annotated[int, typer.Option(help="Pairs in a chain.")] = 4,
) -> None:
    """Let picture and caption lead to each other, round after round; --count chains."""
    from .results import Result

    if prompt is not None and picture is not None:
        raise ValueError("a chain starts from --prompt or from --picture, not from both")
    model = settings.load()
    start = prompt if picture is None else picture
    pairs = model.gibbs(start, rounds=rounds, count=settings.count, **settings.options())
    source = None if start is None else str(start)
    results = [Result(settings.seed + k // rounds, *pair, source) for k, pair in enumerate(pairs)]
    settings.save("gibbs", results, model, rounds=rounds)


@task("interpolate")
def interpolate(
    settings: Settings,
    picture_a: Picture,
    picture_b: Picture,
    frames: Annotated[int, typer.Option(help="Pictures, both ends included.")] = 8,
) -> None:
    """Make the pictures between two pictures; steps are 100 and guidance 1 if not given."""
    from .results import Result

    if settings.count != 1:
        raise ValueError("there is one way between two pictures; use --frames for more pictures on it")
    settings.steps, settings.guidance = settings.steps or 100, settings.guidance or "1"
    model = settings.load()
    images = model.interpolate(picture_a, picture_b, frames=frames, **settings.options())
    results = [Result(settings.seed, image, source=f"{picture_a} - {picture_b}") for image in images]
    settings.save("interpolate", results, model, frames=frames)


@task("demo", count=4)
def demo(
    settings: Settings,
    prompt: Annotated[str, typer.Option(help="What to show.")] = "red apple",
    picture: Annotated[Path, typer.Option(help="What to caption; an example if not given.", show_default=False)] = EXAMPLE,
) -> None:
    """See both directions: pictures of a prompt, and a caption of a picture."""
    text_to_image(settings, prompt)
    settings.count = 1
    image_to_text(settings, [picture])


@command("convert")
def convert_checkpoint(
    source: Annotated[Path, typer.Argument(help="uvit_v1.pth and its neighbours, a diffusers folder, or our file.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Of the weights; as they are if not given.")] = None,
) -> None:
    """Turn a checkpoint of any layout into one safetensors file."""
    from .checkpoints import convert

    convert(source, target, _torch_dtype(dtype))
    typer.echo(f"wrote {target}", err=True)


@command("info")
def info(model: Annotated[str, typer.Argument(help='"emoji", or a checkpoint file or folder.')] = "emoji") -> None:
    """Describe a checkpoint: its parts, sizes and defaults."""
    from rich.console import Console
    from rich.table import Table

    from .checkpoints import load_checkpoint

    checkpoint = load_checkpoint(model)
    table = Table("part", "parameters", "dtype", title=str(checkpoint.path))
    for part in checkpoint.parts():
        tensors = list(checkpoint.state_dict(part).values())
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
        table.add_row(part, f"{sum(tensor.numel() for tensor in tensors):,}", ", ".join(dtypes))
    console = Console()
    console.print(table)
    for name, value in checkpoint.config.to_dict().items():
        console.print(f"[bold]{name}[/bold] {value}", highlight=False, soft_wrap=True)


for _name, _function in COMMANDS.items():
    command(_name)(_function)


def main() -> None:
    """Entry point of the console script."""
    app()


@functools.lru_cache(maxsize=1)  # the demo runs two tasks
def _load(model: str, device: str | None, dtype: Dtype | None) -> UniDiffuser:
    import torch

    from .pipeline import load

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that is unknown or not there
        raise ValueError(f"device {device!r} cannot be used here ({str(error).splitlines()[0]})") from error
    return load(model, device=device, dtype=_torch_dtype(dtype))


def _torch_dtype(dtype: Dtype | None) -> Any:
    import torch

    return None if dtype is None else getattr(torch, dtype.value)


def _guidance(text: str) -> float | tuple[float, float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise ValueError(f"--guidance is one number, or two for image and text as in 4,2; got {text!r}")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


@contextmanager
def _clear_errors() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted; every file that is there is complete", err=True)
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise
    except OSError as error:
        what = f"{error.strerror}: {error.filename}" if error.strerror and error.filename else str(error)
        _fail(what)
    except (ValueError, FloatingPointError) as error:
        _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        _fail("out of memory; use a smaller --batch-size, --width and --height, or --dtype float16")


def _fail(message: str) -> None:
    typer.echo("error: " + " ".join(message.split()), err=True)
    raise typer.Exit(2)
