"""Captions shown in a node while it samples: drafts of all items, and at the end the captions themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import comfy.model_management
from torch import Tensor

from ..unidiffuser.path import LEAST, NoisePath
from .types import show_text

if TYPE_CHECKING:
    from .host_captions import HostCaptionDecoder

DRAFTS = 5  # in one run, before the last


class CaptionDrafts:
    """Shows the captions of a run in a node. Without a decoder, or on a path that leaves the text as it is, it does nothing.

    Args:
        decoder: the caption decoder that Decode Caption uses, with its LoRAs.
        path: the noise path of the run.
        node_id: the node that shows the captions.
    """

    def __init__(self, decoder: HostCaptionDecoder | None, path: NoisePath, node_id: str):
        self.decoder = decoder if path.t_text[0] > path.t_text[-1] else None
        self.finishes = path.t_text[-1] <= LEAST
        self.node_id = node_id
        if self.decoder is not None:
            # NOTE: loaded before the network, so that drafts are decoded with the LoRAs that the host applies on loading.
            comfy.model_management.load_models_gpu([self.decoder.patcher])

    def show(self, step: int, total: int, text: Tensor | None) -> None:
        """Show a draft after some of the steps; `text` is the current prediction of the text latents (B, L, hidden_dim)."""
        if self.decoder is None or text is None:
            return
        every = max(1, total // DRAFTS)
        if step % every == 0 and step + 1 < total:
            self._write(self.decoder.drafts(text))

    def finish(self, text: Tensor | None) -> None:
        """Show the final captions, as Decode Caption writes them, of the sampled text latents (B, L, hidden_dim)."""
        if self.decoder is not None and text is not None and self.finishes:
            self._write([found[0].text for found in self.decoder.decode(text)])

    def _write(self, captions: Sequence[str]) -> None:
        show_text("\n".join(captions), self.node_id)
