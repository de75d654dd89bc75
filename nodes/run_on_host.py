"""The library's sampler inside the host: the host loads and patches the model and shows progress; the library samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ..unidiffuser.path import NoisePath
from ..unidiffuser.samplers import sample
from ..unidiffuser.schedule import sigma_of_label
from ..unidiffuser.streams import Streams, item_generators
from .host_model import UniDiffuserModel
from .memory_errors import say_what_to_do
from .packing import WRAPPER_KEY, Request, SampledStreams, pack, unpack
from .stream_inputs import require_model, start_streams
from .types import show_text

STREAMS = ("img", "clip_img", "text")
SIGMA_MAX = 14.6  # of Stable Diffusion's schedule, for the sigmas that the host requires
CAPTION_PREVIEWS = 5  # in one run
Watch = Callable[[int, int, Streams, Streams], None]


class HostNet:
    """Adapts a MODEL to the network interface of the library's sampler, with the host's wrappers and patches applied."""

    def __init__(self, model: UniDiffuserModel, model_options: dict[str, Any], device: torch.device):
        self.model, self.options, self.device = model, model_options, device
        self.config = model.diffusion_model.config

    def __call__(
        self,
        img: Tensor,
        clip_img: Tensor,
        text: Tensor,
        t_img: Tensor,
        t_text: Tensor,
        data_type: Tensor,
        heads: Sequence[str] = STREAMS,
    ) -> tuple[Tensor | None, ...]:
        streams = dict(zip(STREAMS, (img, clip_img, text), strict=True))
        shapes = {name: tuple(value.shape[1:]) for name, value in streams.items()}
        labels = [value.to(self.device) for value in (t_img, t_text, data_type)]
        described = SampledStreams(list(shapes.values()), request=Request(*labels, heads))
        sigma = sigma_of_label(torch.maximum(t_img, t_text)).to(self.device)
        options = {
            **self.options["transformer_options"],
            WRAPPER_KEY: described,
            "sigmas": sigma[:1],
            "cond_or_uncond": [0],
            "uuids": [],
        }
        packed = pack(list(streams.values())).to(self.device)
        wrapper = self.options.get("model_function_wrapper")
        if wrapper is None:
            out = self.model.apply_model(packed, sigma, transformer_options=options)
        else:
            out = wrapper(
                self.model.apply_model,
                {"input": packed, "timestep": sigma, "cond_or_uncond": [0], "c": {"transformer_options": options}},
            )
        predicted = [name for name in STREAMS if name in heads]
        found = dict(zip(predicted, unpack(out, [shapes[name] for name in predicted]), strict=True))
        return tuple(found[name].to(img.device) if name in found else None for name in STREAMS)


class _Borrowed(comfy.samplers.Sampler):
    """A host sampler that calls a function of the loaded network and stores what it returns in `result`."""

    def __init__(self, function: Callable[[HostNet, torch.device], Any]):
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
        self.result = self.function(HostNet(model_wrap.inner_model, extra_args["model_options"], noise.device), noise.device)
        return noise  # the host expects a tensor of this shape


def in_host(
    patcher: comfy.model_patcher.ModelPatcher,
    count: int,
    seed: int,
    function: Callable[[HostNet, torch.device], Any],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Any:
    """The result of `function(net, device)`, called with the model loaded and patched as in any sampling.

    Args:
        patcher: the MODEL.
        count: batch size, from which the host estimates memory.
        seed: passed to the host's sampling.
        function: takes the network and its device.
        shapes: item shapes of the streams that differ from the trained ones, for the same estimate.
    """
    config = require_model(patcher).diffusion_model.config
    numbers = sum(math.prod(shape) for shape in {**config.item_shapes, **(shapes or {})}.values())
    guider = comfy.samplers.CFGGuider(patcher)
    guider.model_options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
    guider.model_options.setdefault("transformer_options", {})[WRAPPER_KEY] = SampledStreams([])
    placeholder = torch.zeros(count, 1, numbers)
    sampler = _Borrowed(function)
    with say_what_to_do():
        guider.sample(placeholder, placeholder, sampler, torch.tensor([SIGMA_MAX, 0.0]), disable_pbar=True, seed=seed)
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
    **settings: Any,
) -> Streams:
    """Sample along `path` from the given streams (see `start_streams`), on the host's output device.

    `settings` are those of `unidiffuser.samplers.sample`.
    """
    config = require_model(patcher).diffusion_model.config
    count = max(1, given.batch)
    generators = item_generators(seed, count)
    start = start_streams(path, given, mask, generators, config.item_shapes, levels)
    settings |= {
        "generator": generators,
        "mask": Streams(**{name: value for name, value in mask.items() if start[name] is not None}),
        "data_type": min(data_type, max(config.data_types - 1, 0)),
    }
    shapes = {name: tuple(value.shape[1:]) for name, value in start.items()}
    out: Streams = in_host(patcher, count, seed, lambda net, device: sample(net, path, start.to(device), **settings), shapes)
    return out.to(comfy.model_management.intermediate_device())


def watcher(patcher: comfy.model_patcher.ModelPatcher, steps: int, preview_text: Callable[[Tensor], None] | None) -> Watch:
    """A callback for the library's sampler: progress bar, previews, and the host's interrupt.

    `preview_text` is called a few times in a run with the text latent (1, L, text_dim) of the first item.
    """
    show = latent_preview.prepare_callback(patcher, steps)
    bar = comfy.utils.ProgressBar(steps)

    def watch(step: int, total: int, x0: Streams, x: Streams) -> None:
        if preview_text is not None and x0.text is not None and step % max(1, total // CAPTION_PREVIEWS) == 0:
            preview_text(x0.text[:1])
        if x0.img is None:
            bar.update_absolute(step + 1, total)
        else:
            show(step, x0.img, x.img, total)  # raises after Interrupt is pressed

    return watch


def shifted(watch: Watch, done: int, total: int) -> Watch:
    """`watch` for one part of a longer run, after `done` of its `total` steps."""
    return lambda step, _, x0, x: watch(done + step, total, x0, x)


def caption_preview(caption_decoder: Any, node_id: str) -> Any:
    """A function that shows the first words of a text latent in the node; None without a decoder."""
    if caption_decoder is None:
        return None
    return lambda text: show_text(caption_decoder.preview(text), node_id)
