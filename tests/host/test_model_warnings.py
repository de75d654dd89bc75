"""Nodes of other packs that act on the MODEL but spoil the picture, or do nothing: the samplers name them, and only them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from host_server import HostServer
from prompts import Graph, Link

MOMENTUM = "'Momentum Guidance' with a momentum of"
AUTOMATIC = "'Automatic CFG' counts from a cfg of 8"
ATTENTION = "The attention modifiers of 'Automatic CFG' are fitted to the blocks of SDXL"
BEYOND = "'attention_modifier' names input 8; this model has input 0 to"
SCHEDULE = "A node sets another noise schedule on the MODEL"
SAMPLING = "A node sets the sampling of the MODEL to"


def core(graph: Graph, model: Link, steps: int, cfg: float, denoise: float = 1.0) -> Link:
    negative = graph.add("ConditioningZeroOut", conditioning=graph.text("a"))()
    latent: Link = graph.ksampler(
        graph.text("red cat"), negative, graph.empty(), model, steps=steps, cfg=cfg, denoise=denoise
    )()
    return latent


def ours(graph: Graph, model: Link, steps: int, cfg: float, denoise: float = 1.0) -> Link:
    path = graph.path("text to image", steps, start=round(1000 * denoise))()
    latent, token = graph.encoded()
    given = {"latent_image": latent, "clip_vision_output": token, "text": graph.text("red cat")}
    sampled: Link = graph.sampler(path, model=model, image_guidance=cfg, **given)()
    return sampled


@pytest.mark.parametrize("sampler", [core, ours])
@pytest.mark.parametrize(
    ("node", "inputs", "run", "words", "told"),
    [
        ("TestMomentumGuidance", {"momentum": 0.5}, (10, 4.0), MOMENTUM, True),
        ("TestMomentumGuidance", {"momentum": 0.5}, (25, 4.0), MOMENTUM, False),
        ("TestMomentumGuidance", {"momentum": 1.0}, (25, 4.0), MOMENTUM, True),
        ("TestMomentumGuidance", {"momentum": 0.5}, (10, 4.0, 0.4), MOMENTUM, False),  # as dense as 25 over the whole schedule
        ("TestMomentumGuidance", {"momentum": 0.5}, (4, 4.0, 0.4), MOMENTUM, True),
        ("TestMomentumGuidance", {"momentum": 0.5}, (1, 4.0), MOMENTUM, False),
        ("TestMomentumGuidance", {"momentum": 0.0}, (10, 4.0), MOMENTUM, False),
        ("TestAutomaticGuidance", {"automatic_cfg": "hard"}, (3, 6.0), AUTOMATIC, True),
        ("TestAutomaticGuidance", {"automatic_cfg": "hard"}, (3, 8.0), AUTOMATIC, False),
        ("TestAutomaticGuidance", {"automatic_cfg": "hard"}, (3, 1.0), AUTOMATIC, False),
        ("TestAutomaticGuidance", {"automatic_cfg": "None"}, (3, 4.0), AUTOMATIC, False),
        ("TestAttentionModifier", {"block": 0}, (3, 4.0), ATTENTION, True),
        ("TestAttentionModifier", {"block": 8}, (3, 4.0), ATTENTION, False),
        ("TestOwnOptions", {"block": 0}, (3, 4.0), ATTENTION, True),
        ("TestOwnOptions", {"block": 8}, (3, 4.0), BEYOND, True),
    ],
)
def test_a_node_that_spoils_the_picture_is_named(
    server: HostServer,
    sampler: Callable[..., Link],
    node: str,
    inputs: dict[str, object],
    run: tuple[float, ...],
    words: str,
    told: bool,
) -> None:
    before, graph = server.log.count(words), Graph()
    graph.save(sampler(graph, graph.add(node, model=graph.model, **inputs)(), *run), "warned")
    server.run(graph.prompt)
    assert server.log.count(words) == before + told


@pytest.mark.parametrize(("sampling", "zsnr", "told"), [("eps", False, False), ("eps", True, True), ("lcm", False, True)])
def test_a_noise_schedule_on_the_model_is_named_where_the_path_has_the_levels(
    server: HostServer, sampling: str, zsnr: bool, told: bool
) -> None:
    for sampler, expected in ((core, False), (ours, told)):
        before, graph = server.log.count(SCHEDULE), Graph()
        model = graph.add("ModelSamplingDiscrete", model=graph.model, sampling=sampling, zsnr=zsnr)()
        graph.save(sampler(graph, model, 3, 4.0), "schedule")
        server.run(graph.prompt)
        assert server.log.count(SCHEDULE) == before + expected


@pytest.mark.parametrize("sampler", [core, ours])
def test_rotary_positions_are_named(server: HostServer, sampler: Callable[..., Link]) -> None:
    words, scale = "'ScaleROPE' has no effect", dict.fromkeys(("scale_x", "scale_y", "scale_t"), 1.5)
    if "ScaleROPE" not in server.get("/object_info"):
        pytest.skip("this ComfyUI has no ScaleROPE")
    before, graph = server.log.count(words), Graph()
    shift = dict.fromkeys(("shift_x", "shift_y", "shift_t"), 0.0)
    graph.save(sampler(graph, graph.add("ScaleROPE", model=graph.model, **scale, **shift)(), 3, 4.0), "rope")
    server.run(graph.prompt)
    assert server.log.count(words) == before + 1


def test_parts_of_a_run_are_judged_by_the_whole(server: HostServer) -> None:
    for scheduler in ("normal", "karras", "exponential"):
        before, graph = server.log.count(MOMENTUM), Graph()
        model, latent = graph.add("TestMomentumGuidance", model=graph.model, momentum=0.5)(), graph.empty()
        for start, end in ((0, 13), (13, 26)):
            latent = graph.add(
                "KSamplerAdvanced",
                model=model,
                positive=graph.text("red cat"),
                negative=graph.text(""),
                latent_image=latent,
                add_noise="enable" if start == 0 else "disable",
                noise_seed=1,
                steps=26,
                cfg=4.0,
                sampler_name="euler",
                scheduler=scheduler,
                start_at_step=start,
                end_at_step=end,
                return_with_leftover_noise="enable" if start == 0 else "disable",
            )()
        graph.save(latent, "parts")
        server.run(graph.prompt)
        assert server.log.count(MOMENTUM) == before


def test_the_sampling_of_a_flow_model_gets_one_warning(server: HostServer) -> None:
    before, graph = server.log.count(SCHEDULE), Graph()
    sampling = server.log.count(SAMPLING)
    graph.save(ours(graph, graph.add("ModelSamplingSD3", model=graph.model, shift=3.0)(), 3, 4.0), "flow")
    server.run(graph.prompt)
    assert (server.log.count(SCHEDULE), server.log.count(SAMPLING)) == (before, sampling + 1)
