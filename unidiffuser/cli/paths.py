"""The commands that follow a path of one's own, or invert pictures, with latents in and out."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..media.files import check_folder
from ..options import SPACINGS, Options, one_of, whole_number
from .application import command, print_results
from .editing import EDIT, Negative, OptionalPrompt
from .inputs import PathText, Picture, check_points, check_start, picture
from .settings import Settings, task
from .tasks import NO_TEXT, exact

if TYPE_CHECKING:
    from PIL import Image

    from ..streams import Streams

LATENTS = ".safetensors"


@task(
    "invert",
    EDIT,
    without=("count", "on_error", "as_json", *NO_TEXT),
    examples=['unidiffuser invert cat.png --prompt "cat, noto"', "unidiffuser invert cat.png --steps 200 --out noise"],
)
def invert(settings: Settings, given: Picture, prompt: OptionalPrompt = None) -> None:
    """Find the noise that the model generates a picture from, for `reconstruct`; steps are 100, guidance 1 if not given."""
    source = picture(given)
    exact(settings)
    model = settings.load()
    settings.announce(model, 2)
    noise = model.invert(source.given, prompt, **settings.options())
    _write_latents(settings, f"invert-{Path(source.name).stem}", noise, {"picture": source.name, "prompt": prompt or ""})


@task(
    "reconstruct",
    EDIT,
    without=("count", "on_error", *NO_TEXT),
    examples=[
        "unidiffuser reconstruct out/invert-cat.safetensors",
        'unidiffuser reconstruct cat.png --prompt "dog, noto"',
    ],
)
def reconstruct(
    settings: Settings,
    given: Annotated[Path, typer.Argument(metavar="FILE", help="A file of `invert`, or a picture.", show_default=False)],
    prompt: Annotated[str | None, typer.Option(help="Another text, for an edit.", show_default=False)] = None,
) -> None:
    """Generate a picture from its inverted noise, or an edit of it under another text."""
    source = picture(given)
    exact(settings)
    from ..media.results import Result

    model = settings.load()
    settings.announce(model, 3)
    start: Any = _read_latents(given) if given.suffix == LATENTS else source.given
    images = model.reconstruct(start, prompt, **settings.options())
    results = [Result(settings.seed, image, prompt=prompt, picture=source.name) for image in images]
    settings.save("reconstruct", results, model)


@task(
    "sample",
    EDIT,
    count=4,
    without=("on_error",),
    examples=[
        'unidiffuser sample --path "1000,1000 400,0 0,0"',
        'unidiffuser sample --path "700,0 0,0" --picture cat.png --prompt "cat, flat"',
    ],
)
def sample(
    settings: Settings,
    path: PathText,
    given: Annotated[
        Path | None, typer.Option("--picture", help="The picture that the path starts from or holds.", show_default=False)
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="The caption that the path starts from or holds.", show_default=False)
    ] = None,
    negative: Negative = None,
    latents: Annotated[bool, typer.Option("--latents", help="Also write the latents, for `decode`.")] = False,
) -> None:
    """Sample along a path of your own through the noise levels of picture and caption; `path` draws it."""
    check_start(check_points(path), given, prompt)
    source = None if given is None else picture(given)
    from ..media.results import Result
    from ..path import NoisePath, path_points
    from ..runtime.fast_lora import route_of
    from ..tasks.editing import finished

    path_points(path)
    model = settings.load()
    options: Options = {**settings.options(), "output": "latent"}
    settings.routes = (route_of(NoisePath.from_points(path, 1)),)
    chosen = model.resolve(options, *settings.routes)
    way = NoisePath.from_points(path, chosen["steps"], chosen["spacing"])
    settings.announce(model, settings.count)
    out = model.sample(
        way,
        image=None if source is None else source.given,
        text=prompt,
        negative=negative,
        count=settings.count,
        **options,
    )
    images, captions = model.decode(finished(way, out))
    name = None if source is None else source.name
    results = [
        Result(settings.seed + k, image, caption, prompt, name)
        for k, (image, caption) in enumerate(_pairs(images, captions, settings.count))
    ]
    settings.save("sample", results, model, path=path, negative=negative)
    if latents:
        _write_latents(settings, f"sample-seed{settings.seed}", out, {"path": path})


@task(
    "decode",
    EDIT,
    without=("count", "seed", "steps", "guidance", "guidance_interval", "method", "spacing", "data_type", "width", "height",
             "preset", "cache_interval", "cache_branch", "on_error", "compile"),
    examples=["unidiffuser decode out/sample-seed0.safetensors", "unidiffuser decode latents.safetensors --json"],
)  # fmt: skip
def decode(settings: Settings, given: Annotated[Path, typer.Argument(metavar="FILE", help="A file of latents.")]) -> None:
    """Decode latents, written by `sample --latents` or `invert`, to pictures and captions."""
    source = picture(given)
    from ..media.results import Result

    latents = _read_latents(given)
    model = settings.load()
    images, captions = model.decode(latents, **settings.options())
    pairs = _pairs(images, captions, latents.batch)
    results = [Result(k, image, caption, picture=source.name) for k, (image, caption) in enumerate(pairs)]
    settings.save("decode", results, model)


@command(
    "path",
    panel=EDIT,
    examples=['unidiffuser path "1000,1000 400,0 0,0"', 'unidiffuser path "1000,0 0,0" --steps 8 --spacing logsnr'],
)
def draw_path(
    points: Annotated[str, typer.Argument(help='Points as in "1000,1000 400,0 0,0".', show_default=False)],
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    spacing: Annotated[str, typer.Option(help="uniform, logsnr or karras.")] = "uniform",
    size: Annotated[int, typer.Option(help="Side of the picture in pixels.")] = 512,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The PNG to write; out/path.png if not given.")] = None,
) -> None:
    """Draw a noise path, and print the noise levels of its steps: the picture's, then the caption's."""
    check_points(points)
    whole_number("steps", steps, least=1)
    one_of("spacing", spacing, SPACINGS)
    check_folder(Path("out") if out is None else out.parent)
    from ..media.images import png_texts, save_png
    from ..path import NoisePath

    found = NoisePath.from_points(points, steps, spacing)
    described = {"path": points, "steps": str(steps), "spacing": spacing, "size": str(size)}
    names = (Path("out") / f"path{'' if k == 1 else f'-{k}'}.png" for k in itertools.count(1))
    out = out or next(name for name in names if not name.exists() or png_texts(name) == described)
    save_png(found.picture(size), out, described)
    typer.echo(f"wrote {out}", err=True)
    print_results([f"{a:8.2f} {b:8.2f}" for a, b in zip(found.t_img, found.t_text, strict=True)], str(out))


def _pairs(images: list[Image.Image] | None, captions: list[str] | None, count: int) -> list[tuple[Any, Any]]:
    """Pictures and captions side by side, None for those that are not there."""
    nothing: list[Any] = [None] * count
    return list(zip(images or nothing, captions or nothing, strict=True))


def _write_latents(settings: Settings, stem: str, latents: Streams, origin: dict[str, str]) -> None:
    from ..tasks.latents import write_latents

    options = {name: value for name, value in settings.sampling.items() if name not in ("batch_size", "on_error")}
    described = {**origin, "model": settings.model, "seed": str(settings.seed), "options": json.dumps(options)}
    path = write_latents(settings.out, stem, latents, described)
    if not settings.quiet:
        typer.echo(f"wrote {path}", err=True)


def _read_latents(path: Path) -> Streams:
    from ..tasks.latents import read_latents

    return read_latents(path)
