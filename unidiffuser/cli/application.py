"""Shared by all commands: the application, the options of every task, and one-line errors.

Nothing here imports torch before a command runs, so that help and usage errors are immediate.
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
from typing import TYPE_CHECKING, Annotated, Any, cast, get_type_hints

import typer

from ..options import DEFAULTS, Options, option_help

if TYPE_CHECKING:
    import torch

    from ..media.results import Result
    from ..pipeline import UniDiffuser

app = typer.Typer(
    help="UniDiffuser: text to image, image to text, both together, or either alone.",
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


SAMPLING = ("seed", "steps", "guidance", "method", "width", "height", "batch_size", "preset")
"""The sampling options that every task takes; see `options.Options`."""


@dataclass
class Settings:
    """The options that every task takes: these fields, and the `SAMPLING` options."""

    model: Annotated[str, typer.Option("--model", "-m", help='"emoji" (bundled), or a checkpoint file or folder.')] = "emoji"
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")] = Path("out")
    count: Annotated[int, typer.Option("--count", "-n", help="Number of results for each input.")] = 1
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the fastest if not given.")] = None
    dtype: Annotated[Dtype | None, typer.Option(help="Number format of the weights; chosen by device if not given.")] = None
    compile: Annotated[
        str | None, typer.Option(help="torch.compile's default, reduce-overhead or max-autotune; for long runs.")
    ] = None
    offload: Annotated[bool, typer.Option("--offload", help="Keep each part off the device while it is not running.")] = False
    tiling: Annotated[bool, typer.Option("--tiling", help="Decode large pictures tile by tile, to save memory.")] = False
    lora: Annotated[
        list[str] | None, typer.Option(help="A LoRA file, or FILE:STRENGTH as in style.safetensors:0.8; may be repeated.")
    ] = None
    captions: Annotated[TextFormat, typer.Option(help="File format of captions.")] = TextFormat.json
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no list of files.")] = False
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def seed(self) -> int:
        """Result k is made from seed + k."""
        return int(self.sampling["seed"])

    def load(self) -> UniDiffuser:
        """The model, once it is clear that its results can be written."""
        from ..media.files import check_folder

        check_folder(self.out)
        lora = tuple(_lora(text) for text in self.lora or [])
        return _load(self.model, self.device, self.dtype, lora, self.offload, self.tiling, self.compile)

    def options(self) -> Options:
        """For the methods of the model."""
        given = self.sampling["guidance"]
        guidance = None if given is None else _guidance(given)
        options: Any = {**self.sampling, "guidance": guidance, "progress": not self.quiet}
        return cast("Options", options)

    def save(self, task: str, results: Sequence[Result], model: UniDiffuser, **more: Any) -> None:
        """Write the results, print captions to stdout and the names of the files to stderr."""
        from ..media.results import save_results
        from ..options import resolve

        sampling = {name: value for name, value in resolve(self.options(), model.config).items() if value is not None}
        del (
            sampling["progress"],
            sampling["output"],
            sampling["on_error"],
            sampling["speeds"],
        )  # joint, the only task that has speeds, names them in `more`
        made_with: dict[str, Any] = {"model": self.model, "dtype": str(model.dtype).removeprefix("torch.")}
        made_with |= {"lora": self.lora} if self.lora else {}
        settings = {**sampling, **made_with, **{key: value for key, value in more.items() if value is not None}}
        for result in results:
            if result.caption is not None:
                typer.echo(result.caption)
        for path in save_results(results, self.out, task, settings, self.captions.value):
            if not self.quiet:
                typer.echo(f"wrote {path}", err=True)


def _parameters(count: int) -> list[inspect.Parameter]:
    """The fields of `Settings` and the `SAMPLING` options as parameters of a command; `count` is the default of --count."""
    help_texts, types = option_help(), get_type_hints(Options)
    flags, forms = {"method": ("--method", "--sampler")}, {"guidance": " In the form 4 or 4,2."}
    found = []
    hints = get_type_hints(Settings, include_extras=True)
    for field in dataclasses.fields(Settings):
        if field.name != "sampling":
            default = count if field.name == "count" else field.default
            found.append((field.name, default, hints[field.name]))
    for name in SAMPLING:
        kind = str if name == "guidance" else types[name]
        names = flags.get(name, ("--" + name.replace("_", "-"),))
        option = typer.Option(*names, help=help_texts[name] + forms.get(name, ""))
        found.append((name, DEFAULTS.get(name), Annotated[kind | None, option]))
    keyword = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(name, keyword, default=default, annotation=kind) for name, default, kind in found]


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
    """Register a command whose function takes a `Settings` first; `Settings` and `SAMPLING` become its options."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        _, *parameters = inspect.signature(function).parameters.values()
        own = [p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        shared = _parameters(count)

        def run(**values: Any) -> None:
            sampling = {name: values.pop(name) for name in SAMPLING}
            fields = {field.name: values.pop(field.name) for field in dataclasses.fields(Settings) if field.name in values}
            function(Settings(**fields, sampling=sampling), **values)

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
    except (RuntimeError, AssertionError) as error:  # torch raises either for an unknown or missing device
        raise ValueError(f"device {device!r} cannot be used here ({str(error).splitlines()[0]})") from error
    return load(model, device=device, dtype=torch_dtype(dtype), lora=lora, offload=offload, tiling=tiling, compile=compile)


def torch_dtype(dtype: Dtype | None) -> torch.dtype | None:
    """The torch dtype of a choice."""
    import torch

    return None if dtype is None else getattr(torch, dtype.value)


def _lora(text: str) -> tuple[str, float]:
    """FILE or FILE:STRENGTH; a colon not followed by a number belongs to the name, as in C:\\style.safetensors."""
    path, colon, strength = text.rpartition(":")
    try:
        return (path, float(strength)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def numbers(option: str, text: str, counts: Sequence[int] = (2,)) -> tuple[float, ...]:
    """Comma-separated numbers; ValueError that names the option if their number is not in `counts`."""
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
    """Turn user errors into one line on stderr and exit code 2."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted; all files written so far are complete", err=True)
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
