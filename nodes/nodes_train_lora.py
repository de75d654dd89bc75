"""Train UniDiffuser LoRA: teaches the model a new thing, from inside a graph."""

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
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..unidiffuser.media.files import lines_of, read_lines, replacing
from ..unidiffuser.media.images import fit, open_image, to_images
from ..unidiffuser.streams import Streams
from .host_parts import HostCaptionDecoder
from .nodes_lora import on_captions, on_model
from .shared_inputs import seed_input
from .stream_inputs import require_model
from .types import CATEGORY, CaptionDecoderType

PREFIX = "diffusion_model."
PREVIEW_SIDE = 1024
NAME = re.compile(r"\w[\w .-]*")


class TrainUniDiffuserLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def whole(name: str, default: int, most: int, tooltip: str) -> io.Int.Input:
            return io.Int.Input(name, default=default, min=1, max=most, tooltip=tooltip)

        return io.Schema(
            node_id="UniDiffuserTrainLora",
            display_name="Train UniDiffuser LoRA",
            category=CATEGORY,
            description="Teaches the model a new thing from 4 to 8 pictures: its word calls the picture, and its picture calls "
            "the word. What the model knew is kept by pairs of its own. A run that was interrupted goes on when it is "
            "queued again. With the bundled model this takes minutes on a CPU.",
            search_aliases=["lora", "train", "fine-tune", "dreambooth", "teach", "concept"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="From Load UniDiffuser; what is learned adds to LoRAs that are on it."),
                io.Clip.Input("clip", tooltip="From Load UniDiffuser."),
                io.Vae.Input("vae", tooltip="From Load UniDiffuser."),
                io.ClipVision.Input("clip_vision", tooltip="From Load UniDiffuser."),
                CaptionDecoderType.Input("caption_decoder", tooltip="From Load UniDiffuser; it learns to write the word."),
                io.Image.Input(
                    "images", tooltip="Pictures of the new thing, a batch or a list of any sizes; the middle square is used."
                ),
                io.String.Input(
                    "captions",
                    multiline=True,
                    default="zorbi",
                    tooltip="One line for each picture, or one for all. A word that means nothing yet is best.",
                ),
                io.String.Input(
                    "name", default="zorbi", tooltip="Of the file in models/loras; a number is added to a name in use."
                ),
                whole("steps", 800, 100_000, "Training steps; about 800 teach the bundled model one thing."),
                io.Float.Input(
                    "learning_rate", default=0.002, min=1e-6, max=0.1, step=1e-4, tooltip="Less for a large model: 0.0001."
                ),
                whole("batch_size", 8, 256, "Pairs to learn in a step, and as many to keep."),
                whole("rank", 32, 256, "Size of the LoRA; more can hold more, and forgets more."),
                whole("kept_pairs", 320, 4096, "Pairs that the model makes itself, to keep what it knows."),
                whole(
                    "variations", 4, 64, "Of each picture, slightly moved on white ground; 1 takes the pictures as they are."
                ),
                whole("preview_every", 50, 10_000, "Steps between samples."),
                seed_input("Of everything."),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="With the LoRA on."),
                CaptionDecoderType.Output(display_name="CAPTION_DECODER", tooltip="With the LoRA on."),
                io.String.Output(display_name="lora_name", tooltip="The file in models/loras, for Load UniDiffuser LoRA."),
                io.Image.Output(display_name="loss_plot", tooltip="What was learned and kept, step by step; less is better."),
                io.Image.Output(
                    display_name="samples", tooltip="The last sample: pictures of the captions, captions of the pictures."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images: list[Tensor], captions: list[str], **inputs: list[Any]) -> io.NodeOutput:
        one = {name: values[0] for name, values in inputs.items()}
        model, decoder = one["model"], one["caption_decoder"]
        bar = comfy.utils.ProgressBar(1, node_id=cls.hidden.unique_id)
        path, plot, sample = train(squares(images, decoder), captions, bar=bar, **one)
        return io.NodeOutput(
            on_model(model, str(path), 1.0), on_captions(decoder, str(path), 1.0), path.name, as_image(plot), as_image(sample)
        )


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
    """Train, save, and give the file, the loss curve and the last sample. Interrupted, it leaves only what it can go on from.

    Raises:
        ValueError: captions that do not match the pictures, a name that is none, a setting out of range.
    """
    from ..unidiffuser.encoders.captions import CaptionDecoder  # NOTE: these take seconds that other nodes need not wait for
    from ..unidiffuser.training import lora_data, lora_run
    from ..unidiffuser.training.curve import draw_curve
    from ..unidiffuser.training.loop import train as run

    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot be the name of a file: use letters, digits, spaces, dots, - and _")
    settings = lora_run.LoRASettings(rank=rank, variations=variations, kept=kept_pairs, seed=seed % 2**31)
    words = lora_data.captions_of_variations([[line] for line in caption_lines(captions, len(pictures))], variations)
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

    latents = encode(model, clip, vae, clip_vision, shown, words)
    weights = network_weights(model)
    with torch.inference_mode(False), torch.enable_grad():  # the host runs nodes where nothing can be learned
        captioner = CaptionDecoder.from_checkpoint(caption_decoder.checkpoint, device, torch.float32)
        learned = Streams(**latents).map(lambda x: x.float().cpu().clone())
        learned = learned.replace(text=captioner.encode_prefix(learned.need("text").to(device)).detach().cpu())
        comfy.model_management.unload_all_models()
        stage = lora_run.build_lora_stage(
            lora_run.trainable_network(sizes, {name: weight.clone() for name, weight in weights.items()}).to(device),
            captioner,
            learned,
            words,
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
    plot, sample = draw_curve(rows), open_image(max((folder / "samples").iterdir()))
    path = publish(stage.out, name)
    shutil.rmtree(folder.parent, ignore_errors=True)  # with what was interrupted under this name and never went on
    return path, plot, sample


def caption_lines(captions: Sequence[str], count: int) -> list[str]:
    """A caption for each of `count` pictures. ValueError when lines and pictures do not match."""
    lines = [line for text in captions for line in lines_of(text) if line]
    if len(lines) not in (1, count):
        raise ValueError(
            f"There are {count} pictures and {len(lines)} captions. Write one line for each picture, or one for all of them."
        )
    return lines if len(lines) == count else lines * count


def squares(images: Sequence[Tensor], decoder: HostCaptionDecoder) -> list[Image.Image]:
    """The middle squares of IMAGEs (B, H, W, C) in [0, 1], in the model's size."""
    side = decoder.checkpoint.config.image_size
    pictures = [p for batch in images for p in to_images(batch[..., :3].movedim(-1, 1).float() * 2 - 1)]
    return [fit(picture, side, side) for picture in pictures]


def as_image(picture: Image.Image) -> Tensor:
    """IMAGE (1, H, W, 3) in [0, 1]."""
    return torch.from_numpy(np.asarray(picture, np.float32) / 255)[None]


def encode(
    model: Any, clip: Any, vae: Any, clip_vision: Any, pictures: Sequence[Image.Image], words: Sequence[str]
) -> dict[str, Tensor]:
    """The streams of the pairs by the host's encoders; text as CLIP leaves it, (B, L, CLIP width)."""
    host = require_model(model)
    pixels = torch.cat([as_image(picture) for picture in pictures])
    texts = {word: clip.encode_from_tokens(clip.tokenize(word, disable_weights=True)) for word in dict.fromkeys(words)}
    length = host.diffusion_model.config.num_text_tokens
    return {
        "img": host.process_latent_in(vae.encode(pixels)),
        "clip_img": clip_vision.encode_image(pixels)["image_embeds"][:, None],
        "text": torch.cat([texts[word][:, :length] for word in words]),
    }


def network_weights(model: Any) -> dict[str, Tensor]:
    """The weights of the MODEL's network with the LoRAs that are on it, float32, under their original names."""
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
    """Image latents in the model's units -> pixels (B, 3, H, W) in [-1, 1], by the host's VAE."""
    return lambda latents: vae.decode(model.model.process_latent_out(latents)).movedim(-1, 1).cpu() * 2 - 1


def run_folder(name: str, *settings: Any) -> Path:
    """Where a run keeps what it goes on from: the user's folder, by name and all settings."""
    digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:10]
    return Path(folder_paths.get_user_directory()) / "unidiffuser" / "lora" / name / digest


def publish(file: Path, name: str) -> Path:
    """Copy the LoRA into the first of the host's folders for them, under a name that is free; complete or not at all."""
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    number, path = 1, folder / f"{name}.safetensors"
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}.safetensors"
    with replacing(path) as partial:
        shutil.copyfile(file, partial)
    return path


NODES = [TrainUniDiffuserLora]
