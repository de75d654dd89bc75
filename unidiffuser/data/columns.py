"""The columns of published image-text tables, under the names that their subsets give them."""

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
"""Our name -> names in the tables; the case of letters does not matter. LAION-2B (joined), LAION-high-resolution and the
aesthetic subsets write URL, TEXT, WIDTH, HEIGHT, similarity, hash, punsafe, pwatermark; the multilingual parts add LANGUAGE;
laion-aesthetic says `aesthetic`, improved-aesthetics AESTHETIC_SCORE; ReLAION uses lower case; COYO and DataComp their own."""

NEEDED = ("url", "caption")


def find_columns(names: Iterable[str], renamed: Mapping[str, str] | None = None) -> dict[str, str]:
    """Our names -> the names in one table.

    Args:
        names: the columns that the table has.
        renamed: our name -> its name, for tables that call it something else.

    Raises:
        ValueError: a renamed column is not there.
    """
    there = {name.lower(): name for name in reversed(list(names))}
    found: dict[str, str] = {}
    for ours, candidates in COLUMNS.items():
        for candidate in (ours, *candidates):
            if candidate.lower() in there:
                found[ours] = there[candidate.lower()]
                break
    for ours, theirs in (renamed or {}).items():
        if ours not in COLUMNS:
            raise ValueError(f"there is no column {ours!r} to rename; known are {', '.join(COLUMNS)}")
        if theirs.lower() not in there:
            raise ValueError(f"no column {theirs!r}; the table has {', '.join(sorted(there.values()))}")
        found[ours] = there[theirs.lower()]
    return found
