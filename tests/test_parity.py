"""The network and the autoencoder compared with diffusers', on random weights converted by this project."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from layouts import CONFIG, diffusers_network, ldm_autoencoder, ldm_names
from torch import Tensor

from unidiffuser.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from unidiffuser.checkpoints.config import V0, V1
from unidiffuser.checkpoints.keys import apply, uvit_recipes, uvit_to_diffusers, vae_recipes, vae_to_diffusers
from unidiffuser.checkpoints.sizes import infer_uvit, infer_vae
from unidiffuser.checkpoints.skeleton import assign_weights, skeleton
from unidiffuser.encoders.autoencoder import Autoencoder, autoencoder_kl
from unidiffuser.uvit import UViT, UViTConfig

SMALL = UViTConfig(img_size=8, embed_dim=64, depth=6, num_heads=2, text_dim=8, num_text_tokens=5, clip_img_dim=16)
WIDE = UViTConfig(img_size=16, depth=2)  # full width, every kind of block once


def converted_network(theirs: Any, config: UViTConfig) -> UViT:
    stored = theirs.state_dict()
    with skeleton():
        ours = UViT(config)
    assign_weights(ours, apply(uvit_recipes(stored), stored), "diffusers")
    return ours.eval()


def inputs(config: UViTConfig, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    side, _ = config.latent_size
    return (
        torch.randn(batch, config.in_chans, side, side, generator=generator),
        torch.randn(batch, 1, config.clip_img_dim, generator=generator),
        torch.randn(batch, config.num_text_tokens, config.text_dim, generator=generator),
    )


@pytest.mark.parametrize("data_types", [0, 2], ids=["v0", "v1"])
@pytest.mark.parametrize("config", [SMALL, WIDE], ids=["small", "full-width"])
def test_network_equals_diffusers(config: UViTConfig, data_types: int) -> None:
    config = replace(config, data_types=data_types)
    theirs = diffusers_network(config)
    ours = converted_network(theirs, config)
    img, clip_img, text = inputs(config)
    t_img, t_text = torch.tensor([1000, 1, 417]), torch.tensor([0, 1000, 418])
    data_type = torch.tensor([1, 0, 1])
    with torch.inference_mode():
        expected = theirs(img, clip_img, text, t_img, t_text, data_type)
        actual = ours(img, clip_img, text, t_img, t_text, data_type if data_types else None)
    for name, a, e in zip(("img", "clip_img", "text"), actual, expected, strict=True):
        assert a is not None
        assert e.std() > 0.05, f"{name}: an output this small makes the comparison void"
        assert (a - e).abs().max() <= 1e-5, name


@pytest.mark.parametrize("data_types", [0, 2], ids=["v0", "v1"])
def test_conversion_back_to_diffusers_is_exact(data_types: int) -> None:
    config = replace(SMALL, data_types=data_types)
    theirs = diffusers_network(config)
    stored = theirs.state_dict()
    ours = apply(uvit_recipes(stored), stored)
    back = apply(uvit_to_diffusers(ours), ours)
    assert back.keys() == stored.keys()
    for name, tensor in stored.items():
        if not name.startswith("transformer.pos_embed."):  # the unused patch embedding
            assert torch.equal(back[name], tensor), name
    theirs.load_state_dict(back)  # strict


def original_names(depth: int, data_types: int) -> set[str]:
    """Names in the published uvit_v0.pth and uvit_v1.pth, written out."""
    names = {"pos_embed"} | ({"pos_embed_token", "token_embedding.weight"} if data_types else set())
    for module in ("patch_embed.proj", "text_embed", "text_out", "clip_img_embed", "clip_img_out", "norm", "decoder_pred"):
        names |= {f"{module}.weight", f"{module}.bias"}
    blocks = [f"in_blocks.{i}" for i in range(depth // 2)] + ["mid_block"] + [f"out_blocks.{i}" for i in range(depth // 2)]
    for block in blocks:
        names.add(f"{block}.attn.qkv.weight")
        for leaf in ("norm2", "attn.proj", "norm3", "mlp.fc1", "mlp.fc2"):
            names |= {f"{block}.{leaf}.weight", f"{block}.{leaf}.bias"}
        if block.startswith("out"):
            for leaf in ("skip_linear", "norm1"):
                names |= {f"{block}.{leaf}.weight", f"{block}.{leaf}.bias"}
    return names


@pytest.mark.parametrize("config", [V0.uvit, V1.uvit], ids=["v0", "v1"])
def test_state_dict_has_the_original_names_and_size(config: UViTConfig) -> None:
    with torch.device("meta"):
        state = UViT(config).state_dict()
    assert state.keys() == original_names(30, config.data_types)
    assert sum(t.numel() for t in state.values()) // 10**6 == 952
    assert infer_uvit(state) == config


def test_published_autoencoder_has_the_ldm_names_and_size() -> None:
    with skeleton():
        stored = autoencoder_kl(V1.vae).state_dict()
    state = apply(vae_recipes(stored), stored)
    shortcuts = ("encoder.down.1.block.0", "encoder.down.2.block.0", "decoder.up.1.block.0", "decoder.up.0.block.0")
    expected = ldm_names(4, 2) + [f"{s}.nin_shortcut.{leaf}" for s in shortcuts for leaf in ("weight", "bias")]
    assert state.keys() == set(expected)
    assert sum(t.numel() for t in state.values()) == 83_653_863  # Stable Diffusion 1's
    assert infer_vae(state) == V1.vae


def test_autoencoder_equals_diffusers_own_conversion(tmp_path: Any) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    ldm = ldm_autoencoder()
    theirs = autoencoder_kl(CONFIG.vae).eval()
    converted = convert_ldm_vae_checkpoint(dict(ldm), dict(theirs.config))
    theirs.load_state_dict(converted)  # strict
    assert apply(vae_to_diffusers(ldm), ldm).keys() == converted.keys()

    save_checkpoint(tmp_path / "vae.safetensors", CONFIG, {"vae": ldm})
    ours = Autoencoder.from_checkpoint(load_checkpoint(tmp_path / "vae.safetensors"))
    pixels = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.inference_mode():
        posterior = theirs.encode(pixels).latent_dist
        noise = torch.stack([torch.randn(4, 8, 12, generator=torch.Generator().manual_seed(k)) for k in (5, 6)])
        latents = (posterior.mean + posterior.std * noise) * 0.18215
        decoded = theirs.decode(latents / 0.18215).sample
    assert torch.equal(ours.encode(pixels, [torch.Generator().manual_seed(k) for k in (5, 6)]), latents)
    assert torch.equal(ours.decode(latents), decoded)


def test_autoencoder_names_of_old_diffusers_releases() -> None:
    with skeleton():
        stored = autoencoder_kl(CONFIG.vae).state_dict()
    renames = (("to_out.0", "proj_attn"), ("to_q", "query"), ("to_k", "key"), ("to_v", "value"))
    old = {}
    for name, tensor in stored.items():
        for new, former in renames:
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
        old[name] = tensor
    assert vae_recipes(old).keys() == vae_recipes(stored).keys()
    assert old.keys() != stored.keys()
