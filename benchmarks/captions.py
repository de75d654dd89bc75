"""How much the key-value cache and batching buy: captions of GPT-2 small at 5 beams x 67 tokens, random weights.

    python benchmarks/captions.py [--images 1] [--threads 2] [--device cpu]

Three rows in one run: the same search with everything recomputed at every step (as the authors' code does it), diffusers'
UniDiffuserTextDecoder where it is installed, and ours. No caption stops early, so all do the same work.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from unidiffuser.captions import CaptionDecoder
from unidiffuser.model_config import CaptionConfig

NEVER = -1  # for a stop token: no id at all, so that every caption runs to its full length


@torch.inference_mode()
def uncached(model: CaptionDecoder, latents: Tensor, beams: int, limit: int) -> None:
    """Beam search an image at a time, whole sequences and logits of every position at every step."""
    gpt = model.gpt
    for latent in latents:
        embeds = model.decode_prefix(latent[None])
        scores = torch.zeros(1, 1, device=latents.device)
        for length in range(1, limit + 1):
            log_probs = gpt(inputs_embeds=embeds, use_cache=False).logits[:, -1].log_softmax(-1)
            average, best = ((scores + log_probs) / length).flatten().topk(beams)
            source, token = best // log_probs.shape[-1], best % log_probs.shape[-1]
            scores = (average * length)[:, None]
            embeds = torch.cat((embeds[source], gpt.transformer.wte(token)[:, None]), dim=1)


def diffusers_decoder(model: CaptionDecoder) -> Callable[[Tensor], object] | None:
    """diffusers' decoder with the same sizes and weights."""
    try:
        from diffusers import UniDiffuserTextDecoder
    except ImportError:
        return None
    config = model.config
    theirs = UniDiffuserTextDecoder(
        prefix_length=config.prefix_length, prefix_inner_dim=config.prefix_dim, prefix_hidden_dim=config.hidden_dim,
        n_positions=1024, vocab_size=50258, n_embd=768, n_layer=12, n_head=12,
    )  # fmt: skip
    weights = {name.replace("gpt.", "transformer.", 1): value for name, value in model.state_dict().items()}
    theirs.load_state_dict(weights)
    theirs.to(next(model.parameters()).device).eval()
    return lambda latents: [
        theirs.generate_beam(input_embeds=theirs.decode_prefix(latent[None]), eos_token_id=NEVER, device=latents.device)
        for latent in latents
    ]


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor time of one run; on a GPU until it is idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=67)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    model = CaptionDecoder(CaptionConfig(max_new_tokens=args.tokens, stop_token_id=NEVER)).eval().to(args.device)
    latents = torch.randn(args.images, 77, 64, device=args.device)

    rows = {
        "ours": lambda: model.decode(latents, beams=args.beams),
        "uncached": lambda: uncached(model, latents, args.beams, args.tokens),
    }
    theirs = diffusers_decoder(model)
    if theirs is not None:
        rows["diffusers"] = lambda: theirs(latents)
    model.decode(latents[:1], max_new_tokens=2)  # warm-up
    print(f"{args.images} image(s), {args.beams} beams x {args.tokens} tokens, {args.device}, {args.threads} thread(s)")
    own: tuple[float, float] | None = None
    for name, run in rows.items():
        wall, processor = seconds(run)
        own = own or (wall, processor)
        ratios = f"{wall / own[0]:6.1f} x ours by the clock, {processor / own[1]:6.1f} x by processor time"
        print(f"{name:10s} {wall:9.2f} s {processor:9.2f} s   {ratios}", flush=True)


if __name__ == "__main__":
    main()
