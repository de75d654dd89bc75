"""Where the studies write: sheets of pictures, and the markers of their tables in the documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ...media.files import replacing
from ...media.images import contact_sheet

QUALITY = "<!-- quality: python -m unidiffuser.emoji.studies.quality -->", "<!-- /quality -->"  # in docs/results/quality.md
CAPTION_QUALITY = (
    "<!-- caption quality: python -m unidiffuser.emoji.studies.quality --task captions -->",
    "<!-- /caption quality -->",
)
FEW_STEPS = "<!-- few steps: python -m unidiffuser.emoji.studies.few_steps -->", "<!-- /few steps -->"  # likewise


def write_sheet(path: Path, pictures: Sequence[Image.Image], captions: Sequence[str], columns: int) -> None:
    """Pictures with their captions as one JPEG, complete or not at all."""
    with replacing(path) as partial:
        contact_sheet(pictures, captions, columns).save(partial, format="JPEG", quality=90)
