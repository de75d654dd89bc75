"""Column names of the published image-text tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "url": ("URL",),
    "caption": ("TEXT", "caption", "top_caption"),
    "width": ("WIDTH", "original_width"),
    "height": ("HEIGHT", "original_height"),
    "similarity": ("similarity", "clip_similarity_vitb32", "clip_b32_similarity_score"),
    "pwatermark": ("pwatermark", "watermark_score"),
    "punsafe": ("punsafe", "nsfw_score_opennsfw2"),
    "language": ("LANGUAGE", "lang"),
    "aesthetic": ("AESTHETIC_SCORE", "aesthetic", "aesthetic_score_laion_v2", "prediction"),
}
"""Name used here -> names in the tables, in upper or lower case. LAION-2B (joined), LAION-high-resolution and the aesthetic
subsets have URL, TEXT, WIDTH, HEIGHT, similarity, hash, punsafe, pwatermark; the multilingual subsets add LANGUAGE;
laion-aesthetic has `aesthetic`, improved-aesthetics AESTHETIC_SCORE; ReLAION is in lower case; COYO and DataComp differ."""

NEEDED = ("url", "caption")


def find_columns(names: Iterable[str], renamed: Mapping[str, str] | None = None) -> dict[str, str]:
    """Map the names used here to the columns of one table.

    Args:
        names: columns of the table.
        renamed: name used here -> column, for tables with other names than those in `COLUMNS`.

    Raises:
        ValueError: an unknown name, or a column that the table does not have.
    """
    present = {name.lower(): name for name in reversed(list(names))}
    found: dict[str, str] = {}
    for ours, candidates in COLUMNS.items():
        for candidate in (ours, *candidates):
            if candidate.lower() in present:
                found[ours] = present[candidate.lower()]
                break
    for ours, theirs in (renamed or {}).items():
        if ours not in COLUMNS:
            raise ValueError(f"cannot rename {ours!r}, which is not a known column; choose from {', '.join(COLUMNS)}")
        if theirs.lower() not in present:
            raise ValueError(f"no column {theirs!r}; the table has {', '.join(sorted(present.values()))}")
        found[ours] = present[theirs.lower()]
    return found
