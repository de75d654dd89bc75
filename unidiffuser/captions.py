"""The caption decoder: text latents to words, by a GPT-2 that reads the latents as a prefix.

The decoder is ClipCap-like (Mokady et al., arXiv 2111.09734): a text latent (L, hidden_dim) becomes L input embeddings
of GPT-2, which then continues with the caption. It was trained on text reconstruction, before and apart from the
diffusion model, so its `encode_prefix` also defines the text latent space.

Searching runs over images x beams at once with a key-value cache: the prefix is read once per image and only then spread
over the beams, and only the last position is turned into logits. An image whose beams have all stopped leaves the batch,
so the captions of a batch equal those of each image decoded alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from .modules import skeleton
from .streams import generators_for

if TYPE_CHECKING:
    from .checkpoints import Checkpoint
    from .model_config import CaptionConfig


@dataclass(frozen=True)
class Caption:
    """One candidate caption.

    `score` is the mean log-probability of its tokens under the model (0 is certainty), comparable between candidates and
    methods. `tokens` are the vocabulary ids as generated; the last one is the stop token unless the length ran out.
    """

    text: str
    score: float
    tokens: tuple[int, ...]


class CaptionDecoder(nn.Module):
    """GPT-2 with a text latent as its prefix; state-dict keys as in the original: encode_prefix, decode_prefix, gpt.

    `tokenizer` needs `decode(ids, skip_special_tokens=True) -> str` and only :meth:`decode` needs it.
    """

    def __init__(self, config: CaptionConfig, tokenizer: Any = None) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        gpt2 = GPT2Config(**{"bos_token_id": config.stop_token_id, "eos_token_id": config.stop_token_id} | config.gpt2)
        needed = config.prefix_length + config.max_new_tokens
        if gpt2.n_positions < needed:
            raise ValueError(
                f"the caption decoder has {gpt2.n_positions} positions, but a prefix of {config.prefix_length} and "
                f"{config.max_new_tokens} new tokens need {needed}; raise gpt2.n_positions"
            )
        self.encode_prefix = nn.Linear(config.prefix_dim, config.hidden_dim)
        self.decode_prefix = nn.Linear(config.hidden_dim, gpt2.n_embd)
        self.gpt = GPT2LMHeadModel(gpt2)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> CaptionDecoder:
        """The decoder of a checkpoint, with its tokenizer; needs "caption"."""
        with skeleton():
            decoder = cls(checkpoint.config.caption, checkpoint.gpt2_tokenizer())
        return checkpoint.load_into(decoder, "caption", device=device, dtype=dtype)

    def forward(self, latents: Tensor, tokens: Tensor) -> Tensor:
        """Teacher-forced logits for training.

        latents: (B, L, hidden_dim); tokens: (B, T) ids. Returns (B, T, V): the logits that predict each of `tokens`.
        """
        embeds = torch.cat((self.decode_prefix(latents), self.gpt.transformer.wte(tokens)), dim=1)  # (B, L + T, n_embd)
        hidden = self.gpt.transformer(inputs_embeds=embeds, use_cache=False).last_hidden_state
        return self.gpt.lm_head(hidden[:, latents.shape[1] - 1 : -1])

    @torch.inference_mode()
    def decode(
        self,
        latents: Tensor,
        method: str = "beam",
        *,
        beams: int = 5,
        count: int = 1,
        max_new_tokens: int | None = None,
        top_p: float = 0.8,
        temperature: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> list[list[Caption]]:
        """Caption text latents.

        Args:
            latents: (B, L, hidden_dim), as the diffusion model leaves them.
            method: "beam" searches as the paper's code does (deterministic); "nucleus" samples (Holtzman et al.,
                arXiv 1904.09751) from the smallest set of tokens that holds `top_p` of the probability.
            beams: width of the beam search.
            count: candidates per item; at most `beams` for the beam search.
            max_new_tokens: longest caption in tokens; the checkpoint's own limit when None (67 in the published ones).
            top_p: share of the probability that nucleus sampling keeps, in (0, 1].
            temperature: divides the logits; above 0.
            generator: for "nucleus": one per item, or one from which they are derived; chance when None.

        Returns:
            One list per item, of `count` captions, best score first.

        Raises:
            ValueError: an argument out of range, latents of a wrong shape or with NaN or infinite values.
        """
        self._check(latents, beams, count, max_new_tokens, top_p, temperature)
        if latents.shape[0] == 0:
            return []
        limit = self.config.max_new_tokens if max_new_tokens is None else max_new_tokens
        weight = self.decode_prefix.weight
        prefix = self.decode_prefix(latents.to(weight.device, weight.dtype))  # (B, L, n_embd)
        if method == "beam":
            if count > beams:
                raise ValueError(f"count={count} captions need at least as many beams, got beams={beams}")
            found = _beam_search(self.gpt, prefix, self.config.stop_token_id, beams, limit, temperature)
        elif method == "nucleus":
            generators = generators_for(generator, latents.shape[0])
            found = _nucleus(self.gpt, prefix, self.config.stop_token_id, generators, count, limit, top_p, temperature)
        else:
            raise ValueError(f'caption method must be "beam" or "nucleus", got {method!r}')
        return [[self._caption(tokens, score) for tokens, score in item[:count]] for item in found]

    def _caption(self, tokens: list[int], score: float) -> Caption:
        words = [token for token in tokens if token != self.config.stop_token_id]
        text = self.tokenizer.decode(words, skip_special_tokens=True) if self.tokenizer is not None else ""
        return Caption(text.strip(), score, tuple(tokens))

    def _check(
        self, latents: Tensor, beams: int, count: int, max_new_tokens: int | None, top_p: float, temperature: float
    ) -> None:
        if latents.ndim != 3 or latents.shape[2] != self.config.hidden_dim:
            raise ValueError(f"text latents must have shape (B, L, {self.config.hidden_dim}), got {tuple(latents.shape)}")
        if not torch.isfinite(latents).all():
            raise ValueError("the text latents hold NaN or infinite values; lower the guidance or use dtype float32")
        gpt2 = self.gpt.config
        room = gpt2.n_positions - latents.shape[1]
        if max_new_tokens is not None and not 1 <= max_new_tokens <= room:
            raise ValueError(f"max_new_tokens must be between 1 and {room}, got {max_new_tokens}")
        if not 1 <= beams < gpt2.vocab_size:
            raise ValueError(f"beams must be between 1 and {gpt2.vocab_size - 1}, got {beams}")
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")


class _Reader:
    """Next-token logits for a set of rows that share one key-value cache."""

    def __init__(self, gpt: GPT2LMHeadModel) -> None:
        self.gpt = gpt
        self.cache = DynamicCache()

    def read(self, embeds: Tensor) -> Tensor:
        """embeds: (rows, T, n_embd). Returns float32 logits (rows, V) of the token after the last one."""
        out = self.gpt.transformer(inputs_embeds=embeds, past_key_values=self.cache, use_cache=True)
        return self.gpt.lm_head(out.last_hidden_state[:, -1]).float()

    def read_tokens(self, tokens: Tensor) -> Tensor:
        """tokens: (rows,). Returns float32 logits (rows, V)."""
        return self.read(self.gpt.transformer.wte(tokens)[:, None])

    def keep(self, rows: Tensor) -> None:
        """Let row i of the next call continue the present row `rows[i]`; spreads, reorders and drops rows alike."""
        self.cache.batch_select_indices(rows)


Candidates = list[tuple[list[int], float]]  # tokens and score, best first


def _beam_search(
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
        average = (scores[..., None] + log_probs) / lengths[..., None]
        average, best = average.flatten(1).topk(beams, -1)  # (N, K) over K * V continuations
        source, token = best // log_probs.shape[-1], best % log_probs.shape[-1]
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


def _nucleus(
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
