"""Runs the parts of a checkpoint: encodes pictures and texts, moves streams along a path, decodes them.

Each part is loaded when first needed. `batch_size` is applied here only; results do not depend on it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from .checkpoints.checkpoint import Checkpoint
from .checkpoints.skeleton import skeleton
from .checkpoints.vocabulary import Vocabulary
from .encoders.prompts import PromptCheck, check_prompt
from .media.images import ImageSource, fit, open_image, to_images, to_tensor
from .options import Options, Progress
from .path import NoisePath
from .runtime.acceleration import COMPILE_MODES, Compiled, DeepCache
from .runtime.lora import LORA_PARTS, LoRA, apply_loras, layers_of, read_lora
from .runtime.precision import automatic_dtype, automatic_encoder_dtype, depends_on_batch, fix_batches
from .samplers import sample
from .small.network import build
from .streams import Streams, draw_noise
from .uvit import UViT

if TYPE_CHECKING:
    from .encoders.autoencoder import Autoencoder
    from .encoders.captions import CaptionDecoder
    from .encoders.clip import ImageTokenEncoder, TextEncoder

Generators = list[torch.Generator]
"""One for each item."""
Module = TypeVar("Module", bound=nn.Module)
Part = TypeVar("Part")


class Engine:
    """The parts of a checkpoint on a device, and the operations that tasks are made of."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        offload: bool = False,
        tiling: bool = False,
        compile: str | None = None,
    ) -> None:
        """
        Args:
            checkpoint: the checkpoint to run.
            device: None takes the GPU if there is one.
            dtype: of all weights; None chooses by device, see `runtime.precision`.
            offload: keep every part in main memory and move it to the device only while it runs.
            tiling: let the autoencoder work tile by tile on pictures larger than the trained size.
            compile: a mode of `runtime.acceleration.Compiled` for the network; None compiles nothing.

        Raises:
            ValueError: an unknown mode.
        """
        if compile is not None and compile not in COMPILE_MODES:
            raise ValueError(f"compile must be one of {', '.join(COMPILE_MODES)}, got {compile!r}")
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.device = torch.device(device if device is not None else _best_device())
        self.dtype = dtype or automatic_dtype(self.device)
        self.encoder_dtype = dtype or automatic_encoder_dtype(self.device)
        self.offload, self.tiling, self.compile = offload, tiling, compile
        self._storage = torch.device("cpu") if offload else self.device  # where parts are while they do not run
        self._loras: dict[str, tuple[LoRA, float]] = {}
        self._adaptable: dict[str, nn.Module] = {}  # loaded parts that a LoRA can change, by their name in the checkpoint

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Concepts, styles and other words of the training captions; None if the checkpoint does not list them."""
        return self.config.vocabulary

    @cached_property
    def net(self) -> UViT:
        """The U-ViT."""
        with skeleton():
            net = build(self.config.uvit)
        self.checkpoint.load_into(net, "uvit", device=self._storage, dtype=self.dtype)
        if depends_on_batch(self.device, self.dtype):
            fix_batches(net)
        return self._adapted(net, "uvit")

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

        return Autoencoder.from_checkpoint(self.checkpoint, self._storage, self.dtype, self.tiling)

    @cached_property
    def captioner(self) -> CaptionDecoder:
        """Text latents -> captions; its own `decode` gives scores and several candidates."""
        from .encoders.captions import CaptionDecoder

        decoder = CaptionDecoder.from_checkpoint(self.checkpoint, self._storage, self.encoder_dtype)
        return self._adapted(decoder, "caption")

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
        if not math.isfinite(strength):
            raise ValueError(f"the strength of a LoRA must be a finite number, got {strength}")
        parts = [part for part in LORA_PARTS if part in self.checkpoint.parts()]
        lora = read_lora(path, {part: layers_of(self.checkpoint.state_dict(part)) for part in parts})
        self._exchange_loras(self._loras | {os.fspath(path): (lora, strength)})

    def unload_lora(self, path: str | os.PathLike[str] | None = None) -> None:
        """Remove a LoRA, or all of them; the weights are then those of the checkpoint, bit by bit.

        Raises:
            ValueError: this one is not applied.
        """
        if path is not None and os.fspath(path) not in self._loras:
            raise ValueError(f"{path} is not applied; applied are: {', '.join(self._loras) or 'none'}")
        self._exchange_loras({} if path is None else {p: v for p, v in self._loras.items() if p != os.fspath(path)})

    def _exchange_loras(self, wanted: dict[str, tuple[LoRA, float]]) -> None:
        before, self._loras = self._loras, wanted
        for part, module in self._adaptable.items():  # a part that is not loaded yet gets them when it is
            self._apply_loras(module, part, [*before.values(), *wanted.values()])

    def _adapted(self, module: Module, part: str) -> Module:
        """A part that was just loaded, with the present LoRAs."""
        self._adaptable[part] = module
        self._apply_loras(module, part, self._loras.values())
        return module

    def _apply_loras(self, module: nn.Module, part: str, involved: Iterable[tuple[LoRA, float]]) -> None:
        """Set the weights of the layers that `involved` LoRAs change: those applied before and those to be applied."""
        names = {f"{layer}.weight" for lora, _ in involved for layer in lora.changes.get(part, {})}
        if names:
            stored = self.checkpoint.state_dict(part)
            apply_loras(module, part, list(self._loras.values()), {name: stored[name] for name in sorted(names)})

    def run(
        self,
        path: NoisePath,
        start: Streams,
        options: Options,
        generators: Generators,
        negative: Tensor | None = None,
        method: str | None = None,
    ) -> Streams:
        """Move streams along a path; those that it moves and `start` lacks begin as noise.

        Args:
            path: the noise path.
            start: streams at the noise levels of the path's first point.
            options: all of them, as `options.resolve` returns.
            generators: one for each item.
            negative: (1, L, text_dim) text latent of a negative prompt, see `samplers.sample`.
            method: instead of the options' method.
        """
        downscale = self.config.vae.downscale
        shape = (self.config.uvit.in_chans, options["height"] // downscale, options["width"] // downscale)
        cuts = list(_cut(len(generators), options["batch_size"]))
        parts = []
        with _reporter(options["progress"], path.steps * len(cuts)) as report, self.on_device(self.net) as net:
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
                    negative=negative,
                    guidance_interval=options["guidance_interval"],
                )
                parts.append(out)
        return Streams(**{name: torch.cat([part.need(name) for part in parts]) for name, _ in parts[0].items()})

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
        encoder, vocabulary = self.text_encoder, self._vocabulary_with_loras()
        return [check_prompt(prompt, vocabulary, encoder.tokenizer, encoder.length) for prompt in prompts]

    def _vocabulary_with_loras(self) -> Vocabulary | None:
        """The vocabulary and the words of the LoRAs; None if one of them does not list its words."""
        known = self.vocabulary
        for lora, strength in self._loras.values():
            words = lora.words() if strength else ()
            known = None if known is None or words is None else replace(known, words=(*known.words, *words))
        return known

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
        """Image latents -> pictures, `batch_size` of the options at once."""
        latents, size = state.need("img"), (options or {}).get("batch_size")
        with self.on_device(self.autoencoder) as autoencoder:
            decoded = (autoencoder.decode(latents[cut]) for cut in _cut(len(latents), size))
            return [image for pixels in decoded for image in to_images(pixels)]

    def decode_texts(self, state: Streams, options: Options | None = None) -> list[str]:
        """Text latents -> captions, the best of each beam search, `batch_size` of the options at once."""
        latents, size = state.need("text"), (options or {}).get("batch_size")
        with self.on_device(self.captioner) as captioner:
            decoded = (captioner.decode(latents[cut]) for cut in _cut(len(latents), size))
            return [candidates[0].text for captions in decoded for candidates in captions]


def _take(streams: Streams, cut: slice) -> Streams:
    return streams.map(lambda stream: stream[cut])


def _cut(total: int, size: int | None) -> Iterator[slice]:
    step = size or max(total, 1)
    return (slice(first, first + step) for first in range(0, total, step))


@contextmanager
def _reporter(progress: bool | Progress, total: int) -> Iterator[Callable[[int], Progress | None]]:
    """A function that returns, for the number of steps done before, a callback for `sample` that counts up to `total`."""
    if callable(progress):
        call = progress
        yield lambda done: lambda step, _, x0, x: call(done + step, total, x0, x)
    elif progress:
        with tqdm(total=total, unit="step", leave=False) as bar:

            def counting_from(done: int) -> Progress:
                def advance(step: int, _: int, x0: Streams, x: Streams) -> None:
                    bar.update(done + step + 1 - bar.n)

                return advance

            yield counting_from
    else:
        yield lambda done: None


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
