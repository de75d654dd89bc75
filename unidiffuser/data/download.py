"""The img2dataset command that downloads the pictures of filtered tables."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from ..media.formats import files_ending
from .columns import NEEDED, find_columns

# Columns that img2dataset writes itself; it cannot copy a table's column of the same name.
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
    """Program and arguments that download the pictures of tables into webdataset shards.

    Pictures keep their aspect ratio, with the shorter side at most `image_size`; they are cropped to squares when they are
    encoded. All other columns of the tables are copied into the json of each sample.

    Args:
        tables: a parquet file, or a folder of them.
        out: folder for the shards.
        image_size: in pixels.
        per_shard: rows of the table in one shard.
        processes: processes of img2dataset.
        threads: threads of each process.
        renamed: name used here -> column, see `find_columns`.

    Raises:
        FileNotFoundError: no parquet file.
        ValueError: no column for the URL or the caption.
    """
    import pyarrow.parquet as pq

    files = [tables] if tables.is_file() else files_ending(tables, ".parquet")
    if not files:
        raise FileNotFoundError(f"no .parquet files in {tables}; check the path")
    names = pq.read_schema(files[0]).names
    columns = find_columns(names, renamed)
    if missing := [name for name in NEEDED if name not in columns]:
        raise ValueError(f"{files[0]} has no column for {' and '.join(missing)}; name it with --rename {missing[0]}=ITS_NAME")
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
    """The command quoted for a shell, one argument per line."""
    return " \\\n    ".join(map(shlex.quote, arguments))
