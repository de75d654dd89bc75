"""Inpainting: a rectangle of a picture is generated to fit a prompt, the rest stays.

Usage:
    python examples/inpainting.py unidiffuser/assets/example.png "fox, noto" --box 128 0 256 256 --out out/inpainted.png
"""

import argparse
from pathlib import Path

import torch

import unidiffuser
from unidiffuser.options import resolve
from unidiffuser.path import NoisePath
from unidiffuser.samplers import Streams, item_generators, sample
from unidiffuser.streams import draw_noise

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("picture", type=Path)
parser.add_argument("prompt")
parser.add_argument("--box", type=int, nargs=4, default=[128, 0, 256, 256], help="left, top, right, bottom in pixels")
parser.add_argument("--model", default="emoji", help="the bundled model, or a checkpoint file or folder")
parser.add_argument("--steps", type=int, default=20, help="sampling steps")
parser.add_argument("--out", type=Path, default=Path("out/inpainted.png"))
args = parser.parse_args()

model = unidiffuser.load(args.model)
options = resolve({"steps": args.steps}, model.config)
generators = item_generators(0, 1)
clean = model.encode_images([args.picture], 1, options, generators).need("img")  # (1, C, H, W)

cell = model.config.vae.downscale  # pixels per latent cell
left, top, right, bottom = (side // cell for side in args.box)
mask = torch.zeros_like(clean[:, :1])  # 1 = generate, 0 = keep
mask[..., top:bottom, left:right] = 1

# The path starts at label 1000: noise where the picture is generated, the clean latent where it is kept.
noise = draw_noise(clean.shape[1:], generators, clean.device)
start = Streams(img=torch.where(mask == 1, noise, clean), text=model.encode_texts([args.prompt]))
path = NoisePath.text_to_image(args.steps)
out = sample(model.net, path, start, guidance=3.0, mask=Streams(img=mask), generator=generators)

args.out.parent.mkdir(parents=True, exist_ok=True)
model.decode_images(out, options)[0].save(args.out)
print(args.out)
