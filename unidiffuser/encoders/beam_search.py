"""Text generation with GPT-2: the authors' beam search, and nucleus sampling.

Both run over all images and beams in one batch, on a `TokenTree`, whose cache the beams of an image share. In the beam search
an image leaves the batch once all its beams have stopped. In neither do captions depend on the rest of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from .token_tree import TokenTree

Candidates = list[tuple[list[int], float]]
"""Token ids and mean log-probability, best first."""


def beam_search(
    gpt: GPT2LMHeadModel, prefix: Tensor, stop: int, beams: int, limit: int, temperature: float
) -> list[Candidates]:
    """Beam search of ClipCap and UniDiffuser, ranked by mean log-probability.

    A stopped beam keeps its score and length, and stays in the ranking through the single continuation token 0 of
    log-probability 0.

    Args:
        gpt: the language model.
        prefix: (N, L, n_embd) input embeddings, one prefix for each image.
        stop: id of the token that ends a caption.
        beams: K, at most the size V of the vocabulary.
        limit: longest caption in tokens.
        temperature: divides the logits.

    Returns:
        K candidates for each of the N images.
    """
    images, device = prefix.shape[0], prefix.device
    found: list[Candidates] = [[] for _ in range(images)]
    index = torch.arange(images, device=device)  # image of each group of beams
    tree = TokenTree(gpt, prefix, beams, limit - 1)
    scores, first = _best(tree.first, beams, temperature)  # (N, K)
    tokens = first[:, :, None]  # (N, K, T)
    lengths = torch.ones_like(scores)
    stopped = first == stop

    for step in range(1, limit + 1):
        finished = stopped.all(1) if step < limit else torch.ones_like(stopped[:, 0])
        if finished.any():
            for i in finished.nonzero()[:, 0].tolist():
                found[int(index[i])] = _ranked(tokens[i], scores[i], lengths[i])
            active = ~finished
            if not active.any():
                break
            tree.keep(active)
            index, scores, tokens, lengths, stopped = (x[active] for x in (index, scores, tokens, lengths, stopped))

        # The best K of K * V continuations are among the best K of each beam.
        log_probs, token = _best(tree.next_logits(tokens[:, :, -1]), beams, temperature)  # (N, K, K)
        log_probs[stopped], token[stopped] = -torch.inf, 0
        log_probs[..., 0].masked_fill_(stopped, 0.0)
        lengths = lengths + (~stopped)
        average = (scores[..., None] + log_probs) / lengths[..., None]
        average, best = average.flatten(1).topk(beams, -1)  # (N, K)
        source, token = best // beams, token.flatten(1).gather(1, best)
        lengths, stopped = lengths.gather(1, source), stopped.gather(1, source)
        scores = average * lengths
        tokens = torch.cat((tokens.gather(1, source[..., None].expand_as(tokens)), token[..., None]), dim=2)
        stopped = stopped | (token == stop)
        tree.reorder(source)
    return found


def _best(logits: Tensor, count: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and ids (..., count) of the likeliest of logits (..., V)."""
    logits = logits / temperature if temperature != 1 else logits
    values, ids = logits.topk(count, -1)
    return values - logits.logsumexp(-1, keepdim=True), ids


def _ranked(tokens: Tensor, scores: Tensor, lengths: Tensor) -> Candidates:
    """Candidates, best first, of tokens (K, T), summed scores (K,), lengths (K,)."""
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
    """Nucleus sampling (Holtzman et al., arXiv 1904.09751).

    Args:
        gpt: the language model.
        prefix: (N, L, n_embd) input embeddings, one prefix for each image.
        stop: id of the token that ends a caption.
        generators: one per image, so that its captions do not depend on the others.
        count: K, captions per image.
        limit: longest caption in tokens.
        top_p: probability of the set of tokens to sample from, in (0, 1].
        temperature: divides the logits.

    Returns:
        K candidates for each of the N images.
    """
    images, device = prefix.shape[0], prefix.device
    tree = TokenTree(gpt, prefix, count, limit - 1)
    logits = tree.first.repeat_interleave(count, 0)  # (N * count, V)
    tokens = torch.empty(images * count, 0, dtype=torch.long, device=device)
    scores = torch.zeros(images * count, dtype=torch.float32, device=device)
    lengths = torch.zeros_like(scores)
    stopped = torch.zeros_like(scores, dtype=torch.bool)

    for step in range(1, limit + 1):
        uniform = torch.cat(
            [torch.rand(count, generator=g, device=g.device, dtype=torch.float32).to(device) for g in generators]
        )
        token = _draw((logits / temperature).softmax(-1), top_p, uniform)
        log_prob = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
        scores, lengths = scores + log_prob.masked_fill(stopped, 0.0), lengths + (~stopped)
        tokens = torch.cat((tokens, token[:, None]), dim=1)
        stopped = stopped | (token == stop)
        if stopped.all() or step == limit:
            break
        logits = tree.next_logits(token.view(images, count)).flatten(0, 1)
    grouped = (x.view(images, count, *x.shape[1:]) for x in (tokens, scores, lengths))
    return [_ranked(*item) for item in zip(*grouped, strict=True)]


def _draw(probs: Tensor, top_p: float, uniform: Tensor) -> Tensor:
    """Inverse-transform sampling from the nucleus of probs (B, V), by uniform (B,)."""
    ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    mass = ordered.masked_fill(before > top_p, 0.0).cumsum(-1)  # the token that crosses top_p belongs to the nucleus
    place = torch.searchsorted(mass, (uniform * mass[:, -1])[:, None], right=True)
    last = (before <= top_p).sum(-1, keepdim=True) - 1
    return ids.gather(1, torch.minimum(place, last))[:, 0]
