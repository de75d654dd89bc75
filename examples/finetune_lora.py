"""Fine-tune the bundled model, or another checkpoint, on a few pictures with a LoRA, and sample with it.

    python examples/finetune_lora.py pictures/ zorbi --out runs/zorbi

`pictures/` holds 4 to 8 images of the new thing. `zorbi` is their caption; a .txt file beside a picture gives it its own. This
takes twelve minutes on one CPU core; an interrupted run continues when it is started again. See docs/lora.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import unidiffuser
from unidiffuser.training.loop import train
from unidiffuser.training.lora_run import FILE, lora_config, lora_stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("word")
    parser.add_argument("--out", type=Path, default=Path("runs/lora"))
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--kept", type=int, default=320, help="samples of the model itself, for prior preservation")
    options = parser.parse_args()

    data = {"data": str(options.pictures), "word": options.word, "checkpoint": options.model, "kept": options.kept}
    config = lora_config(options.out, steps=options.steps, options=data)
    train(lora_stage(config), config)

    model = unidiffuser.load(options.model, lora=[(options.out / FILE, 1.0)])
    sampling_steps = min(20, options.steps)
    for number, picture in enumerate(model.text_to_image(options.word, count=4, steps=sampling_steps)):
        path = options.out / f"{options.word}-{number}.png"
        picture.save(path)
        print(f"{path}: {model.image_to_text(picture, steps=sampling_steps)[0]}")


if __name__ == "__main__":
    main()
