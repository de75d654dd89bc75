"""A checkpoint at work: its parts, built when first needed, and the one way in which streams are moved.

Pictures and words become streams, a path moves them, and they become pictures and words again. Items are cut into batches
here, and nowhere else; what an item becomes does not depend on the cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .checkpoints import Checkpoint
from .images import ImageSource, fit, open_image, to_images, to_tensor
from .modules import skeleton
from .options import Plan, Progress
from .path import NoisePath
from .samplers import sample
from .streams import Streams, draw_noise
from .uvit import UViT

if TYPE_CHECKING:
    from .captions import CaptionDecoder
    from .encoders import Autoencoder, ImageTokenEncoder, TextEncoder

Generators = list[torch.Generator]
"""One for each item."""


class Engine:
    """The parts of a checkpoint on a device, and the moves that tasks are made of."""

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """device: None takes the GPU if there is one. dtype: of the weights; None is float32 on CPU, else float16."""
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.device = torch.device(device if device is not None else _best_device())
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.float16)

    @cached_property
    def net(self) -> UViT:
        """The U-ViT."""
        with skeleton():
            net = UViT(self.config.uvit)
        return self.checkpoint.load_into(net, "uvit", device=self.device, dtype=self.dtype)

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """Prompts -> text latents; holds CLIP's text tower and one Linear of the caption decoder, not its GPT-2."""
        from .encoders import TextEncoder

        return TextEncoder.from_checkpoint(self.checkpoint, self.device, self.dtype)

    @cached_property
    def image_token_encoder(self) -> ImageTokenEncoder:
        """Pictures -> CLIP image tokens."""
        from .encoders import ImageTokenEncoder

        return ImageTokenEncoder.from_checkpoint(self.checkpoint, self.device, self.dtype)

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """Pictures <-> image latents."""
        from .encoders import Autoencoder

        return Autoencoder.from_checkpoint(self.checkpoint, self.device, self.dtype)

    @cached_property
    def captioner(self) -> CaptionDecoder:
        """Text latents -> captions, with scores and several candidates by its own `decode`."""
        from .captions import CaptionDecoder

        return CaptionDecoder.from_checkpoint(self.checkpoint, self.device, self.dtype)

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
        with _reporter(plan.progress, path.steps * len(cuts)) as report:
            for number, cut in enumerate(cuts):
                mine = generators[cut]
                begin = _take(start, cut)
                if begin.img is None and path.t_img[0] != path.t_img[-1]:  # the sampler only knows the trained size
                    begin = begin.replace(img=draw_noise(shape, mine, self.device))
                out = sample(
                    self.net,
                    path,
                    begin,
                    guidance=plan.guidance,
                    method=method or plan.method,
                    data_type=plan.data_type,
                    generator=mine,
                    callback=report(number * path.steps),
                    unconditional="marginal" if avoid is None else "empty_prompt",
                    empty_text=avoid,
                )
                parts.append(out)
        return Streams(**{name: torch.cat([part.need(name) for part in parts]) for name, _ in parts[0].items()})

    @torch.inference_mode()
    def encode_texts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> text latents (B, L, text_dim)."""
        return self.text_encoder(prompts).float()

    @torch.inference_mode()
    def encode_images(self, pictures: Sequence[ImageSource], count: int, plan: Plan, generators: Generators) -> Streams:
        """Each picture `count` times, each time with another sample of its latent."""
        opened = [open_image(picture) for picture in pictures]
        side = min(plan.width, plan.height)
        squares = [fit(image, side, side) for image in opened]  # CLIP sees the same crop, or its middle
        tokens = [self.image_token_encoder(squares[cut]) for cut in _cut(len(squares), plan.batch_size)]
        pixels = to_tensor([fit(image, plan.width, plan.height) for image in opened]).repeat_interleave(count, 0)
        latents = [self.autoencoder.encode(pixels[cut], generators[cut]) for cut in _cut(len(pixels), plan.batch_size)]
        return Streams(torch.cat(latents).float(), torch.cat(tokens).float().repeat_interleave(count, 0))

    @torch.inference_mode()
    def decode_images(self, state: Streams, plan: Plan) -> list[Image.Image]:
        """The image latents as pictures."""
        latents = state.need("img")
        decoded = (self.autoencoder.decode(latents[cut]) for cut in _cut(len(latents), plan.batch_size))
        return [image for pixels in decoded for image in to_images(pixels)]

    def decode_texts(self, state: Streams, plan: Plan) -> list[str]:
        """The text latents as words, the best of the beams."""
        latents = state.need("text")
        decoded = (self.captioner.decode(latents[cut]) for cut in _cut(len(latents), plan.batch_size))
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
