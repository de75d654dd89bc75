"""The parts of a checkpoint as the host's MODEL, VAE and CLIP_VISION; its CLIP is in `host_clip`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models_base
import comfy.utils
import torch
from torch import Tensor

from ..unidiffuser.checkpoints.checkpoint import Checkpoint, VAEConfig
from ..unidiffuser.encoders.autoencoder import to_encoder_size, to_pixels
from ..unidiffuser.small.palette import Palette
from ..unidiffuser.small.stem import ConvStem
from ..unidiffuser.small.upsampler import ConvexUpsampler
from .host_model import LatentFormat, make_patcher
from .host_network import host_keys
from .host_vae import HostVAE
from .saved_models import Origin, read_network

EXTRAS = ("palette.", "upsampler.")  # prefixes of an autoencoder's weights that the host's does not have


def load_model(checkpoint: Checkpoint, name: str, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """MODEL of a checkpoint, with the caption decoder's Linear from CLIP text to the text latent.

    `name` is that of the checkpoint in "Load UniDiffuser", for files that the host saves from this MODEL.
    """
    caption = checkpoint.state_dict("caption")
    prefix = {key: caption[f"encode_prefix.{key}"] for key in ("weight", "bias")}
    weights = host_keys(checkpoint.state_dict("uvit"), prefix)
    patcher = _model(Origin(name, checkpoint.config), weights, disable_dynamic)
    patcher.cached_patcher_init = (load_model, (checkpoint, name))
    return patcher


def load_saved_model(path: str, origin: Origin, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """MODEL of a file that the host saved."""
    patcher = _model(origin, read_network(path, origin.config), disable_dynamic)
    patcher.cached_patcher_init = (load_saved_model, (path, origin))
    return patcher


def _model(origin: Origin, weights: dict[str, Tensor], disable_dynamic: bool) -> comfy.model_patcher.ModelPatcher:
    config = origin.config
    latent_format = LatentFormat(config.vae)
    patcher = make_patcher(config.uvit, config.caption.prefix_dim, weights, latent_format, disable_dynamic=disable_dynamic)
    patcher.model.origin = origin
    return patcher


def load_vae(checkpoint: Checkpoint) -> comfy.sd.VAE:
    """VAE of a checkpoint. Pixel shuffling, palette and upsampler are hooks, so that the keys stay LDM's."""
    config = checkpoint.config.vae
    weights = {name: x for name, x in checkpoint.state_dict("vae").items() if not name.startswith(EXTRAS)}
    vae = HostVAE(sd=weights, config={"params": {"ddconfig": dict(config.ddconfig), "embed_dim": config.embed_dim}})
    vae.trained_side = checkpoint.config.image_size
    vae.plain = config.patch_size == 1 and not (config.palette or config.upsampler)
    vae.downscale_ratio = vae.upscale_ratio = config.downscale
    model = vae.first_stage_model
    if config.patch_size > 1:
        unshuffle = torch.nn.PixelUnshuffle(config.patch_size)
        model.encoder.register_forward_pre_hook(lambda module, args: (unshuffle(to_encoder_size(args[0], config)), *args[1:]))
    styles = _with_palette(model, config, checkpoint) if config.palette else None
    if config.upsampler:
        model.upsampler = _frozen(ConvexUpsampler(**config.upsampler), checkpoint.state_dict("vae", EXTRAS[1]), model)
    # NOTE: a hook that held the whole model would keep it in memory until a garbage collection.
    palette, upsampler = getattr(model, "palette", None), getattr(model, "upsampler", None)

    def finish(module: torch.nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return to_pixels(out, config, palette, None if styles is None else styles.pop(), upsampler)

    if config.patch_size > 1 or config.palette or config.upsampler:
        model.decoder.register_forward_hook(finish)
    return vae


def _frozen(module: torch.nn.Module, weights: dict[str, Tensor], model: torch.nn.Module) -> torch.nn.Module:
    """A module with weights, on the device and in the dtype of a model."""
    module.load_state_dict(weights)
    first = next(model.parameters())
    return module.to(first.device, first.dtype).eval().requires_grad_(False)


def _with_palette(model: torch.nn.Module, config: VAEConfig, checkpoint: Checkpoint) -> list[Tensor]:
    """Hooks that write the style code of an image into its latent, and read the styles of a latent from its code.

    Returns:
        a list that holds the styles (B, M) of the latents being decoded.
    """
    sizes = config.palette or {}
    palette = Palette(len(sizes["manners"]), sizes["colours"])
    model.palette = _frozen(palette, checkpoint.state_dict("vae", EXTRAS[0]), model)
    scale, encoded, decoded = config.scale_factor, list[Tensor](), list[Tensor]()

    def recognise(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        encoded[:] = [palette.recognise(to_encoder_size(args[0], config))]

    def write(module: torch.nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        mean, spread = out.chunk(2, dim=1)
        return torch.cat([palette.write_code(mean * scale, encoded.pop()) / scale, spread], dim=1)

    def read(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        decoded[:] = [palette.read_code(args[0] * scale)]
        return palette.remove_code(args[0] * scale) / scale, *args[1:]

    model.encoder.register_forward_pre_hook(recognise, prepend=True)  # before pixel_unshuffle
    model.quant_conv.register_forward_hook(write)
    model.post_quant_conv.register_forward_pre_hook(read)
    return decoded


def load_clip_vision(checkpoint: Checkpoint) -> comfy.clip_vision.ClipVisionModel:
    """CLIP_VISION of a checkpoint; the host's own loader rejects a ViT of 12 layers or with a convolutional stem."""
    from transformers import CLIPVisionConfig

    config = dict(checkpoint.config.clip_image)
    stem = config.pop("stem", None)
    with tempfile.TemporaryDirectory() as folder:  # ComfyUI 0.18 reads the sizes only from a file
        sizes = Path(folder) / "config.json"
        sizes.write_text(json.dumps({**CLIPVisionConfig().to_dict(), **config}))
        vision = comfy.clip_vision.ClipVisionModel(str(sizes))
    if stem is not None:
        made = {"operations": comfy.ops.manual_cast, "device": vision.patcher.offload_device, "dtype": vision.dtype}
        vision.model.vision_model.embeddings.patch_embedding = ConvStem(**stem, **made)
    if config["num_hidden_layers"] == 1:
        _return_input(vision.model.vision_model.encoder)
    vision.load_sd(checkpoint.state_dict("clip_image"))
    return vision


def _return_input(encoder: torch.nn.Module) -> None:
    """Make an encoder of one layer return its input as the penultimate state, which the host otherwise lacks and fails on."""
    inputs: list[torch.Tensor] = []

    def remember(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        inputs[:] = [args[0].clone()]  # a copy: the layers add to their input in place

    def replace(module: torch.nn.Module, args: tuple[Any, ...], out: tuple[Any, ...]) -> tuple[Any, ...]:
        return out[0], inputs.pop(), *out[2:]

    encoder.register_forward_pre_hook(remember)
    encoder.register_forward_hook(replace)
