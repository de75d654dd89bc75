"""Images saved with their captions, the prompt and the workflow, as the host's Save Image does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
from comfy.cli_args import args
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

CAPTION = "caption"  # the PNG text field
COMPRESSION = 4, 1  # of saved files and of previews, as the host's


def paired(images: Sequence[Tensor], captions: Sequence[str]) -> list[tuple[Tensor, str]]:
    """Each image (H, W, C) of batches (B, H, W, C) with its caption; one caption alone goes to every image.

    Args:
        images: batches, of any sizes.
        captions: texts of one or several captions, one per line.

    Raises:
        ValueError: another number of captions than of images.
    """
    singles = [image for batch in images for image in batch]
    lines = [line for text in captions for line in text.split("\n")]
    if len(lines) == 1:
        lines *= len(singles)
    if len(lines) != len(singles):
        raise ValueError(
            f"'images' has {len(singles)} images and 'captions' {len(lines)} captions. Connect one caption per image, such as "
            f"the captions of Decode Caption, or a single caption for all."
        )
    return list(zip(singles, lines, strict=True))


def save_pairs(
    pairs: Sequence[tuple[Tensor, str]], prefix: str, hidden: Any, *, keep: bool = True, text_files: bool = False
) -> list[dict[str, str]]:
    """Save images (H, W, C) with their captions; returns {"filename", "subfolder", "type"} of each.

    Args:
        pairs: images with captions.
        prefix: of the file names, may hold a folder and the host's placeholders.
        hidden: the node's hidden inputs, with the prompt and the workflow.
        keep: save into the output folder, otherwise into the one for previews.
        text_files: write each caption into a .txt beside its image too.
    """
    kind, compression = ("output", COMPRESSION[0]) if keep else ("temp", COMPRESSION[1])
    root = folder_paths.get_output_directory() if keep else folder_paths.get_temp_directory()
    saved = []
    for number, (image, caption) in enumerate(pairs):
        height, width = image.shape[:2]
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, root, width, height)
        path = Path(folder) / f"{name.replace('%batch_num%', str(number))}_{counter:05}_.png"
        pixels = (image.cpu().float().numpy() * 255).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path, pnginfo=_metadata(hidden, caption), compress_level=compression)
        if text_files:
            path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
        saved.append({"filename": path.name, "subfolder": subfolder, "type": kind})
    return saved


def _metadata(hidden: Any, caption: str) -> PngInfo | None:
    """The prompt, the workflow and the caption, unless the host was started without metadata."""
    if args.disable_metadata:
        return None
    info = PngInfo()
    fields = {"prompt": hidden.prompt, **(hidden.extra_pnginfo or {})}
    for name, value in fields.items():
        if value is not None:
            info.add_text(name, json.dumps(value))
    info.add_itxt(CAPTION, caption)
    return info
