"""The caption decoder compared with an independent search: one image at a time, without a cache."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import unidiffuser
from unidiffuser.checkpoints.checkpoint import load_checkpoint
from unidiffuser.encoders.beam_search import _draw
from unidiffuser.encoders.captions import CaptionDecoder
from unidiffuser.encoders.clip import TextEncoder

STOP = 1
BUNDLED = Path(unidiffuser.__file__).with_name("assets") / "emoji.safetensors"


class Words:
    """A tokenizer that decodes an id to its decimal digits."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, ids))


def decoder(
    width: int = 32,
    layers: int = 2,
    heads: int = 4,
    vocab: int = 50,
    stop_bias: float = 0.0,
    seed: int = 0,
    limit: int = 12,
) -> CaptionDecoder:
    config = SimpleNamespace(
        gpt2={"vocab_size": vocab, "n_positions": 96, "n_embd": width, "n_layer": layers, "n_head": heads},
        prefix_length=6, prefix_dim=24, hidden_dim=8, stop_token_id=STOP, max_new_tokens=limit,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = CaptionDecoder(config, Words()).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():  # larger than the initialisation, so that the distributions are not flat
            weight.copy_(torch.randn(weight.shape, generator=generator) * (0.35 if weight.ndim > 1 else 0.1))
        model.gpt.transformer.ln_f.weight.add_(1.0)
        # a final bias along the stop token's direction makes stopping more or less likely
        direction = model.gpt.transformer.wte.weight[STOP]
        model.gpt.transformer.ln_f.bias.copy_(stop_bias * direction / direction.norm())
    return model


def slow_beam_search(model: CaptionDecoder, latent: torch.Tensor, beams: int, limit: int) -> list[tuple[list[int], float]]:
    """Hypotheses as Python lists; the whole sequence goes through the network every step. latent: (L, hidden_dim)."""
    gpt, stop = model.gpt, model.config.stop_token_id
    prefix = model.decode_prefix(latent)

    def next_log_probs(ids: list[int]) -> torch.Tensor:
        embeds = prefix if not ids else torch.cat((prefix, gpt.transformer.wte(torch.tensor(ids))))
        return gpt(inputs_embeds=embeds[None], use_cache=False).logits[0, -1].softmax(-1).log()

    first = next_log_probs([])
    live = [([int(i)], float(first[i]), 1) for i in first.topk(beams).indices]
    for _ in range(limit - 1):
        if all(stop in ids for ids, _, _ in live):
            break
        grown = []
        for ids, total, length in live:
            if stop in ids:
                grown.append(([*ids, 0], total, length))
            else:
                grown += [([*ids, i], total + float(p), length + 1) for i, p in enumerate(next_log_probs(ids))]
        live = sorted(grown, key=lambda h: h[1] / h[2], reverse=True)[:beams]
    live.sort(key=lambda h: h[1] / h[2], reverse=True)
    return [(ids[:length], total / length) for ids, total, length in live]


@pytest.mark.parametrize(
    "size",
    [
        {},
        {"width": 64, "layers": 3, "heads": 2, "vocab": 211, "seed": 1},
        {"width": 16, "layers": 1, "heads": 1, "vocab": 17, "seed": 2},
        {"stop_bias": 4.0, "seed": 3},
        {"stop_bias": 3.0, "seed": 5, "limit": 20},
        {"width": 48, "layers": 4, "heads": 4, "vocab": 400, "stop_bias": 3.0, "seed": 4, "limit": 30},
    ],
)
@pytest.mark.parametrize("beams", [1, 5])
@torch.no_grad()
def test_beams_equal_uncached_search_token_for_token(size: dict, beams: int) -> None:
    model = decoder(**size)
    latents = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(7))
    limit = size.get("limit", 12)
    for item, latent in zip(model.decode(latents, beams=beams, count=beams), latents, strict=True):
        expected = slow_beam_search(model, latent, beams, limit)
        assert [list(c.tokens) for c in item] == [ids for ids, _ in expected]
        assert [c.score for c in item] == pytest.approx([score for _, score in expected], abs=1e-4)


@pytest.mark.skipif(not BUNDLED.is_file(), reason=f"NOT CHECKED on the bundled model: {BUNDLED} is not there")
@torch.no_grad()
def test_beams_equal_uncached_search_on_the_bundled_model() -> None:
    checkpoint = load_checkpoint("emoji")
    model = CaptionDecoder.from_checkpoint(checkpoint, dtype=torch.float32)
    known = TextEncoder.from_checkpoint(checkpoint, dtype=torch.float32)(["red apple, noto", "cat face", ""])
    latents = torch.cat((known, torch.randn(2, *known.shape[1:], generator=torch.Generator().manual_seed(0))))
    for item, latent in zip(model.decode(latents, count=5), latents, strict=True):
        expected = slow_beam_search(model, latent, 5, model.config.max_new_tokens)
        assert [list(caption.tokens) for caption in item] == [ids for ids, _ in expected]


@torch.no_grad()
def test_beams_equal_diffusers_token_for_token() -> None:
    """A second reference; it cuts captions at their length and orders them by score, like the authors' code."""
    diffusers = pytest.importorskip("diffusers")
    model = decoder(stop_bias=4.0, seed=3)
    theirs = diffusers.UniDiffuserTextDecoder(
        prefix_length=6, prefix_inner_dim=24, prefix_hidden_dim=8, vocab_size=50, n_positions=96, n_embd=32, n_layer=2, n_head=4
    ).eval()
    theirs.load_state_dict({name.replace("gpt.", "transformer.", 1): v for name, v in model.state_dict().items()})
    latents = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(7))
    for item, latent in zip(model.decode(latents, count=5), latents, strict=True):
        tokens, lengths = theirs.generate_beam(
            input_embeds=theirs.decode_prefix(latent[None]), device="cpu", entry_length=12, eos_token_id=STOP
        )
        expected = [row[: int(length)].tolist() for row, length in zip(tokens, lengths, strict=True)]
        assert [list(caption.tokens) for caption in item] == expected


@torch.no_grad()
def test_the_sizes_above_stop_early_and_late() -> None:
    """Ensures that the comparison covers hypotheses that stop early and ones that reach the limit."""
    latents = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(7))
    lengths = [len(c.tokens) for item in decoder(stop_bias=4.0, seed=3).decode(latents, count=5) for c in item]
    assert min(lengths) < 12
    assert len(set(lengths)) > 1
    lengths = [len(c.tokens) for item in decoder().decode(latents, count=5) for c in item]
    assert max(lengths) == 12


@torch.no_grad()
def test_an_image_that_stops_early_does_not_change_others() -> None:
    model = decoder(stop_bias=4.0, seed=3, limit=20)
    latents = torch.randn(7, 6, 8, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 3, 7)[:, None, None]
    together = model.decode(latents, count=5)
    alone = [model.decode(latent[None], count=5)[0] for latent in latents]
    assert [[c.tokens for c in item] for item in together] == [[c.tokens for c in item] for item in alone]
    assert len({max(len(c.tokens) for c in item) for item in together}) > 1  # they did finish at different steps


@torch.no_grad()
def test_nucleus_items_are_independent_and_seeded() -> None:
    model = decoder(stop_bias=3.0)
    latents = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(1))

    def seeds(*values: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(v) for v in values]

    together = model.decode(latents, "nucleus", count=2, generator=seeds(5, 6, 7))
    alone = model.decode(latents[1:2], "nucleus", count=2, generator=seeds(6))
    assert [c.tokens for c in together[1]] == [c.tokens for c in alone[0]]
    again = model.decode(latents, "nucleus", count=2, generator=seeds(5, 6, 7))
    assert together == again
    assert together != model.decode(latents, "nucleus", count=2, generator=seeds(8, 9, 10))
    assert all(item[0].score >= item[1].score for item in together)


@torch.no_grad()
def test_nucleus_scores_are_mean_log_probabilities() -> None:
    model = decoder(stop_bias=3.0)
    latent = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(1))
    caption = model.decode(latent, "nucleus", temperature=1.7, generator=[torch.Generator().manual_seed(0)])[0][0]
    tokens = torch.tensor([caption.tokens])
    log_probs = model(latent, tokens).log_softmax(-1).gather(2, tokens[..., None])
    assert caption.score == pytest.approx(float(log_probs.mean()), abs=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 1.0))
def test_draws_stay_in_the_nucleus(seed: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    probs = (3 * torch.randn(1, 20, generator=generator)).softmax(-1).expand(200, -1)
    drawn = _draw(probs, top_p, torch.rand(200, generator=generator))
    ordered, ids = probs[0].sort(descending=True)
    nucleus = set(ids[: int((ordered.cumsum(0) - ordered <= top_p).sum())].tolist())
    assert set(drawn.tolist()) <= nucleus


def test_draws_follow_the_probabilities() -> None:
    probs = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).expand(20_000, -1)
    drawn = _draw(probs, 1.0, torch.rand(20_000, generator=torch.Generator().manual_seed(0)))
    assert torch.bincount(drawn, minlength=4) / 20_000 == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.015)
    truncated = _draw(probs, 0.6, torch.rand(20_000, generator=torch.Generator().manual_seed(0)))
    assert torch.bincount(truncated, minlength=4) / 20_000 == pytest.approx([0, 0, 3 / 7, 4 / 7], abs=0.015)


@torch.no_grad()
def test_teacher_forced_logits_agree_with_decoding() -> None:
    model = decoder()
    latent = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(1))
    caption = model.decode(latent, beams=1)[0][0]
    assert model(latent, torch.tensor([caption.tokens])).argmax(-1)[0].tolist() == list(caption.tokens)


def test_original_key_names_and_activation() -> None:
    model = decoder()
    names = {name.split(".")[0] for name in model.state_dict()}
    assert names == {"encode_prefix", "decode_prefix", "gpt"}
    assert "gpt.transformer.h.0.attn.c_attn.weight" in model.state_dict()
    assert model.gpt.config.activation_function == "gelu_new"


def test_arguments_out_of_range_are_refused() -> None:
    model, latents = decoder(), torch.zeros(1, 6, 8)
    for wrong in (
        {"beams": 0}, {"beams": 1000}, {"count": 0}, {"count": 6}, {"max_new_tokens": 0}, {"max_new_tokens": 1000},
        {"method": "greedy"}, {"top_p": 0.0}, {"temperature": 0.0}, {"temperature": float("nan")},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            model.decode(latents, **wrong)
    with pytest.raises(ValueError, match="shape"):
        model.decode(torch.zeros(1, 6, 9))
    with pytest.raises(ValueError, match="NaN"):
        model.decode(torch.full((1, 6, 8), float("nan")))
    assert model.decode(torch.zeros(0, 6, 8)) == []
