"""Text to image, and back: four pictures of a prompt, then a caption of each.

Usage:
    python docs/examples/text_to_image_and_caption.py "red apple, twemoji" --out out/example
"""

import argparse
from pathlib import Path

import unidiffuser

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt", nargs="?", default="red apple, twemoji")
parser.add_argument("--model", default="emoji", help="the bundled model, or a checkpoint file or folder")
parser.add_argument("--count", type=int, default=4, help="number of pictures")
parser.add_argument("--steps", type=int, default=20, help="sampling steps")
parser.add_argument("--out", type=Path, default=Path("out/example"), help="folder for the pictures")
args = parser.parse_args()

model = unidiffuser.load(args.model)
pictures = model.text_to_image(args.prompt, count=args.count, steps=args.steps, seed=0)
captions = model.image_to_text(pictures, steps=args.steps, seed=0)

args.out.mkdir(parents=True, exist_ok=True)
for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
    picture.save(args.out / f"{number}.png")
    print(f"{number}.png: {caption}")
