"""Caption decoding compared with diffusers' generate_captions: GPT-2 small, 5 beams of 67 tokens, random weights.

No caption stops early, so both do the whole work, and the tokens of both are compared.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.clock import once
from unidiffuser.checkpoints.config import CaptionConfig
from unidiffuser.encoders.captions import CaptionDecoder

NEVER = -1  # for a stop token: no id at all


def measure(
    device: torch.device, images: int, peer_images: int | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Times of both, and how many captions have equal tokens.

    The peer decodes one image after another, so `peer_images` of them may stand for all: its time is then scaled up.
    """
    from diffusers import UniDiffuserTextDecoder

    torch.manual_seed(0)
    config = CaptionConfig(stop_token_id=NEVER)
    ours = CaptionDecoder(config).eval()
    with torch.no_grad():
        ours.gpt.transformer.wte.weight.mul_(4)  # random weights at their usual scale give a nearly flat distribution
    sizes = {name: config.gpt2[name] for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    theirs = UniDiffuserTextDecoder(config.prefix_length, config.prefix_dim, config.hidden_dim, **sizes).eval()
    theirs.load_state_dict({name.replace("gpt.", "transformer.", 1): value for name, value in ours.state_dict().items()})
    ours, theirs = ours.to(device, dtype), theirs.to(device, dtype)
    latents = torch.randn(images, config.prefix_length, config.hidden_dim, generator=torch.Generator().manual_seed(1))
    latents = latents.to(device, dtype)
    ours.decode(latents[:1], max_new_tokens=2)  # warm-up

    mine: list[Any] = []
    other: list[Any] = []
    times = {"ours": once(lambda: mine.extend(ours.decode(latents)))}
    shown = latents[: peer_images or images]
    found = once(lambda: other.extend(theirs.generate_captions(shown, NEVER, device)[0]))
    times["diffusers"] = {key: value * images / len(shown) for key, value in found.items()}
    equal = [list(captions[0].tokens) == tokens.tolist() for captions, tokens in zip(mine, other, strict=False)]
    return {"images": images, "compared": len(shown), "equal": sum(equal), "beams": 5, "tokens": 67, "times": times}
