"""UniDiffuser: one transformer for images, captions and both, in any direction.

    import unidiffuser
    model = unidiffuser.load("emoji")
    model.text_to_image("red apple, twemoji", count=4)

Importing the package costs nothing; torch is imported with the first name that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import UniDiffuser, load

__all__ = ["UniDiffuser", "__version__", "load"]
from .version import __version__


def __getattr__(name: str) -> Any:
    if name in ("UniDiffuser", "load"):
        from . import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
