"""What the commands share: the application, the options of every task, and errors that end as one line.

Nothing here imports torch before a command runs, so that help and mistakes answer at once.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    import torch

    from ..media.results import Result
    from ..options import Options
    from ..pipeline import UniDiffuser

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


@dataclass
class Settings:
    """The options that every task takes."""

    model: Annotated[str, typer.Option("--model", "-m", help='"emoji" (bundled), or a checkpoint file or folder.')] = "emoji"
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
    dtype: Annotated[Dtype | None, typer.Option(help="Of all parts. If not given: see the README, Speed.")] = None
    preset: Annotated[str, typer.Option(help="exact, or fast: half the work at a small price in quality.")] = "exact"
    compile: Annotated[
        str | None, typer.Option(help="torch.compile's default, reduce-overhead or max-autotune; for long runs.")
    ] = None
    offload: Annotated[bool, typer.Option("--offload", help="Keep each part off the device while it does not work.")] = False
    tiling: Annotated[bool, typer.Option("--tiling", help="Decode large pictures tile by tile, to save memory.")] = False
    lora: Annotated[
        list[str] | None, typer.Option(help="A LoRA file, or FILE:STRENGTH as in zorbi.safetensors:0.8; may be repeated.")
    ] = None
    captions: Annotated[TextFormat, typer.Option(help="File format of captions.")] = TextFormat.json
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no list of files.")] = False

    def load(self) -> UniDiffuser:
        """The model, after a look at whether its results can be written."""
        from ..media.results import check_folder

        check_folder(self.out)
        lora = tuple(_lora(text) for text in self.lora or [])
        return _load(self.model, self.device, self.dtype, lora, self.offload, self.tiling, self.compile)

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
            "preset": self.preset,
            "progress": not self.quiet,
        }

    def save(self, task: str, results: Sequence[Result], model: UniDiffuser, **more: Any) -> None:
        """Write the results, print captions to stdout and the names of the files to stderr."""
        from ..media.results import save_results
        from ..options import Plan

        plan = {name: value for name, value in vars(Plan.of(self.options(), model.config)).items() if value is not None}
        del plan["progress"], plan["speeds"]  # joint, the only task that has speeds, names them in `more`
        made_with: dict[str, Any] = {"model": self.model, "dtype": str(model.dtype).removeprefix("torch.")}
        made_with |= {"lora": self.lora} if self.lora else {}
        chosen = {key: value for key, value in more.items() if value is not None}
        settings = {**plan, **made_with, **chosen}
        for result in results:
            if result.caption is not None:
                typer.echo(result.caption)
        for path in save_results(results, self.out, task, settings, self.captions.value):
            if not self.quiet:
                typer.echo(f"wrote {path}", err=True)


def command(name: str, to: typer.Typer = app) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command of an application; its errors end as one line on stderr and an exit code."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            with clear_errors():
                function(*args, **kwargs)

        to.command(name)(run)
        return function

    return register


def task(name: str, count: int = 1) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command that takes a `Settings` first; its fields become options of the command."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        _, *parameters = inspect.signature(function).parameters.values()
        own = [p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
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

        run.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*own, *shared)}
        run.__doc__ = function.__doc__
        command(name)(run)
        return function

    return register


@functools.lru_cache(maxsize=1)  # the demo runs two tasks
def _load(
    model: str,
    device: str | None,
    dtype: Dtype | None,
    lora: tuple[tuple[str, float], ...],
    offload: bool,
    tiling: bool,
    compile: str | None,
) -> UniDiffuser:
    import torch

    from ..pipeline import load

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that is unknown or not there
        raise ValueError(f"device {device!r} cannot be used here ({str(error).splitlines()[0]})") from error
    return load(model, device=device, dtype=torch_dtype(dtype), lora=lora, offload=offload, tiling=tiling, compile=compile)


def torch_dtype(dtype: Dtype | None) -> torch.dtype | None:
    """The torch name of a choice."""
    import torch

    return None if dtype is None else getattr(torch, dtype.value)


def _lora(text: str) -> tuple[str, float]:
    """FILE or FILE:STRENGTH; a colon that no number follows belongs to the name, as in C:\\zorbi.safetensors."""
    path, colon, strength = text.rpartition(":")
    try:
        return (path, float(strength)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def numbers(option: str, text: str, counts: Sequence[int] = (2,)) -> tuple[float, ...]:
    """Numbers with commas between them; ValueError that names the option unless there are as many as one of `counts`."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if len(found) not in counts:
        one = "one number, or " if 1 in counts else ""
        raise ValueError(f"{option} is {one}two for image and text as in 4,2; got {text!r}")
    return found


def _guidance(text: str) -> float | tuple[float, float]:
    found = numbers("--guidance", text, (1, 2))
    return found[0] if len(found) == 1 else (found[0], found[1])


@contextmanager
def clear_errors() -> Iterator[None]:
    """Errors of the user's making end as one line on stderr and exit code 2."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted; every file that is there is complete", err=True)
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        _fail(f"{reason}: {error.filename}" if error.filename else reason)
    except (ValueError, FloatingPointError) as error:
        _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        _fail("out of memory; use a smaller --batch-size, --width and --height, or --dtype float16")


def _fail(message: str) -> None:
    typer.echo("error: " + " ".join(message.split()), err=True)
    raise typer.Exit(2)
