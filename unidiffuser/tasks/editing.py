"""Editing: img2img, inpainting, inversion and reconstruction, and sampling along any path from any start."""

from __future__ import annotations

from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor
from typing_extensions import Unpack

from ..engine import Engine
from ..options import Options, number
from ..path import CLEAN, LEAST, MARGINAL, NoisePath
from ..runtime.fast_lora import TEXT_TO_IMAGE, route_of
from ..streams import MODALITIES, MODALITY_OF, Streams, start_streams
from .inputs import (
    Generators,
    Inputs,
    Pictures,
    Prompts,
    check_path,
    check_streams,
    common_number,
    generators_of,
    mask_picture,
    negative_latents,
    read_mask,
    read_pictures,
    read_prompts,
    repeated,
    texts_of,
    warn_of_other_shape,
)

INVERSE, FORWARD = "ddim_inverse", "ddim"  # deterministic, each the inverse of the other
EXACT: Options = {"guidance": 1.0, "steps": 100}
"""Defaults of an inversion, which is close to exact only with these."""
ALWAYS: Options = {"preset": "exact", "on_error": "raise"}
"""Of an inversion: few steps would lead to another picture."""


class Decoded(NamedTuple):
    """Pictures and captions of sampled streams; None for a modality without a clean stream."""

    images: list[Image.Image] | None
    captions: list[str] | None


class Editing(Engine):
    """Tasks that change a picture, or that follow a path of the caller's."""

    def sample(
        self,
        path: NoisePath,
        *,
        image: Pictures | None = None,
        text: Prompts | None = None,
        latents: Streams | None = None,
        noised: bool = False,
        mask: Streams | None = None,
        negative: Prompts | None = None,
        count: int = 1,
        **options: Unpack[Options],
    ) -> Any:
        """Sample along any noise path, from any start and with any held levels.

        A modality that the path starts below label 1000, or holds there, must be given; it is noised to that level.

        Args:
            path: the path, such as `NoisePath.from_points("1000,1000 400,0 0,0", steps=20)`; it has its steps and spacing.
            image: clean pictures, encoded here.
            text: clean captions, encoded here.
            latents: streams to use instead of `image` or `text`, (1 or N, ...) each.
            noised: the `latents` are already at the noise levels of the path's first point, as an earlier path left them.
            mask: streams of 1 = generate, 0 = keep, see `samplers.sample`.
            negative: one negative prompt, or one for each input.
            count: results of each input, or in all if nothing is given.
            **options: see `options.Options`; `steps`, `spacing` and `speeds` have no effect.

        Returns:
            `Decoded` of what the path brings to its clean end; `Streams` with output="latent".

        Raises:
            ValueError: something that the path needs is not given, or numbers of inputs that do not fit.
        """
        chosen = self.resolve({**options, "on_error": "raise"}, route_of(check_path(path)))
        pictures = [] if image is None else read_pictures(image, chosen).items
        texts = [] if text is None else read_prompts(text, chosen).items
        given = Streams() if latents is None else check_streams(latents, "latents")
        inputs = common_number(pictures=pictures, captions=texts, latents=range(given.batch))
        generators = generators_of(chosen, inputs, count)
        streams = given.map(lambda rows: repeated(rows, inputs, count))
        if pictures:
            encoded = self.encode_images(pictures if len(pictures) == inputs else pictures * inputs, count, chosen, generators)
            streams = streams.replace(img=encoded.img, clip_img=encoded.clip_img)
        if texts:
            self.warn_about(texts_of(texts, negative))
            streams = streams.replace(text=repeated(self.encode_texts(texts), inputs, count))
        away_from = negative_latents(self.encode_texts, negative, range(inputs), inputs, count, chosen)
        levels = {n: path.labels(m)[0] for m, names in MODALITIES.items() for n in names if noised and given[n] is not None}
        out = self._follow(path, streams, chosen, generators, mask=mask, negative=away_from, levels=levels)
        if chosen["output"] == "latent":
            return out
        return self.decode(finished(path, out), **options)

    def decode(self, streams: Streams, **options: Unpack[Options]) -> Decoded:
        """Pictures and captions of latents, of the streams that are there."""
        chosen = self.resolve(options)
        check_streams(streams, "the latents")
        images = None if streams.img is None else self.decode_images(streams, chosen)
        return Decoded(images, None if streams.text is None else self.decode_texts(streams, chosen))

    def img2img(
        self,
        image: Pictures,
        prompt: Prompts | None = None,
        *,
        strength: float = 0.6,
        negative: Prompts | None = None,
        count: int = 1,
        **options: Unpack[Options],
    ) -> list[Image.Image]:
        """Pictures that start from a noised picture instead of pure noise.

        Args:
            image: one or more pictures.
            prompt: what they should show, one text or one for each picture; None uses no text.
            strength: noise level to start from, above 0 to 1. 0.3 changes details, 0.8 leaves little of the picture.
            negative: one negative prompt, or one for each picture.
            count: results of each picture.
            **options: see `options.Options`.
        """
        given = read_pictures(image, self.resolve(options))
        return self._edit(given, prompt, None, strength, negative, count, options)

    def inpaint(
        self,
        image: Pictures,
        mask: Any,
        prompt: Prompts | None = None,
        *,
        strength: float = 1.0,
        negative: Prompts | None = None,
        count: int = 1,
        **options: Unpack[Options],
    ) -> list[Image.Image]:
        """Generate the white part of a mask, and keep the rest of the picture.

        Args:
            image: one or more pictures.
            mask: white = generate, black = keep; a picture in any form or an array (H, W), see `tasks.inputs.read_mask`. One
                for all pictures, of their size.
            prompt: what the whole picture should show; None uses no text.
            strength: noise level that the white part starts from, above 0 to 1; 1 starts it from pure noise.
            negative: one negative prompt, or one for each picture.
            count: results of each picture.
            **options: see `options.Options`.

        Returns:
            The pictures. The kept part is as the autoencoder reproduces it.
        """
        chosen = self.resolve(options)
        opened = mask_picture(mask)
        cells = read_mask(opened, chosen["width"], chosen["height"], self.config.vae.downscale)
        pictures = read_pictures(image, chosen)
        warn_of_other_shape(opened.size, pictures.items)
        return self._edit(pictures, prompt, cells, strength, negative, count, options)

    def _edit(
        self,
        given: Inputs[Image.Image],
        prompt: Prompts | None,
        mask: Tensor | None,
        strength: float,
        negative: Prompts | None,
        count: int,
        options: Options,
    ) -> Any:
        chosen = self.resolve(options, TEXT_TO_IMAGE if prompt is not None else "image")
        start = MARGINAL * strength_of(strength)
        texts = [] if prompt is None else read_prompts(prompt, {**chosen, "on_error": "raise"}).items
        if len(texts) > 1:
            common_number(pictures=range(given.total), prompts=texts)
            texts = [texts[place] for place in given.places]
        inputs = len(given.items)
        generators = generators_of(chosen, inputs, count)
        streams = self.encode_images(given.items, count, chosen, generators)
        hold = CLEAN if texts else MARGINAL
        if texts:
            self.warn_about(texts_of(texts, negative))
            streams = streams.replace(text=repeated(self.encode_texts(texts), inputs, count))
        path = NoisePath.text_to_image(chosen["steps"], start=start, hold=hold, spacing=chosen["spacing"])
        away_from = negative_latents(self.encode_texts, negative, given.places, given.total, count, chosen)
        out = self._follow(
            path, streams, chosen, generators, mask=None if mask is None else Streams(img=mask), negative=away_from
        )
        return given.spread(self.results(out, chosen, "img"), count)

    def invert(self, image: Pictures, prompt: Prompts | None = None, **options: Unpack[Options]) -> Streams:
        """The noise from which the model generates a picture (DDIM inversion), with the text that it was inverted under.

        Args:
            image: one or more pictures.
            prompt: a caption of each, or one for all; None lets the model caption them first.
            **options: see `options.Options`; steps are 100 and guidance is 1 by default, and presets change nothing.

        Returns:
            Image latent and CLIP token at label 1000, and the clean text latent, for `reconstruct`.
        """
        chosen = self.resolve({**EXACT, **options, **ALWAYS})
        pictures = read_pictures(image, chosen).items
        generators = generators_of(chosen, len(pictures), 1)
        streams = self.encode_images(pictures, 1, chosen, generators)
        if prompt is None:
            path = NoisePath.image_to_text(chosen["steps"], spacing=chosen["spacing"])
            streams = self.run(path, streams, chosen, generators)
        else:
            texts = read_prompts(prompt, chosen).items
            common_number(pictures=pictures, prompts=texts)
            self.warn_about(texts)
            streams = streams.replace(text=repeated(self.encode_texts(texts), len(pictures), 1))
        path = NoisePath.text_to_image(chosen["steps"], spacing=chosen["spacing"])
        return self.run(path.reversed(), streams, chosen, generators, method=INVERSE)

    def reconstruct(
        self, source: Pictures | Streams, prompt: Prompts | None = None, **options: Unpack[Options]
    ) -> list[Image.Image]:
        """The pictures of inverted noise, or edits of them under another text.

        Args:
            source: the result of `invert`, or pictures, which are inverted first.
            prompt: another text for all or for each; None keeps the one of the inversion.
            **options: as for `invert`, with the same values.
        """
        chosen = self.resolve({**EXACT, **options, "preset": "exact"})
        noise = source if isinstance(source, Streams) else self.invert(source, **options)
        if prompt is not None:
            texts = read_prompts(prompt, chosen).items
            self.warn_about(texts)
            noise = noise.replace(text=repeated(self.encode_texts(texts), noise.batch, 1))
        path = NoisePath.text_to_image(chosen["steps"], spacing=chosen["spacing"])
        noise = Streams(**{name: noise.need(name) for name in ("img", "clip_img", "text")})
        out = self.run(path, noise.to(self.device), chosen, generators_of(chosen, noise.batch, 1), method=FORWARD)
        return self.results(out, chosen, "img")

    def _follow(
        self,
        path: NoisePath,
        streams: Streams,
        options: Options,
        generators: Generators,
        *,
        mask: Streams | None = None,
        negative: Tensor | None = None,
        levels: dict[str, float] | None = None,
    ) -> Streams:
        """Clean streams, noised to the first point of a path, and moved along it."""
        shapes = self.config.uvit.item_shapes
        mask = (mask or Streams()).to(self.device)
        start = start_streams(path, streams, mask, generators, shapes, levels or {})
        mask = Streams(**{name: rows for name, rows in mask.items() if start[name] is not None})
        return self.run(path, start.to(self.device), options, generators, negative, mask=mask)


def finished(path: NoisePath, streams: Streams) -> Streams:
    """The streams that a path moves to their clean end."""
    ends = {m for m in MODALITIES if path.labels(m)[0] != path.labels(m)[-1] <= LEAST}
    return Streams(**{name: value for name, value in streams.items() if MODALITY_OF[name] in ends})


def strength_of(strength: float) -> float:
    """A strength above 0 and at most 1; ValueError otherwise."""
    if number("strength", strength, 0, 1) == 0:
        raise ValueError("strength must be above 0, which would change nothing, and at most 1")
    return float(strength)
