"""diffusers' UniDiffuserPipeline (deprecated there) with the weights of a model of this library.

It is called as its users call it: with PIL pictures and prompts, one task after another. Only CLIP and the autoencoder, which
neither project implements, are shared, in the pipeline's own precision. Both sides run the same network, of the published kind:
`plain_checkpoint` makes one of a model that has more.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

import unidiffuser
from unidiffuser.checkpoints.checkpoint import Checkpoint
from unidiffuser.checkpoints.keys import apply, uvit_to_diffusers
from unidiffuser.checkpoints.parts import InMemoryTensors, make_part
from unidiffuser.encoders.autoencoder import Autoencoder
from unidiffuser.pipeline import UniDiffuser
from unidiffuser.uvit import UViTConfig


def plain_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint of the same sizes that diffusers can run too: without detail head, palette and upsampler.

    Its image head is the published one with random weights, so it draws noise, at the usual speed; captions are right.
    """
    config, uvit = checkpoint.config, checkpoint.config.uvit
    plain = UViTConfig(**{field.name: getattr(uvit, field.name) for field in fields(UViTConfig)})
    vae = replace(config.vae, palette=None, upsampler=None)
    vae.ddconfig["out_ch"] = pixels = 3 * vae.patch_size**2
    parts = {part: checkpoint.state_dict(part) for part in checkpoint.parts()}
    random = torch.randn(plain.patch_values, plain.embed_dim, generator=torch.Generator().manual_seed(0), device="cpu")
    head = {"decoder_pred.weight": 0.02 * random, "decoder_pred.bias": torch.zeros(plain.patch_values)}
    parts["uvit"] = {name: value for name, value in parts["uvit"].items() if not name.startswith("detail.")} | head
    parts["vae"] = {
        name: value[:pixels] if name.startswith("decoder.conv_out.") else value
        for name, value in parts["vae"].items()
        if not name.startswith(("palette.", "upsampler."))
    }
    made = {part: make_part(part, InMemoryTensors(tensors)) for part, tensors in parts.items()}
    side = uvit.latent_size[0] * vae.downscale
    sizes = replace(config, uvit=plain, vae=vae, image_size=side)
    return Checkpoint(Path("plain"), sizes, made, checkpoint.tokenizer_specs())


def network(model: UniDiffuser, dtype: torch.dtype = torch.float32) -> Any:
    """UniDiffuserModel with the weights of a model whose network is of the published kind."""
    from diffusers import UniDiffuserModel

    config = model.config.uvit
    with torch.device("meta"):
        found = UniDiffuserModel(
            text_dim=config.text_dim, clip_img_dim=config.clip_img_dim, num_text_tokens=config.num_text_tokens,
            num_attention_heads=config.num_heads, attention_head_dim=config.embed_dim // config.num_heads,
            in_channels=config.in_chans, out_channels=config.in_chans, num_layers=config.depth, sample_size=config.img_size,
            patch_size=config.patch_size, activation_fn="gelu", block_type="unidiffuser", ff_final_dropout=True,
            use_data_type_embedding=bool(config.data_types),
        )  # fmt: skip
    weights = model.checkpoint.state_dict("uvit", dtype=dtype)
    found.load_state_dict(apply(uvit_to_diffusers(weights), weights), assign=True)
    return found.to(model.device).eval()


def text_decoder(model: UniDiffuser, dtype: torch.dtype = torch.float32) -> Any:
    """UniDiffuserTextDecoder with the weights of a model."""
    from diffusers import UniDiffuserTextDecoder

    caption = model.config.caption
    gpt2 = {name: caption.gpt2[name] for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    found = UniDiffuserTextDecoder(
        caption.prefix_length, caption.prefix_dim, caption.hidden_dim, **gpt2, activation_function="gelu_new"
    )
    weights = model.checkpoint.state_dict("caption", dtype=dtype)
    found.load_state_dict({name.replace("gpt.", "transformer.", 1): value for name, value in weights.items()}, strict=False)
    return found.to(model.device, dtype).eval()


class SharedAutoencoder(nn.Module):
    """The autoencoder of a model behind AutoencoderKL's interface, patches included."""

    def __init__(self, autoencoder: Autoencoder):
        super().__init__()
        self.vae, self.patch = autoencoder.vae, autoencoder.config.patch_size
        levels = autoencoder.config.downscale.bit_length()
        self.config = SimpleNamespace(
            block_out_channels=(1,) * levels, latent_channels=autoencoder.config.embed_dim,
            scaling_factor=autoencoder.config.scale_factor,
        )  # fmt: skip
        self.dtype, self.device = self.vae.dtype, self.vae.device

    def encode(self, x: Tensor) -> Any:
        return self.vae.encode(nn.functional.pixel_unshuffle(x, self.patch))

    def decode(self, z: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (nn.functional.pixel_shuffle(self.vae.decode(z).sample, self.patch),)


class Words:
    """The tokenizers of a model behind the two interfaces that the pipeline calls."""

    def __init__(self, decoding: Any, stop: int):
        self.decoding, self.eos_token_id = decoding, stop

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return self.decoding.decode([int(i) for i in ids if i != self.eos_token_id], skip_special_tokens=skip_special_tokens)


class Pixels:
    """CLIP's preprocessing behind the interface that the pipeline calls."""

    def __init__(self, encoder: Any):
        self.encoder = encoder

    def preprocess(self, images: Any, return_tensors: str) -> Any:
        images = images if isinstance(images, list) else [images]
        from transformers import BatchFeature

        return BatchFeature({"pixel_values": self.encoder.preprocess(images)})


class Peer:
    """The pipeline and its tasks, for `count` results of one input.

    Args:
        model: source of the weights.
        dtype: its precision; float32 is its own default.
    """

    def __init__(self, model: UniDiffuser, dtype: torch.dtype = torch.float32):
        from diffusers import DPMSolverMultistepScheduler, UniDiffuserPipeline

        plain = unidiffuser.UniDiffuser(model.checkpoint, model.device, dtype)
        self.model, self.side = plain, plain.config.image_size
        scheduler = DPMSolverMultistepScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", solver_order=2, algorithm_type="dpmsolver++"
        )
        self.pipeline = UniDiffuserPipeline(
            vae=SharedAutoencoder(plain.autoencoder), text_encoder=plain.text_encoder.clip,
            image_encoder=plain.image_token_encoder.clip, clip_image_processor=Pixels(plain.image_token_encoder),
            clip_tokenizer=None, text_decoder=text_decoder(plain, dtype),
            text_tokenizer=Words(plain.checkpoint.gpt2_tokenizer(), plain.config.caption.stop_token_id),
            unet=network(plain, dtype), scheduler=scheduler,
        )  # fmt: skip
        self.pipeline.set_progress_bar_config(disable=True)
        # It cannot stack captions of different lengths; it decodes one by one anyway.
        decode = self.pipeline.decode_text_latents
        self.pipeline.decode_text_latents = lambda latents, device: [t for x in latents.split(1) for t in decode(x, device)]

    def _options(self, steps: int, guidance: float) -> dict[str, Any]:
        return {"num_inference_steps": steps, "guidance_scale": guidance, "data_type": 1}

    def text_to_image(self, prompts: list[str], steps: int, guidance: float, size: tuple[int, int] | None = None) -> list[Any]:
        width, height = size or (self.side, self.side)
        hidden = self.model.text_encoder.hidden(prompts)
        nothing = self.model.text_encoder.hidden([""]).expand_as(hidden)
        return self.pipeline(
            prompt_embeds=hidden, negative_prompt_embeds=nothing, width=width, height=height, **self._options(steps, guidance)
        ).images

    def image_to_text(self, images: list[Image.Image], steps: int, guidance: float) -> list[str]:
        """One call for each picture, since the pipeline takes a single one."""
        return [text for image in images for text in self.pipeline(image=image, **self._options(steps, guidance)).text]

    def joint(self, count: int, steps: int, guidance: float) -> list[tuple[Any, str]]:
        self.pipeline.set_joint_mode()
        out = self.pipeline(
            num_images_per_prompt=count, num_prompts_per_image=count, width=self.side, height=self.side,
            **self._options(steps, guidance),
        )  # fmt: skip
        self.pipeline.reset_mode()
        return list(zip(out.images, out.text, strict=True))

    def vary_image(self, image: Image.Image, count: int, steps: int, guidance: float) -> list[Any]:
        """As in its documentation: the picture's caption, then pictures of this caption."""
        return self.text_to_image(self.image_to_text([image] * count, steps, guidance), steps, guidance)
