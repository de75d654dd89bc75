"""The library's sampler inside the host: the host loads the model, patches it and shows progress; the library samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ..unidiffuser.path import CLEAN, MARGINAL, NoisePath
from ..unidiffuser.samplers import sample
from ..unidiffuser.schedule import add_noise, sigma_of_label
from ..unidiffuser.streams import MODALITIES, Streams, draw_noise
from .model import UniDiffuserModel
from .streams import WRAPPER_KEY, Request, SampledStreams, check_image_latent, clip_vision_token, pack, unpack

STREAMS = ("img", "clip_img", "text")
WORDS = {"img": "picture", "text": "text"}
INPUT_OF = {"img": "latent_image", "clip_img": "clip_vision_output", "text": "text"}  # of the UniDiffuser Sampler
TOKEN_MASK = "unidiffuser_token_mask"  # in a CONDITIONING: (1, L, 1), 1 = rewrite this token
LEVEL = "unidiffuser_level"  # in what a path left noisy: its label; a path that begins there takes it as it is
SIGMA_MAX = 14.6  # of Stable Diffusion's schedule, for what the host wants to know of a run
DRAFTS = 5  # draft captions in one run
Watch = Callable[[int, int, Streams, Streams], None]


class HostNet:
    """The MODEL as the network that the library's sampler calls, with the wrappers and patches of the host applied."""

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
        told = SampledStreams(list(shapes.values()), request=Request(*labels, heads))
        sigma = sigma_of_label(torch.maximum(t_img, t_text)).to(self.device)
        options = {
            **self.options["transformer_options"],
            WRAPPER_KEY: told,
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
        asked = [name for name in STREAMS if name in heads]
        found = dict(zip(asked, unpack(out, [shapes[name] for name in asked]), strict=True))
        return tuple(found[name].to(img.device) if name in found else None for name in STREAMS)


class _Borrowed(comfy.samplers.Sampler):
    """A host sampler that runs a function of the loaded network instead; what it returns is in `result`."""

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
        return noise  # the host needs a tensor of the shape it gave


def require_model(patcher: Any) -> UniDiffuserModel:
    """The network's host model behind a MODEL.

    Raises:
        ValueError: it is another architecture.
    """
    model = patcher.model
    if not isinstance(model, UniDiffuserModel):
        raise ValueError(
            f"The MODEL is a {type(model).__name__}, not a UniDiffuser. Connect the MODEL output of 'Load "
            f"UniDiffuser' (LoRA and model patches may lie in between)."
        )
    return model


def in_host(
    patcher: comfy.model_patcher.ModelPatcher,
    count: int,
    seed: int,
    function: Callable[[HostNet, torch.device], Any],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Any:
    """The result of `function(net, device)`, called with the model loaded, patched and wrapped as in any sampling.

    `count` and `shapes` of the streams, where they are not the trained ones, tell the host how much memory that takes.
    """
    config = require_model(patcher).diffusion_model.config
    numbers = sum(math.prod(shape) for shape in {**config.item_shapes, **(shapes or {})}.values())
    guider = comfy.samplers.CFGGuider(patcher)
    guider.model_options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
    guider.model_options.setdefault("transformer_options", {})[WRAPPER_KEY] = SampledStreams([])
    placeholder = torch.zeros(count, 1, numbers)
    sampler = _Borrowed(function)
    guider.sample(placeholder, placeholder, sampler, torch.tensor([SIGMA_MAX, 0.0]), disable_pbar=True, seed=seed)
    return sampler.result


def run(
    patcher: comfy.model_patcher.ModelPatcher, path: NoisePath, start: Streams, count: int, seed: int, **settings: Any
) -> Streams:
    """Sample in the host; on the host's output device. `settings` as `unidiffuser.samplers.sample`."""
    shapes = {name: tuple(value.shape[1:]) for name, value in start.items()}
    out: Streams = in_host(patcher, count, seed, lambda net, device: sample(net, path, start.to(device), **settings), shapes)
    return out.to(comfy.model_management.intermediate_device())


def given_streams(
    patcher: comfy.model_patcher.ModelPatcher,
    latent: dict[str, Any] | None,
    clip_vision_output: Any,
    text: Sequence[Any] | None,
) -> tuple[Streams, Streams]:
    """Clean streams and masks (1 = generate) of the inputs of a node, in the model's units, all of one batch.

    Raises:
        ValueError: an input does not fit the model; the text names it.
    """
    model = require_model(patcher)
    net = model.diffusion_model.config
    samples = None if latent is None else latent["samples"]
    if samples is not None:
        check_image_latent(samples, net.in_chans, net.patch_size)
    cond = None if text is None else text_latent(patcher, text)
    embeds = None if clip_vision_output is None else clip_vision_output["image_embeds"]
    batch = max((len(given) for given in (samples, cond, embeds) if given is not None), default=1)

    repeat = comfy.utils.repeat_to_batch_size
    streams = Streams(
        img=None if samples is None else repeat(model.process_latent_in(samples.float()), batch),
        clip_img=None if embeds is None else clip_vision_token(clip_vision_output, batch, net.clip_img_dim),
        text=None if cond is None else repeat(cond, batch),
    )
    mask = None if latent is None else latent.get("noise_mask")
    if mask is not None and samples is not None:
        mask = repeat(comfy.utils.reshape_mask(mask, samples.shape)[:, :1].round(), batch)
    return streams, Streams(img=mask, text=None if text is None else text[0][1].get(TOKEN_MASK))


def given_levels(latent: dict[str, Any] | None, clip_vision_output: Any, text: Sequence[Any] | None) -> dict[str, float]:
    """Labels of those inputs that an earlier path, or an inversion, has left noisy."""
    tags = {
        "img": (latent or {}).get(LEVEL),
        "clip_img": getattr(clip_vision_output, LEVEL, None),
        "text": None if text is None else text[0][1].get(LEVEL),
    }
    return {name: level for name, level in tags.items() if level is not None}


def text_latent(patcher: comfy.model_patcher.ModelPatcher, conditioning: Sequence[Any]) -> Tensor:
    """The text latent (B, L, text_dim) of a CONDITIONING, on the CPU; loads the model, which holds the compressing Linear."""
    comfy.model_management.load_models_gpu([patcher])
    return require_model(patcher).text_latent(conditioning[0][0], patcher.load_device).cpu()


def start_streams(
    path: NoisePath,
    clean: Streams,
    mask: Streams,
    generators: Sequence[torch.Generator],
    shapes: dict[str, tuple[int, ...]],
    levels: Mapping[str, float],
) -> Streams:
    """What the library's sampler starts from: each clean stream at the noise level of the path's first point.

    Args:
        clean: what the artist gave; a stream that starts as pure noise needs none.
        mask: 1 = generate, 0 = keep, for the streams of which a part is kept.
        generators: one per item.
        shapes: of one item of each stream that is not given.
        levels: labels of the streams in `clean` that are noisy already; they are taken as they are.

    Raises:
        ValueError: the path needs a stream that was not given, or begins one at another level than it has.
    """
    start = Streams()
    for modality, names in MODALITIES.items():
        labels = path.labels(modality)
        for name in names:
            given = clean[name]
            if name in levels:
                if not math.isclose(levels[name], labels[0], abs_tol=1e-3):
                    raise ValueError(
                        f"'{INPUT_OF[name]}' is at noise level {levels[name]:g}, but this noise path begins the "
                        f"{WORDS[modality]} at {labels[0]:g}. Choose a path that goes on where it is."
                    )
                start = start.replace(**{name: given})
                continue
            if labels[0] == MARGINAL:
                if given is not None and mask[name] is not None:
                    noise = draw_noise(given.shape[1:], generators, "cpu")
                    start = start.replace(**{name: torch.where(mask[name] > 0, noise, given)})
                elif given is not None and labels[-1] < MARGINAL:
                    start = start.replace(**{name: draw_noise(given.shape[1:], generators, "cpu")})
                continue
            if given is None and name == "clip_img" and labels[0] > CLEAN:
                given = torch.zeros(len(generators), *shapes[name])  # nothing is known of the token: made with the picture
            if given is None or (name == "img" and not torch.count_nonzero(given)):
                raise ValueError(
                    f"This noise path begins with the {WORDS[modality]} at level {labels[0]:g}, not from nothing: connect "
                    f"'{INPUT_OF[name]}'" + (" and 'clip_vision_output'." if name == "img" else ".")
                )
            if labels[0] > CLEAN:
                given = add_noise(given, draw_noise(given.shape[1:], generators, "cpu"), labels[0])
            start = start.replace(**{name: given})
    return start


def watcher(patcher: comfy.model_patcher.ModelPatcher, steps: int, draft: Callable[[Tensor], None] | None) -> Watch:
    """The library's callback that moves the host's progress bar, shows a preview, and can be interrupted.

    `draft` is handed the text latent (1, L, text_dim) of the first item now and then.
    """
    show = latent_preview.prepare_callback(patcher, steps)
    bar = comfy.utils.ProgressBar(steps)

    def watch(step: int, total: int, x0: Streams, x: Streams) -> None:
        if draft is not None and x0.text is not None and step % max(1, total // DRAFTS) == 0:
            draft(x0.text[:1])
        if x0.img is None:
            bar.update_absolute(step + 1, total)
        else:
            show(step, x0.img, x.img, total)  # raises when the artist has pressed Interrupt

    return watch


def shifted(watch: Watch, done: int, total: int) -> Watch:
    """`watch` for one part of a longer run, of which `done` steps are behind it."""
    return lambda step, _, x0, x: watch(done + step, total, x0, x)
