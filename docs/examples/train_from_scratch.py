"""Train a UniDiffuser from scratch: the paper's objective (arXiv 2303.06555, equation 9) in one plain loop, to copy and change.

    python docs/examples/train_from_scratch.py pictures/ --steps 2000 --out model.safetensors
    unidiffuser text-to-image "red circle" --model model.safetensors

`pictures/` holds images, each with its caption in a .txt file of the same name. The frozen encoders are those of a checkpoint,
the bundled model if none is named. For more data, several processes and exact resume see docs/training.md.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import unidiffuser
from unidiffuser.checkpoints.checkpoint import save_checkpoint
from unidiffuser.media.images import fit, open_image, to_tensor
from unidiffuser.schedule import NUM_LABELS, add_noise
from unidiffuser.uvit import CURATED, UViT, UViTConfig

WARMUP = 100  # steps until the full learning rate
EMA_DECAY = 0.999


def read_folder(folder: Path, side: int) -> tuple[list[Image.Image], list[str]]:
    """The pictures of a folder as squares of `side` pixels, and their captions."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix != ".txt" and path.with_suffix(".txt").is_file()]
    if not files:
        raise SystemExit(f"{folder} holds no picture with a caption: write cat.txt beside cat.png")
    captions = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in files]
    return [fit(open_image(path), side, side) for path in files], captions


@torch.no_grad()
def encode(model: unidiffuser.UniDiffuser, pictures: list[Image.Image], captions: list[str]) -> dict[str, Tensor]:
    """Everything the loop needs, encoded once: mean and std (N, 4, H, W), clip_img (N, 1, D), text (N, L, d)."""
    moments = [model.autoencoder.posterior(chunk.to(model.device)) for chunk in to_tensor(pictures).split(16)]
    mean, std = (torch.cat(parts) for parts in zip(*moments, strict=True))
    streams = {"mean": mean, "std": std, "clip_img": model.image_token_encoder(pictures), "text": model.encode_texts(captions)}
    return {name: value.float().clone() for name, value in streams.items()}  # clone: autograd refuses inference tensors


def objective(net: UViT, data: dict[str, Tensor], rows: Tensor) -> Tensor:
    """Mean squared error of the predicted noise, each modality at its own, independent and uniform, noise level."""
    mean, std, clip_img, text = (data[name][rows] for name in ("mean", "std", "clip_img", "text"))
    clean = [mean + std * torch.randn_like(mean), clip_img, text]
    noise = [torch.randn_like(x) for x in clean]
    t_img, t_text = (torch.randint(1, NUM_LABELS + 1, (len(rows),), device=mean.device) for _ in range(2))
    noised = [add_noise(x, eps, t) for x, eps, t in zip(clean, noise, (t_img, t_img, t_text), strict=True)]
    predicted = net(*noised, t_img, t_text, CURATED)
    squared = [(p.float() - eps).square().sum() for p, eps in zip(predicted, noise, strict=True)]
    return torch.stack(squared).sum() / sum(eps.numel() for eps in noise)


def train(net: UViT, data: dict[str, Tensor], steps: int, batch_size: int, learning_rate: float) -> UViT:
    """Train in place; returns the exponential moving average of the weights, which is what to sample with."""
    average = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, betas=(0.9, 0.9), weight_decay=0.03)
    for step in range(steps):
        rows = torch.randint(len(data["text"]), (batch_size,), device=data["text"].device)
        loss = objective(net, data, rows)
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, (step + 1) / WARMUP)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        for slow, fast in zip(average.parameters(), net.parameters(), strict=True):
            slow.lerp_(fast, 1 - decay)
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")
    return average


def save(model: unidiffuser.UniDiffuser, net: UViT, path: Path) -> None:
    """Write a complete model in one file: the frozen parts of the checkpoint, and this network."""
    parts = {name: model.checkpoint.state_dict(name) for name in model.checkpoint.parts()}
    config = replace(model.config, uvit=net.config)
    save_checkpoint(path, config, parts | {"uvit": net.state_dict()}, model.checkpoint.tokenizer_specs())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--out", type=Path, default=Path("model.safetensors"))
    parser.add_argument("--encoders", default="emoji", help="checkpoint whose encoders are used")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--dim", type=int, default=256, help="width of the network")
    parser.add_argument("--depth", type=int, default=7, help="transformer blocks")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = unidiffuser.load(options.encoders, dtype=torch.float32)
    pictures, captions = read_folder(options.pictures, model.config.image_size)
    data = encode(model, pictures, captions)
    given = model.config.uvit  # of this only the shapes of the latents are kept
    shapes = {name: getattr(given, name) for name in ("img_size", "in_chans", "text_dim", "num_text_tokens", "clip_img_dim")}
    sizes = UViTConfig(**shapes, patch_size=4, embed_dim=options.dim, depth=options.depth, num_heads=max(1, options.dim // 64))
    net = UViT(sizes).to(model.device)
    save(model, train(net, data, options.steps, options.batch_size, options.learning_rate), options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
