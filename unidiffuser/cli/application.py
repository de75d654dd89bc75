"""Shared by all commands: the application, how a command is registered, and one-line errors.

Nothing here imports torch before a command runs, so that help and usage errors are immediate.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import IO, TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import torch

app = typer.Typer(
    help="UniDiffuser: text to image, image to text, both together, or either alone.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

LONG = 60  # seconds from which a run is announced with an estimate


class Dtype(str, Enum):
    """Number formats for weights."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def torch_dtype(dtype: Dtype | None) -> torch.dtype | None:
    """The torch dtype of a choice."""
    import torch

    return None if dtype is None else getattr(torch, dtype.value)


def command(
    name: str, to: typer.Typer = app, panel: str | None = None, examples: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command of an application; its errors end as one line on stderr and an exit code.

    Args:
        name: of the command.
        to: the application.
        panel: heading of the list of commands that it is shown under.
        examples: lines for the end of its help.
    """
    epilog = "\n\n".join(["Examples:", *(f"  {line}" for line in examples)]) if examples else None

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            with clear_errors():
                function(*args, **kwargs)

        to.command(name, epilog=epilog, rich_help_panel=panel)(run)
        return function

    return register


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
        fail(f"{reason}: {error.filename}" if error.filename else reason)
    except (ValueError, FloatingPointError) as error:
        fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        fail("out of memory; use a smaller --batch-size, --width and --height, or --dtype float16")


def fail(message: str) -> None:
    """End with a message on stderr and exit code 2."""
    typer.echo("error: " + " ".join(message.split()), err=True)
    raise typer.Exit(2)


def announce(seconds: float, device: object, work: str = "this") -> None:
    """Say on stderr how long work takes, if that is more than a minute."""
    if seconds > LONG:
        minutes = round(seconds / 60)
        duration = f"{minutes} minutes" if minutes < 120 else f"{seconds / 3600:.1f} hours"
        duration = "a minute" if minutes <= 1 else duration
        typer.echo(f"{work} takes about {duration} on {device}", err=True)


def print_results(lines: Sequence[str], saved: str) -> None:
    """Print lines to stdout; where they cannot be written, nothing is lost that was saved before.

    Args:
        lines: the lines.
        saved: where the results are, for the message.

    Raises:
        ValueError: stdout cannot be written, but for a pipe whose reader has ended.
    """
    try:
        for line in lines:
            typer.echo(line.encode("utf-8", "backslashreplace").decode())
    except OSError as error:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())  # or the rest fails again when the interpreter ends
        if error.errno != errno.EPIPE:
            raise ValueError(f"stdout cannot be written ({error.strerror}); the results are in {saved}") from error


def repair_streams() -> None:
    """Make the standard streams safe: a closed one leads nowhere, and stderr that cannot be written ends no run.

    With stderr closed (`2>&-`) the next file that is opened would get its number, and messages of libraries.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (as long as the process)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    elif isinstance(sys.stderr, io.TextIOWrapper):
        raw = _Forgiving(sys.stderr)
        sys.stderr = io.TextIOWrapper(io.BufferedWriter(raw), sys.stderr.encoding, "backslashreplace", line_buffering=True)


class _Forgiving(io.RawIOBase):
    """A file descriptor whose writes always succeed: messages that nobody can read are dropped."""

    def __init__(self, stream: IO[str]):
        self.stream = stream  # kept, as its end would close the descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.stream.fileno()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def write(self, data: Any) -> int:
        try:
            return os.write(self.fileno(), data)
        except OSError:
            return len(data)
