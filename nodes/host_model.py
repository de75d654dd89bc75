"""The U-ViT as a native MODEL: a BaseModel built with the host's operations, in the host's patcher.

The host's samplers, schedulers, LoRA, merging, offloading and compilation then work on it as on any other model. They see a
plain image latent (B, 4, H, W); the CLIP image token travels beside it (see `companion_token.py`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.ops
import comfy.patcher_extension
import comfy.supported_models_base
import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor

from ..unidiffuser.checkpoints.config import VAEConfig
from ..unidiffuser.schedule import NUM_LABELS, label_of_sigma, sigma_of_label
from ..unidiffuser.streams import draw_noise, item_generators
from ..unidiffuser.uvit import UViTConfig
from .companion_token import predict_with_token, sample_with_token
from .host_network import host_network
from .node_warnings import Warnings
from .prompt_notes import NOTE, rows_of_prompt, warn_about_length, warn_about_prompts
from .saved_models import KEY, Origin
from .side_streams import POSITIVE, SIDE, Companion, SideStreams

TEXT = "unidiffuser_text"  # names of the conditions that extra_conds passes to _apply_model
TEXT_LABEL = "unidiffuser_text_label"
ROLE = "unidiffuser_role"
NO_TEXT = None  # text label of a condition without a text


class ExpandedCond(comfy.conds.CONDRegular):
    """A condition (1, ...) or (B, ...); one is expanded over the batch without a copy at each step."""

    def process_cond(self, batch_size: int, **kwargs: Any) -> ExpandedCond:
        if self.cond.shape[0] == 1:
            return self._copy_with(self.cond.expand(batch_size, *self.cond.shape[1:]))
        return super().process_cond(batch_size, **kwargs)


def text_condition(text: Tensor) -> ExpandedCond:
    """A text latent (1 or B, L, D) as (1 or B, L * D): context windows cut what is as long as a side of the image."""
    return ExpandedCond(text.flatten(1))


class RowValues(comfy.conds.CONDRegular):
    """A value for every row of a call, such as a label; a list, so that reading it needs no device sync."""

    def __init__(self, cond: list[Any]):
        super().__init__(cond)

    def process_cond(self, batch_size: int, **kwargs: Any) -> RowValues:
        return RowValues(self.cond[:1] * batch_size)

    def can_concat(self, other: RowValues) -> bool:
        return True

    def concat(self, others: list[RowValues]) -> list[Any]:
        return sum((other.cond for other in others), self.cond)

    def size(self) -> list[int]:
        return [len(self.cond)]


class LatentFormat(comfy.latent_formats.SD15):
    """The latents of a checkpoint's VAE: their scale, pixels per cell and preview colours; Stable Diffusion 1's by default."""

    def __init__(self, vae: VAEConfig | None = None):
        super().__init__()
        vae = vae or VAEConfig()
        self.scale_factor = vae.scale_factor
        self.spacial_downscale_ratio = vae.downscale  # the host resizes its empty latents by it
        if vae.preview_rgb is not None:
            self.latent_rgb_factors = vae.preview_rgb["factors"]
            self.latent_rgb_factors_bias = vae.preview_rgb["bias"]
            self.taesd_decoder_name = None


class ModelSampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
    """Stable Diffusion's sigmas. A timestep is the label minus one, unrounded: the network accepts fractions."""

    def timestep(self, sigma: Tensor) -> Tensor:
        return label_of_sigma(sigma) - 1

    def sigma(self, timestep: Tensor) -> Tensor:
        return sigma_of_label((timestep.float() + 1).clamp(0, NUM_LABELS)).to(timestep.device)


class ModelConfig(comfy.supported_models_base.BASE):
    """The host's description of the model; `config` and `clip_width` become arguments of `HostUViT`."""

    unet_extra_config: ClassVar[dict[str, Any]] = {}
    latent_format = LatentFormat
    memory_usage_factor = 2.0
    supported_inference_dtypes: ClassVar = [torch.float16, torch.bfloat16, torch.float32]
    sampling_settings: ClassVar = {
        "beta_schedule": "linear",
        "linear_start": 0.00085,
        "linear_end": 0.012,
        "timesteps": NUM_LABELS,
    }

    def inpaint_model(self) -> bool:
        return False

    def get_model(self, state_dict: dict[str, Tensor], prefix: str = "", device: Any = None) -> UniDiffuserModel:
        return UniDiffuserModel(self, device=device)


class UniDiffuserModel(comfy.model_base.BaseModel):
    """Denoises image latents, for the host's samplers and for the UniDiffuser Sampler.

    `transformer_options[SIDE]` is the `Companion` with the streams beside the image.
    """

    def __init__(self, model_config: ModelConfig, device: Any = None):
        super().__init__(model_config, comfy.model_base.ModelType.EPS, device=device, unet_model=host_network)
        self.model_sampling = ModelSampling(model_config)
        self.origin: Origin | None = None
        self.notes = Warnings()
        self.running: Companion | None = None  # of the run in progress, for calls whose options have lost it

    def state_dict_for_saving(self, unet_state_dict: dict[str, Tensor], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        saved: dict[str, Tensor] = super().state_dict_for_saving(unet_state_dict, *args, **kwargs)
        return saved if self.origin is None else {**saved, KEY: self.origin.tensor()}

    def text_latent(self, cross_attn: Tensor, device: torch.device) -> Tensor:
        """Text latent (B, L, text_dim) of a CONDITIONING tensor: CLIP text of at least L tokens, or a text latent.

        Raises:
            ValueError: the conditioning is of another text encoder.
        """
        net = self.diffusion_model
        length, width = net.config.num_text_tokens, net.config.text_dim
        if cross_attn.shape[-1] not in (net.clip_width, width) or cross_attn.shape[1] < length:
            raise ValueError(
                f"The CONDITIONING is {cross_attn.shape[1]} x {cross_attn.shape[2]}, from another text encoder; this model "
                f"needs {length} x {net.clip_width}. Encode the prompt with the CLIP output of 'Load UniDiffuser', or connect "
                f"the CONDITIONING of a 'UniDiffuser Sampler'."
            )
        text = cross_attn[:, :length].to(device=device, dtype=torch.float32)
        return text if text.shape[-1] == width else net.text_prefix(text.to(self.get_dtype_inference())).float()

    def extra_conds(self, **kwargs: Any) -> dict[str, comfy.conds.CONDRegular]:
        device, net = kwargs["device"], self.diffusion_model
        cross_attn = kwargs.get("cross_attn")
        given = cross_attn is not None and bool(torch.count_nonzero(cross_attn))
        if given:
            length = net.config.num_text_tokens
            one_prompt = length if cross_attn.shape[-1] == net.config.text_dim else rows_of_prompt(length)
            warn_about_length(cross_attn.shape[1], one_prompt, kwargs.get(NOTE))
        text = (
            self.text_latent(cross_attn, device)
            if given
            else torch.zeros(1, net.config.num_text_tokens, net.config.text_dim, device=device)
        )
        role = kwargs.get("prompt_type", POSITIVE)
        return {TEXT: text_condition(text), TEXT_LABEL: RowValues([0.0 if given else NO_TEXT]), ROLE: RowValues([role])}

    def _apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **conds: Any,
    ) -> Tensor:
        options, sigma = transformer_options or {}, t
        if SIDE not in options and self.running is not None:  # options of a patch's own making
            options = {**options, SIDE: self.running}
        self.diffusion_model.attention.options = options
        side = self.side_streams(options, x)
        self.warn_about_window(options, x)
        items, conditions = side.places(x, options)

        def rows(values: list[Any]) -> list[Any]:
            return [values[i % len(values)] for i in range(len(x))]

        net = self.diffusion_model.config
        labels, text = rows(conds[TEXT_LABEL]), conds[TEXT].to(x.device).unflatten(1, (net.num_text_tokens, net.text_dim))
        text = text.repeat(-(-len(x) // len(text)), 1, 1)[: len(x)]
        missing = torch.tensor([label is NO_TEXT for label in labels])
        if missing.any():  # the unconditional model of the paper: fresh noise at the highest text label
            noise = side.text_noise[items].to(text)
            text = torch.where(missing.to(x.device)[:, None, None], noise, text)
        t_text = torch.tensor([float(NUM_LABELS) if label is NO_TEXT else label for label in labels], device=x.device)

        # NOTE: the label is computed from sigma, so a node may replace model_sampling.
        img = padded(x / torch.hypot(sigma, torch.ones_like(sigma)).view(-1, 1, 1, 1), self.diffusion_model.config.patch_size)
        clip_img = side.clip_img.to(x.device)[items.to(x.device)]
        kind = side.kinds(items, x.device)
        keys = list(zip(rows(conds.get(ROLE) or [POSITIVE]), conditions, strict=True))

        def network(img: Tensor, t_img: Tensor, text: Tensor, transformer_options: dict[str, Any]) -> Tensor | None:
            """The image's noise; the predictions of the other streams go to `side`."""
            eps = self.predict(img, clip_img, text, t_img, t_text, data_type=kind, heads=side.heads)
            for name, value in zip(("clip_img", "text"), eps[1:], strict=True):
                if value is not None:
                    side.collect(name, value, keys, items)
            return eps[0]

        extension = comfy.patcher_extension
        wrappers = extension.get_all_wrappers(extension.WrappersMP.DIFFUSION_MODEL, options) if "img" in side.heads else []
        executor = extension.WrapperExecutor.new_class_executor(network, self.diffusion_model, wrappers)
        eps = executor.execute(img, label_of_sigma(sigma), text, options)
        return x if eps is None else self.model_sampling.calculate_denoised(sigma, eps[..., : x.shape[2], : x.shape[3]], x)

    def warn_about_window(self, options: dict[str, Any], x: Tensor) -> None:
        """Say that a context window along a side of the image cuts through its patches."""
        dim, patch = getattr(options.get("context_window"), "dim", 0), self.diffusion_model.config.patch_size
        if dim in (2, 3) and x.shape[dim] % patch:
            (options[SIDE].notes if SIDE in options else self.notes).warn(
                f"A context window is {x.shape[dim]} latent cells long, but this model draws patches of {patch} x {patch}, so "
                f"the picture gets stripes. In 'Context Windows (Manual)' turn causal_window_fix off, and set context_length "
                f"and context_overlap to multiples of {patch}."
            )

    def side_streams(self, options: dict[str, Any], x: Tensor) -> SideStreams:
        """The streams beside the image; noise where a sampler has dropped them, with a warning."""
        companion = options.get(SIDE)
        if isinstance(companion, Companion) and companion.side is not None:
            return companion.side
        notes = companion.notes if isinstance(companion, Companion) else self.notes
        notes.warn(
            "This sampler, or a patch on the MODEL, drops the wrappers of the MODEL, so the CLIP image token is noise and the "
            "picture is less exact. Use 'KSampler', 'SamplerCustomAdvanced' or 'UniDiffuser Sampler', or remove the patch."
        )
        net = self.diffusion_model.config
        generators = item_generators(0, len(x))
        noise = draw_noise((1, net.clip_img_dim), generators, x.device)
        return SideStreams(noise, lambda: draw_noise((net.num_text_tokens, net.text_dim), generators, "cpu"))

    def predict(
        self, img: Tensor, clip_img: Tensor, text: Tensor, t_img: Tensor, t_text: Tensor | float, **kwargs: Any
    ) -> list[Tensor | None]:
        """Noise predictions in float32, computed in the model's dtype; arguments as in `UViT.forward`."""
        dtype = self.get_dtype_inference()
        out = self.diffusion_model(img.to(dtype), clip_img.to(dtype), text.to(dtype), t_img, t_text, **kwargs)
        return [None if o is None else o.float() for o in out]


def padded(img: Tensor, multiple: int) -> Tensor:
    """An image latent whose sides are multiples of the patch: an area or a tile of the host may have any size."""
    below, right = -img.shape[2] % multiple, -img.shape[3] % multiple
    return F.pad(img, (0, right, 0, below), mode="replicate") if below or right else img


def make_patcher(
    config: UViTConfig,
    clip_width: int,
    weights: dict[str, Tensor],
    latent_format: LatentFormat | None = None,
    disable_dynamic: bool = False,
) -> comfy.model_patcher.ModelPatcher:
    """A MODEL, with dtype and devices chosen by the host's memory management.

    Args:
        config: sizes of the U-ViT.
        clip_width: width of the CLIP text that it is conditioned on.
        weights: state dict of a `HostUViT` (see `host_keys`), possibly quantised in one of the host's formats; emptied while
            loading.
        latent_format: None means Stable Diffusion 1's.
        disable_dynamic: set by the host for a patcher that loads everything at once.
    """
    management = comfy.model_management
    load_device = management.get_torch_device()
    host_config = ModelConfig({"config": config, "clip_width": clip_width, "model_channels": config.embed_dim})
    if latent_format is not None:
        host_config.latent_format = latent_format
    supported = list(host_config.supported_inference_dtypes)
    host_config.quant_config = comfy.utils.detect_layer_quantization(weights, "")
    dtype = management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(weights),
        supported_dtypes=supported,
        weight_dtype=comfy.utils.weight_dtype(weights) if host_config.quant_config is None else None,
    )
    computed_in = dtype if host_config.quant_config is None else None  # quantised weights name their own dtype
    host_config.set_inference_dtype(dtype, management.unet_manual_cast(computed_in, load_device, supported))

    model = host_config.get_model(weights)
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(model, load_device=load_device, offload_device=management.unet_offload_device())
    # NOTE: mapped weights in the right dtype become the parameters themselves; copying them would double the peak memory.
    as_stored = host_config.quant_config is None and all(tensor.dtype == dtype for tensor in weights.values())
    model.load_model_weights(weights, "", assign=as_stored or patcher.is_dynamic())
    wrappers = comfy.patcher_extension.WrappersMP
    patcher.add_wrapper_with_key(wrappers.OUTER_SAMPLE, SIDE, sample_with_token)
    patcher.add_wrapper_with_key(wrappers.PREDICT_NOISE, SIDE, predict_with_token)
    patcher.add_wrapper_with_key(wrappers.OUTER_SAMPLE, NOTE, warn_about_prompts)
    return patcher
