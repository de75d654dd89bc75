"""The library's sampler inside the host: the host loads and patches the model and shows progress; the library samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ..unidiffuser.guidance import overshoot_warning
from ..unidiffuser.path import CLEAN, NoisePath
from ..unidiffuser.samplers import sample
from ..unidiffuser.schedule import sigma_of_label
from ..unidiffuser.streams import Streams, item_generators, start_streams
from .host_guidance import HostGuidance, HostNet
from .host_patches import node_of
from .input_checks import check_conditioning
from .memory_errors import say_what_to_do
from .model_warnings import cfg_warning, model_warnings, momentum_warning, schedule_warning, shifts_tiles
from .side_streams import SIDE, Companion
from .stream_inputs import INPUT_OF, require_model, text_latent
from .types import show_warning

SIGMA_MAX = 14.6  # of Stable Diffusion's schedule, for the sigmas that the host requires
Watch = Callable[[int, int, Streams, Streams], None]
Conditioning = Sequence[Any]


class _Borrowed(comfy.samplers.Sampler):
    """A host sampler that calls a function of the loaded network and stores what it returns in `result`."""

    def __init__(self, function: Callable[[HostNet], Any]):
        self.function = function
        self.result: Any = None

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Any = None,
        denoise_mask: Any = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        self.result = self.function(HostNet(model_wrap, extra_args["model_options"], noise.device))
        return noise  # the host expects a tensor of this shape


def in_host(
    patcher: comfy.model_patcher.ModelPatcher,
    count: int,
    seed: int,
    function: Callable[[HostNet], Any],
    *,
    image: tuple[int, ...] | None = None,
    positive: Conditioning | None = None,
    negative: Conditioning | None = None,
    sigmas: Tensor | None = None,
) -> Any:
    """The result of `function(net)`, called with the model loaded and patched as in any sampling.

    Args:
        patcher: the MODEL.
        count: batch size, from which the host estimates memory.
        seed: passed to the host's sampling.
        function: takes the network.
        image: shape of an image latent (C, H, W); None means the trained one.
        positive, negative: CONDITIONINGs that guide the image; None means none.
        sigmas: the image's noise levels, which nodes that act in a part of the run read.
    """
    model = require_model(patcher)
    if shifts_tiles(patcher):
        raise ValueError(
            "'Tiled Diffusion' with the method SpotDiffusion works in KSampler only. Use the method Mixture of Diffusers."
        )
    config = model.diffusion_model.config
    nothing = [[torch.zeros(1, *config.item_shapes["text"]), {}]]
    guider = comfy.samplers.CFGGuider(patcher)
    guider.model_options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
    companion = guider.model_options.setdefault("transformer_options", {})[SIDE] = Companion()
    for warning in model_warnings(patcher):
        companion.notes.warn(warning)
    guider.set_conds(positive or nothing, negative or nothing)
    placeholder = torch.zeros(count, *(image or config.item_shapes["img"]))
    sampler = _Borrowed(function)
    with say_what_to_do(), companion.running(model):
        sigmas = torch.tensor([SIGMA_MAX, 0.0]) if sigmas is None else sigmas
        guider.sample(placeholder, placeholder, sampler, sigmas, disable_pbar=True, seed=seed)
    return sampler.result


def sample_streams(
    patcher: comfy.model_patcher.ModelPatcher,
    path: NoisePath,
    given: Streams,
    mask: Streams,
    seed: int,
    *,
    levels: Mapping[str, float] = MappingProxyType({}),
    data_type: int = 1,
    guidance: float | tuple[float, float] = 1.0,
    text: Conditioning | None = None,
    negative: Conditioning | None = None,
    batch_index: Sequence[int] | None = None,
    **settings: Any,
) -> Streams:
    """Sample along `path` from the given streams (see `streams.start_streams`), on the host's output device.

    Args:
        text: the CONDITIONING whose first entry is the text stream; further entries guide the image with their areas, masks
            and ranges of steps.
        negative: CONDITIONING that the image is guided away from.
        batch_index: place of each item in the batch that it was taken from.
        Others: as for `unidiffuser.samplers.sample`.
    """
    config = require_model(patcher).diffusion_model.config
    count = max(1, given.batch)
    places = range(count) if batch_index is None or len(batch_index) != count else batch_index
    generators = [generator for k in places for generator in item_generators(seed + int(k), 1)]
    start = start_streams(path, given, mask, generators, config.item_shapes, levels, INPUT_OF)
    masks = Streams(**{name: value for name, value in mask.items() if start[name] is not None})
    scales = guidance if isinstance(guidance, tuple) else (guidance, guidance)

    avoided = None if negative is None else text_latent(patcher, negative)
    show_warning(check_conditioning(extra for _, extra in negative or ()) or "")  # `given_streams` has checked the text

    def run(net: HostNet) -> Streams:
        return sample(
            net,
            path,
            start.to(net.device),
            guidance=HostGuidance(*scales, negative=avoided, net=net),
            generator=generators,
            mask=masks,
            kept=given.to(net.device),
            data_type=min(data_type, max(config.data_types - 1, 0)),
            **settings,
        )

    changing = patcher.model_options.get("denoise_mask_function")
    if changing is not None and masks.img is not None:
        show_warning(
            f"'{node_of(changing)}' changes the mask from step to step, which only KSampler does; here the mask is fixed."
        )
    image = None if start.img is None else tuple(start.img.shape[1:])
    image_moves = len(set(path.t_img)) > 1
    sigmas = sigma_of_label(torch.tensor(path.t_img if image_moves else path.t_text))
    of_image = (cfg_warning(patcher, scales[0]), schedule_warning(patcher), momentum_warning(patcher, sigmas))
    for warning in of_image if image_moves else ():
        show_warning(warning or "")
    out: Streams = in_host(patcher, count, seed, run, image=image, positive=text, negative=negative, sigmas=sigmas)
    if out.img is not None and path.t_img[0] != path.t_img[-1] == CLEAN:
        show_warning(overshoot_warning(out.img) or "")
    return out.to(comfy.model_management.intermediate_device())


def watcher(
    patcher: comfy.model_patcher.ModelPatcher, steps: int, show_text: Callable[[int, int, Tensor | None], None] | None = None
) -> Watch:
    """A callback for the library's sampler: progress bar, previews, and the host's interrupt.

    `show_text` is called after each step with (step, total, predicted text latents (B, L, text_dim)).
    """
    show = latent_preview.prepare_callback(patcher, steps)
    bar = comfy.utils.ProgressBar(steps)

    def watch(step: int, total: int, x0: Streams, x: Streams) -> None:
        if show_text is not None:
            show_text(step, total, x0.text)
        if x0.img is None:
            bar.update_absolute(step + 1, total)
        else:
            show(step, x0.img, x.img, total)  # raises after Interrupt is pressed

    return watch


def shifted(watch: Watch, done: int, total: int) -> Watch:
    """`watch` for one part of a longer run, after `done` of its `total` steps."""
    return lambda step, _, x0, x: watch(done + step, total, x0, x)
