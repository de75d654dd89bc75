"""Runs the parts of a checkpoint: encodes pictures and texts, moves streams along a path, decodes them.

Each part is loaded when first needed. `batch_size` is applied here only; results do not depend on it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn
from typing_extensions import Self

from .checkpoints.checkpoint import Checkpoint
from .checkpoints.vocabulary import Vocabulary
from .encoders.candidate import Caption
from .encoders.prompts import PromptCheck, check_prompt, warning_about
from .guidance import overshoot_warning
from .media.images import PIXEL_FORMS, ImageSource, fit, open_image, to_tensor
from .media.json_files import brief
from .options import Options, is_finite, resolve
from .path import NoisePath
from .runtime.acceleration import COMPILE_MODES, Compiled, DeepCache
from .runtime.applied_loras import AppliedLoRAs
from .runtime.fast_lora import distilled_routes, route_of, student_about, student_settings
from .runtime.precision import (
    DTYPES,
    automatic_dtype,
    automatic_encoder_dtype,
    best_device,
    depends_on_batch,
    fix_batches,
    usable_device,
    weight_dtype,
)
from .runtime.progress import reporter
from .samplers import sample
from .small.network import build
from .streams import Streams, draw_noise, item_generators
from .uvit import UViT

if TYPE_CHECKING:
    from .encoders.autoencoder import Autoencoder
    from .encoders.captions import CaptionDecoder
    from .encoders.clip import ImageTokenEncoder, TextEncoder

log = logging.getLogger(__name__)

Generators = list[torch.Generator]
"""One for each item."""
Part = TypeVar("Part")
PARTS = ("net", "text_encoder", "image_token_encoder", "autoencoder", "captioner", "_compiled")


class Engine:
    """The parts of a checkpoint on a device, and the operations that tasks are made of.

    Attributes:
        device, dtype: where the parts run, and the number format of the network and the autoencoder.
        encoder_dtype: number format of the CLIP towers and the caption decoder.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        *,
        offload: bool = False,
        tiling: bool = False,
        compile: str | None = None,
    ) -> None:
        """
        Args:
            checkpoint: the checkpoint to run.
            device: None takes the GPU if there is one.
            dtype: of all weights: torch.float32, torch.float16, torch.bfloat16 or its name; None chooses by device, see
                `runtime.precision`.
            offload: keep every part in main memory and move it to the device only while it runs.
            tiling: let the autoencoder work tile by tile on pictures larger than the trained size.
            compile: a mode of `runtime.acceleration.Compiled` for the network; None compiles nothing.

        Raises:
            ValueError: an unknown mode or number format, or a device that this machine lacks.
        """
        if compile is not None and compile not in COMPILE_MODES:
            raise ValueError(f"compile must be one of {', '.join(COMPILE_MODES)}, got {compile!r}")
        for name, value in (("offload", offload), ("tiling", tiling)):
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be True or False, got {brief(value)}")
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.offload, self.tiling, self.compile = offload, tiling, compile
        self._loras = AppliedLoRAs(checkpoint)
        self._place(usable_device(best_device() if device is None else device), weight_dtype(dtype))

    def _place(self, device: torch.device, dtype: torch.dtype | None) -> None:
        self.device = device
        self.dtype = dtype or automatic_dtype(device)
        self.encoder_dtype = dtype or automatic_encoder_dtype(device)
        self._storage = torch.device("cpu") if self.offload else device  # where parts are while they do not run

    def to(self, *place: torch.device | str | torch.dtype, device: Any = None, dtype: Any = None) -> Self:
        """Run on another device or in another number format from now on, with the LoRAs that are applied.

        As for a torch module: `model.to("cuda")`, `model.to(torch.float16)` or both. The parts that are loaded are dropped and
        loaded again from the checkpoint when they are needed, so weights that were changed by hand are lost.

        Raises:
            ValueError: a device that this machine lacks, or an unknown number format.
        """
        for value in place:
            if isinstance(value, torch.dtype) or (isinstance(value, str) and value in DTYPES):
                dtype = value
            else:
                device = value
        chosen = self.device if device is None else usable_device(device)
        fixed = self.dtype if self.dtype == self.encoder_dtype else None  # None: both chosen by device
        kept = fixed if chosen.type == self.device.type else None
        self._place(chosen, weight_dtype(dtype) or kept)
        for name in PARTS:
            vars(self).pop(name, None)
        self._loras.forget_modules()
        return self

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Concepts, styles and other words of the training captions; None if the checkpoint does not list them."""
        return self.config.vocabulary

    @cached_property
    def net(self) -> UViT:
        """The U-ViT."""
        with self.checkpoint.building("uvit"):
            net = build(self.config.uvit)
        self.checkpoint.load_into(net, "uvit", device=self._storage, dtype=self.dtype)
        if depends_on_batch(self.device, self.dtype):
            fix_batches(net)
        return self._loras.apply_to(net, "uvit")

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """Prompts -> text latents: CLIP's text tower and the first Linear of the caption decoder, without its GPT-2."""
        from .encoders.clip import TextEncoder

        return TextEncoder.from_checkpoint(self.checkpoint, self._storage, self.encoder_dtype)

    @cached_property
    def image_token_encoder(self) -> ImageTokenEncoder:
        """Pictures -> CLIP image tokens."""
        from .encoders.clip import ImageTokenEncoder

        return ImageTokenEncoder.from_checkpoint(self.checkpoint, self._storage, self.encoder_dtype)

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """Pictures <-> image latents."""
        from .encoders.autoencoder import Autoencoder

        autoencoder = Autoencoder.from_checkpoint(self.checkpoint, self._storage, self.dtype, self.tiling)
        # convolutions read this order; from torch's own, oneDNN in bf16 takes 2.6 times as long at the published size
        with torch.inference_mode(False):  # weights outlive the call, whatever its mode
            autoencoder.vae.to(memory_format=torch.channels_last)
        return autoencoder

    @cached_property
    def captioner(self) -> CaptionDecoder:
        """Text latents -> captions; its own `decode` gives scores and several candidates."""
        from .encoders.captions import CaptionDecoder

        decoder = CaptionDecoder.from_checkpoint(self.checkpoint, self._storage, self.encoder_dtype)
        return self._loras.apply_to(decoder, "caption")

    @cached_property
    def _compiled(self) -> Compiled:
        return Compiled(self.net, self.compile or "default")

    @contextmanager
    def on_device(self, part: Part) -> Iterator[Part]:
        """A part, such as `self.net`, on the device for as long as it runs."""
        modules = [part] if isinstance(part, nn.Module) else [m for m in vars(part).values() if isinstance(m, nn.Module)]
        try:
            for module in modules if self.offload else ():
                module.to(self.device)
            yield part
        finally:
            for module in modules if self.offload else ():
                module.to(self._storage)

    def load_lora(self, path: str | os.PathLike[str], strength: float = 1.0) -> None:
        """Apply a LoRA to the network, and to the caption decoder if the file changes it too. Several add up.

        Args:
            path: the file; one that is already applied gets the new strength.
            strength: 1 is as trained, 0 is off, negative values reverse the change.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is no LoRA, or one for another model; the LoRAs applied before stay.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise ValueError(f"name the LoRA as a text or path, got {brief(path)}")
        if not is_finite(strength):
            raise ValueError(f"the strength of a LoRA must be a finite number, got {brief(strength)}")
        self._loras.load(path, strength)

    def unload_lora(self, path: str | os.PathLike[str] | None = None) -> None:
        """Remove a LoRA, or all of them; the weights are then those of the checkpoint, bit by bit.

        Raises:
            ValueError: this one is not applied.
        """
        self._loras.unload(path)

    def resolve(self, options: Options, *routes: str) -> Options:
        """All options of a call, checked, with this model's defaults, see `options.resolve`.

        Args:
            options: the options of the call.
            routes: the kinds of path that the task follows (`runtime.fast_lora.route_of`), for which a model may suggest steps.
                If its fast LoRA has learnt all of them, the preset "fast" means that LoRA's steps, guidance and method.
        """
        return resolve(options, self.config, routes, lambda: student_settings(self._student, self._loras.student, routes))

    @cached_property
    def _student(self) -> Mapping[str, Any]:
        """Metadata of the fast LoRA; empty without one."""
        return {} if self._loras.student is None else student_about(self._loras.student)

    def run(
        self,
        path: NoisePath,
        start: Streams,
        options: Options,
        generators: Generators,
        negative: Tensor | None = None,
        method: str | None = None,
        mask: Streams | None = None,
    ) -> Streams:
        """Move streams along a path; those that it moves and `start` lacks begin as noise.

        Args:
            path: the noise path.
            start: streams at the noise levels of the path's first point.
            options: all of them, as `options.resolve` returns.
            generators: one for each item.
            negative: (1 or B, L, text_dim) text latent of a negative prompt, see `samplers.sample`.
            method: instead of the options' method.
            mask: (1 or B, ...) streams of 1 = generate, 0 = keep, see `samplers.sample`.
        """
        downscale = self.config.vae.downscale
        shape = (self.config.uvit.in_chans, options["height"] // downscale, options["width"] // downscale)
        cuts = list(_cut(len(generators), options["batch_size"]))
        parts = []
        learnt = (
            options["preset"] == "fast"
            and method is None
            and route_of(path) in distilled_routes(self._student, self._loras.student)
        )
        self._loras.use_student(learnt)
        with reporter(options["progress"], path.steps * len(cuts)) as report, self.on_device(self.net) as net:
            for number, cut in enumerate(cuts):
                begin = _take(start, cut)
                if begin.img is None and path.t_img[0] != path.t_img[-1]:  # the sampler only knows the trained size
                    begin = begin.replace(img=draw_noise(shape, generators[cut], self.device))
                out = sample(
                    self._accelerated(net, options),
                    path,
                    begin,
                    guidance=options["guidance"],
                    method=method or options["method"],
                    data_type=options["data_type"],
                    generator=generators[cut],
                    callback=report(number * path.steps),
                    negative=None if negative is None else _rows(negative, cut),
                    mask=None if mask is None else _take(mask, cut),
                    guidance_interval=options["guidance_interval"],
                )
                parts.append(out)
        return Streams(**{name: torch.cat([part.need(name) for part in parts]) for name, _ in parts[0].items()})

    def step_seconds(self, options: Options) -> float:
        """Seconds of one sampling step of one item on this machine, measured with the options' size and guidance."""
        chosen: Options = {**options, "progress": False, "batch_size": None, "cache_interval": 1}
        text = torch.zeros(1, *self.config.uvit.item_shapes["text"], device=self.device)
        seconds = 0.0
        for attempt in range(2):  # the first one warms up
            with self.on_device(self.net):
                began = time.perf_counter()
                self.run(NoisePath.text_to_image(1), Streams(text=text), chosen, item_generators(0, 1))
                seconds = time.perf_counter() - began
            if attempt == 0 and seconds > 5:  # the warm-up itself may take a second, and would be taken for the step
                break
        return seconds

    def _accelerated(self, net: UViT, options: Options) -> nn.Module:
        """The network as one run evaluates it."""
        if options["cache_interval"] > 1:
            return DeepCache(net, options["cache_interval"], options["cache_branch"])
        return net if self.compile is None else self._compiled

    @torch.inference_mode()
    def encode_texts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> text latents (B, L, text_dim)."""
        with self.on_device(self.text_encoder) as encoder:
            return encoder(prompts).float()

    def check_prompts(self, prompts: Sequence[str]) -> list[PromptCheck]:
        """For each prompt its words outside the `vocabulary`, and the end that the text encoder does not read."""
        encoder, vocabulary = self.text_encoder, self._loras.extend(self.vocabulary)
        return [check_prompt(prompt, vocabulary, encoder.tokenizer, encoder.length) for prompt in prompts]

    def warn_about(self, prompts: Sequence[str]) -> None:
        """Log one warning of what of some prompts the model cannot follow, if there is anything."""
        if warning := warning_about(prompts, self.check_prompts(prompts)):
            log.warning("%s", warning)

    @torch.inference_mode()
    def encode_images(self, pictures: Sequence[ImageSource], count: int, options: Options, generators: Generators) -> Streams:
        """Image latents and CLIP tokens: each picture `count` times, each time with another sample of its latent."""
        width, height, size = options["width"], options["height"], options["batch_size"]
        opened = [open_image(picture) for picture in pictures]
        squares = [fit(image, min(width, height), min(width, height)) for image in opened]  # CLIP sees this crop's middle
        with self.on_device(self.image_token_encoder) as encoder:
            tokens = [encoder(squares[cut]) for cut in _cut(len(squares), size)]
        pixels = to_tensor([fit(image, width, height) for image in opened]).repeat_interleave(count, 0)
        with self.on_device(self.autoencoder) as autoencoder:
            latents = [autoencoder.encode(pixels[cut], generators[cut]) for cut in _cut(len(pixels), size)]
        return Streams(torch.cat(latents).float(), torch.cat(tokens).float().repeat_interleave(count, 0))

    @torch.inference_mode()
    def decode_images(self, state: Streams, options: Options | None = None) -> list[Image.Image]:
        """Image latents -> pictures in the form that the options' `output` names, `batch_size` of them at once."""
        chosen = options or {}
        latents, size, form = state.need("img"), chosen.get("batch_size"), PIXEL_FORMS[chosen.get("output", "pil")]
        if warning := overshoot_warning(latents):
            log.warning("%s", warning)
        with self.on_device(self.autoencoder) as autoencoder:
            pixels = [autoencoder.decode(latents[cut]).cpu() for cut in _cut(len(latents), size)]
        return form(torch.cat(pixels)) if pixels else []

    def decode_texts(self, state: Streams, options: Options | None = None) -> list[str]:
        """Text latents -> captions, the best of each beam search, `batch_size` of the options at once."""
        return [candidates[0].text for candidates in self.decode_candidates(state, options)]

    def decode_candidates(self, state: Streams, options: Options | None = None, **search: Any) -> list[list[Caption]]:
        """Text latents -> candidate captions with scores, best first; `search` are arguments of `CaptionDecoder.decode`."""
        latents, size = state.need("text"), (options or {}).get("batch_size")
        generators: Generators | None = search.pop("generator", None)
        with self.on_device(self.captioner) as captioner:
            decoded = (
                captioner.decode(latents[cut], **search, generator=generators and generators[cut])
                for cut in _cut(len(latents), size)
            )
            return [candidates for captions in decoded for candidates in captions]

    def results(self, state: Streams, options: Options, *modalities: str) -> Any:
        """What a task returns: pictures ("img"), captions ("text") or pairs of them, or the streams themselves.

        Args:
            state: the sampled streams.
            options: all of them; `output` decides.
            modalities: one or two of "img" and "text".
        """
        if options["output"] == "latent":
            return state
        decode = {"img": self.decode_images, "text": self.decode_texts}
        found = [decode[modality](state, options) for modality in modalities]
        return found[0] if len(found) == 1 else list(zip(*found, strict=True))


def _take(streams: Streams, cut: slice) -> Streams:
    return streams.map(lambda stream: _rows(stream, cut))


def _rows(values: Tensor, cut: slice) -> Tensor:
    """The rows of a batch (B, ...), or the one row (1, ...) that holds for all items."""
    return values if len(values) == 1 else values[cut]


def _cut(total: int, size: int | None) -> Iterator[slice]:
    step = size or max(total, 1)
    return (slice(first, first + step) for first in range(0, total, step))
