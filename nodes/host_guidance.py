"""The library's guidance with the host's conditions and patches: areas, masks, ranges of steps, and functions of the cfg."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..unidiffuser.guidance import Guidance, Net, NetInput, evaluate, needed_evaluations
from ..unidiffuser.schedule import alpha_sigma, sigma_of_label
from ..unidiffuser.streams import Streams
from ..unidiffuser.uvit import HEADS
from .host_model import ROLE, TEXT, TEXT_LABEL, RowValues, text_condition
from .side_streams import POSITIVE, REGION, SIDE, Companion, SideStreams, closing, guided

LIMITS = ("area", "mask", "timestep_start", "timestep_end")  # keys of a condition that does not act everywhere


class HostNet:
    """Adapts a MODEL to the network interface of the library, with the host's wrappers and patches applied.

    Args:
        guider: the host's guider, with the model loaded.
        options: its model_options in this run.
        device: of the model.
    """

    def __init__(self, guider: Any, options: dict[str, Any], device: torch.device):
        self.guider, self.options, self.device = guider, options, device
        self.model = guider.inner_model
        self.config = self.model.diffusion_model.config
        self.token: Tensor | None = None  # its last predicted x_0

    def __call__(
        self,
        img: Tensor,
        clip_img: Tensor,
        text: Tensor,
        t_img: Tensor,
        t_text: Tensor,
        data_type: Tensor,
        heads: Sequence[str] = HEADS,
    ) -> tuple[Tensor | None, ...]:
        """Noise predictions, as `UViT.forward`."""
        sigma = sigma_of_label(t_img).to(self.device)
        x = scaled(img.to(self.device), sigma)
        side = SideStreams(clip_img, lambda: text, x, data_type, tuple(heads))
        options = {**self.options["transformer_options"], "sigmas": sigma[:1], "cond_or_uncond": [0], "uuids": []}
        options[SIDE] = Companion(side, options[SIDE].notes)
        conds = {TEXT: text.to(self.device).flatten(1), TEXT_LABEL: t_text.tolist(), ROLE: [POSITIVE]}
        wrapper = self.options.get("model_function_wrapper")
        if wrapper is None:
            denoised = self.model.apply_model(x, sigma, transformer_options=options, **conds)
        else:
            arguments = {"input": x, "timestep": sigma, "cond_or_uncond": [0], "c": {"transformer_options": options, **conds}}
            denoised = wrapper(self.model.apply_model, arguments)
        found = {name: next(iter(side.predictions(name).values())) for name in ("clip_img", "text") if name in heads}
        if "img" in heads:
            found["img"] = noise_of(denoised, x, sigma)
        return tuple(found[name].to(img.device) if name in found else None for name in HEADS)


def scaled(img: Tensor, sigma: Tensor) -> Tensor:
    """A variance-preserving latent in the host's scale, x_0 + sigma * eps."""
    return img * torch.hypot(sigma, torch.ones_like(sigma)).view(-1, 1, 1, 1)


def noise_of(denoised: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The noise that a denoised latent implies; 0 where there is none."""
    return (x - denoised) / sigma.clamp(min=1e-8).view(-1, 1, 1, 1)


@dataclass(frozen=True)
class HostGuidance(Guidance):
    """Guides the image by the host's own function, so that everything a node puts on the MODEL or the CONDITIONING acts.

    The text is guided by the library's rule.
    """

    net: HostNet | None = None

    def predict(
        self,
        net: Net,
        x: Streams,
        t_img: float,
        t_text: float,
        *,
        moving: Collection[str],
        noise: Callable[[str], Tensor],
        marginal: Collection[str] = (),
        data_type: int | Tensor = 1,
    ) -> Streams:
        """As `Guidance.predict`."""
        host = self.net
        if host is None or "img" not in moving:
            return super().predict(
                net, x, t_img, t_text, moving=moving, noise=noise, marginal=marginal, data_type=data_type
            )  # fmt: skip
        point = NetInput(x, t_img, t_text)
        needed = needed_evaluations(point, moving, marginal, self, noise)
        first, *regions = host.guider.conds[POSITIVE]
        alone = not regions and not any(key in first for key in LIMITS)
        eps = self._image(host, needed, HEADS if "text" in moving and alone else HEADS[:2], noise, data_type)
        if "text" not in moving:
            return eps
        rest = {"text": needed["text"]} if "text" in needed else {}
        if eps.text is None:  # else it was evaluated with the image
            rest["main"] = needed["main"]
        outputs = evaluate(net, rest, ["text"], data_type) if rest else {}
        if "main" in outputs:
            eps = eps.replace(text=outputs.pop("main").text)
        return self.combine(eps, outputs, point)

    def _image(
        self,
        host: HostNet,
        needed: dict[str, NetInput],
        heads: tuple[str, ...],
        noise: Callable[[str], Tensor],
        data_type: int | Tensor,
    ) -> Streams:
        """Guided noise of the image and its token; with "text" in `heads` also the unguided noise of the text."""
        main, guider = needed["main"], host.guider
        img = main.x.need("img").to(host.device)
        sigma = sigma_of_label(torch.full((len(img),), main.t_img)).to(host.device)
        x, unconditional = scaled(img, sigma), needed.get("img")
        side = SideStreams(
            main.x.need("clip_img"),
            lambda: noise("text") if unconditional is None else unconditional.x.need("text"),
            x,
            data_type,
            heads,
        )
        conds = guider.conds
        first, *regions = conds[POSITIVE]
        state = {TEXT: text_condition(main.x.need("text").to(host.device)), TEXT_LABEL: RowValues([main.t_text])}
        guider.conds = {
            **conds,
            POSITIVE: [_with(first, state), *(_with(region, {ROLE: RowValues([REGION])}) for region in regions)],
        }
        guider.set_cfg(self.strength("img", main.t_img) + 1 if unconditional is not None else 1.0)
        companion = host.options["transformer_options"][SIDE]
        companion.side = side
        try:
            with closing(host.options, side) as options:
                denoised = guider(x, sigma, model_options=options, seed=0)
        finally:
            guider.conds, companion.side = conds, None
        texts = [value for (role, _), value in side.predictions("text").items() if role == POSITIVE]
        token, alpha, noise_level = main.x.need("clip_img"), *(float(v) for v in alpha_sigma(torch.tensor(main.t_img)))
        clip_img = guided(side.predictions("clip_img"), guider)
        if clip_img is None:  # a cache skipped the evaluation
            clip_img = (token - alpha * (torch.zeros_like(token) if host.token is None else host.token)) / noise_level
        host.token = (token - noise_level * clip_img) / alpha
        return Streams(img=noise_of(denoised, x, sigma), clip_img=clip_img, text=texts[0] if texts else None)


def _with(condition: dict[str, Any], model_conds: dict[str, Any]) -> dict[str, Any]:
    """A condition with other arguments of the model."""
    return {**condition, "model_conds": {**condition["model_conds"], **model_conds}}
