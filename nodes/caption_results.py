"""Captions of a node: its outputs `captions`, `candidates` and `scores`, and the list shown in it."""

from __future__ import annotations

from collections.abc import Sequence

from comfy_api.latest import io

from ..unidiffuser.encoders.candidate import Caption
from .types import show_text


def caption_outputs(of: str) -> list[io.Output]:
    """The three outputs; `of` is what a caption belongs to, as in "batch item"."""
    noun = of.split()[-1]
    return [
        io.String.Output(display_name="captions", is_output_list=True, tooltip=f"The best caption of each {of}."),
        io.String.Output(
            display_name="candidates", is_output_list=True, tooltip=f"All captions, {noun} by {noun}, best first."
        ),
        io.Float.Output(
            display_name="scores",
            is_output_list=True,
            tooltip="How sure the decoder is of each candidate. 0 is certain, more negative is less so.",
        ),
    ]


def caption_results(found: Sequence[Sequence[Caption]], node_id: str) -> tuple[list[str], list[str], list[float], str]:
    """Values of the three outputs, and the text shown in the node: one caption a line, with scores if there are candidates.

    Args:
        found: captions of each item, best first.
        node_id: the node.
    """
    every = [caption for item in found for caption in item]
    scored = len(every) > len(found)
    shown = "\n".join(f"{c.text}  ({round(c.score, 2) + 0.0:.2f})" if scored else c.text for c in every)  # + 0.0: no "-0.00"
    show_text(shown, node_id)
    return [item[0].text for item in found], [c.text for c in every], [c.score for c in every], shown
