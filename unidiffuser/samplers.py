"""The sampler: one loop that moves the three streams along any noise path.

    out = sample(net, NoisePath.text_to_image(20), Streams(noise, clip_noise, text), guidance=4.0)

Captioning, text to image, joint generation, variation, inversion and inpainting differ only in the path and the start.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .guidance import Guidance, Net, predict
from .path import LEAST, MARGINAL, NoisePath
from .schedule import add_noise
from .steppers import METHODS, Level, Point, intervals
from .streams import MODALITIES, MODALITY_OF, Streams, draw_noise, generators_for, item_generators
from .uvit import Predictions, UViTConfig

__all__ = ["METHODS", "SAMPLING_METHODS", "NonFiniteError", "Streams", "add_noise", "item_generators", "sample"]

Callback = Callable[[int, int, Streams, Streams], None]
SAMPLING_METHODS = tuple(name for name, method in METHODS.items() if not method.implicit)
"""The methods that go from noise to clean."""
HISTORY = 2  # earlier points that the steppers of the highest order use


class NonFiniteError(ValueError, FloatingPointError):
    """NaN or infinity in a stream; the text names the stream and the step."""


@torch.no_grad()
def sample(
    net: Net,
    path: NoisePath,
    streams: Streams,
    *,
    guidance: float | Sequence[float] | Guidance = 1.0,
    method: str = "dpmpp_2m",
    data_type: int | Tensor = 1,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    mask: Streams | None = None,
    kept: Streams | None = None,
    callback: Callback | None = None,
    negative: Tensor | None = None,
    guidance_interval: tuple[float, float] | None = None,
) -> Streams:
    """Move `streams` along `path`.

    Args:
        net: a UViT, or any function (img, clip_img, text, t_img, t_text, data_type) that returns the three noise predictions;
            `heads=` is passed if it takes it. Called once per step ("ddim_inverse": twice) with everything that guidance needs
            in one batch, in its own dtype and on its own device.
        path: the noise levels of both modalities at each step.
        streams: the start, one batch of img (B, C, H, W), clip_img (B, 1, D) and text (B, L, D) at the noise levels of the
            path's first point: clean at 0, noised by `add_noise` in between, noise at 1000. One that starts at 1000 may be
            None; then it is drawn from the generators in the network's own size.
        guidance: classifier-free guidance scale, 1 = off; one number, a pair (image, text), or a `Guidance`, which then also
            holds `negative` and `guidance_interval`.
        method: one of `METHODS`. "reference" is the authors' solver, which ends at label 1 and returns that state; all others
            end where the path ends, and their last interval into label 0 returns the x_0 prediction. "ddim_inverse" goes
            from the clean end of the path to the noisy one, in whichever direction it is written; all others go downwards.
        data_type: data-type token of v1 networks: 1 = curated, 0 = web; one number or (B,).
        generator: one per item, or a single one; see `streams.generators_for`. Used for marginal streams, streams that are not
            given, the noise under a mask, and the fresh noise of "lcm". None seeds from the operating system. Global generators
            stay untouched.
        mask: streams of 1 = generate, 0 = keep, broadcastable to the streams ((B, 1, H, W), (B, 1, 1), (B, L, 1)); None
            generates all of a stream. Where it is 0, the given stream holds the clean value to keep, whatever the noise level
            at which the rest starts; it follows the path under one fixed noise and is returned as it was given. Values in
            between mix both before and after each evaluation, as k-diffusion samplers do; they need `kept`.
        kept: the clean streams of a mask with values between 0 and 1, whose `streams` are noisy wherever it is above 0.
        callback: called after each step with (step from 0, total, x_0 prediction, state); may raise to interrupt.
        negative: (1 or B, L, D) text latent of a negative prompt, which the image is guided away from; None guides away from
            the unconditional (marginal) prediction.
        guidance_interval: labels (low, high) outside of which guidance is off.

    Returns:
        The streams at the path's last point, fp32, on the network's device. Held streams are returned as they were given.

    Raises:
        ValueError: an input that cannot be sampled; the text says what to change.
        NonFiniteError: NaN or infinity in a stream.
    """
    if method not in METHODS:
        raise ValueError(f"Unknown method {method!r}; choose one of {', '.join(METHODS)}.")
    how = METHODS[method]
    path = _directed(path, method)
    rule = Guidance.of(guidance, negative, guidance_interval)
    run, device = adapted(net, streams)

    count = streams.batch or (1 if generator is None or isinstance(generator, torch.Generator) else len(generator))
    generators = generators_for(generator, count)
    shapes = _shapes(net, streams, path)
    if rule.negative is not None and tuple(rule.negative.shape[1:]) != shapes["text"]:
        raise ValueError(f"negative is {tuple(rule.negative.shape)}; an item of text is {shapes['text']}.")

    def noise(name: str) -> Tensor:
        return draw_noise(shapes[name], generators, device)

    x = streams.to(device, torch.float32)
    for name, modality in MODALITY_OF.items():
        if x[name] is None and len(set(path.labels(modality))) > 1:  # a stream that never moves has no state to start from
            x = x.replace(**{name: noise(name)})
    steps_of = {modality: intervals(path.labels(modality), how.least) for modality in MODALITIES}
    masked = _Kept(x, mask, noise, kept, path)
    x = masked.start(x, path)
    finite = _Finite(device)
    finite.check(x, "before the first step")

    history: dict[str, list[Point]] = {name: [] for name in MODALITY_OF}
    for i in range(path.steps):
        now = {modality: steps_of[modality][i] for modality in MODALITIES}
        moving = [m for m, interval in now.items() if interval.moving]
        if not moving:
            continue
        marginal = [m for m, interval in now.items() if not interval.moving and interval.level.label == MARGINAL]
        labels = {m: (interval.next if how.implicit else interval.level).label for m, interval in now.items()}
        start, newest = x, dict[str, Point]()
        for name in (n for m in moving if now[m].index == 0 for n in MODALITIES[m]):
            history[name] = []  # points before a hold say nothing about this run
        for _ in range(how.evaluations):
            seen = masked.mixed(x, labels)
            eps = predict(run, seen, labels["img"], labels["text"], moving=moving, guidance=rule, noise=noise,
                          marginal=marginal, data_type=data_type)  # fmt: skip
            for name, value in masked.correct(eps, x, seen, labels).items():
                interval = now[MODALITY_OF[name]]
                newest[name] = Point(interval.level, start.need(name), value)
                x = x.replace(**{name: how.step([*history[name], newest[name]], interval)})
        if how.renews:
            ends = {name: now[MODALITY_OF[name]].next for name in newest}
            fresh = {name: noise(name) for name, end in ends.items() if end.sigma}
            x = x.replace(**{name: x.need(name) + ends[name].sigma * value for name, value in fresh.items()})
            masked.renew(fresh)
        for name, point in newest.items():
            history[name] = [*history[name], point][-HISTORY:]
        finite.check(x, f"at step {i + 1} of {path.steps}")
        if callback is not None:
            callback(i, path.steps, x.replace(**{name: point.x0 for name, point in newest.items()}), x)
    finite.settle()
    return masked.finish(x, path)


class _Kept:
    """The parts of the streams that a mask keeps, each under one fixed noise."""

    def __init__(
        self,
        given: Streams,
        mask: Streams | None,
        noise: Callable[[str], Tensor],
        kept: Streams | None,
        path: NoisePath,
    ):
        self.clean = given
        self.keep: dict[str, Tensor] = {}
        self.noise: dict[str, Tensor] = {}
        self.soft: dict[str, Tensor] = {}  # masks with values between 0 and 1
        for name, values in (mask or Streams()).items():
            start = given.need(name)
            values = values.to(start.device)
            if values.ndim != start.ndim or any(m not in (1, g) for m, g in zip(values.shape, start.shape)):  # noqa: B905
                raise ValueError(f"The mask of {name} is {tuple(values.shape)}; it must fit {tuple(start.shape)}.")
            if not ((values >= 0) & (values <= 1)).all():
                raise ValueError(f"The mask of {name} must hold values from 0 (keep) to 1 (generate).")
            self.keep[name] = values == 0
            self.noise[name] = noise(name)
            if not ((values == 0) | (values == 1)).all():
                if kept is None or kept[name] is None:
                    raise ValueError(f"The mask of {name} has values between 0 and 1; pass the clean {name} as `kept`.")
                self._soften(name, values.float(), kept.need(name).to(start), path.labels(MODALITY_OF[name])[0])

    def _soften(self, name: str, mask: Tensor, clean: Tensor, label: float) -> None:
        """Take the noise that the start holds, so that a mixture of both keeps its variance."""
        start, level = self.clean.need(name), Level.of(label)
        own = start if label == MARGINAL or not level.sigma else (start - level.alpha * clean) / level.sigma
        self.noise[name] = torch.where(self.keep[name], self.noise[name], own)
        self.soft[name] = mask
        self.clean = self.clean.replace(**{name: clean})

    def start(self, x: Streams, path: NoisePath) -> Streams:
        """The state with the kept parts at the noise level of the path's first point."""
        for name, keep in self.keep.items():
            noised = add_noise(self.clean.need(name), self.noise[name], path.labels(MODALITY_OF[name])[0])
            x = x.replace(**{name: torch.where(keep, noised, x.need(name))})
        return x

    def renew(self, noise: Mapping[str, Tensor]) -> None:
        """From now on the kept parts are under this noise, like the rest of the state."""
        self.noise.update({name: value for name, value in noise.items() if name in self.noise})

    def mixed(self, x: Streams, labels: Mapping[str, float]) -> Streams:
        """The state that the network sees: under a soft mask a mixture of the state and the noised clean stream."""
        for name, mask in self.soft.items():
            noised = add_noise(self.clean.need(name), self.noise[name], labels[MODALITY_OF[name]])
            x = x.replace(**{name: mask * x.need(name) + (1 - mask) * noised})
        return x

    def correct(self, eps: Streams, x: Streams, seen: Streams, labels: Mapping[str, float]) -> Streams:
        """The noise prediction with the true noise in the kept parts, so that every stepper takes them along the path.

        Under a soft mask it is the noise that the mixture of the predicted and the kept x_0 implies for the state.
        """
        for name, value in eps.items():
            if name in self.soft:
                level, mask = Level.of(labels[MODALITY_OF[name]]), self.soft[name]
                x0 = (seen.need(name) - level.sigma * value) / level.alpha
                x0 = mask * x0 + (1 - mask) * self.clean.need(name)
                value = (x.need(name) - level.alpha * x0) / level.sigma
            if name in self.keep:
                eps = eps.replace(**{name: torch.where(self.keep[name], self.noise[name], value)})
        return eps

    def finish(self, x: Streams, path: NoisePath) -> Streams:
        """The result with the kept parts as they were given, in modalities that end clean."""
        ends = {n: path.labels(MODALITY_OF[n])[-1] for n in self.keep}
        done = {n: torch.where(self.keep[n], self.clean.need(n), x.need(n)) for n, end in ends.items() if end <= LEAST}
        return x.replace(**done)


def _directed(path: NoisePath, method: str) -> NoisePath:
    """The path in the direction of the method."""
    if METHODS[method].implicit:
        return path if path.ascending else path.reversed()
    if path.ascending:
        raise ValueError(f"{method} needs a falling path and this one rises. Use path.reversed(), or ddim_inverse.")
    return path


def adapted(net: Net, streams: Streams) -> tuple[Net, torch.device]:
    """The network as a function of fp32 streams on its own device, and that device."""
    parameters = net.parameters() if isinstance(net, nn.Module) else ()
    weight: Tensor | None = next((p for p in parameters if p.is_floating_point()), None)
    anchor = weight if weight is not None else next((value for _, value in streams.items()), torch.empty(0))
    dtype = torch.float32 if weight is None else weight.dtype
    takes = inspect.signature(net.forward if isinstance(net, nn.Module) else net).parameters
    takes_heads = "heads" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values())

    def run(img: Tensor, clip_img: Tensor, text: Tensor, *labels: Tensor, heads: Sequence[str]) -> Predictions:
        inputs = (img.to(dtype), clip_img.to(dtype), text.to(dtype), *labels)
        out = net(*inputs, heads=heads) if takes_heads else net(*inputs)
        eps_img, eps_clip, eps_text = (None if x is None else x.float() for x in out)
        return eps_img, eps_clip, eps_text

    return run, anchor.device


def _shapes(net: Net, streams: Streams, path: NoisePath) -> dict[str, tuple[int, ...]]:
    """Shape of one item of each stream, from the given streams or else from the network."""
    shapes = {name: tuple(value.shape[1:]) for name, value in streams.items()}
    config = getattr(net, "config", None)
    for name in MODALITY_OF.keys() - shapes.keys():
        start = path.labels(MODALITY_OF[name])[0]
        if start != MARGINAL:
            raise ValueError(
                f"The {name} stream is missing; the path starts it at label {start:g}: pass it noised to that label."
            )
        if not isinstance(config, UViTConfig):
            raise ValueError(
                f"The {name} stream is missing, and this network has no `config` with its shape: pass noise for it."
            )
        shapes[name] = config.item_shapes[name]
    return shapes


class _Finite:
    """Checks for NaN and infinity: at once on a CPU, elsewhere at the end, since each check would wait for the device."""

    def __init__(self, device: torch.device):
        self.at_once = device.type == "cpu"
        self.checks: list[tuple[str, str, Tensor]] = []

    def check(self, x: Streams, when: str) -> None:
        self.checks += [(name, when, torch.isfinite(value).all()) for name, value in x.items()]
        if self.at_once:
            self.settle()

    def settle(self) -> None:
        """Raise NonFiniteError for the first check that failed."""
        checks, self.checks = self.checks, []
        if not checks or bool(torch.stack([passed for _, _, passed in checks]).all()):
            return
        name, when, _ = next(check for check in checks if not check[2])
        advice = "Check the inputs, lower the guidance, or use fp32 or bf16."
        raise NonFiniteError(f"The {name} stream holds NaN or infinity {when}. {advice}")
