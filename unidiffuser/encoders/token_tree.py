"""Tree-structured key-value cache for beam search with GPT-2.

The beams of an image share their prefix and most of their tokens. An image's keys and values are stored once, in a buffer
allocated at the start: those of the prefix, then at each step those of the token that each beam chose. An attention mask
limits each beam to the prefix and its own ancestors. Reordering beams permutes only the mask: a few bits instead of the tens
of megabytes that a cache per beam would move at every token.

The weights are those of transformers' GPT2LMHeadModel (Radford et al., 2019), applied here layer by layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2LMHeadModel


class TokenTree:
    """Next-token logits for K branches of each of N prefixes.

    Args:
        gpt: the language model.
        prefix: (N, L, n_embd) input embeddings.
        branches: K.
        limit: most tokens that will be added to a branch.

    Attributes:
        first: float32 logits (N, V) of the token after the prefix.
    """

    def __init__(self, gpt: GPT2LMHeadModel, prefix: Tensor, branches: int, limit: int):
        self.gpt, self.branches = gpt, branches
        images, length, _ = prefix.shape
        config = gpt.config
        heads = config.n_head
        room = length + limit * branches
        shape = config.n_layer, images, heads, room, config.n_embd // heads
        self.keys = torch.empty(shape, dtype=prefix.dtype, device=prefix.device)
        self.values = torch.empty_like(self.keys)
        self.visible = torch.zeros(images, branches, room, dtype=torch.bool, device=prefix.device)
        self.visible[:, :, :length] = True
        self.filled, self.position = 0, 0
        self.first = self._forward(prefix, None)[:, -1]

    def next_logits(self, tokens: Tensor) -> Tensor:
        """Add one token to each branch; return the logits of the next.

        Args:
            tokens: (N, K) token ids.

        Returns:
            (N, K, V) float32.
        """
        own = torch.eye(self.branches, dtype=torch.bool, device=tokens.device)
        self.visible[:, :, self.filled : self.filled + self.branches] = own
        mask = self.visible[:, None, :, : self.filled + self.branches]  # (N, 1, K, M), one for all heads
        return self._forward(self.gpt.transformer.wte(tokens), mask)

    def reorder(self, source: Tensor) -> None:
        """Continue branch k from the present branch `source[:, k]`; source: (N, K)."""
        self.visible = self.visible.gather(1, source[:, :, None].expand_as(self.visible))

    def keep(self, images: Tensor) -> None:
        """Continue with these images only; images: indices or (N,) bool."""
        self.visible = self.visible[images]
        self.keys, self.values = self.keys[:, images], self.values[:, images]

    def _forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Logits of x (N, T, n_embd) under a mask; None: causal, logits of the last only."""
        start, end = self.filled, self.filled + x.shape[1]
        net = self.gpt.transformer
        # The tokens of a step are all at one position, one in each branch; those of the prefix follow each other.
        count = x.shape[1] if mask is None else 1
        x = x + net.wpe.weight[self.position : self.position + count]
        for layer, block in enumerate(net.h):
            qkv = block.attn.c_attn(block.ln_1(x)).unflatten(-1, (3, self.keys.shape[2], -1))  # (N, T, 3, heads, d)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (N, heads, T, d) each
            self.keys[layer, :, :, start:end], self.values[layer, :, :, start:end] = k, v
            a = F.scaled_dot_product_attention(
                q, self.keys[layer, :, :, :end], self.values[layer, :, :, :end], attn_mask=mask, is_causal=mask is None
            )
            x = x + block.attn.c_proj(a.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.ln_2(x))
        self.filled, self.position = end, self.position + count
        return self.gpt.lm_head(net.ln_f(x if mask is not None else x[:, -1:])).float()
