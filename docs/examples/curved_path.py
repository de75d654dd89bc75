"""A noise path of your own: picture and caption denoised together along a curve.

A path lists the noise labels (0 = clean, 1000 = noise) of the picture and of the caption at every step. On the diagonal both
lose their noise at the same rate. On this curve the caption is ahead: t_text = 1000 (t_img / 1000)^p with p > 1.

Usage:
    python docs/examples/curved_path.py --power 3 --out out/example
"""

import argparse
from pathlib import Path

import torch

import unidiffuser
from unidiffuser import NoisePath

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="emoji", help="the bundled model, or a checkpoint file or folder")
parser.add_argument("--power", type=float, default=3.0, help="bend of the curve; 1 is the diagonal")
parser.add_argument("--count", type=int, default=4, help="number of pairs")
parser.add_argument("--steps", type=int, default=20, help="sampling steps")
parser.add_argument("--out", type=Path, default=Path("out/example"), help="folder for the pictures")
args = parser.parse_args()

t_img = torch.linspace(1000, 0, args.steps + 1, dtype=torch.float64)
path = NoisePath(t_img, 1000 * (t_img / 1000) ** args.power)

model = unidiffuser.load(args.model)
pictures, captions = model.sample(path, count=args.count, guidance=3.0)  # both start as noise, from the seeds 0, 1, 2, ...

args.out.mkdir(parents=True, exist_ok=True)
path.picture().save(args.out / "path.png")
for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
    picture.save(args.out / f"{number}.png")
    print(f"{number}.png: {caption}")
