"""The host's samplers work on a plain latent: regions, masks, windows and patches act, in both samplers alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from host_server import HostServer
from prompts import Graph, Link
from test_agreement import GUIDANCE, SEED, STEPS, saved
from tiny import TEXT_DIM


def core(graph: Graph, positive: Link, negative: Link | None = None, latent: Link | None = None, **inputs: Link) -> Link:
    """dpmpp_2m of SamplerCustomAdvanced on the levels of a text-to-image path."""
    model = inputs.get("model", graph.model)
    negative = graph.add("ConditioningZeroOut", conditioning=graph.text("a"))() if negative is None else negative
    return graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("RandomNoise", noise_seed=SEED)(),
        guider=graph.add("CFGGuider", model=model, positive=positive, negative=negative, cfg=GUIDANCE)(),
        sampler=graph.add("KSamplerSelect", sampler_name="dpmpp_2m")(),
        sigmas=graph.path("text to image", STEPS)(1),
        latent_image=graph.empty() if latent is None else latent,
    )()


def ours(graph: Graph, positive: Link, negative: Link | None = None, latent: Link | None = None, **inputs: Link) -> Link:
    """The UniDiffuser Sampler on the same path."""
    given = {"text": positive, "latent_image": graph.empty() if latent is None else latent, **inputs}
    if negative is not None:
        given["negative"] = negative
    return graph.sampler(graph.path("text to image", STEPS)(), SEED, image_guidance=GUIDANCE, **given)()


def both(server: HostServer, build: Callable[..., Link]) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents that `build(graph, sampler)` gives with each sampler."""
    found = []
    for name, sampler in (("core", core), ("ours", ours)):
        graph = Graph()
        graph.save(build(graph, sampler), f"plain-{name}")
        found.append(saved(server, graph, f"plain-{name}"))
    return found[0], found[1]


def plain(graph: Graph, sampler: Callable[..., Link]) -> Link:
    return sampler(graph, graph.text("red cat"))


def halves(graph: Graph) -> Link:
    parts = [
        graph.add(
            "ConditioningSetAreaPercentage", conditioning=graph.text(text), width=0.5, height=1.0, x=x, y=0, strength=1.0
        )()
        for text, x in (("red cat", 0.0), ("blue dog", 0.5))
    ]
    return graph.add("ConditioningCombine", conditioning_1=parts[0], conditioning_2=parts[1])()


def region(graph: Graph) -> Link:
    black = graph.add("SolidMask", value=0.0, width=128, height=128)()
    white = graph.add("SolidMask", value=1.0, width=64, height=128)()
    mask = graph.add("MaskComposite", destination=black, source=white, x=64, y=0, operation="add")()
    part = graph.add(
        "ConditioningSetMask", conditioning=graph.text("blue dog"), mask=mask, strength=1.0, set_cond_area="default"
    )()
    return graph.add("ConditioningCombine", conditioning_1=graph.text("red cat"), conditioning_2=part)()


def in_turn(graph: Graph) -> Link:
    parts = [
        graph.add("ConditioningSetTimestepRange", conditioning=graph.text(text), start=start, end=end)()
        for text, start, end in (("blue dog", 0.0, 0.5), ("red cat", 0.5, 1.0))
    ]
    return graph.add("ConditioningCombine", conditioning_1=parts[0], conditioning_2=parts[1])()


@pytest.mark.parametrize("texts", [halves, region, in_turn])
def test_regional_texts_act_in_both_samplers_alike(server: HostServer, texts: Callable[[Graph], Link]) -> None:
    one, other = both(server, lambda graph, sampler: sampler(graph, texts(graph)))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-3)
    assert (one - both(server, plain)[0]).abs().max() > 1e-2


def test_a_region_changes_its_own_side_first(server: HostServer) -> None:
    """One step: the left half is exactly that of the first text."""

    def one_step(text: Callable[[Graph], Link]) -> torch.Tensor:
        graph = Graph()
        out = graph.sampler(graph.path("text to image", 1)(), SEED, text=text(graph), latent_image=graph.empty())
        graph.save(out(), "region")
        return saved(server, graph, "region")

    alone, with_region = one_step(lambda graph: graph.text("red cat")), one_step(region)
    torch.testing.assert_close(with_region[..., :8], alone[..., :8], rtol=0, atol=1e-5)
    assert (with_region[..., 8:] - alone[..., 8:]).abs().max() > 1e-3


def test_regions_in_a_joint_path_leave_the_caption_to_the_first_text(server: HostServer) -> None:
    """The other texts guide the image; the caption stream is the one that moves."""
    for text in (region, halves):
        graph = Graph()
        path = graph.path("joint", STEPS, image_start=1000, text_start=500)()
        levelled = graph.sampler(graph.path("image to text", 2, start=500)(), SEED, **start(graph), text=text(graph))
        out = graph.sampler(path, SEED, text=text(graph), latent_image=graph.empty())
        graph.save(out(), "joint")
        words = graph.caption(out(2))()[0]
        graph.caption(levelled(2))
        shown = server.run(graph.prompt)
        assert words in shown


def start(graph: Graph) -> dict[str, Link]:
    latent, token = graph.encoded()
    return {"latent_image": latent, "clip_vision_output": token}


def masked(value: float) -> Callable[..., Link]:
    def build(graph: Graph, sampler: Callable[..., Link]) -> Link:
        latent, _ = graph.encoded()
        mask = graph.add("SolidMask", value=value, width=128, height=128)()
        given = graph.add("SetLatentNoiseMask", samples=latent, mask=mask)()
        return sampler(graph, graph.text("red cat"), graph.text(""), given)

    return build


@pytest.mark.parametrize("value", [0.6, 0.3])
def test_a_soft_mask_is_that_of_the_core_samplers(server: HostServer, value: float) -> None:
    """Apart from the 7 % of the picture that a core sampler leaves in its first noise."""
    one, other = both(server, masked(value))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-2)
    for hard in (0.0, 1.0):
        assert (other - both(server, masked(hard))[1]).abs().max() > 0.1


def test_an_item_of_a_batch_keeps_its_picture(server: HostServer) -> None:
    def item(graph: Graph, sampler: Callable[..., Link]) -> Link:
        latent = graph.add("LatentFromBatch", samples=graph.empty(batch_size=4), batch_index=2, length=1)()
        return sampler(graph, graph.text("red cat"), latent=latent)

    def batch(graph: Graph, sampler: Callable[..., Link]) -> Link:
        return sampler(graph, graph.text("red cat"), latent=graph.empty(batch_size=4))

    for alone, together in zip(both(server, item), both(server, batch), strict=True):
        torch.testing.assert_close(alone, together[2:3], rtol=0, atol=1e-3)


def test_context_windows_take_the_noise_of_their_items(server: HostServer) -> None:
    graph = Graph()
    windows = {"context_length": 4, "context_overlap": 2, "context_schedule": "standard_static", "context_stride": 1}
    options = {"closed_loop": False, "fuse_method": "pyramid", "dim": 0, "freenoise": False, "split_conds_to_windows": False}
    options |= {"cond_retain_index_list": "", "latent_retain_index_list": "", "causal_window_fix": False}
    model = graph.add("ContextWindowsManual", model=graph.model, **windows, **options)()
    graph.save(core(graph, graph.text("red cat"), latent=graph.empty(batch_size=6), model=model), "windows")
    made = saved(server, graph, "windows")
    assert made.shape[0] == 6
    assert torch.isfinite(made).all()
    graph = Graph()
    graph.save(core(graph, graph.text("red cat"), latent=graph.empty(batch_size=6)), "whole")
    torch.testing.assert_close(made, saved(server, graph, "whole"), rtol=0, atol=1e-3)  # items are independent


def test_a_model_without_its_wrappers_samples_with_a_warning(server: HostServer) -> None:
    graph = Graph()
    model = graph.add("TestDropWrappers", model=graph.model)()
    graph.save(core(graph, graph.text("red cat"), model=model), "dropped")
    assert torch.isfinite(saved(server, graph, "dropped")).all()
    assert "drops the wrappers of the MODEL" in server.log


def patched(node: str, **inputs: object) -> Callable[..., Link]:
    """A build for `both` with a patch node on the MODEL."""

    def build(graph: Graph, sampler: Callable[..., Link]) -> Link:
        return sampler(graph, graph.text("red cat"), model=graph.add(node, model=graph.model, **inputs)())

    return build


def test_patches_that_change_nothing_give_the_same_picture(server: HostServer) -> None:
    for one, other in zip(both(server, patched("TestSamePatches")), both(server, plain), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


def test_a_schedule_that_is_sampled_twice_equals_two_samplers(server: HostServer) -> None:
    found = []
    for node in ("TestTwoRounds", ""):
        graph = Graph()
        model = graph.add(node, model=graph.model)() if node else graph.model
        text, nothing = graph.text("red cat"), graph.text("")
        latent = graph.empty() if node else core(graph, text, nothing)
        graph.save(core(graph, text, nothing, latent, model=model), "rounds")
        found.append(saved(server, graph, "rounds"))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_a_sampler_that_stops_early_leaves_noise_and_no_warning(server: HostServer) -> None:
    words, graph = "the range of pictures (spread", Graph("emoji")
    before = server.log.count(words)
    out = graph.add(
        "SamplerCustom",
        model=graph.model,
        add_noise=True,
        noise_seed=SEED,
        cfg=GUIDANCE,
        positive=graph.text("red apple, twemoji"),
        negative=graph.text(""),
        sampler=graph.add("TestEarlyStop")(),
        sigmas=graph.path("text to image", STEPS)(1),
        latent_image=graph.empty(256, 256),
    )
    graph.save(out(), "early")
    assert saved(server, graph, "early").std() > 2
    assert server.log.count(words) == before


WINDOW = {
    "context_length": 8,
    "context_overlap": 4,
    "context_schedule": "standard_static",
    "context_stride": 1,
    "closed_loop": False,
    "fuse_method": "pyramid",
    "freenoise": False,
    "cond_retain_index_list": "",
    "latent_retain_index_list": "",
    "split_conds_to_windows": False,
}


@pytest.mark.parametrize("dim", [2, 3])
def test_a_context_window_along_a_side_leaves_the_text_whole(server: HostServer, dim: int) -> None:
    """The side has as many cells as a text latent has numbers for a token."""
    if "ContextWindowsManual" not in server.get("/object_info"):
        pytest.skip("this ComfyUI has no context windows")
    known = server.get("/object_info/ContextWindowsManual")["ContextWindowsManual"]["input"]
    names = {*known["required"], *known.get("optional", {})}
    assert TEXT_DIM * 8 == 128

    def windows(graph: Graph, sampler: Callable[..., Link], causal: bool) -> Link:
        inputs = {name: value for name, value in {**WINDOW, "dim": dim, "causal_window_fix": causal}.items() if name in names}
        model = graph.add("ContextWindowsManual", model=graph.model, **inputs)()
        return sampler(graph, graph.text("red cat"), model=model, latent=graph.empty(128, 128))

    words = "so the picture gets stripes. In 'Context Windows (Manual)' turn causal_window_fix off"
    for causal in (False, True) if "causal_window_fix" in names else (False,):
        before = server.log.count(words)
        for latent in both(server, lambda graph, sampler, causal=causal: windows(graph, sampler, causal)):
            assert torch.isfinite(latent).all()
        assert server.log.count(words) == before + 2 * causal


@pytest.mark.parametrize(
    ("node", "name", "good", "bad", "words"),
    [
        ("EasyCache", "reuse_threshold", 0.05, 0.2, "'EasyCache' with a reuse_threshold of 0.2 skips so many"),
        ("NAGuidance", "nag_scale", 2.0, 5.0, "'Normalized Attention Guidance' with a nag_scale of 5 is too strong"),
    ],
)
def test_settings_that_spoil_the_picture_are_told(
    server: HostServer, node: str, name: str, good: float, bad: float, words: str
) -> None:
    shared = {
        "EasyCache": {"start_percent": 0.1, "end_percent": 0.95, "verbose": False},
        "NAGuidance": {"nag_alpha": 0.5, "nag_tau": 1.5},
    }
    before = server.log.count(words)
    both(server, patched(node, **shared[node], **{name: good}))
    assert server.log.count(words) == before
    both(server, patched(node, **shared[node], **{name: bad}))
    assert server.log.count(words) == before + 2


def test_steps_without_a_positive_prompt_are_told(server: HostServer) -> None:
    words = "No positive prompt is active in some of the steps"

    def build(graph: Graph, sampler: Callable[..., Link], end: float) -> Link:
        text = graph.add("ConditioningSetTimestepRange", conditioning=graph.text("red cat"), start=0.0, end=end)()
        return sampler(graph, text)

    for end, told in ((1.0, 0), (0.5, 2)):
        before = server.log.count(words)
        both(server, lambda graph, sampler, end=end: build(graph, sampler, end))
        assert server.log.count(words) == before + told


def test_a_cache_that_skips_evaluations_acts(server: HostServer) -> None:
    for node in ("EasyCache", "LazyCache"):
        options = {"reuse_threshold": 3.0, "start_percent": 0.1, "end_percent": 0.95, "verbose": False}
        one, other = both(server, patched(node, **options))
        assert torch.isfinite(one).all()
        assert torch.isfinite(other).all()
        assert (one - both(server, plain)[0]).abs().max() > 1e-3
    assert "Use 'EasyCache' with a reuse_threshold of 0.05 instead" in server.log


LAYERS = {"double_layers": "1, 2", "single_layers": "", "scale": 3.0, "start_percent": 0.0, "end_percent": 1.0}
PATCHES = {
    "PerturbedAttentionGuidance": {"scale": 3.0},
    "SelfAttentionGuidance": {"scale": 0.8, "blur_sigma": 2.0},
    "NAGuidance": {"nag_scale": 5.0, "nag_alpha": 0.5, "nag_tau": 1.5},
    "SkipLayerGuidanceDiT": {**LAYERS, "rescaling_scale": 0.0},
    "RescaleCFG": {"multiplier": 1.0},
    "CFGZeroStar": {},
    "VideoLinearCFGGuidance": {"min_cfg": 1.0},
    "TestStateInOptions": {},
}


@pytest.mark.parametrize("node", PATCHES)
def test_a_patch_on_the_model_acts_in_both_samplers_alike(server: HostServer, node: str) -> None:
    one, other = both(server, patched(node, **PATCHES[node]))
    effect = float((one - both(server, plain)[0]).abs().max())
    assert effect > 1e-4  # repeated runs are equal
    torch.testing.assert_close(one, other, rtol=0, atol=min(1e-3, effect / 10))


@pytest.mark.parametrize(
    ("node", "inputs", "kind"),
    [
        ("ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": False}, "v_prediction"),
        ("ModelSamplingSD3", {"shift": 3.0}, "that of a flow model"),
    ],
)
def test_the_sampling_of_another_kind_of_model_is_named(
    server: HostServer, node: str, inputs: dict[str, object], kind: str
) -> None:
    words = f"A node sets the sampling of the MODEL to {kind}"
    before = server.log.count(words)
    both(server, patched(node, **inputs))
    assert server.log.count(words) == before + 2
    both(server, patched("ModelSamplingDiscrete", sampling="eps", zsnr=False))
    assert server.log.count(words) == before + 2


def test_shifted_tiles_are_named_and_refused_by_our_sampler(server: HostServer) -> None:
    graph = Graph()
    graph.save(patched("TestShiftedTiles")(graph, core), "shifted")
    saved(server, graph, "shifted")
    assert "with the method SpotDiffusion moves the tiles" in server.log
    graph = Graph()
    graph.save(patched("TestShiftedTiles")(graph, ours), "shifted")
    with pytest.raises(RuntimeError, match="SpotDiffusion works in KSampler only"):
        server.run(graph.prompt)


@pytest.mark.parametrize(("scale", "told"), [(3.0, 0), (30.0, 1)])
def test_guidance_that_drives_latents_out_of_the_range_of_pictures_is_told(server: HostServer, scale: float, told: int) -> None:
    words = "the range of pictures (spread"
    for sampler in ("core", "ours"):
        before, graph = server.log.count(words), Graph("emoji")
        text, latent = graph.text("red apple, twemoji"), graph.empty(256, 256)
        if sampler == "core":
            out = graph.ksampler(text, graph.text(""), latent, steps=6, cfg=scale)()
        else:
            path = graph.path("text to image", 6)()
            out = graph.sampler(path, SEED, image_guidance=scale, text=text, latent_image=latent)()
        graph.save(out, f"far-{sampler}")
        server.run(graph.prompt)
        assert server.log.count(words) == before + told


@pytest.mark.parametrize(("width", "told"), [(128, 0), (256, 1)])
def test_an_image_of_areas_may_be_large(server: HostServer, width: int, told: int) -> None:
    words = "so objects may repeat or stretch"
    for sampler in (core, ours):
        before, graph = server.log.count(words), Graph()
        parts = [
            graph.add(
                "ConditioningSetArea", conditioning=graph.text(text), width=width, height=128, x=128 * k, y=0, strength=1.0
            )()
            for k, text in enumerate(("red cat", "blue dog"))
        ]
        text = graph.add("ConditioningCombine", conditioning_1=parts[0], conditioning_2=parts[1])()
        graph.save(sampler(graph, text, latent=graph.empty(256, 128)), "areas")
        server.run(graph.prompt)
        assert server.log.count(words) == before + told


@pytest.mark.parametrize("sampler", [core, ours])
def test_an_area_outside_of_the_image_is_named(server: HostServer, sampler: Callable[..., Link]) -> None:
    graph = Graph()
    text = graph.add("ConditioningSetArea", conditioning=graph.text("red cat"), width=64, height=64, x=256, y=0, strength=1.0)()
    graph.save(sampler(graph, text), "outside")
    with pytest.raises(RuntimeError, match="The area of a prompt lies outside of the image"):
        server.run(graph.prompt)


def test_tiles_smaller_than_trained_are_named(server: HostServer) -> None:
    graph = Graph()
    graph.save(patched("TestSmallTiles")(graph, core), "small")
    saved(server, graph, "small")
    assert "'MixtureOfDiffusers' samples tiles of 64 x 128 pixels, smaller than" in server.log


FREE_U = {"b1": 1.1, "b2": 1.2, "s1": 0.9, "s2": 0.2}
SHRINK = {
    "block_number": 1,
    "downscale_factor": 2.0,
    "start_percent": 0.0,
    "end_percent": 0.5,
    "downscale_after_skip": True,
    "downscale_method": "bicubic",
    "upscale_method": "bicubic",
}


def test_patches_of_other_networks_are_named(server: HostServer) -> None:
    far = {**LAYERS, "double_layers": "9", "rescaling_scale": 0.0}
    for node, inputs, words in (
        ("FreeU", FREE_U, "'FreeU' is made for the channels of a U-Net"),
        ("SkipLayerGuidanceDiT", far, "'SkipLayerGuidanceDiT' names double_block 9; this model has double_block 0 to"),
    ):
        both(server, patched(node, **inputs))
        assert words in server.log
    with pytest.raises(RuntimeError, match="'PatchModelAddDownscale' resizes the layers of a U-Net"):
        both(server, patched("PatchModelAddDownscale", **SHRINK))
