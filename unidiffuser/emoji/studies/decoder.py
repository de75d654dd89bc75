"""Two decoders on the same latents: error at full size and sharpness of edges, on pictures of unseen concepts.

    git show COMMIT:unidiffuser/assets/emoji.safetensors > before.safetensors
    python -m unidiffuser.emoji.studies.decoder --data data/emoji --before before.safetensors

The former decoder's pictures are doubled by bicubic interpolation. Latents are those of the pictures, and the same with noise,
denoised by one evaluation of the network under the picture's caption, with the errors that a network leaves.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...checkpoints.checkpoint import load_checkpoint
from ...encoders.autoencoder import Autoencoder
from ...evaluation.metrics import psnr
from ...media.images import to_images
from ...pipeline import UniDiffuser, load
from ...schedule import add_noise, alpha_sigma
from ...streams import draw_normal
from ..image_folder import ImageFolder

UNSEEN = {"split": ["heldout_concept"], "style": ["noto", "twemoji", "flat", "fluent"], "tone": [0]}
EDGE = 0.5  # change of brightness between neighbouring pixels, in [-1, 1], from which they count as an edge
BATCH = 32


def edge_sharpness(pixels: Tensor, reference: Tensor) -> Tensor:
    """(B,) mean gradient of pictures at the edges of their references, over that of the references: 1 is as sharp.

    Args:
        pixels, reference: (B, 3, H, W) in [-1, 1].
    """
    ours, theirs = _gradient(pixels), _gradient(reference)
    edges = theirs > EDGE
    return (ours * edges).flatten(1).sum(1) / (theirs * edges).flatten(1).sum(1).clamp_min(1e-6)


def _gradient(pixels: Tensor) -> Tensor:
    """(B, H, W) sum of the absolute differences of brightness to the pixels at the right and below."""
    grey = pixels.clamp(-1, 1).mean(1)
    return F.pad(grey.diff(dim=2), (0, 1)).abs() + F.pad(grey.diff(dim=1), (0, 0, 0, 1)).abs()


def doubled(pixels: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) at twice their sides by bicubic interpolation."""
    return F.interpolate(pixels.clamp(-1, 1), scale_factor=2, mode="bicubic").clamp(-1, 1)


@torch.inference_mode()
def denoised(model: UniDiffuser, clean: Tensor, clip_img: Tensor, text: Tensor, label: float, seed: int) -> Tensor:
    """Image latents (B, C, h, w) after noise of a label and one evaluation of the network under clean captions."""
    generator = torch.Generator().manual_seed(seed)
    img, token = (add_noise(x, draw_normal(x.shape, generator), label) for x in (clean, clip_img))
    known, data_type = torch.zeros(len(img)), torch.ones(len(img), dtype=torch.long)
    noise = model.net(img, token, text, torch.full((len(img),), float(label)), known, data_type)[0]
    alpha, sigma = alpha_sigma(torch.tensor(float(label)))
    return (img - sigma * noise) / alpha


@torch.inference_mode()
def latents_of(model: UniDiffuser, images: ImageFolder, labels: Sequence[int]) -> dict[int, Tensor]:
    """The latents of pictures under label 0, and denoised ones under the other labels."""
    parts: dict[int, list[Tensor]] = {label: [] for label in (0, *labels)}
    for chunk in torch.arange(len(images)).split(BATCH):
        pixels = images.pixels(chunk)
        clean, token = model.autoencoder.posterior(pixels)[0], model.image_token_encoder(to_images(pixels))
        text = model.encode_texts([images.records[i]["text"][0] for i in chunk.tolist()])
        parts[0].append(clean)
        for label in labels:
            parts[label].append(denoised(model, clean, token, text, label, label + int(chunk[0])))
    return {label: torch.cat(found) for label, found in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of `prepare`, at full size")
    parser.add_argument("--before", required=True, help="a checkpoint with the former decoder, of half the size")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--labels", type=int, nargs="*", default=[100, 200, 300], help="of the noise on denoised latents")
    parser.add_argument("--sheet", type=Path, help="write pictures, the former decoder's and this one's, eight of each")
    options = parser.parse_args()
    model = load(options.model, dtype=torch.float32)
    before = Autoencoder.from_checkpoint(load_checkpoint(options.before), dtype=torch.float32)
    images = ImageFolder(options.data, model.config.image_size, UNSEEN)
    latents = latents_of(model, images, options.labels)
    print("| latents | PSNR before | after | gain (95 %) | edges before | after |\n|---|---|---|---|---|---|")
    for label, z in latents.items():
        scores = []
        for chunk in torch.arange(len(images)).split(BATCH):
            pixels = images.pixels(chunk)
            pair = [doubled(before.decode(z[chunk])), model.autoencoder.decode(z[chunk])]
            scores.append(torch.stack([f(x, pixels) for f in (psnr, edge_sharpness) for x in pair]))
        old, new, blurred, sharp = torch.cat(scores, dim=1)
        gain, error = (new - old).mean(), 1.96 * (new - old).std() / len(new) ** 0.5
        name = f"denoised from label {label}" if label else "of the pictures"
        print(
            f"| {name} | {old.mean():.2f} | {new.mean():.2f} | {gain:.2f} +- {error:.2f} | {blurred.mean():.2f} "
            f"| {sharp.mean():.2f} |"
        )
    if options.sheet:
        some = torch.randperm(len(images), generator=torch.Generator().manual_seed(0), device="cpu")[:8]
        rows = [images.pixels(some)]
        for z in (latents[0], latents[options.labels[0]]) if options.labels else (latents[0],):
            rows += [doubled(before.decode(z[some])), model.autoencoder.decode(z[some]).clamp(-1, 1)]
        sheet: Image.Image = to_images(torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)[None])[0]
        sheet.save(options.sheet, quality=92)


if __name__ == "__main__":
    main()
