"""The commands that edit a picture or a caption, or score captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..media.files import write_text
from ..options import number, whole_number
from .application import print_results
from .inputs import Picture, Pictures, picture, pictures, prompts, words
from .settings import DESCRIBE, DRAW, Settings, task
from .tasks import NO_TEXT, placed

if TYPE_CHECKING:
    pass

EDIT = "Editing and paths"

OptionalPrompt = Annotated[
    str | None, typer.Option(help="What the picture should show; no text is used if not given.", show_default=False)
]
Negative = Annotated[str | None, typer.Option(help="Negative prompt; needs guidance above 1.")]


@task(
    "img2img",
    EDIT,
    count=4,
    without=NO_TEXT,
    examples=[
        'unidiffuser img2img cat.png --prompt "cat, flat"',
        'unidiffuser img2img photos/ --prompt "fox, noto" --strength 0.8 -n 1',
    ],
)
def img2img(
    settings: Settings,
    given: Pictures,
    prompt: OptionalPrompt = None,
    strength: Annotated[float, typer.Option(help="0.3 changes details, 0.8 leaves little of the picture; at most 1.")] = 0.6,
    negative: Negative = None,
) -> None:
    """Generate pictures that start from a noised picture instead of pure noise."""
    sources = pictures(given, settings.sampling["on_error"] or "raise")
    number("strength", strength, 0, 1)
    from ..media.results import Result

    settings.routes = (DRAW if prompt is not None else "image",)
    model = settings.load()
    settings.announce(model, len(sources) * settings.count)
    images = model.img2img(
        [source.given for source in sources],
        prompt,
        strength=strength,
        negative=negative,
        count=settings.count,
        **settings.options(),
    )
    results = [
        Result(settings.seed + k, image, prompt=prompt, picture=source.name)
        for source, k, image in placed(sources, images, settings.count)
    ]
    settings.save("img2img", results, model, strength=strength, negative=negative)


@task(
    "inpaint",
    EDIT,
    count=4,
    without=("on_error", *NO_TEXT),
    examples=[
        'unidiffuser inpaint cat.png mask.png --prompt "cat, noto"',
        "unidiffuser inpaint cat.png mask.png --strength 0.7 -n 1",
    ],
)
def inpaint(
    settings: Settings,
    given: Picture,
    mask: Annotated[Path, typer.Argument(metavar="MASK", help="White: generate; black: keep. As large as the picture.")],
    prompt: OptionalPrompt = None,
    strength: Annotated[float, typer.Option(help="Noise the white part starts from; 1 is pure noise.")] = 1.0,
    negative: Negative = None,
) -> None:
    """Generate the white part of a mask anew, and keep the rest of the picture."""
    source, white = picture(given), picture(mask)
    number("strength", strength, 0, 1)
    from ..media.results import Result

    settings.routes = (DRAW if prompt is not None else "image",)
    model = settings.load()
    settings.announce(model, settings.count)
    images = model.inpaint(
        source.given, white.given, prompt, strength=strength, negative=negative, count=settings.count, **settings.options()
    )
    results = [Result(settings.seed + k, image, prompt=prompt, picture=source.name) for k, image in enumerate(images)]
    settings.save("inpaint", results, model, mask=white.name, strength=strength, negative=negative)


@task(
    "rewrite",
    EDIT,
    count=4,
    without=("on_error",),
    examples=[
        'unidiffuser rewrite "green apple, noto" --change green --picture apple.png',
        'unidiffuser rewrite "red apple, noto" --keep "apple,"',
    ],
)
def rewrite(
    settings: Settings,
    caption: Annotated[str, typer.Argument(help="The caption to change.", show_default=False)],
    given: Annotated[Path | None, typer.Option("--picture", help="The picture that it should fit.", show_default=False)] = None,
    change: Annotated[str | None, typer.Option(help="Words to change, or their positions from 0.", show_default=False)] = None,
    keep: Annotated[str | None, typer.Option(help="Words to keep, instead of --change.", show_default=False)] = None,
    rest: Annotated[bool, typer.Option(help="Also write anew what follows the caption, so that it can grow longer.")] = True,
    strength: Annotated[float, typer.Option(help="Noise the changed words start from; 1 is pure noise.")] = 1.0,
) -> None:
    """Write some words of a caption anew, to fit a picture if one is given."""
    source = None if given is None else picture(given)
    number("strength", strength, 0, 1)
    which: dict[str, Any] = {"change": words(change, caption), "keep": words(keep, caption)}
    from ..media.results import Result
    from ..tasks.words import token_mask

    token_mask(caption, len, 1, **which)  # a word that is not there is named before the model is loaded
    settings.routes = (DESCRIBE if source is not None else "text",)
    model = settings.load()
    settings.announce(model, settings.count)
    captions = model.rewrite(
        caption,
        None if source is None else source.given,
        rest=rest,
        strength=strength,
        count=settings.count,
        **which,
        **settings.options(),
    )
    name = None if source is None else source.name
    results = [Result(settings.seed + k, caption=c, prompt=caption, picture=name) for k, c in enumerate(captions)]
    settings.save("rewrite", results, model, rest=rest, strength=strength, **which)


@task(
    "score",
    EDIT,
    without=("count", "guidance", "guidance_interval", "on_error", "tiling", "captions"),
    examples=[
        'unidiffuser score cat.png "cat, noto" "dog, noto" "fox, noto"',
        "unidiffuser score cat.png - --levels 32 --json < labels.txt",
    ],
)
def score(
    settings: Settings,
    given: Picture,
    labels: Annotated[list[str], typer.Argument(metavar="CAPTIONS", help="Captions; - reads them from stdin, one a line.")],
    levels: Annotated[int, typer.Option(help="Noise levels to test: 8 is quick, 32 more reliable.")] = 8,
    shuffled: Annotated[int, typer.Option(help="Captions that the model draws to compare with.")] = 8,
) -> None:
    """Rank captions of a picture; with labels as captions it classifies.

    Prints for each caption, best first, its log-odds in nats: against the empty caption, and against captions drawn at random.
    Above 0 it fits the picture better than they do.
    """
    if labels == ["-"] and str(given) == "-":
        raise ValueError("stdin is either the picture or the captions, not both")
    source = picture(given)
    texts = prompts(labels[0]) if len(labels) == 1 else labels
    whole_number("levels", levels, least=1), whole_number("shuffled", shuffled, least=1)
    model = settings.load()
    settings.announce(model, shuffled + (len(texts) + shuffled) * levels / 40)
    scores = model.score(source.given, texts, levels=levels, shuffled=shuffled, **settings.options())
    rows = [vars(found) for found in scores]
    whole = {"task": "score", "picture": source.name, "settings": settings.made_with(model, levels=levels), "scores": rows}
    content = json.dumps(whole, ensure_ascii=False, indent=1)
    path = settings.free(f"score-{Path(source.name).stem}", ".json", content)
    write_text(path, content + "\n")
    if not settings.quiet:
        typer.echo(f"wrote {path}", err=True)
    lines = ["rank   empty  random  caption"]
    lines += [f"{s.rank:4d} {s.log_odds_empty:+7.1f} {s.log_odds_shuffled:+7.1f}  {s.caption}" for s in scores]
    print_results([content] if settings.as_json else lines, str(path))
