"""Filtering of LAION-style parquet tables by thresholds, with counts of the rows that each rule drops."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..media.files import replacing, write_text
from ..media.formats import files_ending
from ..media.json_files import read_object
from .columns import NEEDED, find_columns

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rules:
    """Thresholds that a row must satisfy; None switches a rule off. Bounds are inclusive.

    Attributes:
        min_side: shorter side of the picture in pixels.
        max_ratio: longer side over shorter side.
        min_similarity: CLIP similarity of picture and caption.
        max_watermark, max_unsafe: probabilities in [0, 1].
        min_aesthetic: score of LAION's predictor, 0 to 10.
        language: code such as "en"; ignored for tables without a language column, which only multilingual ones have.
        min_caption, max_caption: characters of the caption without white space at its ends.
    """

    min_side: int | None = None
    max_ratio: float | None = None
    min_similarity: float | None = None
    max_watermark: float | None = None
    max_unsafe: float | None = None
    min_aesthetic: float | None = None
    language: str | None = None
    min_caption: int | None = 1
    max_caption: int | None = None


PRESETS: Mapping[str, Rules] = {
    # The paper (section 5 and appendix) names its data sets but no thresholds. The data sets are defined by: English and CLIP
    # similarity of at least 0.28 for laion2B-en, 1024 x 1024 for laion-high-resolution, score of at least 5 for aesthetics 5+.
    # LAION applied pwatermark < 0.8 and punsafe < 0.5 to its aesthetic subsets.
    "laion2b-256": Rules(min_side=256, min_similarity=0.28, language="en"),
    "high-resolution-512": Rules(min_side=1024, language="en"),
    "aesthetics-512": Rules(min_side=512, min_aesthetic=5.0, max_watermark=0.8, max_unsafe=0.5, language="en"),
}


@dataclass
class Count:
    """Counts of rows.

    Attributes:
        read, kept: rows.
        dropped: rule -> rows; a row counts for the first rule that it violates, in this order.
        files: tables read.
        unreadable: table -> reason.
    """

    read: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    files: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)


def filter_tables(
    source: Path,
    out: Path,
    rules: Rules,
    *,
    renamed: Mapping[str, str] | None = None,
    batch_rows: int = 65536,
    report: Callable[[Path], Any] | None = None,
) -> Count:
    """Write the rows that satisfy the rules to one parquet file per input file, with all their columns.

    A file that was filtered before with the same rules, and whose output and count exist, is skipped.

    Args:
        source: a parquet file, or a folder of them.
        out: folder for the tables and `filter.json` (rules and counts).
        rules: the thresholds.
        renamed: name used here -> column, see `find_columns`.
        batch_rows: rows in memory at once.
        report: called after each file.

    Returns:
        The counts of all files.

    Raises:
        FileNotFoundError: no parquet file.
        ValueError: a table lacks the column of a rule, of the URL or of the caption.
    """
    files = [source] if source.is_file() else files_ending(source, ".parquet")
    if not files:
        raise FileNotFoundError(f"no .parquet files in {source}; check the path")
    total = Count()
    for file in files:
        target, note = out / file.name, out / f".{file.name}.json"
        if target.resolve() == file.resolve():
            raise ValueError(f"{out} is also the source, which would be overwritten; name another folder for the result")
        settings = {"rules": vars(rules), "renamed": dict(renamed or {}), "bytes": file.stat().st_size}
        count = _done(target, note, settings)
        if count is None:
            count = _filter_file(file, target, rules, dict(renamed or {}), batch_rows)
            if not count.unreadable:
                write_text(note, json.dumps({"settings": settings, "count": vars(count)}))
        _add(total, count)
        if report is not None:
            report(file)
    write_text(out / "filter.json", json.dumps({"rules": vars(rules), "count": vars(total)}, indent=1))
    return total


def _done(target: Path, note: Path, settings: dict[str, Any]) -> Count | None:
    if not (target.is_file() and note.is_file()):
        return None
    try:
        saved = read_object(note)
        return Count(**saved["count"]) if saved["settings"] == settings else None
    except (ValueError, KeyError, TypeError):
        return None  # damaged: the table is filtered again


def _add(total: Count, count: Count) -> None:
    total.read, total.kept, total.files = total.read + count.read, total.kept + count.kept, total.files + count.files
    for rule, number in count.dropped.items():
        total.dropped[rule] = total.dropped.get(rule, 0) + number
    total.unreadable |= count.unreadable


def _filter_file(file: Path, target: Path, rules: Rules, renamed: dict[str, str], batch_rows: int) -> Count:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        names = table.schema_arrow.names
    except (pa.ArrowException, OSError, UnicodeError) as error:  # UnicodeError: a damaged name of a column
        log.warning("%s cannot be read (%s); skipped", file, error)
        return Count(unreadable={file.name: str(error).splitlines()[0]})
    with table:
        schema = table.schema_arrow
        columns = find_columns(names, renamed)
        tests = list(_tests(rules, columns, file))
        count = Count(files=1, dropped={name: 0 for name, _ in tests})
        try:
            with replacing(target) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
                for batch in _batches(table, batch_rows):
                    kept = _apply(batch, tests, count)
                    if kept.num_rows:
                        writer.write_batch(kept)
        except _Damaged as error:
            log.warning("%s is damaged (%s); skipped", file, error)
            return Count(unreadable={file.name: str(error).splitlines()[0]})
    return count


class _Damaged(Exception):
    """A table with a readable footer and a page or column that cannot be used."""


def _batches(table: pq.ParquetFile, rows: int) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    try:
        yield from table.iter_batches(rows)
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise _Damaged(str(error)) from error


def _apply(batch: pa.RecordBatch, tests: list[tuple[str, Test]], count: Count) -> pa.RecordBatch:
    import pyarrow.compute as pc

    count.read += batch.num_rows
    for name, passes in tests:
        mask = pc.fill_null(passes(batch), False)  # a missing value violates the rule
        kept = batch.filter(mask)
        count.dropped[name] += batch.num_rows - kept.num_rows
        batch = kept
    count.kept += batch.num_rows
    return batch


Test = Callable[[Any], Any]
"""Maps a record batch to an array of booleans, true for rows that pass."""


def _cast(column: pa.Array, kind: pa.DataType, name: str) -> pa.Array:
    """A column as texts or numbers; _Damaged for one of another type, such as a struct or bytes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        return pc.cast(column, kind)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise _Damaged(f"{name} holds {column.type}, not {kind}: {str(error).splitlines()[0]}") from error


def _tests(rules: Rules, columns: dict[str, str], file: Path) -> Iterator[tuple[str, Test]]:
    """Name and test of each active rule, in a fixed order."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def column(name: str, rule: str) -> str:
        if name not in columns:
            raise ValueError(
                f"{file} has no column for {name!r}, which {rule} needs; switch the rule off, or name the column with --rename "
                f"{name}=ITS_NAME"
            )
        return columns[name]

    url, caption = (column(name, "every table") for name in NEEDED)

    def text(batch: pa.RecordBatch, name: str) -> pa.Array:
        return _cast(batch.column(name), pa.string(), f"{file}, column {name!r}")

    def number(batch: pa.RecordBatch, name: str) -> pa.Array:
        return _cast(batch.column(name), pa.float64(), f"{file}, column {name!r}")

    def bound(name: str, rule: str, compare: Callable[[Any, Any], Any]) -> Test:
        theirs, limit = column(name, rule), getattr(rules, rule)
        return lambda batch: compare(number(batch, theirs), limit)

    yield "url", lambda batch: pc.match_substring_regex(text(batch, url), r"^https?://")
    length = lambda batch: pc.utf8_length(pc.utf8_trim_whitespace(text(batch, caption)))  # noqa: E731
    if rules.min_caption is not None:
        yield "min_caption", lambda batch: pc.greater_equal(length(batch), rules.min_caption)
    if rules.max_caption is not None:
        yield "max_caption", lambda batch: pc.less_equal(length(batch), rules.max_caption)
    if rules.language is not None and "language" in columns:
        language = columns["language"]
        yield "language", lambda batch: pc.equal(text(batch, language), rules.language)
    if rules.min_side is not None or rules.max_ratio is not None:
        rule = "min_side" if rules.min_side is not None else "max_ratio"
        width, height = column("width", rule), column("height", rule)
        shorter = lambda b: pc.min_element_wise(number(b, width), number(b, height), skip_nulls=False)  # noqa: E731
        longer = lambda b: pc.max_element_wise(number(b, width), number(b, height), skip_nulls=False)  # noqa: E731
        if rules.min_side is not None:
            yield "min_side", lambda batch: pc.greater_equal(shorter(batch), rules.min_side)
        if rules.max_ratio is not None:
            yield (
                "max_ratio",
                lambda batch: pc.less_equal(longer(batch), pc.multiply(shorter(batch), float(rules.max_ratio or 0))),
            )
    if rules.min_similarity is not None:
        yield "min_similarity", bound("similarity", "min_similarity", pc.greater_equal)
    if rules.max_watermark is not None:
        yield "max_watermark", bound("pwatermark", "max_watermark", pc.less_equal)
    if rules.max_unsafe is not None:
        yield "max_unsafe", bound("punsafe", "max_unsafe", pc.less_equal)
    if rules.min_aesthetic is not None:
        yield "min_aesthetic", bound("aesthetic", "min_aesthetic", pc.greater_equal)
