"""Draw the README's picture of four commands and their results, the banner and the icon, with the bundled model.

python docs/draw_results.py

writes results.jpg, banner.png and icon.png in docs/pictures. The first panel is what the README's command and its library
example give.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import unidiffuser

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "nodes/pictures"
PROMPT = "red apple, twemoji"
DESCRIBED = "lion"
JOINT_SEED = 0
ENDS = ("fox", "lion")
WIDTH, HEIGHT, HEADING, LINE = 1350, 364, 36, 22
ICON = 400
BANNER = (1260, 540)
BANNER_SEED = 58  # of the template Joint pairs, with its speeds
INK, RULE = "#202020", "#c8c8c8"
Pair = tuple[Image.Image, str]


def written(draw: ImageDraw.ImageDraw, text: str, middle: float, top: float, width: float, size: int) -> None:
    """Draw a centred line of text, in a smaller font if it does not fit."""
    while size > 8 and draw.textlength(text, ImageFont.load_default(size)) > width:
        size -= 1
    draw.text((middle, top + LINE / 2), text, fill=INK, font=ImageFont.load_default(size), anchor="mm")


def panel(canvas: Image.Image, left: int, width: int, heading: str, rows: list[list[Pair]]) -> None:
    """Draw pictures in rows below a heading, each with its caption beneath if there is one."""
    draw = ImageDraw.Draw(canvas)
    written(draw, heading, left + width / 2, 8, width - 16, 18)
    line = LINE if any(text for row in rows for _, text in row) else 0
    side = min((width - 24) // max(map(len, rows)), (HEIGHT - HEADING - 8) // len(rows) - line)
    top = HEADING + (HEIGHT - HEADING - len(rows) * (side + line)) // 2
    for row in rows:
        for place, (picture, text) in enumerate(row):
            x = left + (width - len(row) * side) // 2 + place * side
            canvas.paste(picture.resize((side - 6, side - 6), Image.Resampling.LANCZOS), (x + 3, top + 3))
            written(draw, text, x + side / 2, top + side, side - 4, 16)
        top += side + line


def banner(pairs: list[Pair]) -> Image.Image:
    """A row of pictures with their captions beneath."""
    canvas = Image.new("RGB", BANNER, "white")
    draw = ImageDraw.Draw(canvas)
    side = BANNER[0] // len(pairs)
    top = (BANNER[1] - side - 50) // 2
    for place, (picture, text) in enumerate(pairs):
        canvas.paste(picture.resize((side - 24, side - 24), Image.Resampling.LANCZOS), (place * side + 12, top + 12))
        draw.text((place * side + side / 2, top + side + 24), text, fill=INK, font=ImageFont.load_default(28), anchor="mm")
    return canvas


def main() -> None:
    """Run the four tasks and draw their results."""
    model = unidiffuser.load("emoji")
    apples = model.text_to_image(PROMPT, count=4, steps=20, guidance=3.0, seed=0)
    with Image.open(EXAMPLES / f"{DESCRIBED}.png") as picture:
        described = picture.convert("RGB")
    pairs = model.joint(count=4, seed=JOINT_SEED)
    frames = model.interpolate(*(EXAMPLES / f"{name}.png" for name in ENDS), frames=8)
    canvas = Image.new("RGB", (WIDTH, HEIGHT), "white")
    drawn = [(image, "") for image in apples]
    panels: list[tuple[int, str, list[list[Pair]]]] = [
        (338, f'text-to-image "{PROMPT}"', [drawn[:2], drawn[2:]]),
        (300, f"image-to-text {DESCRIBED}.png", [[(described, model.image_to_text(described)[0])]]),
        (338, "joint" + (f" --seed {JOINT_SEED}" if JOINT_SEED else ""), [pairs[:2], pairs[2:]]),
        (374, f"interpolate {ENDS[0]}.png {ENDS[1]}.png", [[(frame, "") for frame in frames[k : k + 4]] for k in (0, 4)]),
    ]
    left = 0
    for width, heading, rows in panels:
        if left:
            ImageDraw.Draw(canvas).line([(left, 10), (left, HEIGHT - 10)], fill=RULE)
        panel(canvas, left, width, heading, rows)
        left += width
    pictures = ROOT / "docs/pictures"
    canvas.save(pictures / "results.jpg", quality=85, optimize=True)
    shown = banner(model.joint(count=4, seed=BANNER_SEED, speeds=(1, 2)))
    shown.quantize(128).save(pictures / "banner.png", optimize=True)
    icon = apples[0].resize((ICON, ICON), Image.Resampling.LANCZOS)
    icon.quantize(64).save(pictures / "icon.png", optimize=True)


if __name__ == "__main__":
    main()
