"""UniDiffuser: every task of the model, each a choice of noise path and start.

    task            path             given clean     then
    text_to_image   text_to_image    text            decode the image
    image_to_text   image_to_text    image           decode the text
    joint           joint            -               decode both
    image, text     image, text      -               decode one
    vary_image      image_to_text, then text_to_image: the text latent is handed over
    vary_text       text_to_image, then image_to_text: the image latent and CLIP token are handed over
    gibbs           the two in turn, round after round
    interpolate     image_to_text, inverse text_to_image, text_to_image between the two

Seeds: candidate k of a prompt or picture draws everything (autoencoder sample, start noise, noise inside the sampler)
from one generator seeded with seed + k. So a result depends neither on its batch nor on how the batch is cut:
`count=4, seed=0` gives the four results of `count=1` with seeds 0, 1, 2 and 3.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .checkpoints import Checkpoint, load_checkpoint
from .guidance import Guidance
from .images import ImageSource, fit, open_image, to_images, to_tensor
from .modules import skeleton
from .path import NoisePath
from .samplers import METHODS, sample
from .streams import Streams, draw_noise, item_generators
from .uvit import UViT

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .captions import CaptionDecoder
    from .encoders import Autoencoder, ImageTokenEncoder, TextEncoder

log = logging.getLogger(__name__)

Scales = float | tuple[float, float]
Progress = Callable[[int, int, Streams, Streams], None]
SAMPLERS = tuple(name for name, method in METHODS.items() if not method.implicit)


class Options(TypedDict, total=False):
    """What every task takes besides its input and `count`.

    steps: network steps of each path, at least 1; the checkpoint's default when absent.
    guidance: 1 = off (the paper's scale + 1); or a pair (image, text); the checkpoint's default when absent.
    seed: see the module's text. Default 0.
    method: one of SAMPLERS. Default "dpmpp_2m".
    width, height: of the pictures, in pixels, multiples of `UniDiffuser.multiple`; the trained size when absent.
    data_type: 1 = curated captions (default), 0 = web; v0 checkpoints have no such thing.
    batch_size: most items that are in the network at once; bounds memory and changes nothing else.
    progress: True for a bar on stderr, or a callback (step, total steps, x0: Streams, x: Streams).
    """

    steps: int | None
    guidance: Scales | None
    seed: int
    method: str
    width: int | None
    height: int | None
    data_type: int
    batch_size: int | None
    progress: bool | Progress


@dataclass(frozen=True)
class _Plan:
    """The options of one call, checked, with the checkpoint's defaults filled in."""

    steps: int
    guidance: Scales
    width: int
    height: int
    seed: int = 0
    method: str = "dpmpp_2m"
    data_type: int = 1
    batch_size: int | None = None
    progress: bool | Progress = False


class UniDiffuser:
    """A loaded model. Its parts are built when a task first needs them; `load` in the package makes one.

    Pictures come as PIL images or paths and leave as PIL RGB. Bad input raises ValueError or FileNotFoundError that says
    what to do.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """device: None takes the GPU if there is one. dtype: of the weights; None is float32 on CPU, else float16."""
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.device = torch.device(device if device is not None else _best_device())
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.float16)

    # Parts

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

    @property
    def multiple(self) -> int:
        """What width and height must be multiples of, in pixels."""
        return self.config.vae.downscale * self.config.uvit.patch_size

    # Tasks

    def text_to_image(
        self, prompt: str | Sequence[str], *, count: int = 1, negative: str | None = None, **options: Unpack[Options]
    ) -> list[Image.Image]:
        """Pictures of one prompt or of each of several, `count` for each.

        `negative` describes what to move away from: guidance then starts at this prompt instead of at no prompt.
        """
        plan = self._plan(options)
        prompts = _listed(prompt)
        generators = _generators(plan.seed, len(prompts), count)
        text = self._encode_texts(prompts).repeat_interleave(count, 0)
        avoid = None if negative is None else self._encode_texts([negative])
        out = self._run(NoisePath.text_to_image(plan.steps), Streams(text=text), plan, generators, avoid)
        return self._decode_images(out, plan)

    def image_to_text(
        self, image: ImageSource | Sequence[ImageSource], *, count: int = 1, **options: Unpack[Options]
    ) -> list[str]:
        """Captions of one picture or of each of several, `count` for each."""
        plan = self._plan(options)
        pictures = _listed(image)
        generators = _generators(plan.seed, len(pictures), count)
        given = self._encode_images(pictures, count, plan, generators)
        return self._decode_texts(self._to_text(given, plan, generators), plan)

    def joint(self, *, count: int = 1, **options: Unpack[Options]) -> list[tuple[Image.Image, str]]:
        """Pairs of a picture and its caption, out of nothing."""
        plan = self._plan(options)
        out = self._run(NoisePath.joint(plan.steps), Streams(), plan, _generators(plan.seed, 1, count))
        return list(zip(self._decode_images(out, plan), self._decode_texts(out, plan), strict=True))

    def image(self, *, count: int = 1, **options: Unpack[Options]) -> list[Image.Image]:
        """Pictures out of nothing; the marginal distribution p(image), which needs no guidance."""
        plan = self._plan(options)
        out = self._run(NoisePath.image(plan.steps), Streams(), plan, _generators(plan.seed, 1, count))
        return self._decode_images(out, plan)

    def text(self, *, count: int = 1, **options: Unpack[Options]) -> list[str]:
        """Captions out of nothing; the marginal distribution p(text), which needs no guidance."""
        plan = self._plan(options)
        out = self._run(NoisePath.text(plan.steps), Streams(), plan, _generators(plan.seed, 1, count))
        return self._decode_texts(out, plan)

    def vary_image(
        self, image: ImageSource | Sequence[ImageSource], *, count: int = 1, **options: Unpack[Options]
    ) -> list[Image.Image]:
        """Pictures of the same subject: picture -> text latent -> picture, without words in between."""
        plan = self._plan(options)
        pictures = _listed(image)
        generators = _generators(plan.seed, len(pictures), count)
        given = self._encode_images(pictures, count, plan, generators)
        return self._decode_images(self._to_image(self._to_text(given, plan, generators), plan, generators), plan)

    def vary_text(self, prompt: str | Sequence[str], *, count: int = 1, **options: Unpack[Options]) -> list[str]:
        """Other words for a prompt: text -> image latent -> text, without pixels in between."""
        plan = self._plan(options)
        prompts = _listed(prompt)
        generators = _generators(plan.seed, len(prompts), count)
        given = Streams(text=self._encode_texts(prompts).repeat_interleave(count, 0))
        return self._decode_texts(self._to_text(self._to_image(given, plan, generators), plan, generators), plan)

    def gibbs(
        self,
        start: Image.Image | os.PathLike[str] | str | None = None,
        *,
        rounds: int = 4,
        count: int = 1,
        **options: Unpack[Options],
    ) -> list[tuple[Image.Image, str]]:
        """Blocked Gibbs sampling: p(text | image) and p(image | text) in turn, latents handed over.

        Args:
            start: a picture (PIL image or Path), a prompt (str), or None for a picture out of nothing.
            rounds: pairs in a chain, each made from the one before.
            count: chains.

        Returns:
            `rounds` pairs, in order; with several chains, chain after chain.
        """
        _whole("rounds", rounds, least=1)
        plan = self._plan(options)
        generators = _generators(plan.seed, 1, count)
        halves = [self._to_text, self._to_image]
        if start is None:
            state = self._run(NoisePath.image(plan.steps), Streams(), plan, generators)
        elif isinstance(start, str):
            state = Streams(text=self._encode_texts([start]).repeat_interleave(count, 0))
            halves.reverse()
        else:
            state = self._encode_images([start], count, plan, generators)
        pairs = []
        for _ in range(rounds):
            for half in halves:
                state = half(state, plan, generators)
            pairs.append(list(zip(self._decode_images(state, plan), self._decode_texts(state, plan), strict=True)))
        return [pair for chain in zip(*pairs, strict=True) for pair in chain]

    def interpolate(
        self, image_a: ImageSource, image_b: ImageSource, *, frames: int = 8, **options: Unpack[Options]
    ) -> list[Image.Image]:
        """Pictures on the way from one picture to another, both ends included as the model reproduces them.

        Each picture is captioned and, conditioned on its own text latent, inverted to noise; noises and text latents
        are interpolated on the sphere, and every mixture is sampled deterministically (arXiv 2303.06555, applications).
        Guidance is off and steps are 100 unless given, since the inversion is only then close to exact; `method` is
        for the captions.
        """
        _whole("frames", frames, least=2)
        plan = self._plan({"guidance": 1.0, "steps": 100, **options})
        generators = _generators(plan.seed, 2, 1)
        given = self._encode_images([image_a, image_b], 1, plan, generators)
        ends = self._to_text(given, plan, generators)
        path = NoisePath.text_to_image(plan.steps)
        noise = self._run(path.reversed(), ends, plan, generators, method="ddim_inverse")
        weights = [frame / (frames - 1) for frame in range(frames)]
        mixed = noise.map(lambda stream: torch.stack([slerp(stream[0], stream[1], weight) for weight in weights]))
        return self._decode_images(self._run(path, mixed, plan, _generators(plan.seed, 1, frames), method="ddim"), plan)

    # Machinery

    def _plan(self, options: Options) -> _Plan:
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        unknown = given.keys() - Options.__annotations__.keys()
        if unknown:
            raise TypeError(f"unknown option {min(unknown)!r}; options are {', '.join(Options.__annotations__)}")
        trained = self.config.image_size
        defaults = {"steps": 50, "guidance": 8.0, "width": trained, "height": trained, **self.config.defaults}
        plan = _Plan(**(defaults | given))
        _whole("steps", plan.steps, least=1)
        Guidance.of(plan.guidance)
        if plan.method not in SAMPLERS:
            raise ValueError(f"method must be one of {', '.join(SAMPLERS)}, got {plan.method!r}")
        for name, side in (("width", plan.width), ("height", plan.height)):
            _whole(name, side)
            if side < self.multiple or side % self.multiple:
                raise ValueError(f"{name} must be a positive multiple of {self.multiple} pixels, got {side}")
        _whole("seed", plan.seed)
        if plan.batch_size is not None:
            _whole("batch_size", plan.batch_size, least=1)
        return plan

    def _to_text(self, state: Streams, plan: _Plan, generators: list[torch.Generator]) -> Streams:
        return self._run(NoisePath.image_to_text(plan.steps), state.replace(text=None), plan, generators)

    def _to_image(self, state: Streams, plan: _Plan, generators: list[torch.Generator]) -> Streams:
        return self._run(NoisePath.text_to_image(plan.steps), Streams(text=state.text), plan, generators)

    def _run(
        self,
        path: NoisePath,
        start: Streams,
        plan: _Plan,
        generators: list[torch.Generator],
        avoid: Tensor | None = None,
        method: str | None = None,
    ) -> Streams:
        """Move the streams along a path; those absent from `start` that it moves begin as noise."""
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
    def _encode_texts(self, prompts: list[str]) -> Tensor:
        """-> (B, L, text_dim)."""
        return self.text_encoder(prompts).float()

    @torch.inference_mode()
    def _encode_images(self, pictures: list[Any], count: int, plan: _Plan, generators: list[torch.Generator]) -> Streams:
        """Each picture `count` times, each time with another sample of its latent."""
        opened = [open_image(picture) for picture in pictures]
        side = min(plan.width, plan.height)
        squares = [fit(image, side, side) for image in opened]  # CLIP sees the same crop, or its middle
        tokens = [self.image_token_encoder(squares[cut]) for cut in _cut(len(squares), plan.batch_size)]
        pixels = to_tensor([fit(image, plan.width, plan.height) for image in opened]).repeat_interleave(count, 0)
        latents = [self.autoencoder.encode(pixels[cut], generators[cut]) for cut in _cut(len(pixels), plan.batch_size)]
        return Streams(torch.cat(latents).float(), torch.cat(tokens).float().repeat_interleave(count, 0))

    @torch.inference_mode()
    def _decode_images(self, state: Streams, plan: _Plan) -> list[Image.Image]:
        latents = state.need("img")
        decoded = (self.autoencoder.decode(latents[cut]) for cut in _cut(len(latents), plan.batch_size))
        return [image for pixels in decoded for image in to_images(pixels)]

    def _decode_texts(self, state: Streams, plan: _Plan) -> list[str]:
        latents = state.need("text")
        decoded = (self.captioner.decode(latents[cut]) for cut in _cut(len(latents), plan.batch_size))
        return [candidates[0].text for captions in decoded for candidates in captions]


def load(
    name_or_path: str | os.PathLike[str] = "emoji",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> UniDiffuser:
    """Open a model: the name of the bundled one ("emoji"), or a file or folder in one of the layouts that are read.

    Only the headers are read here; each part is loaded when a task first needs it.

    Raises:
        FileNotFoundError, ValueError: no such model, or not one; the text says which file and what to do.
    """
    return UniDiffuser(load_checkpoint(name_or_path), device, dtype)


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Interpolation on the sphere, `weight` 0 = a, 1 = b, of two tensors as vectors; straight where they align."""
    cosine = torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).clamp(-1, 1)
    angle = math.acos(float(cosine))
    if math.sin(angle) < 1e-4:
        return torch.lerp(a, b, weight)
    return (math.sin((1 - weight) * angle) * a + math.sin(weight * angle) * b) / math.sin(angle)


T = TypeVar("T")


def _listed(given: T | Sequence[T]) -> list[T]:
    items = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not items:
        raise ValueError("give at least one prompt or picture, got an empty list")
    return items


def _whole(name: str, value: Any, least: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        raise ValueError(f"{name} must be a whole number{f' of at least {least}' if least else ''}, got {value!r}")


def _generators(seed: int, subjects: int, count: int) -> list[torch.Generator]:
    """Subject after subject, `count` generators each; candidate k has the same seed for every subject."""
    _whole("count", count, least=1)
    return [generator for _ in range(subjects) for generator in item_generators(seed, count)]


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
            yield lambda done: lambda step, _, x0, x: bar.update(done + step - bar.n)
    else:
        yield lambda done: None


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
