"""Options of the tasks on the command line, and what all tasks do with them: check, load, save, print.

A mistake is answered before torch is imported, as far as it can be seen without a model.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_type_hints

import typer

from ..media.files import check_folder
from ..options import DEFAULTS, Options, check, option_help, whole_number
from .application import Dtype, announce, command, print_results, torch_dtype

if TYPE_CHECKING:
    from ..media.results import Result
    from ..pipeline import UniDiffuser

MODEL, SAMPLING_PANEL, SPEED, RESULTS = "Model", "Sampling", "Speed and memory", "Results"
BUNDLED = ("emoji",)
COMPILE = ("default", "reduce-overhead", "max-autotune")
SHORT = 16  # sampling steps in all below which nothing is measured


class TextFormat(str, Enum):
    """How captions are written."""

    json = "json"
    txt = "txt"
    metadata = "metadata"


SAMPLING = {
    "seed": SAMPLING_PANEL,
    "steps": SAMPLING_PANEL,
    "guidance": SAMPLING_PANEL,
    "guidance_interval": SAMPLING_PANEL,
    "method": SAMPLING_PANEL,
    "spacing": SAMPLING_PANEL,
    "data_type": SAMPLING_PANEL,
    "width": SAMPLING_PANEL,
    "height": SAMPLING_PANEL,
    "preset": SPEED,
    "batch_size": SPEED,
    "cache_interval": SPEED,
    "cache_branch": SPEED,
    "on_error": RESULTS,
}
"""The sampling options of tasks, and the group in which the help shows them; see `options.Options`."""
SHOWN = ("seed", "preset")  # whose defaults the help shows, as no model has others
DRAW, DESCRIBE = "text_to_image", "image_to_text"  # `runtime.fast_lora` imports torch
ROUTES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("text-to-image", "generate"), (DRAW,)),
    **dict.fromkeys(("image-to-text", "caption"), (DESCRIBE,)),
    **dict.fromkeys(("vary-image", "vary-text", "gibbs"), (DESCRIBE, DRAW)),
    "joint": ("joint",),
    "image": ("image",),
    "text": ("text",),
}
"""The kinds of path that each command follows; editing commands know theirs from their inputs."""
ON_ERROR = "An input that cannot be used: raise (default) ends the run, skip goes on without it."
NO_FLAGS = ("sampling", "routes")
PAIRS = {"guidance": (1, 2), "guidance_interval": (2,)}  # options of comma-separated numbers


def _option(panel: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, **more)


@dataclass
class Settings:
    """The options of a task: these fields, as far as the task has them, and the `SAMPLING` options."""

    count: Annotated[int, _option(SAMPLING_PANEL, "--count", "-n", help="Number of results for each input.")] = 1
    model: Annotated[str, _option(MODEL, "--model", "-m", help='"emoji" (bundled), or a checkpoint file or folder.')] = "emoji"
    lora: Annotated[
        list[str] | None, _option(MODEL, help="A LoRA file, or FILE:STRENGTH as in style.safetensors:0.8; may be repeated.")
    ] = None
    device: Annotated[str | None, _option(MODEL, help="cpu, cuda, cuda:1, mps; the fastest if not given.")] = None
    dtype: Annotated[Dtype | None, _option(MODEL, help="Number format of the weights; chosen by device if not given.")] = None
    compile: Annotated[
        str | None, _option(SPEED, help="torch.compile's default, reduce-overhead or max-autotune; for long runs.")
    ] = None
    offload: Annotated[bool, _option(SPEED, "--offload", help="Keep each part off the device while it is not running.")] = False
    tiling: Annotated[bool, _option(SPEED, "--tiling", help="Decode large pictures tile by tile, to save memory.")] = False
    out: Annotated[Path, _option(RESULTS, "--out", "-o", help="Folder for the results.")] = Path("out")
    captions: Annotated[
        TextFormat,
        _option(
            RESULTS,
            help="File of captions: json, with seeds and settings; txt, one a line; metadata, a line for each picture in "
            "metadata.jsonl, which train-lora and data encode read.",
        ),
    ] = TextFormat.json
    as_json: Annotated[bool, _option(RESULTS, "--json", help="Print the results as JSON, for programs.")] = False
    quiet: Annotated[bool, _option(RESULTS, "--quiet", "-q", help="No progress bar, no list of files.")] = False
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
    routes: tuple[str, ...] = ()  # kinds of path that the task follows, see `Engine.resolve`

    @property
    def seed(self) -> int:
        """Result k is made from seed + k."""
        return int(self.sampling.get("seed") or 0)

    def check(self) -> None:
        """Everything that can be checked without a model.

        Raises:
            FileNotFoundError: no such model or LoRA.
            ValueError: an option out of range.
            OSError: the folder of the results cannot be written.
        """
        check_folder(self.out)
        whole_number("--count", self.count, least=1)
        check(self.options())
        if self.model not in BUNDLED and not Path(self.model).exists():
            from ..checkpoints.checkpoint import load_checkpoint

            load_checkpoint(self.model)  # its message says what a model is
        for path, _ in map(_lora, self.lora or []):
            if not Path(path).is_file():
                raise FileNotFoundError(f"there is no LoRA file {path}; check the path")
        if self.device is not None and not re.fullmatch(r"[a-z]+(:\d+)?", self.device):
            raise ValueError(f"--device is cpu, cuda, cuda:1 or mps, got {self.device!r}")
        if self.compile is not None and self.compile not in COMPILE:
            raise ValueError(f"--compile must be one of {', '.join(COMPILE)}, got {self.compile!r}")

    def load(self) -> UniDiffuser:
        """The model."""
        lora = tuple(_lora(text) for text in self.lora or [])
        return _load(self.model, self.device, self.dtype, lora, self.offload, self.tiling, self.compile)

    def options(self) -> Options:
        """For the methods of the model."""
        given: dict[str, Any] = dict(self.sampling)
        for name, counts in PAIRS.items():
            if given.get(name) is not None:
                found = numbers("--" + name.replace("_", "-"), given[name], counts)
                given[name] = found[0] if len(found) == 1 else found
        return cast("Options", {**given, "progress": not self.quiet})

    def announce(self, model: UniDiffuser, items: float, runs: float = 1) -> None:
        """Say how long it will take, if that is more than a minute.

        Args:
            model: the loaded model.
            items: results that are computed.
            runs: samplings of all steps for each of them.
        """
        options = model.resolve(self.options(), *self.routes)
        if self.quiet or self.compile or items * runs * options["steps"] < SHORT:
            return
        announce(items * runs * options["steps"] * model.step_seconds(options), model.device)

    def save(self, task: str, results: Sequence[Result], model: UniDiffuser, **more: Any) -> None:
        """Write the results, then print captions to stdout and the names of the files to stderr."""
        from ..media.results import described, save_results

        settings = self.made_with(model, **more)
        paths = save_results(results, self.out, task, settings, self.captions.value)
        for path in paths if not self.quiet else ():
            typer.echo(f"wrote {path}", err=True)
        lines = [_line(result) for result in results if result.caption is not None]
        if self.as_json:
            rows = [described(result) for result in results]
            written = iter(paths)
            for row, result in zip(rows, results, strict=True):
                row |= {} if result.image is None else {"file": str(next(written))}
            whole = {"task": task, "settings": settings, "results": rows, "files": [str(path) for path in paths]}
            lines = [json.dumps(whole, ensure_ascii=False, indent=1)]
        print_results(lines, str(self.out))

    def free(self, stem: str, suffix: str, content: str) -> Path:
        """The first path of `stem` in the folder of the results that is free, or holds the same content."""
        for number in itertools.count(1):
            path = self.out / f"{stem}{'' if number == 1 else f'-{number}'}{suffix}"
            if not path.exists() or path.read_bytes() == f"{content}\n".encode():
                return path
        raise AssertionError  # itertools.count has no end

    def made_with(self, model: UniDiffuser, **more: Any) -> dict[str, Any]:
        """Everything that reproduces the results, as JSON values."""
        left_out = ("progress", "speeds", "output", "on_error")  # joint, the only task that has speeds, names them in `more`
        sampling = {k: value for k, value in model.resolve(self.options(), *self.routes).items() if value is not None}
        made_with: dict[str, Any] = {"model": self.model, "dtype": str(model.dtype).removeprefix("torch.")}
        made_with |= {"lora": self.lora} if self.lora else {}
        kept = {name: value for name, value in sampling.items() if name not in left_out}
        return {**kept, **made_with, **{key: value for key, value in more.items() if value is not None}}


def _line(result: Result) -> str:
    return str(result.caption) if result.score is None else f"{result.score:8.3f}  {result.caption}"


def task(
    name: str, panel: str, count: int = 1, without: Collection[str] = (), examples: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command whose function takes a `Settings` first.

    Args:
        name: of the command.
        panel: heading that it is listed under.
        count: default of --count.
        without: fields of `Settings` and names of `SAMPLING` that this command has no use for.
        examples: lines for the end of its help.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        _, *parameters = inspect.signature(function).parameters.values()
        own = [p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        shared = [parameter for parameter in _parameters(count) if parameter.name not in without]

        def run(**values: Any) -> None:
            sampling = {name: values.pop(name) for name in SAMPLING if name in values}
            fields = {field.name: values.pop(field.name) for field in dataclasses.fields(Settings) if field.name in values}
            settings = Settings(**fields, sampling=sampling, routes=ROUTES.get(name, ()))
            settings.check()
            function(settings, **values)

        run.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*own, *shared)}
        run.__doc__ = function.__doc__
        command(name, panel=panel, examples=examples)(run)
        return function

    return register


def _parameters(count: int) -> list[inspect.Parameter]:
    """The fields of `Settings` and the `SAMPLING` options as parameters of a command; `count` is the default of --count."""
    help_texts, types = option_help(), get_type_hints(Options)
    flags = {"method": ("--method", "--sampler")}
    forms = {"guidance": " In the form 4 or 4,2.", "guidance_interval": " In the form 0,600."}
    found = []
    hints = get_type_hints(Settings, include_extras=True)
    for field in dataclasses.fields(Settings):
        if field.name not in NO_FLAGS:
            default = count if field.name == "count" else field.default
            found.append((field.name, default, hints[field.name]))
    for name, panel in SAMPLING.items():
        kind: Any = str if name in PAIRS or name == "on_error" else types[name]
        names = flags.get(name, ("--" + name.replace("_", "-"),))
        text = ON_ERROR if name == "on_error" else help_texts[name]
        option = typer.Option(*names, help=text + forms.get(name, ""), rich_help_panel=panel)
        found.append((name, DEFAULTS.get(name) if name in SHOWN else None, Annotated[kind | None, option]))
    keyword = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(name, keyword, default=default, annotation=kind) for name, default, kind in found]


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
    from ..pipeline import load

    return load(model, device=device, dtype=torch_dtype(dtype), lora=lora, offload=offload, tiling=tiling, compile=compile)


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
        two = "two labels, low and high, as in 0,600" if option == "--guidance-interval" else "two for image and text as in 4,2"
        raise ValueError(f"{option} is {one}{two}; got {text!r}")
    return found
