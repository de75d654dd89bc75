"""The sampler: its steppers against diffusers', the authors' formulas and exact solutions; seeds, masks and errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_path import falling_paths
from torch import Tensor

from unidiffuser.path import NoisePath
from unidiffuser.samplers import METHODS, NonFiniteError, Streams, add_noise, item_generators, sample
from unidiffuser.schedule import alpha_sigma, half_logsnr
from unidiffuser.steppers import Level, intervals
from unidiffuser.streams import draw_noise, noised
from unidiffuser.uvit import UViT, UViTConfig

SHAPES = {"img": (4, 4, 6), "clip_img": (1, 5), "text": (3, 2)}
MEAN, SPREAD = 0.5, 0.3  # of the data that `gaussian` knows
DOWNWARDS = [name for name, method in METHODS.items() if not method.implicit]


def noise(batch: int = 2, seed: int = 0) -> Streams:
    g = torch.Generator().manual_seed(seed)
    return Streams(**{name: torch.randn(batch, *shape, generator=g) for name, shape in SHAPES.items()})


def levels(t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(v.reshape(-1, *[1] * (like.ndim - 1)) for v in alpha_sigma(t))


def gaussian(img, clip_img, text, t_img, t_text, data_type):
    """The exact noise prediction for data N(MEAN, SPREAD^2), the modalities independent."""

    def eps(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = levels(t, x)
        return sigma * (x - alpha * MEAN) / (alpha**2 * SPREAD**2 + sigma**2)

    return eps(img, t_img), eps(clip_img, t_img), eps(text, t_text)


def bent(img, clip_img, text, t_img, t_text, data_type):
    """A prediction that is no one's exact solution: curved in x and in both labels, each stream seeing the other's level."""
    exact = gaussian(img, clip_img, text, t_img, t_text, data_type)
    parts = []
    for eps, x, own, other in zip(exact, (img, clip_img, text), (t_img, t_img, t_text), (t_text, t_text, t_img), strict=True):
        own, other = (t.reshape(-1, *[1] * (x.ndim - 1)) / 1000 for t in (own, other))
        parts.append(eps + 0.1 * own * torch.sin(2 * x + 3 * own + other))
    return tuple(parts)


def flow(x: Tensor, start: float, end: float) -> Tensor:
    """Exact probability flow of `gaussian` between two labels: z = (x - alpha MEAN) / std stays what it is."""
    (a, s), (b, r) = (map(float, alpha_sigma(torch.tensor(t, dtype=torch.float64))) for t in (start, end))
    z = (x - a * MEAN) / math.sqrt(a**2 * SPREAD**2 + s**2)
    return b * MEAN + z * math.sqrt(b**2 * SPREAD**2 + r**2)


def error(out: Tensor, expected: Tensor) -> float:
    return float((out - expected).norm() / expected.norm())


# Against diffusers

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}


def of_diffusers(method: str):
    import diffusers

    if method == "ddim":
        return diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=True)
    order = {"dpmpp_2m": 2, "dpmpp_3m": 3}[method]
    return diffusers.DPMSolverMultistepScheduler(
        **SCHEDULE, algorithm_type="dpmsolver++", solver_order=order, final_sigmas_type="zero"
    )


@pytest.mark.parametrize("method", ["ddim", "dpmpp_2m", "dpmpp_3m"])
def test_steppers_agree_with_diffusers_one_label_lower(method):
    theirs, start = of_diffusers(method), noise()
    theirs.set_timesteps(20)
    assert [int(t) + 1 for t in theirs.timesteps] == [1000 - 50 * k for k in range(20)]
    x, clean, track = start.need("img"), torch.zeros(2, 3, 2), []
    for t in theirs.timesteps:
        label = torch.full((2,), float(t) + 1)
        eps = bent(x, start.need("clip_img"), clean, label, torch.zeros(2), 1)[0]
        x = theirs.step(eps, t, x).prev_sample
        track.append(x)
    ours: list[Tensor] = []
    sample(bent, NoisePath.text_to_image(20), start.replace(text=clean), method=method,
           callback=lambda step, total, x0, x: ours.append(x.need("img")))  # fmt: skip
    torch.testing.assert_close(torch.stack(ours), torch.stack(track), atol=1e-4, rtol=1e-4)


# Against the formulas of the authors' solver, written out as in the paper


def singlestep_3(net, x: Tensor, steps: int) -> Tensor:
    """DPM-Solver++ singlestep, order 3, "fast", uniform in t from 1 to 1/1000; x is a text stream."""

    def x0(x: Tensor, t: float) -> Tensor:
        alpha, sigma = alpha_sigma(torch.tensor(t, dtype=torch.float64))
        label = torch.full((len(x),), t)
        eps = net(torch.zeros(2, 4, 4, 6), torch.zeros(2, 1, 5), x.float(), torch.zeros(len(x)), label, 1)[2]
        return (x - sigma * eps) / alpha

    rest = {0: [2, 1], 1: [1], 2: [2]}[steps % 3]
    orders = [3] * ((steps - sum(rest)) // 3) + rest
    t, i = torch.linspace(1000, 1, steps + 1, dtype=torch.float64).tolist(), 0
    for order in orders:
        s, end = t[i], t[i + order]
        lam = [float(half_logsnr(torch.tensor(v, dtype=torch.float64))) for v in t[i : i + order + 1]]
        (alpha, sigma), sigma_s = alpha_sigma(torch.tensor(end, dtype=torch.float64)), levels_of(s)[1]
        h = lam[-1] - lam[0]
        m = x0(x, s)
        if order == 1:
            x = sigma / sigma_s * x - alpha * math.expm1(-h) * m
        elif order == 2:
            r1 = (lam[1] - lam[0]) / h
            alpha_1, sigma_1 = levels_of(t[i + 1])
            m1 = x0(sigma_1 / sigma_s * x - alpha_1 * math.expm1(-r1 * h) * m, t[i + 1])
            x = sigma / sigma_s * x - alpha * math.expm1(-h) * m - 0.5 / r1 * alpha * math.expm1(-h) * (m1 - m)
        else:
            r1, r2 = (lam[1] - lam[0]) / h, (lam[2] - lam[0]) / h
            (alpha_1, sigma_1), (alpha_2, sigma_2) = levels_of(t[i + 1]), levels_of(t[i + 2])
            m1 = x0(sigma_1 / sigma_s * x - alpha_1 * math.expm1(-r1 * h) * m, t[i + 1])
            phi_22 = math.expm1(-r2 * h) / (r2 * h) + 1
            x2 = sigma_2 / sigma_s * x - alpha_2 * math.expm1(-r2 * h) * m + r2 / r1 * alpha_2 * phi_22 * (m1 - m)
            m2 = x0(x2, t[i + 2])
            phi_2 = math.expm1(-h) / h + 1
            x = sigma / sigma_s * x - alpha * math.expm1(-h) * m + 1 / r2 * alpha * phi_2 * (m2 - m)
        i += order
    return x


def levels_of(t: float) -> tuple[float, float]:
    alpha, sigma = alpha_sigma(torch.tensor(t, dtype=torch.float64))
    return float(alpha), float(sigma)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 7, 20, 50])
def test_reference_is_the_authors_solver(steps):
    start = noise().replace(img=torch.zeros(2, 4, 4, 6), clip_img=torch.zeros(2, 1, 5))
    out = sample(bent, NoisePath.image_to_text(steps), start, method="reference")
    expected = singlestep_3(bent, start.need("text").double(), steps)
    torch.testing.assert_close(out.need("text").double(), expected, atol=1e-5, rtol=1e-4)


def test_reference_ends_at_label_1_and_the_others_at_0():
    path = NoisePath.joint(7)
    assert [s.next.label for s in intervals(path.t_img, least=1.0)] == pytest.approx([1000 - 999 * k / 7 for k in range(1, 8)])
    assert intervals(path.t_img)[-1].next.label == 0
    assert intervals((1000, 1), least=1.0)[-1].next.label == 1


# Against exact solutions


@pytest.mark.parametrize("method", [name for name in DOWNWARDS if not METHODS[name].renews])
@pytest.mark.parametrize("make", [
    NoisePath.joint,
    lambda steps: NoisePath.joint(steps, speeds=(3, 1)),
    lambda steps: NoisePath.joint(steps, spacing="logsnr"),
    lambda steps: NoisePath.joint(steps, spacing="karras"),
    lambda steps: NoisePath.through((1000, 1000), (1000, 400), (200, 300), (0, 0), steps=steps),
], ids=["diagonal", "unequal speeds", "logsnr", "karras", "corners"])  # fmt: skip
def test_every_stepper_converges_to_the_flow_on_every_path(method, make):
    start, errors = noise(), []
    for steps in (20, 80):
        out = sample(gaussian, make(steps), start, method=method)
        errors.append([error(x, flow(start.need(name), 1000, METHODS[method].least)) for name, x in out.items()])
    for few, many in zip(*errors, strict=True):
        assert many < max(0.6 * few, 0.005)
        assert many < 0.13


def test_higher_orders_are_more_exact():
    start, errors = noise(), {}
    labels = NoisePath.joint(24, spacing="logsnr").t_img[:-1]  # without the last interval, which all take in first order
    for method in ("ddim", "dpmpp_2m", "dpmpp_3m", "reference"):
        out = sample(gaussian, NoisePath(labels, labels), start, method=method).need("img")
        errors[method] = error(out, flow(start.need("img"), 1000, 1))
    assert errors["dpmpp_3m"] < errors["dpmpp_2m"] < errors["ddim"] / 3
    assert errors["reference"] < errors["ddim"] / 3


@pytest.mark.parametrize("net", [gaussian, bent])
def test_inversion_finds_the_noise_that_ddim_takes_back(net):
    g = torch.Generator().manual_seed(3)
    real = noise().map(lambda x: MEAN + SPREAD * torch.randn(x.shape, generator=g))
    for path in (NoisePath.text_to_image(100), NoisePath.joint(100, speeds=(1, 2))):
        up = sample(net, path.reversed(), real, method="ddim_inverse")
        assert torch.equal(up.need("img"), sample(net, path, real, method="ddim_inverse").need("img"))
        back = sample(net, path, up, method="ddim")
        for name, x in real.items():
            assert error(back.need(name), x) < 0.01, name
    if net is gaussian:
        assert error(up.need("img"), flow(real.need("img"), 0, 1000)) < 0.1


def test_a_start_below_1000_is_taken_as_noised_to_there():
    clean = noise(seed=5).map(lambda x: MEAN + SPREAD * x)
    start = clean.zip(noise(), lambda x, n: add_noise(x, n, 400))
    out = sample(gaussian, NoisePath.text_to_image(40, start=400), start.replace(text=clean.text))
    assert error(out.need("img"), flow(start.need("img"), 400, 0)) < 0.03
    assert torch.equal(out.need("text"), clean.need("text"))


def test_a_stream_noised_to_a_label_is_itself_at_0_and_nothing_but_noise_at_1000():
    clean = torch.ones(3, 4, 5)
    generators = item_generators(0, 3)
    assert noised(clean, 0, generators) is clean
    noise = draw_noise((4, 5), item_generators(0, 3), "cpu")
    assert torch.equal(noised(clean, 1000, generators), noise)  # nothing had been drawn at 0
    between = noised(clean, 400, item_generators(0, 3))
    assert torch.equal(between, add_noise(clean, noise, 400))
    assert torch.equal(noised(clean[1:2], 400, item_generators(1, 1)), between[1:2])  # an item of a batch is the item alone


def test_a_condition_held_at_a_noise_level_stays_as_given():
    seen = []

    def net(*given):
        seen.append((given[2].clone(), float(given[4][0])))
        return bent(*given)

    start = noise()
    out = sample(net, NoisePath.text_to_image(5, hold=250), start)
    assert all(torch.equal(text, start.need("text")) and label == 250 for text, label in seen)
    assert torch.equal(out.need("text"), start.need("text"))


@settings(deadline=None)
@given(falling_paths(), st.sampled_from(DOWNWARDS))
def test_every_legal_path_can_be_sampled_by_every_method(path, method):
    calls = []

    def net(*given):
        calls.append(1)
        return gaussian(*given)

    start, steps = noise(), []
    out = sample(net, path, start, method=method, callback=lambda step, total, x0, x: steps.append((step, total)))
    moves = [i for i in range(path.steps) if any(t[i] != t[i + 1] for t in (path.t_img, path.t_text))]
    assert steps == [(i, path.steps) for i in moves]
    assert len(calls) == len(moves)
    for name, x in out.items():
        assert float(x.abs().max()) < 100
        labels = path.t_text if name == "text" else path.t_img
        if labels[0] == labels[-1]:
            assert torch.equal(x, start.need(name))


def test_a_path_round_a_corner_is_two_runs_in_one():
    """First a picture from nothing, then its caption: the far edge and the left edge."""
    start = noise()
    both = sample(bent, NoisePath.through((1000, 1000), (0, 1000), (0, 0), steps=12), start, generator=item_generators(0, 2))
    generators = item_generators(0, 2)
    picture = sample(bent, NoisePath.image(6), start, generator=generators)
    caption = sample(bent, NoisePath.image_to_text(6), picture, generator=generators)
    for name, x in caption.items():
        torch.testing.assert_close(both.need(name), x)


# Seeds


@pytest.fixture(scope="module")
def small_net() -> UViT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UViT(UViTConfig(8, 4, 2, 32, 3, 2, 6, 5, 7))


@pytest.mark.parametrize("path", [NoisePath.image(3), NoisePath.joint(3), NoisePath.text(3)], ids=["image", "joint", "text"])
def test_an_item_of_a_batch_is_the_item_alone(small_net, path):
    whole = sample(small_net, path, Streams(), guidance=3.0, generator=item_generators(11, 3))
    for k in range(3):
        alone = sample(small_net, path, Streams(), guidance=3.0, generator=item_generators(11 + k, 1))
        for name, x in alone.items():
            torch.testing.assert_close(whole.need(name)[k : k + 1], x, atol=1e-4, rtol=1e-4)


def test_one_generator_serves_a_batch_and_moves_on(small_net):
    def run(generator: torch.Generator, batch: int) -> Tensor:
        given = Streams(text=torch.zeros(batch, 5, 6))
        return sample(small_net, NoisePath.text_to_image(2), given, generator=generator).need("img")

    g = torch.Generator().manual_seed(4)
    first, second = run(g, 2), run(g, 2)
    assert not torch.allclose(first, second)
    assert not torch.allclose(first[0], first[1])
    torch.testing.assert_close(run(torch.Generator().manual_seed(4), 1)[0], first[0], atol=1e-4, rtol=1e-4)


def test_the_global_generator_is_neither_read_nor_moved(small_net):
    before = torch.get_rng_state()
    sample(small_net, NoisePath.image(2), Streams(), guidance=2.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_streams_not_given_are_drawn_in_the_networks_size(small_net):
    out = sample(small_net, NoisePath.joint(1), Streams(), generator=item_generators(0, 2))
    assert [tuple(x.shape) for _, x in out.items()] == [(2, 4, 8, 8), (2, 1, 7), (2, 5, 6)]
    assert sample(small_net, NoisePath.image(1), Streams()).text is None


# Masks


@pytest.mark.parametrize("method", DOWNWARDS)
def test_a_mask_keeps_its_part_on_course_and_returns_it_as_given(method):
    given = noise()
    mask = Streams(img=torch.ones(2, 1, 4, 6), text=torch.ones(2, 3, 1))
    mask.need("img")[..., :2] = 0
    mask.need("text")[:, 0] = 0
    seen = []
    callback = lambda step, total, x0, x: seen.append((x0, x))  # noqa: E731
    out = sample(bent, NoisePath.joint(9, speeds=(2, 1)), given, method=method, mask=mask, callback=callback)
    assert torch.equal(out.need("img")[..., :2], given.need("img")[..., :2])
    assert torch.equal(out.need("text")[:, 0], given.need("text")[:, 0])
    assert not torch.allclose(out.need("img")[..., 2:], given.need("img")[..., 2:], atol=0.1)
    level = intervals(NoisePath.joint(9, speeds=(2, 1)).t_text, METHODS[method].least)
    fixed = [(x.need("text")[:, 0] - stage.next.alpha * given.need("text")[:, 0]) / stage.next.sigma
             for (_, x), stage in zip(seen, level, strict=True) if stage.next.sigma]  # fmt: skip
    for one in fixed[1:]:  # one noise all the way down, or another one at each step
        assert torch.allclose(one, fixed[0], atol=2e-4, rtol=1e-3) is not METHODS[method].renews
    for x0, _ in seen:
        torch.testing.assert_close(x0.need("text")[:, 0], given.need("text")[:, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (Streams(img=torch.ones(2, 1, 4, 5)), "mask of img"),
        (Streams(img=torch.ones(4, 6)), "mask of img"),
        (Streams(text=torch.full((2, 3, 1), 0.5)), "between 0 and 1"),
    ],
)
def test_bad_masks_are_named(mask, words):
    with pytest.raises(ValueError, match=words):
        sample(bent, NoisePath.joint(2), noise(), mask=mask)


@pytest.mark.parametrize("label", [1000, 600])
def test_a_soft_mask_mixes_before_and_after_each_evaluation(label):
    """As k-diffusion's samplers in ComfyUI: x m + noised (1 - m) goes in, x_0 m + clean (1 - m) comes out; here Euler's."""
    path, mask = NoisePath.image(6, start=label), torch.rand(2, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    clean, own = noise(1), noise(2)
    start = own if label == 1000 else clean.zip(own, lambda x, e: add_noise(x, e, label))
    out = sample(bent, path, start.replace(text=own.text), mask=Streams(img=mask), kept=clean, method="euler",
                 generator=torch.Generator().manual_seed(1))  # fmt: skip
    x, kept, eps_img = start, clean.need("img"), own.need("img")
    for step in intervals(path.t_img):
        now, last = step.level, step.next
        noised = now.alpha * kept + now.sigma * eps_img
        seen = x.replace(img=mask * x.need("img") + (1 - mask) * noised)
        img, clip_img, _ = bent(seen.img, seen.clip_img, own.text, torch.full((2,), now.label), torch.full((2,), 1000.0), 1)
        x0 = mask * (seen.need("img") - now.sigma * img) / now.alpha + (1 - mask) * kept
        eps = (x.need("img") - now.alpha * x0) / now.sigma
        token0 = (x.need("clip_img") - now.sigma * clip_img) / now.alpha
        x = Streams(last.alpha * x0 + last.sigma * eps, last.alpha * token0 + last.sigma * clip_img)
    assert (x.need("img") - kept).abs().max() > 0.1
    torch.testing.assert_close(out.need("img"), x.need("img"), atol=1e-4, rtol=1e-4)


# Fresh noise


def test_lcm_adds_fresh_noise_to_the_prediction_and_none_at_the_end():
    ends, seen = {"img": 0.5, "clip_img": -1.0, "text": 0.3}, []

    def net(img, clip_img, text, t_img, t_text, data_type):
        """Knows how all streams end."""
        given = (img, clip_img, text)
        levels = (Level.of(float(t[0])) for t in (t_img, t_img, t_text))
        return tuple((x - level.alpha * x0) / level.sigma if level.sigma else x * 0
                     for x, x0, level in zip(given, ends.values(), levels, strict=True))  # fmt: skip

    path = NoisePath.joint(4, speeds=(1, 2))
    start = Streams(torch.zeros(2, 4, 16, 16), torch.zeros(2, 1, 64), torch.zeros(2, 8, 64))
    out = sample(net, path, start, method="lcm", generator=item_generators(0, 2),
                 callback=lambda step, total, x0, x: seen.append(x))  # fmt: skip
    for name, x in out.items():
        torch.testing.assert_close(x, torch.full_like(x, ends[name]), atol=1e-4, rtol=0)
    noises = []
    for x, label in zip(seen[:-1], path.t_img[1:], strict=False):
        level = Level.of(label)
        noises.append((x.need("img") - level.alpha * 0.5) / level.sigma)
        assert abs(noises[-1].mean()) < 0.1
        assert abs(noises[-1].std() - 1) < 0.05
    assert abs(torch.corrcoef(torch.stack([one.flatten() for one in noises]))[0, 1]) < 0.1
    alone = sample(net, path, start.map(lambda x: x[1:]), method="lcm", generator=item_generators(1, 1),
                   callback=lambda step, total, x0, x: seen.append(x))  # fmt: skip
    torch.testing.assert_close(alone.need("img"), out.need("img")[1:])
    torch.testing.assert_close(seen[4].need("img"), seen[0].need("img")[1:])
    assert torch.equal(seen[1].need("text"), seen[3].need("text"))  # it is finished, and gets no noise any more


# What may go wrong


def test_nan_is_reported_with_stream_and_step():
    def net(*given):
        eps_img, eps_clip, eps_text = bent(*given)
        return eps_img, eps_clip * (math.nan if given[3][0] < 700 else 1), eps_text

    with pytest.raises(NonFiniteError, match=r"clip_img stream .* at step 3 of 5") as caught:
        sample(net, NoisePath.text_to_image(5), noise())
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, FloatingPointError)
    bad = noise()
    bad.need("text")[0, 0, 0] = math.inf
    with pytest.raises(NonFiniteError, match=r"text stream .* before the first step"):
        sample(bent, NoisePath.text_to_image(5), bad)


def test_an_interrupt_in_the_callback_comes_through():
    def stop(step, total, x0, x):
        assert total == 6
        if step == 2:
            raise KeyboardInterrupt

    given = noise()
    kept = given.map(Tensor.clone)
    with pytest.raises(KeyboardInterrupt):
        sample(bent, NoisePath.joint(6), given, callback=stop)
    assert torch.is_grad_enabled()
    assert all(torch.equal(x, kept.need(name)) for name, x in given.items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "heun"}, "Unknown method 'heun'"),
        ({"path": NoisePath.joint(3).reversed()}, "rises"),
        ({"streams": Streams(text=torch.zeros(2, 3, 2))}, "img stream is missing"),
        ({"streams": noise().replace(text=None), "path": NoisePath.text_to_image(3)}, "text stream is missing"),
        ({"streams": noise().replace(text=torch.zeros(3, 3, 2))}, "one batch size"),
        ({"generator": item_generators(0, 3)}, "3 generators for 2 items"),
    ],
)
def test_bad_input_is_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        sample(**({"net": bent, "path": NoisePath.joint(3), "streams": noise()} | arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_state_is_fp32_and_the_network_runs_in_its_own_dtype(small_net, dtype):
    net = UViT(small_net.config).to(dtype)
    seen = set()
    net.register_forward_pre_hook(lambda _, args: seen.update(a.dtype for a in args[:3]))
    given = Streams(torch.randn(1, 4, 4, 8, dtype=torch.float16), torch.randn(1, 1, 7), torch.randn(1, 5, 6))
    out = sample(net, NoisePath.joint(2), given, guidance=2.0)
    assert seen == {dtype}
    assert {x.dtype for _, x in out.items()} == {torch.float32}
    assert out.need("img").shape == (1, 4, 4, 8)


def test_a_device_is_asked_for_nan_once_and_the_first_step_is_named():
    from unidiffuser.samplers import NonFiniteError, _Finite

    finite = _Finite(torch.device("cuda"))
    good, bad = torch.zeros(1, 2), torch.tensor([[0.0, float("nan")]])
    for step, img in enumerate([good, bad, bad], start=1):
        finite.check(Streams(img=img, text=good), f"at step {step} of 3")
    with pytest.raises(NonFiniteError, match="The img stream holds NaN or infinity at step 2 of 3"):
        finite.settle()
    finite.settle()  # nothing is left to tell
