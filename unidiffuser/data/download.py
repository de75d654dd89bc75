"""The img2dataset command for a folder of filtered tables. It does the downloading; we only know its settings."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from .columns import NEEDED, find_columns

# What img2dataset calls its own results; a table's column of that name cannot be passed through.
RESERVED = {"key", "caption", "url", "width", "height", "original_width", "original_height", "status", "error_message", "exif",
            "md5", "sha256", "sha512"}  # fmt: skip


def img2dataset_command(
    tables: Path,
    out: Path,
    image_size: int,
    *,
    per_shard: int = 10000,
    processes: int = 16,
    threads: int = 64,
    renamed: Mapping[str, str] | None = None,
) -> list[str]:
    """Arguments, the program first, that download the pictures of these tables into webdataset shards with their json.

    Pictures keep their shape, with the shorter side at most ``image_size``; the crop to a square is made when they are encoded.
    Shrinking is by area, as img2dataset's other filters alias. All further columns of the tables go into the json.

    Raises:
        FileNotFoundError: no parquet there.
        ValueError: no column for the url or the caption.
    """
    import pyarrow.parquet as pq

    files = [tables] if tables.is_file() else sorted(tables.glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"no .parquet files in {tables}")
    names = pq.read_schema(files[0]).names
    columns = find_columns(names, renamed)
    if missing := [name for name in NEEDED if name not in columns]:
        raise ValueError(f"{files[0]} has no column for {' and '.join(missing)}; name it with --rename")
    extra = [n for n in names if n not in (columns["url"], columns["caption"]) and n not in RESERVED]
    settings = {
        "url_list": tables,
        "input_format": "parquet",
        "url_col": columns["url"],
        "caption_col": columns["caption"],
        "output_format": "webdataset",
        "output_folder": out,
        "image_size": image_size,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "number_sample_per_shard": per_shard,
        "processes_count": processes,
        "thread_count": threads,
        "save_additional_columns": json.dumps(extra),
    }
    return ["img2dataset", *(f"--{name}={value}" for name, value in settings.items())]


def as_shell(arguments: list[str]) -> str:
    """For a terminal, one setting a line."""
    return " \\\n    ".join(map(shlex.quote, arguments))
