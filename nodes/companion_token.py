"""The CLIP image token travels beside a plain image latent, whatever sampler of the host works on the latent.

The token takes its own DPM-Solver++(2M) steps between the noise levels at which the guider is asked for a prediction. With
sampler `dpmpp_2m` this is the library's sampler; with `lcm` the token too gets fresh noise at each step; with others it arrives
its own way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..unidiffuser.guidance import overshoot_warning
from ..unidiffuser.schedule import NUM_LABELS, label_of_sigma
from ..unidiffuser.steppers import Interval, Level, Point, dpmpp_2m, lcm
from ..unidiffuser.streams import draw_noise, draw_normal, item_generators
from .input_checks import check_conditioning, check_image_latent, clip_token, unclip_warning
from .memory_errors import say_what_to_do
from .model_warnings import cfg_warning, model_warnings, momentum_warning, sampler_name, sampler_warning
from .side_streams import SIDE, Companion, SideStreams, closing, guided
from .types import show_warning

LCM = "sample_lcm"  # the host's sampler that renews the noise at each step
HISTORY = 3  # points that are kept; the stepper uses two, one more allows a sampler to step back
ENDING = 0.5  # sigma of the last evaluation from which a picture is left, for samplers that choose their own steps
SEARCHED = 64  # items of a batch that the seed's noise is compared with, to find an item taken from it


class CompanionToken(Companion):
    """The token of a run of a host sampler.

    Args:
        noise: (B, 1, D) the token's noise.
        known: (B, 1, D) the clean token to hold, or None to generate it with the image.
        draw_text: see `SideStreams`.
        from_noise: whether the image starts as pure noise; else the token starts without a signal at the image's level.
        fresh: draws noise (B, 1, D) for each step of a sampler that renews it; None for one that does not.
    """

    def __init__(
        self,
        noise: Tensor,
        known: Tensor | None,
        draw_text: Callable[[], Tensor],
        from_noise: bool = True,
        fresh: Callable[[], Tensor] | None = None,
    ):
        super().__init__()
        self.noise, self.known, self.draw_text, self.from_noise = noise, known, draw_text, from_noise
        self.fresh = fresh
        self.points: list[Point] = []
        self.first: Level | None = None  # of the run
        self.sigma = math.inf  # of the last evaluation

    def at(self, sigma: float, image: Tensor) -> SideStreams:
        """The token at a noise level, for the guider's evaluation of `image` there."""
        self.sigma = sigma
        self.level = Level.of(float(label_of_sigma(torch.tensor(sigma, dtype=torch.float64))))
        self.first = self.first or self.level
        if self.points and self.points[-1].level.sigma < self.first.sigma <= self.level.sigma:
            self.points.clear()  # a node samples the whole path again, from its beginning
        self.x = self._move(self.level, image.device)
        self.side = SideStreams(self.x, self.draw_text, image)
        return self.side

    def _move(self, level: Level, device: torch.device) -> Tensor:
        noise = self.noise.to(device)
        if self.known is not None:
            return level.alpha * self.known.to(device) + level.sigma * noise
        if not self.points:
            return noise if self.from_noise else level.sigma * noise
        while len(self.points) > 1 and self.points[-1].level.sigma <= level.sigma:
            self.points.pop()  # the sampler asks again, at this level or above: from the point before
        if self.points[-1].level.sigma == 0:
            return self.points[-1].x
        interval = Interval(self.points[-1].level, level)
        if self.fresh is not None:
            return lcm(self.points, interval) + level.sigma * self.fresh().to(device)
        return dpmpp_2m(self.points, interval)

    def has_ended(self, sigmas: Tensor) -> bool:
        """Whether the last evaluation was near the end of the schedule: a sampler may stop on its way, or go upwards."""
        last = float(sigmas[sigmas > 0].min()) if bool((sigmas > 0).any()) else 0.0
        return self.sigma <= max(last * (1 + 1e-3), ENDING)

    def learn(self, guider: Any) -> None:
        """Take the predictions of the evaluation that `at` began."""
        predictions = self.side.predictions("clip_img") if self.side is not None else {}
        self.side = None
        eps = guided(predictions, guider)
        if eps is not None and self.known is None:
            self.points = [*self.points, Point(self.level, self.x, eps)][-HISTORY:]


def sample_with_token(
    executor: Any,
    noise: Tensor,
    latent_image: Tensor,
    sampler: Any,
    sigmas: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """OUTER_SAMPLE wrapper: a companion token for the run.

    A CLIP_VISION_OUTPUT in the positive conditioning (core unCLIPConditioning) is held as the token; without one the token is
    generated with the image.
    """
    guider = executor.class_obj
    options = guider.model_options.setdefault("transformer_options", {})
    if SIDE in options:  # the library samples, and moves the token itself
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    model = guider.model_patcher.model
    net = model.diffusion_model.config
    positive = guider.conds.get("positive", [])
    tiled = "model_function_wrapper" in guider.model_options
    largest = float(guider.model_patcher.get_model_object("model_sampling").sigma_max)
    from_noise = float(sigmas[0]) > largest or math.isclose(float(sigmas[0]), largest, rel_tol=1e-5)
    start = NUM_LABELS if from_noise else float(label_of_sigma(sigmas[0]))
    advice = check_image_latent(latent_image, net, model.latent_format.spacial_downscale_ratio, positive, tiled, start)
    batch, seed = len(latent_image), kwargs.get("seed", args[3] if len(args) > 3 else None) or 0
    generators = [generator for k in drawn_items(noise, seed) for generator in item_generators(seed + k, 1)]
    draw_noise(tuple(latent_image.shape[1:]), generators, "cpu")  # the library draws an item's image noise first

    def token_noise() -> Tensor:
        return draw_noise((1, net.clip_img_dim), generators, "cpu")

    options[SIDE] = CompanionToken(
        token_noise(),
        clip_token(positive, batch, net.clip_img_dim),
        lambda: draw_noise((net.num_text_tokens, net.text_dim), generators, "cpu"),
        from_noise=from_noise,
        fresh=token_noise if sampler_name(sampler) == LCM else None,
    )
    patcher, cfg = guider.model_patcher, getattr(guider, "cfg", math.inf)
    own = (
        advice,
        check_conditioning(text for texts in guider.conds.values() for text in texts),
        unclip_warning(positive, from_noise),
        sampler_warning(sampler),
        cfg_warning(patcher, cfg),
        momentum_warning(patcher, sigmas, sampler_name(sampler)),
    )
    for warning in filter(None, (*own, *model_warnings(patcher))):
        options[SIDE].notes.warn(warning)
    try:
        with say_what_to_do(), options[SIDE].running(model):
            out: Tensor = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        if float(sigmas[-1]) == 0 and options[SIDE].has_ended(sigmas):  # else noise is left, for another sampler
            show_warning(overshoot_warning(model.process_latent_in(out)) or "")
        return out
    finally:
        options.pop(SIDE, None)


def predict_with_token(
    executor: Any, x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None, seed: int | None = None
) -> Tensor:
    """PREDICT_NOISE wrapper: brings the token to the noise level of a guider's evaluation and takes its prediction."""
    options = model_options or {}
    token = options.get("transformer_options", {}).get(SIDE)
    if not isinstance(token, CompanionToken):
        return executor(x, timestep, options, seed)
    side = token.at(float(timestep.flatten()[0]), x)
    with closing(options, side):
        out = executor(x, timestep, options, seed)
    token.learn(executor.class_obj)
    return out


def drawn_items(noise: Tensor, seed: int) -> list[int]:
    """For each item of a noise (B, ...), its index in the batch that the host draws from `seed`; k for item k of other noise.

    An item that "Latent From Batch" takes from a batch so keeps its picture.
    """
    generator = torch.Generator().manual_seed(seed % 2**64)
    found: dict[int, int] = {}
    for index in range(max(SEARCHED, len(noise))):
        drawn = draw_normal((1, *noise.shape[1:]), generator)[0]
        found |= {k: index for k, item in enumerate(noise.cpu()) if k not in found and torch.equal(item.float(), drawn)}
        if len(found) == len(noise) or (index == 0 and not noise.any()):
            break
    return [found.get(k, k) for k in range(len(noise))]
