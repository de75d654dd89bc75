"""The U-ViT as a native MODEL: a BaseModel built with the host's operations, in the host's patcher.

The host's samplers, schedulers, LoRA, merging, offloading and compilation then work on it as on any other model. The host
samples one tensor, so the streams of a sample are packed into one (see `packing.py`).
"""

from __future__ import annotations

import logging
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
from torch import Tensor

from ..unidiffuser.checkpoints.config import VAEConfig
from ..unidiffuser.schedule import NUM_LABELS, label_of_sigma, sigma_of_label
from ..unidiffuser.uvit import UViTConfig
from .host_network import host_network
from .packing import WRAPPER_KEY, SampledStreams, pack, sample_with_clip_stream, unpack
from .saved_models import KEY, Origin

logger = logging.getLogger(__name__)

TEXT = "unidiffuser_text"  # names of the conditions that extra_conds passes to _apply_model
TEXT_LABEL = "unidiffuser_text_label"


class ExpandedCond(comfy.conds.CONDRegular):
    """A condition (1, ...) or (B, ...); one is expanded over the batch without a copy at each step."""

    def process_cond(self, batch_size: int, **kwargs: Any) -> ExpandedCond:
        if self.cond.shape[0] == 1:
            return self._copy_with(self.cond.expand(batch_size, *self.cond.shape[1:]))
        return super().process_cond(batch_size, **kwargs)


class TextLabel(comfy.conds.CONDRegular):
    """The text label, 0..1000, of every batch item; a list of numbers, so that reading it needs no device sync."""

    def __init__(self, cond: list[float]):
        super().__init__(cond)

    def process_cond(self, batch_size: int, **kwargs: Any) -> TextLabel:
        return TextLabel(self.cond[:1] * batch_size)

    def can_concat(self, other: TextLabel) -> bool:
        return True

    def concat(self, others: list[TextLabel]) -> list[float]:
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
    """Predicts packed streams, for the host's samplers (sigma in, denoised out) and for the UniDiffuser Sampler.

    `transformer_options[WRAPPER_KEY]` is the `SampledStreams` that describes the pack.
    """

    def __init__(self, model_config: ModelConfig, device: Any = None):
        super().__init__(model_config, comfy.model_base.ModelType.EPS, device=device, unet_model=host_network)
        self.model_sampling = ModelSampling(model_config)
        self.origin: Origin | None = None

    def state_dict_for_saving(self, unet_state_dict: dict[str, Tensor], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        saved: dict[str, Tensor] = super().state_dict_for_saving(unet_state_dict, *args, **kwargs)
        return saved if self.origin is None else {**saved, KEY: self.origin.tensor()}

    def process_latent_in(self, latent: Tensor) -> Tensor:
        return latent if latent.ndim == 3 else super().process_latent_in(latent)  # a pack is already scaled

    def process_latent_out(self, latent: Tensor) -> Tensor:
        return latent if latent.ndim == 3 else super().process_latent_out(latent)

    def memory_required(self, input_shape: Any, cond_shapes: dict[str, Any] | None = None) -> float:
        # The host multiplies batch and area, and the length of a pack counts every channel as area.
        channels = self.diffusion_model.config.in_chans
        if len(input_shape) == 3:
            input_shape = [input_shape[0], channels, -(-input_shape[2] // channels)]
        return super().memory_required(input_shape, cond_shapes=cond_shapes or {})

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
        if cross_attn.shape[1] > length:
            logger.warning("The prompt is longer than %d tokens; the rest is ignored.", length)
        text = cross_attn[:, :length].to(device=device, dtype=torch.float32)
        return text if text.shape[-1] == width else net.text_prefix(text.to(self.get_dtype_inference())).float()

    def extra_conds(self, **kwargs: Any) -> dict[str, comfy.conds.CONDRegular]:
        device, net = kwargs["device"], self.diffusion_model
        cross_attn = kwargs.get("cross_attn")
        given = cross_attn is not None and bool(torch.count_nonzero(cross_attn))
        text = (
            self.text_latent(cross_attn, device)
            if given
            else torch.zeros(1, net.config.num_text_tokens, net.config.text_dim, device=device)
        )
        return {TEXT: ExpandedCond(text), TEXT_LABEL: TextLabel([0.0 if given else float(NUM_LABELS)])}

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
        options = transformer_options or {}
        self.diffusion_model.attention.options = options
        streams: SampledStreams = options.get(WRAPPER_KEY)
        if streams is None:
            raise ValueError(
                "This sampler skips the wrappers of the MODEL, which UniDiffuser needs. Use 'KSampler', "
                "'SamplerCustomAdvanced' or 'UniDiffuser Sampler'."
            )
        if (call := streams.request) is not None:
            eps = self.predict(*unpack(x, streams.shapes), call.t_img, call.t_text, data_type=call.data_type, heads=call.heads)
            return pack([e for e in eps if e is not None])

        sigma = t
        img, clip_img = unpack(x / torch.hypot(sigma, torch.ones_like(sigma)).view(-1, 1, 1), streams.shapes)
        text, labels = conds[TEXT].to(x.device), conds[TEXT_LABEL]
        t_text: Tensor | float = 0.0
        if any(labels):  # the unconditional model of the paper: fresh noise at the highest text label
            t_text = torch.tensor(labels, device=x.device)
            noise = streams.text_noise(text.shape[1:]).to(text).repeat(text.shape[0] // len(streams.generators), 1, 1)
            text = torch.where(t_text[:, None, None] > 0, noise, text)
        # NOTE: the label is computed from sigma, so a node may replace model_sampling.
        eps = self.predict(img, clip_img, text, label_of_sigma(sigma), t_text, heads=("img", "clip_img"))
        return self.model_sampling.calculate_denoised(sigma, pack(eps[:2]), x)

    def predict(
        self, img: Tensor, clip_img: Tensor, text: Tensor, t_img: Tensor, t_text: Tensor | float, **kwargs: Any
    ) -> list[Tensor | None]:
        """Noise predictions in float32, computed in the model's dtype; arguments as in `UViT.forward`."""
        dtype = self.get_dtype_inference()
        out = self.diffusion_model(img.to(dtype), clip_img.to(dtype), text.to(dtype), t_img, t_text, **kwargs)
        return [None if o is None else o.float() for o in out]


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
    host_config = ModelConfig({"config": config, "clip_width": clip_width})
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
    model.load_model_weights(weights, "", assign=patcher.is_dynamic())
    wrappers = comfy.patcher_extension.WrappersMP
    patcher.add_wrapper_with_key(wrappers.OUTER_SAMPLE, WRAPPER_KEY, sample_with_clip_stream)
    return patcher
