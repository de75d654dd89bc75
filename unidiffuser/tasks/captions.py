"""Captions beyond the best one: candidates with scores, rewriting some words, and scoring given captions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from typing_extensions import Unpack

from ..encoders.candidate import Caption
from ..options import Options, number, whole_number
from ..path import CLEAN, MARGINAL, NoisePath
from ..runtime.fast_lora import IMAGE_TO_TEXT
from ..scoring import CaptionScore, caption_scores, denoising_errors
from ..streams import Streams, item_generators
from .editing import Editing, strength_of
from .inputs import Pictures, Prompts, common_number, generators_of, read_pictures, read_prompts, repeated
from .words import Words, token_mask

BEAMS = 5  # of the authors' beam search
SHUFFLED = 8  # captions that a score is compared with


class Captions(Editing):
    """Tasks about captions of pictures."""

    def caption(
        self,
        image: Pictures,
        *,
        candidates: int = 1,
        beams: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        count: int = 1,
        **options: Unpack[Options],
    ) -> list[list[Caption]]:
        """Candidate captions of one picture, or of each of several, with their scores.

        Args:
            image: one or more pictures.
            candidates: captions decoded from each text latent, best first.
            beams: width of the beam search; None for 5, or as many as candidates.
            top_p: draw the words from the most likely ones that together have this probability (nucleus sampling), instead of
                beam search; 0.8 is usual.
            temperature: 1 is neutral, less is more predictable.
            count: text latents of each picture, with the seeds seed, seed + 1, ...
            **options: see `options.Options`.

        Returns:
            For each text latent its candidates: `encoders.captions.Caption` with `text`, `score` (mean log-probability of its
            tokens) and `tokens`.
        """
        chosen = self.resolve(options, IMAGE_TO_TEXT)
        search = search_options(candidates, beams, top_p, temperature)
        given = read_pictures(image, chosen)
        generators = generators_of(chosen, len(given.items), count)
        encoded = self.encode_images(given.items, count, chosen, generators)
        out = self.run(NoisePath.image_to_text(chosen["steps"], spacing=chosen["spacing"]), encoded, chosen, generators)
        if chosen["output"] == "latent":
            return out  # type: ignore[return-value]  # as `options.Options` says
        return given.spread(self.decode_candidates(out, chosen, **search, generator=generators), count)

    def rewrite(
        self,
        text: Prompts,
        image: Pictures | None = None,
        *,
        change: Words | None = None,
        keep: Words | None = None,
        rest: bool = True,
        strength: float = 1.0,
        count: int = 1,
        **options: Unpack[Options],
    ) -> list[str]:
        """Captions with some words written anew, to fit a picture if one is given.

        Args:
            text: the caption to change, or one for each picture.
            image: the pictures that it should fit.
            change: words to change, as in "red"; or positions, 0 for the first word and -1 for the last.
            keep: the words to keep, instead of `change`.
            rest: also write anew what follows the text, so that it can grow longer.
            strength: noise level that the changed words start from, above 0 to 1.
            count: results of each picture, or of each text without one.
            **options: see `options.Options`.

        Raises:
            ValueError: not exactly one of `change` and `keep`, or a word that the text does not contain.
        """
        chosen = self.resolve({**options, "on_error": "raise"}, "text" if image is None else IMAGE_TO_TEXT)
        texts = read_prompts(text, chosen).items
        pictures = [] if image is None else read_pictures(image, chosen).items
        start = MARGINAL * strength_of(strength)
        inputs = common_number(captions=texts, pictures=pictures)
        self.warn_about(texts)
        tokenizer, length = self.text_encoder.tokenizer, self.config.uvit.num_text_tokens
        masks = torch.cat(
            [token_mask(each, lambda word: len(tokenizer.encode(word)), length, change=change, keep=keep, rest=rest)
             for each in texts]
        )  # fmt: skip
        generators = generators_of(chosen, inputs, count)
        streams = Streams()
        if pictures:
            streams = self.encode_images(pictures if len(pictures) == inputs else pictures * inputs, count, chosen, generators)
        streams = streams.replace(text=repeated(self.encode_texts(texts), inputs, count))
        hold = CLEAN if pictures else MARGINAL
        path = NoisePath.image_to_text(chosen["steps"], start=start, hold=hold, spacing=chosen["spacing"])
        out = self._follow(path, streams, chosen, generators, mask=Streams(text=repeated(masks, inputs, count)))
        return self.results(out, chosen, "text")

    def score(
        self,
        image: Pictures,
        captions: Prompts,
        *,
        shuffled: int | Sequence[str] = SHUFFLED,
        levels: int = 8,
        **options: Unpack[Options],
    ) -> list[CaptionScore]:
        """How well captions fit a picture, by the denoising error of the picture under each; with labels, a classifier.

        Args:
            image: the picture.
            captions: the captions to compare.
            shuffled: what `log_odds_shuffled` compares with: captions of other pictures, or the number of captions that the
                model draws from p(text) for it.
            levels: noise levels to test; 8 is quick, 32 more reliable.
            **options: see `options.Options`; the seed is that of the noise.

        Returns:
            `scoring.CaptionScore` of each caption, best first.
        """
        chosen = self.resolve({**options, "on_error": "raise"}, "text")
        texts = read_prompts(captions, chosen).items
        levels = whole_number("levels", levels, least=1)
        pictures = read_pictures(image, chosen).items
        if len(pictures) != 1:
            raise ValueError(f"score takes one picture, got {len(pictures)}; call it for each")
        others = [] if isinstance(shuffled, int) else read_prompts(shuffled, chosen).items
        self.warn_about([*texts, *others])
        latents = self.encode_texts([*texts, "", *others])
        if isinstance(shuffled, int):
            generators = item_generators(chosen["seed"], whole_number("shuffled", shuffled, least=1))
            path = NoisePath.text(chosen["steps"], spacing=chosen["spacing"])
            latents = torch.cat([latents, self.run(path, Streams(), chosen, generators).need("text")])
        clean = self.encode_images(pictures, 1, chosen, item_generators(chosen["seed"], 1))
        with self.on_device(self.net) as net:
            errors = denoising_errors(
                net,
                clean,
                latents,
                levels=levels,
                generator=item_generators(chosen["seed"], 1)[0],
                data_type=min(chosen["data_type"], max(0, self.config.uvit.data_types - 1)),
                batch_size=chosen["batch_size"],
            )
        return caption_scores(texts, errors, len(texts))


def search_options(candidates: int, beams: int | None, top_p: float | None, temperature: float) -> dict[str, object]:
    """Arguments of `CaptionDecoder.decode`, checked.

    Raises:
        ValueError: a value out of range, or fewer beams than candidates.
    """
    found: dict[str, object] = {
        "count": whole_number("candidates", candidates, least=1),
        "temperature": number("temperature", temperature, 0.01, 100),
    }
    if top_p is not None:
        return {**found, "method": "nucleus", "top_p": number("top_p", top_p, 0.001, 1)}
    width = max(BEAMS, candidates) if beams is None else whole_number("beams", beams, least=1)
    if width < candidates:
        raise ValueError(f"candidates must be at most as many as beams, got {candidates} and {width}; raise beams")
    return {**found, "beams": width}
