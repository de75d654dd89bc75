"""A checkpoint at work: its parts, built when first needed, and the one way in which streams are moved.

Pictures and words become streams, a path moves them, and they become pictures and words again. Items are cut into batches
here, and nowhere else; what an item becomes does not depend on the cut.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from .checkpoints.checkpoint import Checkpoint
from .checkpoints.skeleton import skeleton
from .media.images import ImageSource, fit, open_image, to_images, to_tensor
from .options import Plan, Progress
from .path import NoisePath
from .runtime.acceleration import COMPILE_MODES, Compiled, DeepCache
from .runtime.lora import LoRA, layers_of, put_on, read_lora
from .runtime.precision import automatic_dtype, automatic_side_dtype, depends_on_batch, fix_batches
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
LORA_PARTS: Mapping[str, str] = {"uvit": "net", "caption": "captioner"}
"""The parts of a checkpoint that a LoRA may change, and what they are called here."""
Module = TypeVar("Module", bound=nn.Module)


class Engine:
    """The parts of a checkpoint on a device, and the moves that tasks are made of."""

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
            checkpoint: whose parts these are.
            device: None takes the GPU if there is one.
            dtype: of all weights; None leaves it to `precision`.
            offload: keep every part in main memory and on the device only while it works.
            tiling: let the autoencoder work tile by tile on pictures larger than the trained size.
            compile: a mode of `acceleration.Compiled` for the network; None compiles nothing.

        Raises:
            ValueError: an unknown mode.
        """
        if compile is not None and compile not in COMPILE_MODES:
            raise ValueError(f"compile must be one of {', '.join(COMPILE_MODES)}, got {compile!r}")
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.device = torch.device(device if device is not None else _best_device())
        self.dtype = dtype or automatic_dtype(self.device)
        self.side_dtype = dtype or automatic_side_dtype(self.device)
        self.offload, self.tiling, self.compile = offload, tiling, compile
        self._resting = torch.device("cpu") if offload else self.device  # where parts are when they do not work
        self._loras: dict[str, tuple[LoRA, float]] = {}

    @cached_property
    def net(self) -> UViT:
        """The U-ViT."""
        with skeleton():
            net = build(self.config.uvit)
        self.checkpoint.load_into(net, "uvit", device=self._resting, dtype=self.dtype)
        if depends_on_batch(self.device, self.dtype):
            fix_batches(net)
        return self._with_loras(net, "uvit", self._loras.values())

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """Prompts -> text latents; holds CLIP's text tower and one Linear of the caption decoder, not its GPT-2."""
        from .encoders.clip import TextEncoder

        return TextEncoder.from_checkpoint(self.checkpoint, self._resting, self.side_dtype)

    @cached_property
    def image_token_encoder(self) -> ImageTokenEncoder:
        """Pictures -> CLIP image tokens."""
        from .encoders.clip import ImageTokenEncoder

        return ImageTokenEncoder.from_checkpoint(self.checkpoint, self._resting, self.side_dtype)

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """Pictures <-> image latents."""
        from .encoders.autoencoder import Autoencoder

        return Autoencoder.from_checkpoint(self.checkpoint, self._resting, self.dtype, self.tiling)

    @cached_property
    def captioner(self) -> CaptionDecoder:
        """Text latents -> captions, with scores and several candidates by its own `decode`."""
        from .encoders.captions import CaptionDecoder

        decoder = CaptionDecoder.from_checkpoint(self.checkpoint, self._resting, self.side_dtype)
        return self._with_loras(decoder, "caption", self._loras.values())

    @cached_property
    def _compiled(self) -> Compiled:
        return Compiled(self.net, self.compile or "default")

    @contextmanager
    def working(self, name: str) -> Iterator[Any]:
        """A part ("net", "autoencoder", ...), on the device for as long as it works."""
        part = getattr(self, name)
        modules = [part] if isinstance(part, nn.Module) else [m for m in vars(part).values() if isinstance(m, nn.Module)]
        try:
            for module in modules if self.offload else ():
                module.to(self.device)
            yield part
        finally:
            for module in modules if self.offload else ():
                module.to(self._resting)

    def load_lora(self, path: str | os.PathLike[str], strength: float = 1.0) -> None:
        """Put a LoRA on the network, and on the caption decoder if the file changes it too. Several add up.

        Args:
            path: the file; one that is on already gets the new strength.
            strength: 1 is as trained, 0 is off, below 0 turns away from what was learned.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it is no LoRA, or one for another model; what was on stays on.
        """
        if not math.isfinite(strength):
            raise ValueError(f"the strength of a LoRA must be a finite number, got {strength}")
        parts = [part for part in LORA_PARTS if part in self.checkpoint.parts()]
        lora = read_lora(path, {part: layers_of(self.checkpoint.state_dict(part)) for part in parts})
        self._exchange_loras(self._loras | {os.fspath(path): (lora, strength)})

    def unload_lora(self, path: str | os.PathLike[str] | None = None) -> None:
        """Take a LoRA off, or all of them; the weights are then those of the checkpoint, bit by bit.

        Raises:
            ValueError: this one is not on.
        """
        if path is not None and os.fspath(path) not in self._loras:
            raise ValueError(f"{path} is not on; on are: {', '.join(self._loras) or 'none'}")
        self._exchange_loras({} if path is None else {p: v for p, v in self._loras.items() if p != os.fspath(path)})

    def _exchange_loras(self, wanted: dict[str, tuple[LoRA, float]]) -> None:
        before, self._loras = self._loras, wanted
        for part, name in LORA_PARTS.items():
            if name in self.__dict__:  # a part that is not built yet gets them when it is
                self._with_loras(self.__dict__[name], part, [*before.values(), *wanted.values()])

    def _with_loras(self, module: Module, part: str, touched: Iterable[tuple[LoRA, float]]) -> Module:
        """`touched`: the LoRAs whose layers may differ from the checkpoint, or shall."""
        names = {f"{layer}.weight" for lora, _ in touched for layer in lora.changes.get(part, {})}
        if names:
            stored = self.checkpoint.state_dict(part)
            put_on(module, part, list(self._loras.values()), {name: stored[name] for name in sorted(names)})
        return module

    def run(
        self,
        path: NoisePath,
        start: Streams,
        plan: Plan,
        generators: Generators,
        avoid: Tensor | None = None,
        method: str | None = None,
    ) -> Streams:
        """Move the streams along a path; those absent from `start` that it moves begin as noise.

        avoid: (1, L, text_dim) text latent that guidance of the image moves away from. method: in place of the plan's.
        """
        downscale = self.config.vae.downscale
        shape = (self.config.uvit.in_chans, plan.height // downscale, plan.width // downscale)
        cuts = list(_cut(len(generators), plan.batch_size))
        parts = []
        with _reporter(plan.progress, path.steps * len(cuts)) as report, self.working("net") as net:
            for number, cut in enumerate(cuts):
                mine = generators[cut]
                begin = _take(start, cut)
                if begin.img is None and path.t_img[0] != path.t_img[-1]:  # the sampler only knows the trained size
                    begin = begin.replace(img=draw_noise(shape, mine, self.device))
                out = sample(
                    self._evaluated(net, plan),
                    path,
                    begin,
                    guidance=plan.guidance,
                    method=method or plan.method,
                    data_type=plan.data_type,
                    generator=mine,
                    callback=report(number * path.steps),
                    unconditional="marginal" if avoid is None else "empty_prompt",
                    empty_text=avoid,
                    guidance_interval=plan.guidance_interval,
                    uncond_interval=plan.uncond_interval,
                )
                parts.append(out)
        return Streams(**{name: torch.cat([part.need(name) for part in parts]) for name, _ in parts[0].items()})

    def _evaluated(self, net: UViT, plan: Plan) -> nn.Module:
        """The network as one run evaluates it."""
        if plan.cache_interval > 1:
            return DeepCache(net, plan.cache_interval, plan.cache_branch)
        return net if self.compile is None else self._compiled

    @torch.inference_mode()
    def encode_texts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> text latents (B, L, text_dim)."""
        with self.working("text_encoder") as encoder:
            return encoder(prompts).float()

    @torch.inference_mode()
    def encode_images(self, pictures: Sequence[ImageSource], count: int, plan: Plan, generators: Generators) -> Streams:
        """Each picture `count` times, each time with another sample of its latent."""
        opened = [open_image(picture) for picture in pictures]
        side = min(plan.width, plan.height)
        squares = [fit(image, side, side) for image in opened]  # CLIP sees the same crop, or its middle
        with self.working("image_token_encoder") as encoder:
            tokens = [encoder(squares[cut]) for cut in _cut(len(squares), plan.batch_size)]
        pixels = to_tensor([fit(image, plan.width, plan.height) for image in opened]).repeat_interleave(count, 0)
        with self.working("autoencoder") as autoencoder:
            latents = [autoencoder.encode(pixels[cut], generators[cut]) for cut in _cut(len(pixels), plan.batch_size)]
        return Streams(torch.cat(latents).float(), torch.cat(tokens).float().repeat_interleave(count, 0))

    @torch.inference_mode()
    def decode_images(self, state: Streams, plan: Plan) -> list[Image.Image]:
        """The image latents as pictures."""
        latents = state.need("img")
        with self.working("autoencoder") as autoencoder:
            decoded = (autoencoder.decode(latents[cut]) for cut in _cut(len(latents), plan.batch_size))
            return [image for pixels in decoded for image in to_images(pixels)]

    def decode_texts(self, state: Streams, plan: Plan) -> list[str]:
        """The text latents as words, the best of the beams."""
        latents = state.need("text")
        with self.working("captioner") as captioner:
            decoded = (captioner.decode(latents[cut]) for cut in _cut(len(latents), plan.batch_size))
            return [candidates[0].text for captions in decoded for candidates in captions]


def _take(streams: Streams, cut: slice) -> Streams:
    return streams.map(lambda stream: stream[cut])


def _cut(total: int, size: int | None) -> Iterator[slice]:
    step = size or max(total, 1)
    return (slice(first, first + step) for first in range(0, total, step))


@contextmanager
def _reporter(progress: bool | Progress, total: int) -> Iterator[Callable[[int], Progress | None]]:
    """Gives, for the steps done before, a callback for `sample` that counts on to `total`."""
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
