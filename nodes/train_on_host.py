"""LoRA training inside the host: the host encodes the images and shows progress; the library trains."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..unidiffuser.media.files import lines_of, read_lines, replacing
from ..unidiffuser.media.images import fit, open_image, to_images
from ..unidiffuser.streams import Streams
from .host_captions import HostCaptionDecoder
from .stream_inputs import require_model

PREFIX = "diffusion_model."
PREVIEW_SIDE = 1024
NAME = re.compile(r"\w[\w .-]*")


def train(
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    *,
    model: Any,
    clip: Any,
    vae: Any,
    clip_vision: Any,
    caption_decoder: HostCaptionDecoder,
    name: str,
    steps: int,
    learning_rate: float,
    batch_size: int,
    rank: int,
    kept_pairs: int,
    variations: int,
    preview_every: int,
    seed: int,
    bar: Any,
) -> tuple[Path, Image.Image, Image.Image]:
    """Train a LoRA and publish it in the host's folder.

    An interrupted run keeps its checkpoints in `run_folder`; the same call then resumes it.

    Args:
        pictures: squares of the model's size.
        captions: one line per picture, or one for all.
        model, clip, vae, clip_vision, caption_decoder: the outputs of "Load UniDiffuser".
        bar: the host's progress bar.
        Others: the inputs of the node.

    Returns:
        The LoRA file, the loss curve, and the last preview.

    Raises:
        ValueError: captions do not match the pictures, `name` is not a file name, or a setting is out of range.
    """
    from ..unidiffuser.encoders.captions import CaptionDecoder  # NOTE: imported here; these take seconds
    from ..unidiffuser.training import lora_data, lora_run
    from ..unidiffuser.training.curve import draw_curve
    from ..unidiffuser.training.loop import train as run
    from ..unidiffuser.training.network import trainable_network

    if not NAME.fullmatch(name):
        raise ValueError(f"The name {name!r} is not a valid file name. Use letters, digits, spaces, dots, - and _.")
    settings = lora_run.LoRASettings(rank=rank, variations=variations, kept=kept_pairs, seed=seed % 2**31)
    texts = lora_data.captions_of_variations([[line] for line in caption_lines(captions, len(pictures))], variations)
    shown = lora_data.variations(pictures, variations, settings.strength, settings.seed)
    device, sizes = comfy.model_management.get_torch_device(), require_model(model).diffusion_model.config
    rounds = -(-kept_pairs // 16)

    def watch_pairs(done: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(-(-done // 16), rounds + steps)

    def watch(done: int, terms: dict[str, float], sample: Image.Image | None) -> None:
        preview = None if sample is None else ("JPEG", sample, PREVIEW_SIDE)
        bar.update_absolute(rounds + done, rounds + steps, preview)
        comfy.model_management.throw_exception_if_processing_interrupted()

    latents = encode(model, clip, vae, clip_vision, shown, texts)
    weights = network_weights(model)
    with torch.inference_mode(False), torch.enable_grad():  # the host runs nodes in inference mode
        captioner = CaptionDecoder.from_checkpoint(caption_decoder.checkpoint, device, torch.float32)
        new = Streams(**latents).map(lambda x: x.float().cpu().clone())
        new = new.replace(text=captioner.encode_prefix(new.need("text").to(device)).detach().cpu())
        comfy.model_management.unload_all_models()
        stage = lora_run.build_lora_stage(
            trainable_network(sizes, {name: weight.clone() for name, weight in weights.items()}).to(device),
            captioner,
            new,
            texts,
            Path(),
            settings,
            decode=decoder_of(model, vae),
            about={"model": model.model.origin.name, "steps": steps},
            watch=watch_pairs,
        )
        folder = run_folder(name, stage.fingerprint(), learning_rate, batch_size)
        config = lora_run.lora_config(
            folder,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=settings.seed,
            sample_every=preview_every,
        )
        stage.out = folder / lora_run.FILE
        run(stage, config, progress=False, device=str(device), watch=watch)
    rows = [json.loads(line) for line in read_lines(folder / "losses.jsonl") if line]
    plot, preview = draw_curve(rows), open_image(max((folder / "samples").iterdir()))
    path = publish(stage.out, name)
    shutil.rmtree(folder.parent, ignore_errors=True)  # with abandoned runs of the same name
    return path, plot, preview


def caption_lines(captions: Sequence[str], count: int) -> list[str]:
    """One caption for each of `count` pictures.

    Raises:
        ValueError: the number of lines is neither 1 nor `count`.
    """
    lines = [line for text in captions for line in lines_of(text) if line]
    if len(lines) not in (1, count):
        raise ValueError(
            f"'captions' has {len(lines)} lines for {count} images. Write one line per image, or one line for all."
        )
    return lines if len(lines) == count else lines * count


def squares(images: Sequence[Tensor], decoder: HostCaptionDecoder) -> list[Image.Image]:
    """Centre squares of IMAGEs (B, H, W, C) in [0, 1], scaled to the model's size."""
    side = decoder.checkpoint.config.image_size
    pictures = [p for batch in images for p in to_images(batch[..., :3].movedim(-1, 1).float() * 2 - 1)]
    return [fit(picture, side, side) for picture in pictures]


def as_image(picture: Image.Image) -> Tensor:
    """A picture as an IMAGE (1, H, W, 3) in [0, 1]."""
    return torch.from_numpy(np.asarray(picture, np.float32) / 255)[None]


def encode(
    model: Any, clip: Any, vae: Any, clip_vision: Any, pictures: Sequence[Image.Image], captions: Sequence[str]
) -> dict[str, Tensor]:
    """Encode pairs with the host's encoders: "img", "clip_img" and "text", the last as CLIP text (B, L, CLIP width)."""
    host = require_model(model)
    pixels = torch.cat([as_image(picture) for picture in pictures])
    texts = {text: clip.encode_from_tokens(clip.tokenize(text, disable_weights=True)) for text in dict.fromkeys(captions)}
    length = host.diffusion_model.config.num_text_tokens
    return {
        "img": host.process_latent_in(vae.encode(pixels)),
        "clip_img": clip_vision.encode_image(pixels)["image_embeds"][:, None],
        "text": torch.cat([texts[text][:, :length] for text in captions]),
    }


def network_weights(model: Any) -> dict[str, Tensor]:
    """State dict of the MODEL's network with its LoRAs merged, float32, under the original names."""
    tables = {"position": "pos_embed", "position_token": "pos_embed_token"}
    weights = {}
    for key, ((weight, convert), *patches) in model.get_key_patches(PREFIX).items():
        name, value = key.removeprefix(PREFIX), convert(weight.to("cpu", copy=True)).to(torch.float32)
        value = comfy.lora.calculate_weight(patches, value, key) if patches else value
        if (layer := name.removesuffix(".weight")) in tables:
            weights[tables[layer]] = value[None]
        elif not name.startswith("text_prefix."):
            weights[name] = value
    return weights


def decoder_of(model: Any, vae: Any) -> Callable[[Tensor], Tensor]:
    """Decoder by the host's VAE: scaled latents (B, C, H, W) to pixels (B, 3, H, W) in [-1, 1]."""
    return lambda latents: vae.decode(model.model.process_latent_out(latents)).movedim(-1, 1).cpu() * 2 - 1


def run_folder(name: str, *settings: Any) -> Path:
    """Folder of a run's checkpoints below the host's user folder; its name depends on all settings."""
    digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:10]
    return Path(folder_paths.get_user_directory()) / "unidiffuser" / "lora" / name / digest


def publish(file: Path, name: str) -> Path:
    """Copy a LoRA atomically into the host's first LoRA folder, under a name that is not taken."""
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    number, path = 1, folder / f"{name}.safetensors"
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}.safetensors"
    with replacing(path) as partial:
        shutil.copyfile(file, partial)
    return path
