"""Conversion of state-dict keys from each layout to canonical names, and back.

Canonical names are those of the published uvit_v0/v1.pth for the U-ViT, of latent diffusion for the autoencoder, and of
transformers for the two CLIP towers (`text_model.*`; `vision_model.*`, `visual_projection.weight`). The caption decoder has
`encode_prefix.*`, `decode_prefix.*` and `gpt.*`, with GPT-2 under transformers' names.

A conversion is a dict of recipes, one for each target name: which stored tensors it needs, and what is done to them. It is
built from names alone, so no weights are read, and tensors that are only renamed stay memory-mapped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

PARTS = ("uvit", "vae", "clip_text", "clip_image", "caption")


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Recipe:
    """Source of one tensor: `make` applied to the stored tensors `keys`."""

    keys: tuple[str, ...]
    make: Callable[..., Tensor] = _same


Recipes = dict[str, Recipe]


def apply(recipes: Recipes, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert tensors: every target name whose source tensors are present."""
    return {
        name: recipe.make(*(tensors[key] for key in recipe.keys))
        for name, recipe in recipes.items()
        if all(key in tensors for key in recipe.keys)
    }


def _rename(names: Iterable[str], rename: Callable[[str], str] = str) -> Recipes:
    return {rename(name): Recipe((name,)) for name in names}


def numbered(names: Iterable[str], prefix: str) -> int:
    """Length of a numbered list of modules: of `prefix`0.*, `prefix`1.*, ...

    Raises:
        ValueError: a number below the largest one is missing.
    """
    matches = (re.match(re.escape(prefix) + r"(\d+)\.", name) for name in names)
    found = {int(match[1]) for match in matches if match}
    if found and max(found) >= len(found):
        raise ValueError(f"it has {prefix}{max(found)}, but only {len(found)} such modules; download it again.")
    return len(found)


# ---- U-ViT ----------------------------------------------------------------------------------------------------------

_UVIT_LEAVES = {
    "patch_embed.proj": "vae_img_in.proj",
    "text_embed": "text_in",
    "clip_img_embed": "clip_img_in",
    "decoder_pred": "vae_img_out",
    "norm": "transformer.norm_out",
    "token_embedding": "data_type_token_embedding",
}
_UVIT_TABLES = {"pos_embed": "pos_embed", "pos_embed_token": "data_type_pos_embed_token"}
_BLOCK_LEAVES = {
    "norm2": "norm1",
    "norm3": "norm3",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_SKIP_LEAVES = {"skip_linear": "skip.skip_linear", "norm1": "skip.norm"}


def uvit_diffusers_names(name: str) -> tuple[str, ...]:
    """The diffusers name of an original U-ViT tensor: one name, or three for a qkv."""
    if name in _UVIT_TABLES:
        return (_UVIT_TABLES[name],)
    module, leaf = name.rsplit(".", 1)
    block = re.fullmatch(r"(in_blocks\.\d+|mid_block|out_blocks\.\d+)\.(.+)", module)
    if block is None:
        return (f"{_UVIT_LEAVES.get(module, module)}.{leaf}",)
    place, inner = f"transformer.transformer_{block[1]}", block[2]
    if inner in _SKIP_LEAVES:
        return (f"{place}.{_SKIP_LEAVES[inner]}.{leaf}",)
    if place.startswith("transformer.transformer_out"):
        place += ".block"
    if inner == "attn.qkv":
        return tuple(f"{place}.attn1.to_{x}.{leaf}" for x in "qkv")
    return (f"{place}.{_BLOCK_LEAVES[inner]}.{leaf}",)


def uvit_names(blocks: int, data_types: bool, qkv_bias: bool = False) -> list[str]:
    """Original names of a U-ViT with `blocks` blocks on each side of the middle."""
    modules = ["patch_embed.proj", "text_embed", "text_out", "clip_img_embed", "clip_img_out", "norm", "decoder_pred"]
    places = ["mid_block"] + [f"{side}_blocks.{i}" for side in ("in", "out") for i in range(blocks)]
    modules += [f"{place}.{leaf}" for place in places for leaf in (*_BLOCK_LEAVES, "attn.qkv")]
    modules += [f"out_blocks.{i}.{leaf}" for i in range(blocks) for leaf in _SKIP_LEAVES]
    names = ["pos_embed", *(f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias"))]
    if data_types:
        names += ["pos_embed_token", "token_embedding.weight"]
    return [name for name in names if qkv_bias or not name.endswith("qkv.bias")]


def uvit_recipes(keys: Iterable[str]) -> Recipes:
    """Original U-ViT names from the original layout or diffusers' (split qkv)."""
    keys = set(keys)
    if "vae_img_in.proj.weight" not in keys:
        return _rename(keys, lambda name: name.removeprefix("module."))
    blocks = numbered(keys, "transformer.transformer_in_blocks.")
    bias = "transformer.transformer_mid_block.attn1.to_q.bias" in keys
    names = uvit_names(blocks, "data_type_token_embedding.weight" in keys, bias)
    recipes = {name: Recipe(uvit_diffusers_names(name)) for name in names}
    recipes = {name: Recipe(r.keys, _concatenate) if len(r.keys) > 1 else r for name, r in recipes.items()}
    # NOTE: transformer.pos_embed.proj is a second patch embedding that diffusers saves and never uses.
    used = {key for recipe in recipes.values() for key in recipe.keys}
    unknown = {key for key in keys - used if not key.startswith("transformer.pos_embed.")}
    present = {name: recipe for name, recipe in recipes.items() if keys.issuperset(recipe.keys)}
    return present | _rename(unknown)


def uvit_to_diffusers(names: Iterable[str]) -> Recipes:
    """Names of diffusers' UniDiffuserModel from the original ones.

    Its second, unused patch embedding copies the used one.
    """
    recipes: Recipes = {}
    for name in names:
        targets = uvit_diffusers_names(name)
        for i, target in enumerate(targets):
            recipes[target] = Recipe((name,), _same if len(targets) == 1 else _third(i))
    for leaf in ("weight", "bias"):
        recipes[f"transformer.pos_embed.proj.{leaf}"] = Recipe((f"patch_embed.proj.{leaf}",))
    return recipes


def _concatenate(*tensors: Tensor) -> Tensor:
    if tensors[0].is_meta:  # torch.cat of meta tensors imports torch's compiler, which takes a second
        rows = sum(tensor.shape[0] for tensor in tensors)
        return torch.empty(rows, *tensors[0].shape[1:], dtype=tensors[0].dtype, device="meta")
    return torch.cat(tensors)


def _third(i: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.chunk(3)[i]


# ---- Autoencoder ----------------------------------------------------------------------------------------------------

_VAE_PAIRS = (  # (latent diffusion, diffusers)
    (".mid.block_1.", ".mid_block.resnets.0."),
    (".mid.block_2.", ".mid_block.resnets.1."),
    (".mid.attn_1.norm.", ".mid_block.attentions.0.group_norm."),
    (".mid.attn_1.q.", ".mid_block.attentions.0.to_q."),
    (".mid.attn_1.k.", ".mid_block.attentions.0.to_k."),
    (".mid.attn_1.v.", ".mid_block.attentions.0.to_v."),
    (".mid.attn_1.proj_out.", ".mid_block.attentions.0.to_out.0."),
    (".norm_out.", ".conv_norm_out."),
    (".nin_shortcut.", ".conv_shortcut."),
    (".downsample.conv.", ".downsamplers.0.conv."),
    (".upsample.conv.", ".upsamplers.0.conv."),
)
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.14


def vae_recipes(keys: Iterable[str]) -> Recipes:
    """Latent diffusion's names from its own, a whole SD checkpoint's or diffusers'."""
    keys = list(keys)
    if not any(".mid_block." in key for key in keys):
        first_stage = [key for key in keys if key.startswith("first_stage_model.")]
        return _rename(first_stage or keys, lambda name: name.removeprefix("first_stage_model."))
    levels = 1 + max((int(m[1]) for m in (re.search(r"up_blocks\.(\d+)\.", key) for key in keys) if m), default=-1)
    recipes = {}
    for key in keys:
        name = re.sub(r"(attentions\.0)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{_OLD_ATTENTION[m[2]]}.", key)
        for ldm, diffusers in _VAE_PAIRS:
            name = name.replace(diffusers, ldm)
        name = name.replace(".resnets.", ".block.")
        name = re.sub(r"\.down_blocks\.(\d+)\.", r".down.\1.", name)
        name = re.sub(r"\.up_blocks\.(\d+)\.", lambda m: f".up.{levels - 1 - int(m[1])}.", name)
        recipes[name] = Recipe((key,), _as_convolution if _is_attention_matrix(name) else _same)
    return recipes


def vae_to_diffusers(names: Iterable[str]) -> Recipes:
    """Names of diffusers' AutoencoderKL from latent diffusion's."""
    names = list(names)
    levels = 1 + max((int(m[1]) for m in (re.search(r"\.up\.(\d+)\.", name) for name in names) if m), default=-1)
    recipes = {}
    for name in names:
        key = re.sub(r"\.down\.(\d+)\.", r".down_blocks.\1.", name)
        key = re.sub(r"\.up\.(\d+)\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.", key)
        key = key.replace(".block.", ".resnets.")
        for ldm, diffusers in _VAE_PAIRS:
            key = key.replace(ldm, diffusers)
        recipes[key] = Recipe((name,), _as_matrix if _is_attention_matrix(name) else _same)
    return recipes


def _is_attention_matrix(name: str) -> bool:
    return re.search(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$", name) is not None


def _as_convolution(weight: Tensor) -> Tensor:
    return weight.reshape(*weight.shape[:2], 1, 1)  # attention projections are 1 x 1 convolutions in latent diffusion


def _as_matrix(weight: Tensor) -> Tensor:
    return weight.reshape(weight.shape[:2])


# ---- CLIP -----------------------------------------------------------------------------------------------------------

_OPENAI_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_OPENAI_TEXT = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_OPENAI_IMAGE = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}


def clip_text_recipes(keys: Iterable[str]) -> Recipes:
    """transformers' text-tower names from its own (of any version) or OpenAI's."""
    keys = list(keys)
    if "ln_final.weight" in keys:
        return _openai_tower(keys, "", "text_model.", _OPENAI_TEXT)
    prefixed = any(key.startswith("text_model.") for key in keys)
    # NOTE: transformers 5 saves a CLIPTextModel without the prefix text_model.
    tower = [key for key in keys if not prefixed or key.startswith("text_model.")]
    dropped = ("embeddings.position_ids", "text_projection.weight", "logit_scale")
    return _rename((key for key in tower if not key.endswith(dropped)), lambda key: key if prefixed else f"text_model.{key}")


def clip_image_recipes(keys: Iterable[str]) -> Recipes:
    """transformers' image-tower names from its own or OpenAI's."""
    keys = list(keys)
    if "visual.conv1.weight" in keys:
        recipes = _openai_tower(keys, "visual.", "vision_model.", _OPENAI_IMAGE)
        return recipes | {"visual_projection.weight": Recipe(("visual.proj",), torch.t)}
    tower = [key for key in keys if key.startswith(("vision_model.", "visual_projection."))]
    if not tower:
        return _rename(keys)
    return _rename(key for key in tower if not key.endswith("embeddings.position_ids"))


def _openai_tower(keys: list[str], source: str, target: str, names: dict[str, str]) -> Recipes:
    recipes = {target + name: Recipe((source + key,)) for key, name in names.items()}
    for key in keys:
        block = re.fullmatch(re.escape(source) + r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", key)
        if block is None:
            continue
        layer = f"{target}encoder.layers.{block[1]}"
        if block[2] == "attn.in_proj":
            for i, x in enumerate("qkv"):
                recipes[f"{layer}.self_attn.{x}_proj.{block[3]}"] = Recipe((key,), _third(i))
        else:
            recipes[f"{layer}.{_OPENAI_BLOCK.get(block[2], block[2])}.{block[3]}"] = Recipe((key,))
    return recipes


# ---- Caption decoder ------------------------------------------------------------------------------------------------


def caption_recipes(keys: Iterable[str]) -> Recipes:
    """Caption-decoder names from the original file or diffusers' text_decoder.

    The prefix "module." is removed and GPT-2 is put under "gpt.". The frozen CLIP in some original files is left out, and so
    are the causal masks that old versions of transformers stored.
    """
    kept = (
        key
        for key in keys
        if not key.removeprefix("module.").startswith("clip") and not key.endswith((".attn.bias", ".attn.masked_bias"))
    )
    return _rename(kept, lambda key: re.sub(r"^transformer\.", "gpt.", key.removeprefix("module.")))


RECIPES: dict[str, Callable[[Iterable[str]], Recipes]] = {
    "uvit": uvit_recipes,
    "vae": vae_recipes,
    "clip_text": clip_text_recipes,
    "clip_image": clip_image_recipes,
    "caption": caption_recipes,
}
