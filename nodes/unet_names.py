"""The names of a U-Net's transformer blocks, for nodes that look for them to place their patches.

Such nodes list the modules of class BasicTransformerBlock, read a block's number off its name, as in
"input_blocks.4.1.transformer_blocks.0", and patch the attention or the forward of that block. These modules have no weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.ldm.modules.attention
from torch import Tensor, nn

Place = tuple[str, int]


class _CrossAttention(nn.Module):
    """A U-Net's cross-attention: its place can be patched, but it takes no text of a node's own."""

    def to_k(self, text: Any) -> Any:
        """Refuse.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "This node puts a text of its own into the cross-attention of a U-Net. UniDiffuser has none: text and image share "
            "one attention. Use the node 'Normalized Attention Guidance' of ComfyUI, or a negative prompt."
        )

    to_q = to_v = to_k


class BasicTransformerBlock(comfy.ldm.modules.attention.BasicTransformerBlock):
    """The image tokens of a U-ViT's block, under the name of a U-Net's."""

    def __init__(self) -> None:
        nn.Module.__init__(self)  # without the parent's weights
        self.attn1, self.attn2 = nn.Module(), _CrossAttention()
        self.body: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor, context: Any = None, transformer_options: Any = None) -> Tensor:
        """Image tokens (B, N, D) through the block; `body` is set for the call."""
        assert self.body is not None
        return self.body(x)

    @property
    def wrapped(self) -> bool:
        """Whether a node has replaced `forward`."""
        return "forward" in vars(self)


def _spatial() -> nn.Module:
    module = nn.Module()
    module.transformer_blocks = nn.ModuleList([BasicTransformerBlock()])
    return nn.ModuleList([nn.Module(), module])


def add_unet_names(net: Any) -> dict[Place, BasicTransformerBlock]:
    """Give a network the names of a U-Net's blocks; returns them by place."""
    net.input_blocks = nn.ModuleList([_spatial() for _ in net.in_blocks])
    net.middle_block = _spatial()
    net.output_blocks = nn.ModuleList([_spatial() for _ in net.out_blocks])
    blocks = {("input", n): part for n, part in enumerate(net.input_blocks)}
    blocks |= {("output", n): part for n, part in enumerate(net.output_blocks)} | {("middle", 0): net.middle_block}
    return {place: part[1].transformer_blocks[0] for place, part in blocks.items()}
