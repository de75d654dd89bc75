"""GPT-2 reading a tree: one prefix an image, and the tokens of all its beams, in one cache that is never copied.

The beams of a search share their prefix and most of their words. So the keys and values of an image are kept once, in a buffer
made at the start: first those of the prefix, then, step after step, those of the token that each beam took. What a beam
may see of them is a mask: the prefix and its own ancestors. When beams change places only the mask is reordered, which is
bits, where a cache of whole sequences would move tens of megabytes at every token.

The weights are those of transformers' GPT2LMHeadModel (Radford et al., 2019), read here layer by layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2LMHeadModel


class TokenTree:
    """Next-token logits for K branches of each of N prefixes.

    Args:
        gpt: the decoder.
        prefix: (N, L, n_embd) input embeddings; they are read at once, and `first` is what follows them.
        branches: K.
        limit: most tokens that a branch will read.

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
        self.first = self._read(prefix, None)[:, -1]

    def read(self, tokens: Tensor) -> Tensor:
        """tokens: (N, K), the next of each branch. Returns float32 logits (N, K, V)."""
        own = torch.eye(self.branches, dtype=torch.bool, device=tokens.device)
        self.visible[:, :, self.filled : self.filled + self.branches] = own
        seen = self.visible[:, None, :, : self.filled + self.branches]  # (N, 1, K, M), one for all heads
        return self._read(self.gpt.transformer.wte(tokens), seen)

    def follow(self, source: Tensor) -> None:
        """Let branch k of each image go on from its present branch `source[:, k]`; source: (N, K)."""
        self.visible = self.visible.gather(1, source[:, :, None].expand_as(self.visible))

    def keep(self, images: Tensor) -> None:
        """Go on with these images only; images: indices or (N,) bool."""
        self.visible = self.visible[images]
        self.keys, self.values = self.keys[:, images], self.values[:, images]

    def _read(self, x: Tensor, seen: Tensor | None) -> Tensor:
        """x: (N, T, n_embd) embeddings; seen: what each may see, None is all before it. Logits, of the last one if None."""
        start, end = self.filled, self.filled + x.shape[1]
        net = self.gpt.transformer
        # All tokens of one call but those of the prefix stand at one position, side by side in the branches.
        count = x.shape[1] if seen is None else 1
        x = x + net.wpe.weight[self.position : self.position + count]
        for layer, block in enumerate(net.h):
            qkv = block.attn.c_attn(block.ln_1(x)).unflatten(-1, (3, self.keys.shape[2], -1))  # (N, T, 3, heads, d)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (N, heads, T, d) each
            self.keys[layer, :, :, start:end], self.values[layer, :, :, start:end] = k, v
            a = F.scaled_dot_product_attention(
                q, self.keys[layer, :, :, :end], self.values[layer, :, :, :end], attn_mask=seen, is_causal=seen is None
            )
            x = x + block.attn.c_proj(a.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.ln_2(x))
        self.filled, self.position = end, self.position + count
        return self.gpt.lm_head(net.ln_f(x if seen is not None else x[:, -1:])).float()
