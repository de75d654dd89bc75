"""Every node in a real server: outputs, caching and refused inputs."""

from __future__ import annotations

import io
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from host_server import HostServer, InvalidPrompt, error_of
from locale_texts import english_texts
from PIL import Image
from prompts import Graph
from tiny import write_tiny_checkpoint

import unidiffuser
from unidiffuser.training.fine_tune import fine_tune


def pictures(server: HostServer, shown: dict) -> list[Image.Image]:
    return [Image.open(io.BytesIO(server.file(item))) for item in shown["images"]]


def test_text_to_image_by_the_core_sampler_alone(server: HostServer) -> None:
    graph = Graph()
    out = graph.ksampler(graph.text("a (red:1.2) cat"), graph.text(""), graph.empty(batch_size=3))
    preview = graph.show(out())
    images = pictures(server, server.run(graph.prompt)[preview])
    assert [image.size for image in images] == [(128, 128)] * 3
    assert len({image.tobytes() for image in images}) == 3


def test_an_empty_latent_of_the_host_has_the_size_that_it_was_given(server: HostServer, tiny_file: Path) -> None:
    """The host's empty latents assume 8 pixels per cell; those of SD 3 also 16 channels."""
    write_tiny_checkpoint(tiny_file.with_name("fine.safetensors"), downscale=4)
    server.get("/object_info/UniDiffuserLoader")
    for model in ("tiny.safetensors", "fine.safetensors"):
        graph = Graph(model)
        empty, other = graph.empty(128, 64), graph.add("EmptySD3LatentImage", width=128, height=64, batch_size=1)()
        text = graph.text("red")
        previews = [
            graph.show(graph.ksampler(text, graph.text(""), empty)()),
            *(graph.show(graph.sampler(graph.path("joint")(), latent_image=latent)()) for latent in (empty, other)),
            graph.show(graph.ksampler(text, graph.text(""), graph.sampler(graph.path("joint")(), latent_image=empty)())()),
        ]
        shown = server.run(graph.prompt)
        assert [pictures(server, shown[preview])[0].size for preview in previews] == [(128, 64)] * 4

    graph = Graph("fine.safetensors")
    graph.show(graph.sampler(graph.path("joint")(), latent_image=graph.empty(1024, 512))())
    with pytest.raises(RuntimeError, match=r"one of 1024 x 512 pixels; this model was trained on 128 x 128"):
        server.run(graph.prompt)


def test_an_attention_that_a_node_puts_on_the_model_is_used(server: HostServer) -> None:
    graph = Graph()
    blind = graph.add("TestBlindAttention", model=graph.model)()
    text = graph.text("a red cat")
    shown = {}
    for name, model in (("plain", graph.model), ("blind", blind)):
        shown[name, "core"] = graph.show(graph.ksampler(text, graph.text(""), graph.empty(), model=model)())
        shown[name, "ours"] = graph.show(graph.sampler(graph.path("image")(), model=model)())
    found = server.run(graph.prompt)
    seen = {key: pictures(server, found[preview])[0].tobytes() for key, preview in shown.items()}
    for sampler in ("core", "ours"):
        assert seen["plain", sampler] != seen["blind", sampler]


def test_zeroed_conditioning_is_the_unconditional(server: HostServer) -> None:
    graph = Graph()
    text = graph.text("red")
    nothing = graph.add("ConditioningZeroOut", conditioning=text)()
    preview = graph.show(graph.ksampler(text, nothing, graph.empty())())
    assert pictures(server, server.run(graph.prompt)[preview])


def test_img2img_inpainting_and_odd_sizes(server: HostServer) -> None:
    graph = Graph()
    latent, _ = graph.encoded(graph.picture(160))
    mask = graph.add("SolidMask", value=1.0, width=50, height=70)()
    masked = graph.add("SetLatentNoiseMask", samples=latent, mask=mask)()
    previews = [
        graph.show(graph.ksampler(graph.text("red"), graph.text(""), image, denoise=0.6)()) for image in (latent, masked)
    ]
    shown = server.run(graph.prompt)
    assert all(pictures(server, shown[preview])[0].size == (160, 160) for preview in previews)


def test_a_clip_token_in_the_conditioning_is_followed(server: HostServer) -> None:
    def picture(red: int) -> bytes:
        graph = Graph()
        _, token = graph.encoded(graph.picture(red=red))
        cond = graph.add(
            "unCLIPConditioning", conditioning=graph.text("cat"), clip_vision_output=token, strength=1.0, noise_augmentation=0.0
        )()
        preview = graph.show(graph.ksampler(cond, graph.text(""), graph.empty())())
        return pictures(server, server.run(graph.prompt)[preview])[0].tobytes()

    assert picture(0xFF0000) != picture(0x0000FF)


def test_a_node_that_runs_the_layers_of_the_autoencoder_is_refused(server: HostServer) -> None:
    graph = Graph("emoji")
    graph.show(graph.add("TestTiledEncode", pixels=graph.picture(256), vae=graph.vae)())
    with pytest.raises(RuntimeError, match=r"Use 'VAE Encode \(Tiled\)'"):
        server.run(graph.prompt)


ONE_IMAGE = "UniDiffuser follows the image of the first 'unCLIPConditioning' only"
LOOSELY = "An image that starts from noise follows 'unCLIPConditioning' loosely"


@pytest.mark.parametrize(
    ("strengths", "denoise", "named"),
    [([1.0], 0.5, ()), ([1.0], 1.0, (LOOSELY,)), ([0.5], 0.5, (ONE_IMAGE,)), ([1.0, 1.0], 1.0, (ONE_IMAGE, LOOSELY))],
)
def test_what_unclip_conditioning_asks_for_in_vain_is_named(
    server: HostServer, strengths: list[float], denoise: float, named: tuple[str, ...]
) -> None:
    graph, before = Graph(), {words: server.log.count(words) for words in (ONE_IMAGE, LOOSELY)}
    cond = graph.add("ConditioningCombine", conditioning_1=graph.text("cat"), conditioning_2=graph.text("red cat"))()
    for number, strength in enumerate(strengths):
        token = graph.encoded(graph.picture(red=0xFF0000 + 0xFF * number))[1]
        given = {"clip_vision_output": token, "strength": strength, "noise_augmentation": 0.0}
        cond = graph.add("unCLIPConditioning", conditioning=cond, **given)()
    graph.show(graph.ksampler(cond, graph.text(""), graph.encoded()[0], seed=41, denoise=denoise)())
    server.run(graph.prompt)
    assert {words: server.log.count(words) - count for words, count in before.items()} == {
        words: words in named for words in before
    }


@pytest.mark.parametrize("taker", ["KSampler", "sampler", "invert"])
@pytest.mark.parametrize(
    ("node", "words"),
    [
        ("unCLIPConditioning", "'unCLIPConditioning' has no effect here"),
        ("ReferenceLatent", "'ReferenceLatent' has no effect on UniDiffuser"),
        ("TestControl", "A ControlNet changes the layers of a U-Net, which UniDiffuser does not have"),
    ],
)
def test_what_a_prompt_carries_in_vain_is_named(server: HostServer, node: str, words: str, taker: str) -> None:
    graph, before = Graph(), server.log.count(words)
    latent, token = graph.encoded()
    given = {
        "unCLIPConditioning": {"clip_vision_output": token, "strength": 1.0, "noise_augmentation": 0.0},
        "ReferenceLatent": {"latent": latent},
    }
    text = graph.add(node, conditioning=graph.text("cat"), **given.get(node, {}))()
    path = graph.path("text to image")()
    if taker == "KSampler":
        sampled = graph.ksampler(text, graph.text(""), graph.empty())()
    elif taker == "sampler":
        sampled = graph.sampler(path, text=text)()
    else:
        given = {"latent_image": latent, "clip_vision_output": token, "text": text}
        sampled = graph.add("UniDiffuserInvert", model=graph.model, steps=2, seed=1, **given)()
    graph.show(sampled)
    if node == "TestControl":
        with pytest.raises(RuntimeError, match=words):
            server.run(graph.prompt)
        return
    server.run(graph.prompt)
    assert server.log.count(words) - before == (taker != "KSampler" or node == "ReferenceLatent")


@pytest.mark.parametrize("task", ["joint", "image", "text"])
def test_tasks_out_of_nothing(server: HostServer, task: str) -> None:
    graph = Graph()
    out = graph.sampler(graph.path(task)(), latent_image=graph.empty(batch_size=2), caption_decoder=graph.decoder)
    preview, caption = graph.show(out(0)), graph.caption(out(2), candidates=2)()[0]
    shown = server.run(graph.prompt)
    assert (preview in shown) == (task != "text")  # an output that the path does not sample skips its branch
    assert (caption in shown) == (task != "image")
    if task != "image":
        assert len(shown[caption]["text"][0].splitlines()) == 4


def test_image_to_text_shows_its_path_and_feeds_core_nodes(server: HostServer) -> None:
    graph = Graph()
    latent, token = graph.encoded(graph.add("UniDiffuserExamplePicture", picture="sunflower")())
    path = graph.path("image to text")
    out = graph.sampler(path(), latent_image=latent, clip_vision_output=token)
    words = graph.caption(out(2), candidates=3)
    text = graph.add("PreviewAny", source=words(1))()[0]
    again = graph.add("CLIPTextEncode", clip=graph.clip, text=words(0))()
    preview = graph.show(graph.ksampler(again, graph.text(""), graph.empty())())
    shown = server.run(graph.prompt)
    points = shown[path()[0]]["unidiffuser_path"]
    assert [points[0], points[-1], len(points)] == [[0, 1000], [0, 0], 4]
    assert "images" not in shown[path()[0]]  # the host would show it as the result of the run
    assert len(shown[text]["text"]) == 3
    assert preview in shown


def test_captions_are_drawn_by_top_p_and_temperature(server: HostServer) -> None:
    graph = Graph()
    text = graph.sampler(graph.path("text")())(2)
    drawn = [
        graph.caption(text, method="nucleus", candidates=4, top_p=top_p, temperature=2.0, seed=seed)()[0]
        for seed, top_p in ((1, 0.95), (2, 0.95), (1, 0.01))
    ]
    searched = graph.caption(text, beams=1)()[0]
    shown = server.run(graph.prompt)
    free, other, narrow = (shown[node]["text"][0].splitlines() for node in drawn)
    assert len(free) == len(other) == len(narrow) == 4
    assert free != other
    greedy = shown[searched]["text"][0]
    assert {line.split("  (")[0] for line in narrow} == {greedy.split("  (")[0]}  # the likeliest token alone


def test_a_fine_tuned_model_is_loaded_and_used(server: HostServer, tiny_file: Path, tmp_path: Path) -> None:
    for name, colour in (("a", "red"), ("b", "green")):
        Image.new("RGB", (96, 80), colour).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("zor cat", encoding="utf-8")
    settings = {"steps": 4, "batch_size": 2, "learning_rate": 0.05, "variations": 1, "first_sample": 0, "sample_every": 100}
    options = {"kept": 2, "captions": False}
    made = fine_tune(tmp_path, tmp_path / "run", str(tiny_file), device="cpu", progress=False, options=options, **settings)
    shutil.copy(made, tiny_file.with_name("tuned.safetensors"))
    server.get("/object_info/UniDiffuserLoader")
    found = []
    for name in ("tiny.safetensors", "tuned.safetensors"):
        graph = Graph(name)
        latent, token = graph.encoded()
        preview = graph.show(graph.sampler(graph.path("text to image")(), text=graph.text("zor cat"), seed=3)())
        described = graph.sampler(graph.path("image to text")(), latent_image=latent, clip_vision_output=token)
        words = graph.caption(described(2))()[0]
        shown = server.run(graph.prompt)
        found.append(pictures(server, shown[preview])[0])
        assert shown[words]["text"][0]
    model = unidiffuser.load(made, device="cpu", dtype="float32")
    assert np.abs(np.asarray(found[0], dtype=float) - np.asarray(found[1], dtype=float)).max() > 8
    assert model.config.image_size == found[1].width


def test_latents_are_handed_over_in_a_variation(server: HostServer) -> None:
    graph = Graph()
    latent, token = graph.encoded()
    described = graph.sampler(graph.path("image to text")(), latent_image=latent, clip_vision_output=token)
    varied = graph.sampler(graph.path("text to image")(), text=described(2), latent_image=graph.empty(batch_size=2))
    by_core = graph.ksampler(described(2), graph.text(""), graph.empty())
    previews = [graph.show(varied()), graph.show(by_core())]
    shown = server.run(graph.prompt)
    assert [len(shown[preview]["images"]) for preview in previews] == [2, 1]


def test_a_path_can_be_walked_in_two_samplers(server: HostServer) -> None:
    graph = Graph()
    corner = {"text_start": 1000, "text_corner": 1000, "text_end": 1000, "image_end": 0}
    whole = graph.path("through a corner", image_start=1000, image_corner=500, **corner)
    assert server.run({**graph.prompt, "p": {"class_type": "PreviewAny", "inputs": {"source": whole(1)}}})
    first = graph.path(
        "through a corner", 2, image_start=1000, image_corner=600, **(corner | {"image_end": 500, "text_end": 0})
    )
    half = graph.sampler(first(), latent_image=graph.empty())
    rest = graph.path("joint", 2, image_start=500, text_start=0)
    out = graph.sampler(rest(), latent_image=half(0), clip_vision_output=half(1), text=half(2))
    preview = graph.show(out())
    assert pictures(server, server.run(graph.prompt)[preview])


def test_rewriting_words_keeps_the_others(server: HostServer) -> None:
    graph = Graph()
    latent, token = graph.encoded()
    text = graph.add("UniDiffuserRewriteWords", clip=graph.clip, text="a red b", words="red", rest=False)()
    out = graph.sampler(graph.path("image to text")(), latent_image=latent, clip_vision_output=token, text=text)
    words = graph.caption(out(2))()[0]
    assert words in server.run(graph.prompt)


def test_invert_leads_back(server: HostServer) -> None:
    graph = Graph()
    latent, token = graph.encoded()
    text = graph.text("red")
    noise = graph.add(
        "UniDiffuserInvert", model=graph.model, latent_image=latent, clip_vision_output=token, text=text, steps=30, seed=0
    )
    back = graph.sampler(
        graph.path("text to image", 30)(),
        method="ddim",
        image_guidance=1.0,
        latent_image=noise(0),
        clip_vision_output=noise(1),
        text=text,
    )
    previews = graph.show(latent), graph.show(back())
    shown = server.run(graph.prompt)
    before, after = (pictures(server, shown[preview])[0].convert("L").resize((8, 8)) for preview in previews)
    assert max(abs(a - b) for a, b in zip(before.tobytes(), after.tobytes(), strict=True)) < 16


def test_interpolate_and_score(server: HostServer) -> None:
    graph = Graph()
    frames = graph.add(
        "UniDiffuserInterpolate",
        model=graph.model,
        clip_vision=graph.clip_vision,
        vae=graph.vae,
        image_a=graph.picture(),
        image_b=graph.picture(96, 0x20C020),
        frames=3,
        steps=3,
        text_guidance=2.0,
        seed=0,
    )
    preview = graph.add("PreviewImage", images=frames())()[0]
    ranked = graph.score("a\nbb\ncat", levels=3, seed=0)
    text = graph.add("PreviewAny", source=ranked(1))()[0]
    shown = server.run(graph.prompt)
    assert len(shown[preview]["images"]) == 3
    assert sorted(shown[text]["text"]) == ["a", "bb", "cat"]


def gibbs(rounds: int, steps: int = 2, guidance: float = 2.0, **options: float) -> Graph:
    graph = Graph()
    latent, token = graph.encoded()
    chain = graph.add(
        "UniDiffuserGibbsChain",
        model=graph.model,
        vae=graph.vae,
        caption_decoder=graph.decoder,
        rounds=rounds,
        steps=steps,
        seed=11,
        method="dpmpp_2m",
        image_guidance=guidance,
        text_guidance=guidance,
        latent_image=latent,
        clip_vision_output=token,
        **options,
    )
    graph.add("PreviewImage", images=chain(0))
    graph.add("PreviewAny", source=chain(1))
    return graph


def test_a_longer_gibbs_chain_keeps_its_finished_rounds(server: HostServer) -> None:
    def files(rounds: int) -> list[str]:
        shown = server.run(gibbs(rounds).prompt)
        return [shown[key]["images"][-1]["filename"] for key in sorted(shown) if ".round " in key]

    two, three = files(2), files(3)
    assert len(three) == 3
    assert three[:2] == two  # a round that runs again writes new files


def test_a_chain_equals_samplers_wired_by_hand(server: HostServer) -> None:
    def by_chain(**options: float) -> np.ndarray:
        outputs = server.run(gibbs(2, guidance=30.0, **options).prompt).values()
        (shown,) = (o for o in outputs if len(o.get("images", [])) == 2 and "unidiffuser_captions" not in o)
        return np.stack([np.asarray(image, dtype=int) for image in pictures(server, shown)])

    def by_hand(hold: float) -> np.ndarray:
        graph = Graph()
        latent, token = graph.encoded()
        state, previews = {"latent_image": latent, "clip_vision_output": token}, []
        for step, task in enumerate(["image to text", "text to image"] * 2):
            path = graph.path(task, 2, hold=hold)()
            out = graph.sampler(path, 11 + 1000 * step, image_guidance=30.0, text_guidance=30.0, **state)
            if task == "image to text":
                state["text"] = out(2)
            else:
                state |= {"latent_image": out(0), "clip_vision_output": out(1)}
                previews.append(graph.show(out(0)))
        shown = server.run(graph.prompt)
        return np.stack([np.asarray(pictures(server, shown[preview])[0], dtype=int) for preview in previews])

    chain, hand = by_chain(hold=300.0), by_hand(300.0)
    plain = by_chain()  # a workflow saved before the option existed
    assert abs(chain - hand).max() <= 1
    assert abs(chain - plain).max() > 8


def test_a_chain_can_be_interrupted_within_a_step_and_goes_on(server: HostServer) -> None:
    shown = len(list((server.base / "temp").iterdir()))
    running = server.queue(gibbs(20, steps=200).prompt)
    while len(list((server.base / "temp").iterdir())) == shown:  # until the first path is previewed
        time.sleep(0.05)
    server.request("/interrupt", {})
    asked = time.monotonic()
    entry = server.wait(running)
    assert entry["status"]["status_str"] == "error"
    assert error_of(entry) == "interrupted"
    assert time.monotonic() - asked < 10
    assert server.run(gibbs(1).prompt)  # the server and the chain continue


def test_schemas_have_texts_and_locales_match_them(server: HostServer) -> None:
    info = server.get("/object_info")
    ours = {name: node for name, node in info.items() if name.startswith("UniDiffuser")}
    assert len(ours) >= 12
    root = Path(__file__).resolve().parents[2]
    for name, node in ours.items():
        assert node["description"], name
        assert all(node["output_tooltips"]), name
        for group in ("required", "optional"):
            for key, (_, options) in node["input"].get(group, {}).items():
                assert options.get("tooltip"), (name, key)
        if not node.get("dev_only"):
            assert (root / "web/docs" / f"{name}.md").is_file(), name
            assert (root / "web/docs" / name / "zh.md").is_file(), name
    english, chinese = (
        json.loads((root / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8")) for language in ("en", "zh")
    )
    if "CurveEditor" not in info:  # a host without curves
        del english["UniDiffuserNoisePath"]["inputs"]["task_curve"], chinese["UniDiffuserNoisePath"]["inputs"]["task_curve"]
    assert english == english_texts(info)
    assert set(chinese) == set(english)
    for name, texts in english.items():
        for group in ("inputs", "outputs"):
            assert set(chinese[name][group]) == set(texts[group]), (name, group)


def test_unknown_checkpoints_are_not_queued(server: HostServer) -> None:
    with pytest.raises(InvalidPrompt) as error:
        server.queue(
            Graph("not there.safetensors").prompt | {"p": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}}
        )
    assert "not there.safetensors" in str(error.value)
