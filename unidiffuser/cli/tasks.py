"""The sampling commands, one per task, and the demo.

Results go to files, captions also to stdout, bars and messages to stderr. Exit codes: 0 done, 2 bad input (one line says
what to do), 130 interrupted.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..options import Options, check
from ..version import __version__
from .application import app
from .inputs import Picture, Pictures, Prompt, Source, picture, pictures, prompt_not_picture, prompts
from .settings import Settings, numbers, task

EXAMPLE = Path(__file__).parents[1] / "assets" / "example.png"
GENERATE = "Pictures and captions"
NO_TEXT = ("captions",)  # options that commands without captions do not have


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


@task(
    "text-to-image",
    GENERATE,
    count=4,
    examples=[
        'unidiffuser text-to-image "red apple, twemoji"',
        'unidiffuser text-to-image "cat, noto" -n 9 --guidance 5',
    ],
)
def text_to_image(
    settings: Settings,
    prompt: Prompt,
    negative: Annotated[str | None, typer.Option(help="Negative prompt; needs guidance above 1.")] = None,
) -> None:
    """Generate pictures from a prompt."""
    given = prompts(prompt)
    from ..media.results import Result

    model = settings.load()
    settings.announce(model, len(given) * settings.count)
    images = model.text_to_image(given, count=settings.count, negative=negative, **settings.options())
    results = [Result(settings.seed + k, image, prompt=text) for text, k, image in placed(given, images, settings.count)]
    settings.save("text-to-image", results, model, negative=negative)


@task(
    "image-to-text",
    GENERATE,
    examples=["unidiffuser image-to-text cat.png", "unidiffuser image-to-text photos/ --on-error skip --json"],
)
def image_to_text(settings: Settings, given: Pictures) -> None:
    """Caption pictures; for many, resumable and on several GPUs, use `caption`."""
    _caption(settings, pictures(given, settings.sampling["on_error"] or "raise"))


def _caption(settings: Settings, sources: Sequence[Source]) -> None:
    from ..media.results import Result

    model = settings.load()
    settings.announce(model, len(sources) * settings.count)
    captions = model.image_to_text([source.given for source in sources], count=settings.count, **settings.options())
    results = [
        Result(settings.seed + k, caption=caption, picture=source.name)
        for source, k, caption in placed(sources, captions, settings.count)
    ]
    settings.save("image-to-text", results, model)


@task(
    "joint",
    GENERATE,
    count=4,
    without=("on_error",),
    examples=["unidiffuser joint -n 9", "unidiffuser joint -n 50 --captions metadata --out pairs"],
)
def joint(
    settings: Settings,
    speeds: Annotated[
        str | None,
        typer.Option(help="Denoising speeds of image and text, as in 1,2 for text first; the model's default if not given."),
    ] = None,
) -> None:
    """Generate image-caption pairs without a prompt."""
    options: Options = settings.options()
    if speeds is not None:
        image, text = numbers("--speeds", speeds)
        options["speeds"] = image, text
        check(options)
    from ..media.results import Result

    model = settings.load()
    settings.announce(model, settings.count)
    pairs = model.joint(count=settings.count, **options)
    results = [Result(settings.seed + k, *pair) for k, pair in enumerate(pairs)]
    settings.save("joint", results, model, speeds=model.resolve(options, *settings.routes)["speeds"])


@task(
    "image",
    GENERATE,
    count=4,
    without=("guidance", "guidance_interval", "on_error", *NO_TEXT),
    examples=["unidiffuser image", "unidiffuser image -n 16 --seed 100 --out samples"],
)
def image(settings: Settings) -> None:
    """Generate pictures without a prompt."""
    from ..media.results import Result

    model = settings.load()
    settings.announce(model, settings.count)
    images = model.image(count=settings.count, **settings.options())
    settings.save("image", [Result(settings.seed + k, picture) for k, picture in enumerate(images)], model)


@task(
    "text",
    GENERATE,
    count=4,
    without=("guidance", "guidance_interval", "on_error", "width", "height", "tiling"),
    examples=["unidiffuser text", "unidiffuser text -n 100 --captions txt --quiet"],
)
def text(settings: Settings) -> None:
    """Generate captions without a picture."""
    from ..media.results import Result

    model = settings.load()
    settings.announce(model, settings.count)
    captions = model.text(count=settings.count, **settings.options())
    settings.save("text", [Result(settings.seed + k, caption=c) for k, c in enumerate(captions)], model)


@task(
    "vary-image",
    GENERATE,
    count=4,
    without=NO_TEXT,
    examples=["unidiffuser vary-image cat.png", "unidiffuser vary-image photos/ -n 1 --on-error skip"],
)
def vary_image(settings: Settings, given: Pictures) -> None:
    """Generate variations of a picture."""
    sources = pictures(given, settings.sampling["on_error"] or "raise")
    from ..media.results import Result

    model = settings.load()
    settings.announce(model, len(sources) * settings.count, runs=2)
    images = model.vary_image([source.given for source in sources], count=settings.count, **settings.options())
    results = [
        Result(settings.seed + k, image, picture=source.name) for source, k, image in placed(sources, images, settings.count)
    ]
    settings.save("vary-image", results, model)


@task(
    "vary-text",
    GENERATE,
    count=4,
    examples=['unidiffuser vary-text "red apple, twemoji"', 'unidiffuser vary-text "a cat" -n 8 --captions txt'],
)
def vary_text(settings: Settings, prompt: Prompt) -> None:
    """Generate other captions with the meaning of a prompt."""
    given = prompts(prompt)
    from ..media.results import Result

    model = settings.load()
    settings.announce(model, len(given) * settings.count, runs=2)
    captions = model.vary_text(given, count=settings.count, **settings.options())
    results = [
        Result(settings.seed + k, caption=caption, prompt=text) for text, k, caption in placed(given, captions, settings.count)
    ]
    settings.save("vary-text", results, model)


@task(
    "gibbs",
    GENERATE,
    without=("on_error",),
    examples=['unidiffuser gibbs --prompt "cat, noto"', "unidiffuser gibbs --picture cat.png --rounds 12 --hold 60"],
)
def gibbs(
    settings: Settings,
    prompt: Annotated[str | None, typer.Option(help="Start from this prompt.")] = None,
    start: Annotated[Path | None, typer.Option("--picture", help="Start from this picture.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds in a chain; each gives a pair.")] = 4,
    hold: Annotated[
        float, typer.Option(help="Noise on each half's condition, 0..1000; 40 to 100 keeps long chains on their topic.")
    ] = 0.0,
) -> None:
    """Caption a picture, illustrate the caption, and so on (blocked Gibbs sampling); --count chains."""
    if prompt is not None and start is not None:
        raise ValueError("a chain starts from --prompt or from --picture, not from both")
    prompt_not_picture("--prompt", prompt)
    source = None if start is None else picture(start)
    if rounds < 1:
        raise ValueError(f"rounds must be a whole number of at least 1, got {rounds}")
    if not 0 <= hold <= 1000:
        raise ValueError(f"hold must be a number from 0 to 1000, got {hold:g}")
    from ..media.results import Result

    model = settings.load()
    settings.announce(model, settings.count, runs=2 * rounds)
    given = prompt if source is None else source.given
    pairs = model.gibbs(given, rounds=rounds, hold=hold, count=settings.count, **settings.options())
    name = None if source is None else source.name
    results = [Result(settings.seed + k // rounds, *pair, prompt, name) for k, pair in enumerate(pairs)]
    settings.save("gibbs", results, model, rounds=rounds, hold=hold)


@task(
    "interpolate",
    GENERATE,
    without=("count", "on_error", *NO_TEXT),
    examples=["unidiffuser interpolate a.png b.png", "unidiffuser interpolate a.png b.png --frames 24 --out morph"],
)
def interpolate(
    settings: Settings,
    picture_a: Picture,
    picture_b: Picture,
    frames: Annotated[int, typer.Option(help="Number of pictures, both ends included.")] = 8,
) -> None:
    """Interpolate between two pictures; steps are 100 and guidance 1 if not given."""
    first, second = picture(picture_a), picture(picture_b)
    if frames < 2:
        raise ValueError(f"frames must be a whole number of at least 2, got {frames}")
    exact(settings)
    from ..media.results import Result

    model = settings.load()
    settings.announce(model, frames + 6)
    images = model.interpolate(first.given, second.given, frames=frames, **settings.options())
    results = [Result(settings.seed, image, picture=f"{first.name} - {second.name}") for image in images]
    settings.save("interpolate", results, model, frames=frames)


@task(
    "demo",
    GENERATE,
    count=4,
    without=("on_error",),
    examples=["unidiffuser demo", 'unidiffuser demo --prompt "fox, fluent" --picture cat.png'],
)
def demo(
    settings: Settings,
    prompt: Annotated[str, typer.Option(help="The prompt.")] = "red apple, twemoji",
    given: Annotated[
        Path, typer.Option("--picture", help="A picture to caption; an example if not given.", show_default=False)
    ] = EXAMPLE,
) -> None:
    """Show both directions: pictures from a prompt, and a caption of a picture."""
    source = picture(given)
    text_to_image(settings, prompt)
    settings.count = 1
    _caption(settings, [source])


def exact(settings: Settings) -> None:
    """The steps and guidance of an inversion, where none are given; presets change nothing there."""
    settings.sampling["preset"] = "exact"
    settings.sampling["steps"] = settings.sampling["steps"] or 100
    settings.sampling["guidance"] = settings.sampling["guidance"] or "1"


def placed(inputs: Sequence[Any], results: Sequence[Any], count: int) -> list[tuple[Any, int, Any]]:
    """(input, number of the candidate, result) of each result; those of inputs that were skipped are left out.

    Raises:
        ValueError: the number of results is not `count` for each input.
    """
    sources = [(given, k) for given in inputs for k in range(count)]
    return [(*source, result) for source, result in zip(sources, results, strict=True) if result is not None]
