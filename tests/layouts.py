"""Small checkpoints in the original and diffusers layouts, written without the code under test."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from unidiffuser.checkpoints.config import V1, CaptionConfig, ModelConfig, VAEConfig
from unidiffuser.encoders.autoencoder import autoencoder_kl
from unidiffuser.encoders.clip import clip_image_model, clip_text_model
from unidiffuser.uvit import UViT, UViTConfig

# Width 64, so that one head is inferred, and 77 text tokens, since shapes do not determine either.
CONFIG = ModelConfig(
    uvit=UViTConfig(img_size=8, patch_size=2, embed_dim=64, depth=4, num_heads=1, text_dim=8, clip_img_dim=16),
    vae=VAEConfig(V1.vae.ddconfig | {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1}),
    clip_text=V1.clip_text
    | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1, "vocab_size": 49408},
    clip_image=V1.clip_image
    | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1}
    | {"image_size": 32, "patch_size": 8, "projection_dim": 16},
    caption=CaptionConfig(
        V1.caption.gpt2 | {"n_embd": 64, "n_layer": 2, "n_head": 1, "n_positions": 160}, prefix_dim=64, hidden_dim=8
    ),
    image_size=16,
)
V0 = replace(CONFIG, uvit=replace(CONFIG.uvit, data_types=0))


def randomise(module: nn.Module, seed: int = 0, scale: float = 0.05) -> nn.Module:
    """Randomise every parameter, so that a lost or swapped one is noticed; norms stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = base + scale * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def ldm_names(levels: int, blocks: int) -> list[str]:
    """Tensor names of latent diffusion's autoencoder with `levels` resolutions of `blocks` residual blocks."""
    residual = ["norm1", "conv1", "norm2", "conv2"]
    modules = [f"{half}.{leaf}" for half in ("encoder", "decoder") for leaf in ("conv_in", "norm_out", "conv_out")]
    modules += ["quant_conv", "post_quant_conv"]
    for half in ("encoder", "decoder"):
        modules += [f"{half}.mid.block_{i}.{leaf}" for i in (1, 2) for leaf in residual]
        modules += [f"{half}.mid.attn_1.{leaf}" for leaf in ("norm", "q", "k", "v", "proj_out")]
    for i in range(levels):
        modules += [f"encoder.down.{i}.block.{j}.{leaf}" for j in range(blocks) for leaf in residual]
        modules += [f"decoder.up.{i}.block.{j}.{leaf}" for j in range(blocks + 1) for leaf in residual]
    modules += [f"encoder.down.{i}.downsample.conv" for i in range(levels - 1)]
    modules += [f"decoder.up.{i}.upsample.conv" for i in range(1, levels)]
    return [f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")]


def ldm_autoencoder(seed: int = 0) -> dict[str, Tensor]:
    """Random weights of CONFIG.vae under latent diffusion's names."""
    width = {"encoder.down.0": (32, 32), "encoder.down.1": (32, 64), "decoder.up.1": (64, 64), "decoder.up.0": (64, 32)}
    ends = {
        "encoder.conv_in": (3, 32), "encoder.conv_out": (64, 8), "encoder.norm_out": (64, 64),
        "decoder.conv_in": (4, 64), "decoder.conv_out": (32, 3), "decoder.norm_out": (32, 32),
        "quant_conv": (8, 8), "post_quant_conv": (4, 4),
    }  # fmt: skip
    names = ldm_names(2, 1)
    names += [
        f"{place}.nin_shortcut.{leaf}"
        for place in ("encoder.down.1.block.0", "decoder.up.0.block.0")
        for leaf in ("weight", "bias")
    ]
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name in names:
        module, leaf = name.rsplit(".", 1)
        level = ".".join(module.split(".")[:3])
        into, out = ends.get(module) or width.get(level) or (64, 64)
        second = ".block.1." in name or (".block." in name and module.endswith(("norm2", "conv2")))
        if second or "sample" in name:  # all but the first layer of a level
            into = out
        norm = "norm" in module
        side = 1 if "quant" in module or "attn" in module or "nin" in module else 3
        shape = (out if leaf == "bias" and not norm else into,) if norm or leaf == "bias" else (out, into, side, side)
        state[name] = (1.0 if norm and leaf == "weight" else 0.0) + 0.1 * torch.randn(shape, generator=generator)
    return state


def caption_file(config: CaptionConfig, seed: int = 0) -> dict[str, Tensor]:
    """The caption decoder as saved with DataParallel and transformers 4.23, with masks and tied output matrix."""
    from unidiffuser.encoders.captions import CaptionDecoder

    decoder = randomise(CaptionDecoder(config), seed)
    state = dict(decoder.state_dict())
    n = config.gpt2["n_positions"]
    for i in range(config.gpt2["n_layer"]):
        state[f"gpt.transformer.h.{i}.attn.bias"] = torch.ones(n, n, dtype=torch.uint8).tril()[None, None]
        state[f"gpt.transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return {f"module.{name}": tensor for name, tensor in state.items()}


def write_original(folder: Path, config: ModelConfig = CONFIG, clip: bool = True) -> dict[str, dict[str, Tensor]]:
    """Write the published set of files, and CLIP in two transformers folders; return the files' contents."""
    folder.mkdir(parents=True, exist_ok=True)
    version = "v1" if config.uvit.data_types else "v0"
    contents = {
        f"uvit_{version}.pth": dict(randomise(UViT(config.uvit)).state_dict()),
        "autoencoder_kl.pth": ldm_autoencoder(),
        "caption_decoder.pth": caption_file(config.caption),
    }
    for name, state in contents.items():
        torch.save(state, folder / name)
    if clip:
        text, image = randomise(clip_text_model(config.clip_text)), randomise(clip_image_model(config.clip_image))
        for name, model in (("clip-vit-large-patch14", text), ("clip-vit-base-patch32", image)):
            model.save_pretrained(folder / name)
    return contents


def openai_clip(text: nn.Module, image: nn.Module) -> dict[str, Tensor]:
    """The two towers of transformers as one OpenAI state dict."""
    renames = (("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
               ("self_attn.out_proj", "attn.out_proj"), ("encoder.layers", "transformer.resblocks"))  # fmt: skip
    whole = {
        "embeddings.token_embedding.weight": "token_embedding.weight", "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias", "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight", "pre_layrnorm.weight": "ln_pre.weight",
        "pre_layrnorm.bias": "ln_pre.bias", "post_layernorm.weight": "ln_post.weight",
        "post_layernorm.bias": "ln_post.bias", "embeddings.position_embedding.weight": "positional_embedding",
    }  # fmt: skip
    result: dict[str, Tensor] = {"logit_scale": torch.tensor(4.6), "text_projection": torch.zeros(64, 16)}
    for prefix, state in (("", text.state_dict()), ("visual.", image.state_dict())):
        state = {name.removeprefix("text_model.").removeprefix("vision_model."): t for name, t in state.items()}
        for name, tensor in state.items():
            if name == "visual_projection.weight":
                result["visual.proj"] = tensor.T.contiguous()
            elif name in whole:
                result[prefix + whole[name]] = tensor
            elif ".q_proj." in name:
                layer, _, leaf = name.partition(".self_attn.q_proj.")
                qkv = torch.cat([state[f"{layer}.self_attn.{x}_proj.{leaf}"] for x in "qkv"])
                result[f"{prefix}{layer.replace(*renames[-1])}.attn.in_proj_{leaf}"] = qkv
            elif "k_proj" not in name and "v_proj" not in name:
                for ours, theirs in renames:
                    name = name.replace(ours, theirs)
                result[prefix + name] = tensor
    return result


def write_openai_clip(path: Path, config: ModelConfig = CONFIG) -> tuple[nn.Module, nn.Module]:
    """Write both towers to one safetensors file under OpenAI's names; return transformers' modules."""
    text, image = randomise(clip_text_model(config.clip_text)), randomise(clip_image_model(config.clip_image))
    save_file(openai_clip(text, image), path)
    return text, image


def diffusers_network(config: UViTConfig) -> Any:
    """diffusers' UniDiffuserModel of a config, randomised."""
    from diffusers import UniDiffuserModel

    network = UniDiffuserModel(
        text_dim=config.text_dim,
        clip_img_dim=config.clip_img_dim,
        num_text_tokens=config.num_text_tokens,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.embed_dim // config.num_heads,
        in_channels=config.in_chans,
        out_channels=config.in_chans,
        num_layers=config.depth,
        sample_size=config.img_size,
        patch_size=config.patch_size,
        activation_fn="gelu",
        block_type="unidiffuser",
        ff_final_dropout=True,
        use_data_type_embedding=bool(config.data_types),
    )
    return randomise(network, scale=0.02)


def clip_tokenizer() -> Any:
    """CLIP's tokenizer of transformers 4 or 5."""
    from transformers import CLIPTokenizerFast

    from unidiffuser.checkpoints.tokenizers import clip_spec

    return _tokenizer(CLIPTokenizerFast, clip_spec())


def gpt2_tokenizer() -> Any:
    """GPT-2's tokenizer of transformers 4 or 5, without the stop token that the authors add."""
    from transformers import GPT2TokenizerFast

    from unidiffuser.checkpoints.tokenizers import STOP, gpt2_spec

    spec = gpt2_spec()
    return _tokenizer(GPT2TokenizerFast, {**spec, "vocab": {token: i for token, i in spec["vocab"].items() if token != STOP}})


def _tokenizer(kind: Any, spec: Any) -> Any:
    with TemporaryDirectory() as folder:
        vocab, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab.write_text(json.dumps(spec["vocab"]), "utf-8")
        merges.write_text("\n".join(["#version: 0.2", *spec["merges"]]) + "\n", "utf-8")
        return kind(str(vocab), str(merges))


def clip_image_processor(**settings: Any) -> Any:
    """CLIP's image processor of transformers 4 or 5."""
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    except ImportError:  # transformers 4
        from transformers import CLIPImageProcessor as CLIPImageProcessorPil

    return CLIPImageProcessorPil(**settings)


def write_diffusers(folder: Path, config: ModelConfig = CONFIG, **save: Any) -> Any:
    """Write a UniDiffuserPipeline folder; return the pipeline."""
    from diffusers import DPMSolverMultistepScheduler, UniDiffuserPipeline, UniDiffuserTextDecoder

    from unidiffuser.checkpoints.tokenizers import STOP

    caption, gpt2 = config.caption, config.caption.gpt2
    decoder = UniDiffuserTextDecoder(
        caption.prefix_length, caption.prefix_dim, caption.hidden_dim, gpt2["vocab_size"], gpt2["n_positions"],
        gpt2["n_embd"], gpt2["n_layer"], gpt2["n_head"], activation_function="gelu",
    )  # fmt: skip
    randomise(decoder)
    if save.get("safe_serialization", True):  # diffusers cannot write tied weights as safetensors
        decoder.transformer.lm_head.weight = nn.Parameter(decoder.transformer.transformer.wte.weight.data.clone())
    text_tokenizer = gpt2_tokenizer()
    text_tokenizer.add_special_tokens({"eos_token": STOP})
    side = config.clip_image["image_size"]
    pipeline = UniDiffuserPipeline(
        vae=randomise(autoencoder_kl(config.vae)),
        text_encoder=randomise(clip_text_model(config.clip_text)),
        image_encoder=randomise(clip_image_model(config.clip_image)),
        clip_image_processor=clip_image_processor(
            crop_size={"height": side, "width": side}, size={"shortest_edge": side}, image_mean=[0.4, 0.5, 0.6]
        ),
        clip_tokenizer=clip_tokenizer(),
        text_decoder=decoder,
        text_tokenizer=text_tokenizer,
        unet=diffusers_network(config.uvit),
        scheduler=DPMSolverMultistepScheduler(),
    )
    pipeline.save_pretrained(folder, **save)
    return pipeline


def metadata(path: Path) -> dict[str, Any]:
    """The __metadata__ of a safetensors file, read without safetensors."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length])["__metadata__"]
