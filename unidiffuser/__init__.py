"""UniDiffuser: one diffusion transformer for text-to-image, captioning, joint and unconditional generation.

    import unidiffuser
    model = unidiffuser.load("emoji")
    model.text_to_image("red apple, twemoji", count=4)

`import unidiffuser` loads neither torch nor numpy; the first use of one of its names does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .options import Options
    from .path import NoisePath
    from .pipeline import UniDiffuser, load
    from .scoring import CaptionScore
    from .streams import Streams
    from .tasks.editing import Decoded

__all__ = ["CaptionScore", "Decoded", "NoisePath", "Options", "Streams", "UniDiffuser", "__version__", "load"]

_MODULES = {
    "CaptionScore": "scoring",
    "Decoded": "tasks.editing",
    "NoisePath": "path",
    "Options": "options",
    "Streams": "streams",
    "UniDiffuser": "pipeline",
    "load": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    if name == "UniDiffuserPipeline":
        raise AttributeError("UniDiffuserPipeline is diffusers' name; here it is unidiffuser.load(folder)")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """All names, those that are imported on first use too, so that `help` and completion show them."""
    return sorted({*globals(), *__all__})
