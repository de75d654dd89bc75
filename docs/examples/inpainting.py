"""Inpainting: a rectangle of a picture is generated to fit a prompt, the rest stays.

Usage:
    python docs/examples/inpainting.py unidiffuser/assets/example.png "fox, noto" --box 128 0 256 256 --out out/inpainted.png
"""

import argparse
from pathlib import Path

import numpy as np

import unidiffuser
from unidiffuser.media.images import open_image

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("picture", type=Path)
parser.add_argument("prompt")
parser.add_argument("--box", type=int, nargs=4, default=[128, 0, 256, 256], help="left, top, right, bottom in pixels")
parser.add_argument("--model", default="emoji", help="the bundled model, or a checkpoint file or folder")
parser.add_argument("--steps", type=int, default=20, help="sampling steps")
parser.add_argument("--out", type=Path, default=Path("out/inpainted.png"))
args = parser.parse_args()

picture = open_image(args.picture)
left, top, right, bottom = args.box
mask = np.zeros((picture.height, picture.width), dtype=bool)  # True = generate, False = keep
mask[top:bottom, left:right] = True

model = unidiffuser.load(args.model)
changed = model.inpaint(picture, mask, args.prompt, steps=args.steps, guidance=3.0)[0]

args.out.parent.mkdir(parents=True, exist_ok=True)
changed.save(args.out)
print(args.out)
