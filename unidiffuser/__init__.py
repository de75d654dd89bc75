"""UniDiffuser: one diffusion transformer for text-to-image, captioning, joint and unconditional generation.

    import unidiffuser
    model = unidiffuser.load("emoji")
    model.text_to_image("red apple, twemoji", count=4)

`import unidiffuser` loads neither torch nor numpy; the first use of `load` or `UniDiffuser` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .pipeline import UniDiffuser, load

__all__ = ["UniDiffuser", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in ("UniDiffuser", "load"):
        from . import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """All names, those that are imported on first use too, so that `help` and completion show them."""
    return sorted({*globals(), *__all__})
