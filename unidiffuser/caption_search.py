"""Continuing a prefix with GPT-2: beam search as the authors do it, and nucleus sampling.

Searching runs over images x beams at once with a key-value cache: the prefix is read once per image and only then spread
over the beams, and only the last position is turned into logits. An image whose beams have all stopped leaves the batch,
so the captions of a batch equal those of each image decoded alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, GPT2LMHeadModel

Candidates = list[tuple[list[int], float]]
"""Token ids and mean log-probability, best first."""


class _Reader:
    """Next-token logits for a set of rows that share one key-value cache."""

    def __init__(self, gpt: GPT2LMHeadModel) -> None:
        self.gpt = gpt
        self.cache = DynamicCache()
        self.rows = 0

    def read(self, embeds: Tensor) -> Tensor:
        """embeds: (rows, T, n_embd). Returns float32 logits (rows, V) of the token after the last one."""
        self.rows = len(embeds)
        out = self.gpt.transformer(inputs_embeds=embeds, past_key_values=self.cache, use_cache=True)
        return self.gpt.lm_head(out.last_hidden_state[:, -1]).float()

    def read_tokens(self, tokens: Tensor) -> Tensor:
        """tokens: (rows,). Returns float32 logits (rows, V)."""
        return self.read(self.gpt.transformer.wte(tokens)[:, None])

    def keep(self, rows: Tensor) -> None:
        """Let row i of the next call continue the present row `rows[i]`; spreads, reorders and drops rows alike."""
        if len(rows) != self.rows or not torch.equal(rows, torch.arange(self.rows, device=rows.device)):
            self.cache.batch_select_indices(rows)  # copies the whole cache, so not when nothing changes
            self.rows = len(rows)


def beam_search(
    gpt: GPT2LMHeadModel, prefix: Tensor, stop: int, beams: int, limit: int, temperature: float
) -> list[Candidates]:
    """Beam search of ClipCap and UniDiffuser: hypotheses compete by log-probability averaged over their own length.

    A stopped beam keeps its score and length and competes on with the one continuation "token 0, log-probability 0".
    """
    images, device = prefix.shape[0], prefix.device
    found: list[Candidates] = [[] for _ in range(images)]
    index = torch.arange(images, device=device)  # which image each group of beams belongs to
    reader = _Reader(gpt)
    log_probs = (reader.read(prefix) / temperature).log_softmax(-1)  # (N, V)
    scores, tokens = log_probs.topk(beams, -1)  # (N, K)
    reader.keep(index.repeat_interleave(beams))  # the prefix was read once per image; spread it over the beams
    tokens = tokens[:, :, None]  # (N, K, T)
    lengths = torch.ones_like(scores)
    stopped = tokens[:, :, -1] == stop

    for step in range(1, limit + 1):
        finished = stopped.all(1) if step < limit else torch.ones_like(stopped[:, 0])
        if finished.any():
            for i in finished.nonzero()[:, 0].tolist():
                found[int(index[i])] = _ranked(tokens[i], scores[i], lengths[i])
            going = ~finished
            if not going.any():
                break
            rows = torch.arange(going.numel() * beams, device=device).view(-1, beams)[going]
            reader.keep(rows.flatten())
            index, scores, tokens, lengths, stopped = (x[going] for x in (index, scores, tokens, lengths, stopped))

        logits = reader.read_tokens(tokens[:, :, -1].flatten())
        log_probs = (logits / temperature).log_softmax(-1).view(*scores.shape, -1)  # (N, K, V)
        log_probs[stopped] = -torch.inf
        log_probs[..., 0].masked_fill_(stopped, 0.0)
        lengths = lengths + (~stopped)
        # The best K of K * V continuations are among the best K of each beam, which are found in parallel.
        log_probs, token = log_probs.topk(beams, -1)  # (N, K, K)
        average = (scores[..., None] + log_probs) / lengths[..., None]
        average, best = average.flatten(1).topk(beams, -1)  # (N, K)
        source, token = best // beams, token.flatten(1).gather(1, best)
        lengths, stopped = lengths.gather(1, source), stopped.gather(1, source)
        scores = average * lengths
        tokens = torch.cat((tokens.gather(1, source[..., None].expand_as(tokens)), token[..., None]), dim=2)
        stopped = stopped | (token == stop)
        reader.keep((source + torch.arange(len(source), device=device)[:, None] * beams).flatten())
    return found


def _ranked(tokens: Tensor, scores: Tensor, lengths: Tensor) -> Candidates:
    """tokens (K, T), scores (K,) summed, lengths (K,) -> candidates by average score, best first."""
    mean = scores / lengths
    return [(tokens[k, : int(lengths[k])].tolist(), float(mean[k])) for k in mean.argsort(descending=True).tolist()]


def nucleus_sampling(
    gpt: GPT2LMHeadModel,
    prefix: Tensor,
    stop: int,
    generators: Sequence[torch.Generator],
    count: int,
    limit: int,
    top_p: float,
    temperature: float,
) -> list[Candidates]:
    """Sample `count` captions an image; each image draws its own uniforms, so others cannot change its captions."""
    images, device = prefix.shape[0], prefix.device
    reader = _Reader(gpt)
    logits = reader.read(prefix).repeat_interleave(count, 0)  # (N * count, V)
    reader.keep(torch.arange(images, device=device).repeat_interleave(count))
    tokens = torch.empty(images * count, 0, dtype=torch.long, device=device)
    scores = torch.zeros(images * count, device=device)
    lengths = torch.zeros_like(scores)
    stopped = torch.zeros_like(scores, dtype=torch.bool)

    for step in range(1, limit + 1):
        uniform = torch.cat([torch.rand(count, generator=g, device=g.device).to(device) for g in generators])
        token = _draw((logits / temperature).softmax(-1), top_p, uniform)
        log_prob = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
        scores, lengths = scores + log_prob.masked_fill(stopped, 0.0), lengths + (~stopped)
        tokens = torch.cat((tokens, token[:, None]), dim=1)
        stopped = stopped | (token == stop)
        if stopped.all() or step == limit:
            break
        logits = reader.read_tokens(token)
    grouped = (x.view(images, count, *x.shape[1:]) for x in (tokens, scores, lengths))
    return [_ranked(*item) for item in zip(*grouped, strict=True)]


def _draw(probs: Tensor, top_p: float, uniform: Tensor) -> Tensor:
    """Inverse-transform sampling from the nucleus of each row. probs: (rows, V); uniform: (rows,) in [0, 1)."""
    ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    mass = ordered.masked_fill(before > top_p, 0.0).cumsum(-1)  # the token that crosses top_p stays in
    place = torch.searchsorted(mass, (uniform * mass[:, -1])[:, None], right=True)
    last = (before <= top_p).sum(-1, keepdim=True) - 1
    return ids.gather(1, torch.minimum(place, last))[:, 0]
