"""Ours beside diffusers' UniDiffuserPipeline: the same weights, steps, precision and guidance, in one run.

    python benchmarks/pipeline.py [--model emoji] [--count 16] [--steps 20] [--repeats 3] [--json FILE]

Rows: one evaluation of the network; guided text to image (latents, and decoded by the same autoencoder on both sides); guided
joint sampling. The two sides take turns, and the median of the repeats is shown. diffusers' pipeline does one evaluation after
another for guidance and numbers its timesteps differently, so outputs differ while the amount of work does not.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import unidiffuser
from unidiffuser.checkpoint_keys import apply, uvit_to_diffusers
from unidiffuser.path import NoisePath
from unidiffuser.pipeline import UniDiffuser
from unidiffuser.samplers import Streams, item_generators, sample


def diffusers_network(model: UniDiffuser) -> Any:
    """diffusers' UniDiffuserModel with the model's weights."""
    from diffusers.pipelines.deprecated.unidiffuser.modeling_uvit import UniDiffuserModel

    config = model.config.uvit
    network = UniDiffuserModel(
        text_dim=config.text_dim, clip_img_dim=config.clip_img_dim, num_text_tokens=config.num_text_tokens,
        num_attention_heads=config.num_heads, attention_head_dim=config.embed_dim // config.num_heads,
        in_channels=config.in_chans, out_channels=config.in_chans, num_layers=config.depth, sample_size=config.img_size,
        patch_size=config.patch_size, activation_fn="gelu", block_type="unidiffuser", ff_final_dropout=True,
        use_data_type_embedding=bool(config.data_types),
    )  # fmt: skip
    weights = model.checkpoint.state_dict("uvit", dtype=model.dtype)
    network.load_state_dict(apply(uvit_to_diffusers(weights), weights))
    return network.eval()


def diffusers_pipeline(model: UniDiffuser, network: Any) -> Any:
    """The pipeline around it. Its autoencoder is a stand-in that only tells the downscaling: latents are compared."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UniDiffuserPipeline
    from diffusers.pipelines.deprecated.unidiffuser.modeling_text_decoder import UniDiffuserTextDecoder

    caption, gpt2 = model.config.caption, model.config.caption.gpt2
    decoder = UniDiffuserTextDecoder(
        caption.prefix_length, caption.prefix_dim, caption.hidden_dim, gpt2["vocab_size"], gpt2["n_positions"],
        gpt2["n_embd"], gpt2["n_layer"], gpt2["n_head"], activation_function="gelu_new",
    )  # fmt: skip
    decoder.encode_prefix.load_state_dict(model.text_encoder.encode_prefix.state_dict())
    levels = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", solver_order=2, algorithm_type="dpmsolver++"
    )
    pipeline = UniDiffuserPipeline(
        vae=AutoencoderKL(3, 3, *levels, block_out_channels=(8,) * 4, norm_num_groups=8),
        text_encoder=model.text_encoder.clip,
        image_encoder=model.image_token_encoder.clip,
        clip_image_processor=None,
        clip_tokenizer=None,
        text_decoder=decoder.eval(),
        text_tokenizer=None,
        unet=network,
        scheduler=scheduler,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def rows(model: UniDiffuser, count: int, steps: int, guidance: float) -> dict[str, tuple[Callable, Callable]]:
    """name -> (ours, theirs)."""
    network = diffusers_network(model)
    pipeline = diffusers_pipeline(model, network)
    sizes = model.config.uvit.item_shapes
    hidden = model.text_encoder.hidden(["red apple"] * count)
    text = model.text_encoder.compress(hidden)
    noise = {name: torch.randn(count, *shape) for name, shape in sizes.items()}
    labels = torch.full((count,), 500.0), torch.zeros(count)
    data_type = torch.ones(count, dtype=torch.long)

    def our_latents(path: NoisePath, start: Streams) -> Tensor:
        out = sample(model.net, path, start, guidance=guidance, generator=item_generators(0, count))
        return out.need("img")

    def their_latents() -> Tensor:
        out: Tensor = pipeline(
            prompt_embeds=hidden, negative_prompt_embeds=hidden, num_inference_steps=steps, guidance_scale=guidance,
            data_type=1, output_type="latent", height=sizes["img"][1] * 8, width=sizes["img"][2] * 8,
        ).images  # fmt: skip
        return out

    t2i = NoisePath.text_to_image(steps)

    @torch.inference_mode()
    def our_evaluation() -> Any:
        return model.net(noise["img"], noise["clip_img"], text, *labels, data_type)

    @torch.inference_mode()
    def their_evaluation() -> Any:
        return network(noise["img"], noise["clip_img"], text, *labels, data_type)

    def decoded(latents: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: model.autoencoder.decode(latents())

    ours = {"latents": lambda: our_latents(t2i, Streams(text=text))}
    return {
        f"one evaluation, batch {count}": (our_evaluation, their_evaluation),
        f"text to image, {count} x {steps} steps, latents": (ours["latents"], their_latents),
        f"text to image, {count} x {steps} steps, pictures": (decoded(ours["latents"]), decoded(their_latents)),
    }


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    model = unidiffuser.load(args.model, device="cpu", dtype=torch.float32)
    results = {}
    print(f"{'':50s} {'ours':>9s} {'diffusers':>9s} {'ratio':>6s}")
    for name, (ours, theirs) in rows(model, args.count, args.steps, args.guidance).items():
        ours()  # warm-up of both
        theirs()
        pairs = [(seconds(ours), seconds(theirs)) for _ in range(args.repeats)]
        mine, other = (statistics.median(column) for column in zip(*pairs, strict=True))
        results[name] = {"ours_s": mine, "diffusers_s": other, "ratio": other / mine}
        print(f"{name:50s} {mine:8.3f}s {other:8.3f}s {other / mine:6.2f}")
    if args.json:
        args.json.write_text(json.dumps({"threads": args.threads, "torch": torch.__version__, "rows": results}, indent=1))


if __name__ == "__main__":
    main()
