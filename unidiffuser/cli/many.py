"""The commands for many prompts or pictures: `generate` and `caption`, resumable and on any number of processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .inputs import Pictures, pictures
from .settings import Settings, task
from .tasks import GENERATE, NO_TEXT, placed

if TYPE_CHECKING:
    from .bulk import Item, Work


@task(
    "generate",
    GENERATE,
    without=("on_error", "as_json", *NO_TEXT),
    examples=[
        "unidiffuser generate prompts.txt --out pictures",
        "torchrun --nproc-per-node 8 -m unidiffuser generate a.txt",
    ],
)
def generate(
    settings: Settings,
    prompts: Annotated[Path, typer.Argument(help="A text file, one prompt a line.", show_default=False)],
) -> None:
    """Generate a picture for each line of a file; torchrun or `accelerate launch` spread the work over processes."""
    from .bulk import pictures_of, prompt_items

    items = prompt_items(prompts, settings.seed, settings.count)
    _many(settings, "generate", items, lambda model, options, made: pictures_of(model, settings.out, options, made))


@task(
    "caption",
    GENERATE,
    without=("count", "on_error", "captions"),
    examples=["unidiffuser caption photos/ --beside", "unidiffuser caption cat.png --candidates 5"],
)
def caption(
    settings: Settings,
    given: Pictures,
    candidates: Annotated[int, typer.Option(help="Captions of each picture, best first, with their scores.")] = 1,
    beams: Annotated[int | None, typer.Option(help="Width of the beam search; 5 if not given.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw words from the most likely ones with this probability, as in 0.8.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="1 is neutral, less is more predictable.")] = 1.0,
    beside: Annotated[
        bool, typer.Option("--beside", help="For a folder: write cat.txt beside cat.png, where there is none yet.")
    ] = False,
) -> None:
    """Caption a folder, resumable and with torchrun on several processes; or a few pictures, with candidates.

    A folder's captions go to NAME.txt in --out and to a metadata.jsonl there, which train-lora and data encode read.
    """
    search = {"candidates": candidates, "beams": beams, "top_p": top_p, "temperature": temperature}
    if not (len(given) == 1 and given[0].is_dir()):
        if beside:
            raise ValueError("--beside is for one folder of pictures")
        return _few(settings, given, search)
    from ..tasks.captions import search_options
    from .bulk import captions_of, picture_items, write_beside, write_metadata

    found = search_options(candidates, beams, top_p, temperature)
    folder = given[0]
    items = picture_items(folder, settings.seed)
    plain = {"candidates": 1, "beams": None, "top_p": None, "temperature": 1.0}
    chosen = {name: value for name, value in search.items() if value != plain[name]}
    manifest = _many(
        settings, "caption", items, lambda model, options, _: captions_of(model, folder, settings.out, options, found), chosen
    )
    if manifest is not None:
        paths = [write_metadata(folder, settings.out, manifest)]
        paths += write_beside(folder, settings.out, manifest) if beside else []
        for path in paths if not settings.quiet else ():
            typer.echo(f"wrote {path}", err=True)
    return None


def _few(settings: Settings, given: list[Path], search: dict[str, Any]) -> None:
    from ..media.results import Result

    sources = pictures(given)
    model = settings.load()
    settings.announce(model, len(sources))
    found = model.caption([source.given for source in sources], **search, **settings.options())
    results = [
        Result(settings.seed, caption=each.text, picture=source.name, score=each.score)
        for source, _, captions in placed(sources, found, 1)
        for each in captions
    ]
    settings.save("caption", results, model, **search)


def _many(
    settings: Settings,
    name: str,
    items: list[Item],
    work: Callable[..., Work],
    more: dict[str, Any] | None = None,
) -> Path | None:
    """Run the items; returns the manifest in the main process."""
    from datetime import timedelta

    from tqdm import tqdm

    from ..distributed import joined
    from ..media.files import read_lines
    from .bulk import run_items

    left_out = ("progress", "batch_size", "on_error", "output")
    with joined(settings.device, patience=timedelta(days=7)) as world:
        model = settings.load()
        if world.main:
            settings.announce(model, len(items) / world.size)
        options = {**settings.options(), "progress": False, "batch_size": None, **dict.fromkeys(left_out[2:])}
        made_with: dict[str, Any] = {"task": name, "model": settings.model, "dtype": str(model.dtype).removeprefix("torch.")}
        made_with |= {name: value for name, value in options.items() if name not in left_out} | (more or {})
        made_with |= {"progress": False, "batch_size": None}  # as older runs have it
        made_with["method"] = model.resolve(settings.options(), *settings.routes)["method"]
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
        if not world.main:
            return None
        failed = [row for row in map(json.loads, filter(None, read_lines(manifest))) if "error" in row]
        note = f", {len(failed)} of them failed" if failed else ""
        typer.echo(f"wrote {manifest}: {len(items)} items{note}", err=True)
        return manifest
