"""Guidance: the network evaluations of a point on the path, batched in one forward, and how they combine.

UniDiffuser needs no null token for classifier-free guidance (Ho and Salimans, arXiv 2207.12598): a modality's
unconditional prediction is the same network with the other modality at label 1000, where it is pure noise
(arXiv 2303.06555, section 3.3). For a modality that moves at label t while the other is at u, with the usual scale g
(1 = off; the paper's s is g - 1):

    eps = eps(x_t, y_u, t, u) + (g - 1) * (eps(x_t, y_u, t, u) - eps(x_t, noise, t, 1000))

One rule: with u = 0 it is the paper's conditional guidance, with both moving its joint guidance of three evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .path import CLEAN, MARGINAL
from .streams import MODALITIES, Streams
from .uvit import Predictions

OTHER = {"img": "text", "text": "img"}
"""The modality that conditions each modality."""

Net = Callable[..., Predictions]
"""A UViT, or any function of (img, clip_img, text, t_img, t_text, data_type, heads=) that returns noise predictions."""


MOST_SPREAD, MOST_PEAK = 2.0, 8.0
"""Root mean square and largest value of image latents, in units of the autoencoder's unit variance, beyond which they hardly
show a picture. 849 pictures of flat saturated colours, the most extreme kind, reach 1.8 and 5.9."""


def overshoot_warning(latents: Tensor) -> str | None:
    """A sentence on sampled image latents (B, C, H, W) that leave the range of pictures; None if none does.

    Guidance too strong for a model, by scale or by other means, drives latents beyond those that its autoencoder has seen.
    """
    if not latents.numel():
        return None
    values = latents.detach().float().flatten(1)
    spread, peak = values.square().mean(1).sqrt(), values.abs().amax(1)
    count = int(((spread > MOST_SPREAD) | (peak > MOST_PEAK)).sum())
    if not count:
        return None
    which = "The image overshoots" if len(latents) == 1 else f"{count} of {len(latents)} images overshoot"
    found = f"spread {spread.max():.1f} of at most {MOST_SPREAD:g}, peak {peak.max():.1f} of at most {MOST_PEAK:g}"
    return (
        f"{which} the range of pictures ({found}), so colours burn or the picture breaks up. Lower the guidance (cfg), or the "
        f"strength of what changes the model."
    )


@dataclass(frozen=True)
class Guidance:
    """How strongly each modality is guided, and away from what.

    Attributes:
        img, text: scales g of the modalities, 1 = off.
        interval: labels (low, high) outside of which a modality is not guided (Kynkäänniemi et al., arXiv 2404.07724).
        negative: (1 or B, L, D) text latent that the image is guided away from, clean at t_text = 0. None guides away from the
            marginal.

    Raises:
        ValueError: a scale that is not finite, an empty interval, or a latent of another rank.
    """

    img: float = 1.0
    text: float = 1.0
    interval: tuple[float, float] = (CLEAN, MARGINAL)
    negative: Tensor | None = None

    def __post_init__(self) -> None:
        for name, scale in (("image", self.img), ("text", self.text)):
            if not math.isfinite(scale):
                raise ValueError(f"The {name} guidance is {scale}; it must be a finite number (1 = off).")
        low, high = self.interval
        if not low <= high:
            raise ValueError(f"guidance_interval must be labels (low, high) with low <= high, not {self.interval}.")
        if self.negative is not None and self.negative.ndim != 3:
            raise ValueError(f"negative must be (1 or B, L, D), not {tuple(self.negative.shape)}.")

    @classmethod
    def of(
        cls,
        guidance: float | Sequence[float] | Guidance,
        negative: Tensor | None = None,
        interval: tuple[float, float] | None = None,
    ) -> Guidance:
        """From the arguments of `samplers.sample`: one scale, a pair (image, text), or a rule, which is returned as it is.

        Raises:
            ValueError: a scale that is not finite, or neither one scale nor a pair.
        """
        if isinstance(guidance, Guidance):
            return guidance
        if isinstance(guidance, Sequence) and len(guidance) != 2:
            raise ValueError(f"guidance must be one number or an (image, text) pair, not {guidance!r}.")
        img, text = guidance if isinstance(guidance, Sequence) else (guidance, guidance)
        return cls(float(img), float(text), (CLEAN, MARGINAL) if interval is None else interval, negative)

    def strength(self, modality: str, label: float) -> float:
        """The paper's s = g - 1 of "img" or "text" at a label, 0 outside the interval."""
        scale = {"img": self.img, "text": self.text}[modality]
        return scale - 1 if self.interval[0] <= label <= self.interval[1] else 0.0

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
        """Guided noise prediction; see `predict`. A subclass may evaluate and combine in its own way."""
        point = NetInput(x, t_img, t_text)
        evaluations = needed_evaluations(point, moving, marginal, self, noise)
        heads = [name for modality in MODALITIES if modality in moving for name in MODALITIES[modality]]
        outputs = evaluate(net, evaluations, heads, data_type)
        return self.combine(outputs.pop("main"), outputs, point)

    def combine(self, main: Streams, unconditional: Mapping[str, Streams], point: NetInput) -> Streams:
        """Guided noise of a point, from its prediction and the unconditional ones of the modalities that they name."""
        guided = {}
        for modality, other in unconditional.items():
            s = self.strength(modality, point.label(modality))
            for name in MODALITIES[modality]:
                if (eps := other[name]) is not None:
                    guided[name] = main.need(name) + s * (main.need(name) - eps)
        return main.replace(**guided)


@dataclass(frozen=True)
class NetInput:
    """One input of the network: the state and the labels of its modalities."""

    x: Streams
    t_img: float
    t_text: float

    def label(self, modality: str) -> float:
        """The label of "img" or "text"."""
        return {"img": self.t_img, "text": self.t_text}[modality]

    def without(self, modality: str, noise: Callable[[str], Tensor]) -> NetInput:
        """The same with `modality` marginalised: pure noise at label 1000."""
        x = self.x.replace(**{name: noise(name) for name in MODALITIES[modality]})
        labels = {"img": self.t_img, "text": self.t_text} | {modality: MARGINAL}
        return NetInput(x, labels["img"], labels["text"])


def needed_evaluations(
    point: NetInput,
    moving: Collection[str],
    marginal: Collection[str],
    guidance: Guidance,
    noise: Callable[[str], Tensor],
) -> dict[str, NetInput]:
    """The evaluations of one point: "main", and one named after each moving modality for its unconditional prediction.

    A modality that is not guided here, or whose condition is marginal anyway, has no unconditional evaluation.
    """
    main = point
    for modality in marginal:
        main = main.without(modality, noise)
    needed = {"main": main}
    for modality in moving:
        if guidance.strength(modality, point.label(modality)) and OTHER[modality] not in marginal:
            needed[modality] = _unconditional(point, modality, guidance, noise)
    return needed


def _unconditional(point: NetInput, modality: str, guidance: Guidance, noise: Callable[[str], Tensor]) -> NetInput:
    if modality == "img" and guidance.negative is not None and point.x.text is not None:
        negative = guidance.negative.to(point.x.text).expand_as(point.x.text)
        return NetInput(point.x.replace(text=negative), point.t_img, CLEAN)
    return point.without(OTHER[modality], noise)


def evaluate(net: Net, evaluations: dict[str, NetInput], heads: Sequence[str], data_type: int | Tensor) -> dict[str, Streams]:
    """All evaluations in one forward, batched along B. Returns the noise predictions of `heads` under the same names.

    Every stream must be there; `data_type` is one number or (B,).
    """
    points = list(evaluations.values())
    streams = [torch.cat([t for p in points if (t := p.x[name]) is not None]) for name in ("img", "clip_img", "text")]
    batch, device = streams[0].shape[0] // len(points), streams[0].device

    def labels(values: list[float]) -> Tensor:
        # created on the device: a copy from the CPU would synchronise
        return torch.cat([torch.full((batch,), value, dtype=torch.float32, device=device) for value in values])

    kinds = torch.as_tensor(data_type, device=device).expand(batch).repeat(len(points))
    out = net(*streams, labels([p.t_img for p in points]), labels([p.t_text for p in points]), kinds, heads=heads)
    named = zip(("img", "clip_img", "text"), out, strict=True)
    parts = {name: value.chunk(len(points)) for name, value in named if value is not None and name in heads}
    return {key: Streams(**{name: part[k] for name, part in parts.items()}) for k, key in enumerate(evaluations)}


def predict(
    net: Net,
    x: Streams,
    t_img: float,
    t_text: float,
    *,
    moving: Collection[str],
    guidance: Guidance,
    noise: Callable[[str], Tensor],
    marginal: Collection[str] = (),
    data_type: int | Tensor = 1,
) -> Streams:
    """Guided noise prediction of the moving modalities at (t_img, t_text), from a single forward of the network.

    Args:
        net: the network.
        x: the state; a marginal stream may be None.
        t_img, t_text: labels in [0, 1000].
        moving: modalities to predict, of "img" and "text".
        guidance: the rule.
        noise: called with a stream's name for fresh N(0, I) in the shape of that stream.
        marginal: modalities held at 1000; their streams are replaced with fresh noise.
        data_type: data-type token of v1; one number or (B,).

    Returns:
        Noise predictions of the streams of `moving`; None for the others.
    """
    return guidance.predict(net, x, t_img, t_text, moving=moving, noise=noise, marginal=marginal, data_type=data_type)
