"""Nodes with outputs that do not fit UniDiffuser, as a user may connect them, and nodes that write tensors to files.

The tests copy this file into the server's custom_nodes.
"""

from __future__ import annotations

from typing import Any

import comfy.clip_vision
import comfy.controlnet
import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import torch
from comfy.ldm.modules.attention import optimized_attention


class ForeignConditioning:
    """CONDITIONING of SDXL's width."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "run", "tests"

    def run(self) -> tuple[Any]:
        return ([[torch.randn(1, 77, 2048), {}]],)


class ForeignLatent:
    """LATENT of 16 channels, not empty: the host itself adapts an empty one."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "run", "tests"

    def run(self) -> tuple[Any]:
        return ({"samples": torch.randn(1, 16, 16, 16)},)


class ForeignToken:
    """CLIP_VISION_OUTPUT of SDXL's encoder."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("CLIP_VISION_OUTPUT",), "run", "tests"

    def run(self) -> tuple[Any]:
        output = comfy.clip_vision.Output()
        output["image_embeds"] = torch.randn(1, 1280)
        return (output,)


class ForeignModel:
    """A MODEL of another architecture, in the host's own patcher."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "tests"

    def run(self) -> tuple[Any]:
        device = comfy.model_management.get_torch_device()
        return (comfy.model_patcher.ModelPatcher(torch.nn.Linear(1, 1), device, device),)


KINDS = ["MemoryError", "OutOfMemoryError", "a petabyte"]


class OutOfMemory:
    """A MODEL that runs out of memory when it is called."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "kind": (KINDS,)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "tests"

    def run(self, model: Any, kind: str) -> tuple[Any]:
        def fail(apply: Any, arguments: Any) -> None:
            if kind == "a petabyte":
                torch.empty(2**50, dtype=torch.uint8)
            raise (MemoryError if kind == "MemoryError" else torch.OutOfMemoryError)("raised by a test")

        patched = model.clone()
        patched.set_model_unet_function_wrapper(fail)
        return (patched,)


class DumpToken:
    """Writes the embedding of a CLIP_VISION_OUTPUT to a file."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"output": ("CLIP_VISION_OUTPUT",), "file": ("STRING",)}})
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "run", "tests", True

    def run(self, output: Any, file: str) -> tuple[()]:
        torch.save(output["image_embeds"], file)
        return ()


class BlindAttention:
    """Sets an attention on a MODEL that returns zeros, with the host's own option."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "tests"

    def run(self, model: Any) -> tuple[Any]:
        def override(
            attention: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any
        ) -> torch.Tensor:
            return torch.zeros_like(attention(q, k, v, *args, **kwargs))

        model = model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = override
        return (model,)


class DropWrappers:
    """A MODEL without the wrappers that its loader put on it, as some samplers leave it."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "tests"

    def run(self, model: Any) -> tuple[Any]:
        model = model.clone()
        model.wrappers = {}
        return (model,)


class SamePatches:
    """Patches in all the host's places that return what they are given, and check its shape."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "tests"

    def run(self, model: Any) -> tuple[Any]:
        model = model.clone()

        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
            return optimized_attention(q, k, v, extra["n_heads"])

        def self_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
            rows, columns = extra["original_shape"][-2:]
            assert q.shape == k.shape == v.shape == (q.shape[0], rows * columns, extra["n_heads"] * extra["dim_head"])
            assert len(q) % len(extra["cond_or_uncond"]) == 0
            assert extra["sigmas"].numel() > 0
            return attention(q, k, v, extra)

        def inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> tuple[torch.Tensor, ...]:
            return q.clone(), k.clone(), v.clone()

        for block in (("input", 0), ("middle", 0), ("output", 1)):
            model.set_model_attn1_replace(self_attention, *block)
            model.set_model_attn2_replace(attention, *block, 0)
        model.set_model_attn1_patch(inputs)
        model.set_model_attn2_patch(inputs)
        model.set_model_attn1_output_patch(lambda n, extra: n.clone())
        model.set_model_attn2_output_patch(lambda n, extra: n.clone())
        model.set_model_input_block_patch(lambda h, options: h.clone())
        model.set_model_input_block_patch_after_skip(lambda h, options: h.clone())
        model.set_model_output_block_patch(lambda h, skip, options: (h.clone(), skip.clone()))
        for layer in range(5):
            model.set_model_patch_replace(lambda args, extra: extra["original_block"](args), "dit", "double_block", layer)
        return (model,)


class StateInOptions:
    """A post-cfg function that averages with the step before, which it keeps in the model options."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "tests"

    def run(self, model: Any) -> tuple[Any]:
        def average(arguments: dict[str, Any]) -> torch.Tensor:
            options, now = arguments["model_options"], arguments["denoised"]
            before = options.get("test_average", now)
            options["test_average"] = now
            return (now + before) / 2

        model = model.clone()
        model.set_model_sampler_post_cfg_function(average)
        return (model,)


class MomentumGuidance:
    """A post-cfg function of the name of sd-perturbed-attention's."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "momentum": ("FLOAT",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "tests"

    def run(self, model: Any, momentum: float) -> tuple[Any]:
        model = model.clone()
        model.set_model_sampler_post_cfg_function(lambda arguments: arguments["denoised"] * (1 + 0 * momentum))
        return (model,)


class AutomaticGuidance:
    """A cfg function that looks like Automatic CFG's, which scales what a cfg of 8 gives."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "automatic_cfg": ("STRING",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "tests"

    def run(self, model: Any, automatic_cfg: str) -> tuple[Any]:
        def automatic_cfg_function(arguments: dict[str, Any]) -> torch.Tensor:
            scale = 1 if automatic_cfg == "None" else arguments["cond_scale"] / 8
            return arguments["cond"] * scale

        automatic_cfg_function.__module__ = "custom_nodes.ComfyUI-AutomaticCFG.nodes"
        model = model.clone()
        model.set_model_sampler_cfg_function(automatic_cfg_function)
        return (model,)


class attention_modifier:
    """An attention patch of the name of Automatic CFG's."""

    def modified_attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        return optimized_attention(q, k, v, extra["n_heads"])


class AttentionModifier:
    """Puts an `attention_modifier` on a block of a MODEL."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "block": ("INT",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "tests"

    def run(self, model: Any, block: int) -> tuple[Any]:
        model = model.clone()
        model.set_model_attn1_replace(attention_modifier().modified_attention, "input", block)
        return (model,)


class OwnOptions:
    """A post-cfg function that calls the model with options of its own, which patch a block."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "block": ("INT",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "tests"

    def run(self, model: Any, block: int) -> tuple[Any]:
        patches = {"attn1": {("input", block): attention_modifier().modified_attention}}
        options = {"transformer_options": {"patches_replace": patches}}

        def again(arguments: dict[str, Any]) -> torch.Tensor:
            conditions, x, sigma = [arguments["cond"]], arguments["input"], arguments["sigma"]
            comfy.samplers.calc_cond_batch(arguments["model"], conditions, x, sigma, options)
            return arguments["denoised"]

        model = model.clone()
        model.set_model_sampler_post_cfg_function(again)
        return (model,)


class Control:
    """A CONDITIONING with a ControlNet without weights."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"conditioning": ("CONDITIONING",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "run", "tests"

    def run(self, conditioning: Any) -> tuple[Any]:
        return ([[text, {**extra, "control": comfy.controlnet.ControlBase()}] for text, extra in conditioning],)


class DumpText:
    """Writes the tensor of a CONDITIONING to a file."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"text": ("CONDITIONING",), "file": ("STRING",)}})
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "run", "tests", True

    def run(self, text: Any, file: str) -> tuple[()]:
        torch.save(text[0][0], file)
        return ()


class SpotDiffusion:
    """A model function wrapper of the name of Tiled Diffusion's."""

    def __call__(self, apply: Any, arguments: dict[str, Any]) -> torch.Tensor:
        return apply(arguments["input"], arguments["timestep"], **arguments["c"])


class ShiftedTiles:
    """Puts a `SpotDiffusion` on a MODEL."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "tests"

    def run(self, model: Any) -> tuple[Any]:
        patched = model.clone()
        patched.set_model_unet_function_wrapper(SpotDiffusion())
        return (patched,)


class MixtureOfDiffusers(SpotDiffusion):
    """A model function wrapper of the name of Tiled Diffusion's, with its sides of tiles in latent cells."""

    tile_height, tile_width = 16, 8


class SmallTiles(ShiftedTiles):
    """Puts a `MixtureOfDiffusers` on a MODEL."""

    def run(self, model: Any) -> tuple[Any]:
        patched = model.clone()
        patched.set_model_unet_function_wrapper(MixtureOfDiffusers())
        return (patched,)


class VAEHook:
    """Calls the layers of an encoder, as that of Tiled Diffusion does."""

    def __init__(self, net: Any):
        self.net = net

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.net.conv_in(x)


class TiledEncode:
    """Encodes with a `VAEHook` in place of the encoder."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"pixels": ("IMAGE",), "vae": ("VAE",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "run", "tests"

    def run(self, pixels: torch.Tensor, vae: Any) -> tuple[Any]:
        encoder = vae.first_stage_model.encoder
        before, encoder.forward = encoder.forward, VAEHook(encoder)
        try:
            return ({"samples": vae.encode(pixels)},)
        finally:
            encoder.forward = before


class TwoRounds:
    """Samples the whole schedule twice, the second time from the first result, as AnimateDiff-Evolved's iterations do."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "tests"

    def run(self, model: Any) -> tuple[Any]:
        def rounds(executor: Any, noise: torch.Tensor, latent: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return executor(noise, executor(noise, latent, *args, **kwargs), *args, **kwargs)

        model = model.clone()
        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, "rounds", rounds)
        return (model,)


class EarlyStop:
    """A sampler that does the first half of its schedule only."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("SAMPLER",), "run", "tests"

    def run(self) -> tuple[Any]:
        euler = comfy.k_diffusion.sampling.sample_euler

        def half(model: Any, x: torch.Tensor, sigmas: torch.Tensor, **options: Any) -> torch.Tensor:
            return euler(model, x, sigmas[: len(sigmas) // 2], **options)

        return (comfy.samplers.KSAMPLER(half),)


class LatentMask:
    """The noise mask of a LATENT."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"samples": ("LATENT",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MASK",), "run", "tests"

    def run(self, samples: Any) -> tuple[Any]:
        return (samples["noise_mask"],)


NODE_CLASS_MAPPINGS = {
    "TestAttentionModifier": AttentionModifier,
    "TestAutomaticGuidance": AutomaticGuidance,
    "TestBlindAttention": BlindAttention,
    "TestStateInOptions": StateInOptions,
    "TestSamePatches": SamePatches,
    "TestControl": Control,
    "TestDropWrappers": DropWrappers,
    "TestDumpText": DumpText,
    "TestEarlyStop": EarlyStop,
    "TestTwoRounds": TwoRounds,
    "TestDumpToken": DumpToken,
    "TestForeignConditioning": ForeignConditioning,
    "TestForeignLatent": ForeignLatent,
    "TestForeignModel": ForeignModel,
    "TestForeignToken": ForeignToken,
    "TestLatentMask": LatentMask,
    "TestOwnOptions": OwnOptions,
    "TestShiftedTiles": ShiftedTiles,
    "TestSmallTiles": SmallTiles,
    "TestTiledEncode": TiledEncode,
    "TestMomentumGuidance": MomentumGuidance,
    "TestOutOfMemory": OutOfMemory,
}
