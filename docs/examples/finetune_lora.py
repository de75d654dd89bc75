"""Fine-tune the bundled model, or another checkpoint, on a few pictures with a LoRA, and sample with it.

    python docs/examples/finetune_lora.py pictures/ zorbi --out runs/zorbi

`pictures/` holds 4 to 8 images of the new thing. `zorbi` is their caption; a .txt file beside a picture gives it its own. With
the bundled model this takes about a quarter of an hour on one idle CPU core; an interrupted run continues when it is started
again. See docs/lora.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import unidiffuser
from unidiffuser.training.loop import train
from unidiffuser.training.lora_run import FILE, lora_config, lora_stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="folder of 4 to 8 pictures")
    parser.add_argument("word", help="caption of the pictures, and the prompt of the samples")
    parser.add_argument("--out", type=Path, default=Path("runs/lora"), help="folder of the run")
    parser.add_argument("--model", default="emoji", help="the bundled model, or a checkpoint file or folder")
    parser.add_argument("--steps", type=int, default=800, help="training steps")
    parser.add_argument("--sampling-steps", type=int, default=20, help="steps of the samples at the end")
    parser.add_argument("--kept", type=int, default=320, help="samples of the model itself, for prior preservation")
    options = parser.parse_args()

    data = {"data": str(options.pictures), "word": options.word, "checkpoint": options.model, "kept": options.kept}
    config = lora_config(options.out, steps=options.steps, options=data)
    train(lora_stage(config), config)

    model = unidiffuser.load(options.model, lora=[(options.out / FILE, 1.0)])
    for number, picture in enumerate(model.text_to_image(options.word, count=4, steps=options.sampling_steps)):
        path = options.out / f"{options.word}-{number}.png"
        picture.save(path)
        print(f"{path}: {model.image_to_text(picture, steps=options.sampling_steps)[0]}")


if __name__ == "__main__":
    main()
