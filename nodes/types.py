"""The category and the two socket types of this pack, and texts in nodes; everything else uses the host's own types.

UNIDIFFUSER_CAPTION_DECODER: a `host_captions.HostCaptionDecoder`.
UNIDIFFUSER_NOISE_PATH: a `unidiffuser.path.NoisePath`, steps + 1 labels (t_img, t_text) in 0..1000.

A text latent is a CONDITIONING whose tensor is (B, L, text_dim), 77 x 64 in the published models; KSampler with this pack's
MODEL, UniDiffuser Sampler and Decode Caption accept it. A CLIP image token is a CLIP_VISION_OUTPUT with `image_embeds`
(B, clip_img_dim).
"""

from __future__ import annotations

import logging
from contextvars import ContextVar

from comfy_api.latest import io
from comfy_execution.utils import get_executing_context
from server import PromptServer

logger = logging.getLogger(__name__)

CaptionDecoderType = io.Custom("UNIDIFFUSER_CAPTION_DECODER")
NoisePathType = io.Custom("UNIDIFFUSER_NOISE_PATH")

CATEGORY = "UniDiffuser"
LINE_BREAK = "  \n"
"""A new line in a node's text: one renderer reads it as Markdown, the other as plain text."""

_shown: ContextVar[tuple[object, tuple[str, ...]]] = ContextVar("unidiffuser_warnings", default=(None, ()))
"""The latest execution of a node that showed a warning, and its warnings."""
_warned: set[str] = set()
"""Nodes that show a warning. The front end keeps a text until the next one, so it must be taken away."""


def show_text(text: str, node_id: str) -> None:
    """Show a text in a node until the next one, below the warnings of this execution."""
    warnings = (f"\u26a0 {warning}" for warning in _warnings())
    parts = (part.replace("\n", LINE_BREAK) for part in (*warnings, text) if part)
    PromptServer.instance.send_progress_text("\n\n".join(parts), node_id)


def show_warning(message: str) -> None:
    """Log a warning and show it, with earlier ones, in the running node, or in the one whose expansion that node is part of.

    "" shows nothing, and takes the warning of an earlier execution away.
    """
    running = get_executing_context()
    if message in _warnings() or running is None:
        return
    node_id = running.node_id.split(".")[0]
    if message:
        logger.warning("%s", message)
        _shown.set((running, (*_warnings(), message)))
        _warned.add(node_id)
        show_text("", node_id)
    elif node_id in _warned and not _warnings():
        _warned.discard(node_id)
        show_text("", node_id)


def _warnings() -> tuple[str, ...]:
    execution, warnings = _shown.get()
    return warnings if execution is not None and execution == get_executing_context() else ()
