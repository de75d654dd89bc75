"""`unidiffuser data ...`: filter tables, print the download command, encode pictures into latent shards."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from .application import announce, command

app = typer.Typer(help="From image-text metadata to latent shards that training reads.", no_args_is_help=True)

Renames = Annotated[Optional[list[str]], typer.Option("--rename", help="OUR_NAME=ITS_NAME of a column; repeatable.")]  # noqa: UP045


def _renamed(given: list[str] | None) -> dict[str, str]:
    pairs = [item.partition("=") for item in given or []]
    if bad := [item for item, equals, _ in pairs if not equals]:
        raise ValueError(f"--rename is OUR_NAME=ITS_NAME, got {bad[0]!r}")
    return {ours: theirs for ours, _, theirs in pairs}


@command(
    "filter",
    app,
    examples=[
        "unidiffuser data filter laion2B-en-joined kept --preset laion2b-256",
        "unidiffuser data filter table.parquet kept --min-side 512 --rename url=link",
    ],
)
def filter_command(
    source: Annotated[Path, typer.Argument(help="A parquet file or a folder of them, with LAION's columns.")],
    out: Annotated[Path, typer.Argument(help="Folder for the filtered tables.")],
    preset: Annotated[Optional[str], typer.Option(help="laion2b-256, high-resolution-512 or aesthetics-512.")] = None,  # noqa: UP045
    min_side: Annotated[Optional[int], typer.Option(help="Shorter side in pixels.")] = None,  # noqa: UP045
    max_ratio: Annotated[Optional[float], typer.Option(help="Longest aspect ratio, longer over shorter side.")] = None,  # noqa: UP045
    min_similarity: Annotated[Optional[float], typer.Option(help="CLIP similarity of picture and caption.")] = None,  # noqa: UP045
    max_watermark: Annotated[Optional[float], typer.Option(help="Highest probability of a watermark.")] = None,  # noqa: UP045
    max_unsafe: Annotated[Optional[float], typer.Option(help="Highest probability of unsafe content.")] = None,  # noqa: UP045
    min_aesthetic: Annotated[Optional[float], typer.Option(help="Lowest aesthetic score, 0 to 10.")] = None,  # noqa: UP045
    language: Annotated[Optional[str], typer.Option(help='Language such as "en", for tables with that column.')] = None,  # noqa: UP045
    min_caption: Annotated[Optional[int], typer.Option(help="Characters of the caption.")] = None,  # noqa: UP045
    max_caption: Annotated[Optional[int], typer.Option(help="Characters of the caption.")] = None,  # noqa: UP045
    rename: Renames = None,
) -> None:
    """Keep the rows that pass all thresholds, and count the rows that each dropped. Options override the preset."""
    from dataclasses import replace

    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm

    from ..data.filter import PRESETS, Rules, filter_tables

    if preset is not None and preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
    given: dict[str, Any] = {
        "min_side": min_side, "max_ratio": max_ratio, "min_similarity": min_similarity, "max_watermark": max_watermark,
        "max_unsafe": max_unsafe, "min_aesthetic": min_aesthetic, "language": language, "min_caption": min_caption,
        "max_caption": max_caption,
    }  # fmt: skip
    base = PRESETS[preset] if preset else Rules()
    rules = replace(base, **{name: value for name, value in given.items() if value is not None})
    with tqdm(unit="file") as bar:
        count = filter_tables(source, out, rules, renamed=_renamed(rename), report=lambda path: bar.update())
    table = Table("rule", "threshold", "dropped", "of the rows it tested", title=f"{source} -> {out}")
    seen = count.read
    for name, dropped in count.dropped.items():
        table.add_row(name, str(getattr(rules, name, "http(s)")), f"{dropped:,}", f"{dropped / max(seen, 1):.1%}")
        seen -= dropped
    table.add_section()
    table.add_row("kept", "", f"{count.kept:,} of {count.read:,}", f"{count.kept / max(count.read, 1):.1%}")
    Console().print(table)
    for name, reason in count.unreadable.items():
        typer.echo(f"unreadable: {name}: {reason}", err=True)
    if count.unreadable:
        raise typer.Exit(1)


@command(
    "download",
    app,
    examples=[
        "unidiffuser data download kept shards --image-size 512",
        "unidiffuser data download kept shards --processes 4 --threads 16",
    ],
)
def download_command(
    tables: Annotated[Path, typer.Argument(help="Folder of filtered tables.")],
    out: Annotated[Path, typer.Argument(help="Folder for the shards.")],
    image_size: Annotated[int, typer.Option(help="Shorter side of the pictures in pixels, at most.")] = 512,
    per_shard: Annotated[int, typer.Option(help="Rows of one shard.")] = 10000,
    processes: Annotated[int, typer.Option(help="Processes of img2dataset.")] = 16,
    threads: Annotated[int, typer.Option(help="Threads of each process.")] = 64,
    rename: Renames = None,
) -> None:
    """Print the img2dataset command that downloads the pictures. Install img2dataset in its own environment."""
    from ..data.download import as_shell, img2dataset_command

    download = img2dataset_command(
        tables, out, image_size, per_shard=per_shard, processes=processes, threads=threads, renamed=_renamed(rename)
    )
    typer.echo(as_shell(download))


@command(
    "encode",
    app,
    examples=[
        "unidiffuser data encode pictures latents --image-size 256",
        "torchrun --nproc-per-node 8 -m unidiffuser data encode shards latents --model unidiffuser-v1",
    ],
)
def encode_command(
    source: Annotated[Path, typer.Argument(help="Folder of webdataset shards, or of pictures with captions.")],
    out: Annotated[Path, typer.Argument(help="Folder for the latent shards.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Checkpoint with the encoders.")] = "emoji",
    image_size: Annotated[Optional[int], typer.Option(help="Side in pixels; the model's default if not given.")] = None,  # noqa: UP045
    captions: Annotated[Optional[Path], typer.Option(help="COCO's annotations, for a folder of its pictures.")] = None,  # noqa: UP045
    min_side: Annotated[int, typer.Option(help="Drop pictures with a shorter side, in pixels.")] = 1,
    per_part: Annotated[int, typer.Option(help="Pictures of one latent shard, for folders.")] = 4096,
    batch_size: Annotated[int, typer.Option(help="Pictures in the encoders at once.")] = 32,
    readers: Annotated[int, typer.Option(help="Threads that decode pictures.")] = 4,
    device: Annotated[Optional[str], typer.Option(help="cpu, cuda; the fastest if not given.")] = None,  # noqa: UP045
) -> None:
    """Encode pictures and captions into latents for training. Run it again to resume; use torchrun for several workers."""
    from datetime import timedelta

    from tqdm import tqdm

    from ..checkpoints.checkpoint import load_checkpoint
    from ..data.encode import Encoders, Encoding, encode, seconds_left
    from ..data.sources import find_parts
    from ..distributed import joined
    from ..options import side_multiple

    checkpoint = load_checkpoint(model)
    side = image_size or checkpoint.config.image_size
    if side % side_multiple(checkpoint.config):
        raise ValueError(f"--image-size must be a multiple of {side_multiple(checkpoint.config)}, got {side}")
    parts = find_parts(source, captions, per_part)
    # The first worker to finish waits for the last.
    with _without_length_warnings(), joined(device, patience=timedelta(days=7)) as world:
        bar: Any = tqdm(unit="pair", disable=not world.main)
        encoders, encoding = Encoders(checkpoint, world.device), Encoding(side, min_side, batch_size, readers)
        if world.main:
            announce(seconds_left(parts, out, encoders, encoding) / world.size, world.device, "encoding")
        manifest = encode(parts, out, encoders, encoding, world, bar.update)
        bar.close()
        if world.main:
            _print_summary(manifest, out)
    if manifest["damaged"]:
        raise typer.Exit(1)


@contextmanager
def _without_length_warnings() -> Iterator[None]:
    """Silence the tokenizer's warning that a text is truncated: captions from the web are often long."""
    tokenizers = logging.getLogger("unidiffuser.checkpoints.tokenizers")
    level = tokenizers.level
    tokenizers.setLevel(logging.ERROR)
    try:
        yield
    finally:
        tokenizers.setLevel(level)


def _print_summary(manifest: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("pairs", "number", title=str(out))
    table.add_row("read", f"{manifest['read']:,}")
    for reason, number in manifest["dropped"].items():
        table.add_row(f"dropped: {reason}", f"{number:,}")
    table.add_row(f"encoded, in {len(manifest['shards'])} shards", f"{manifest['samples']:,}")
    Console().print(table)
    for name, reason in manifest["damaged"].items():
        typer.echo(f"not encoded: {name}: {reason}", err=True)
    if manifest["damaged"]:
        typer.echo(
            "download these again (remove their _stats.json and run img2dataset once more), then run this again", err=True
        )
