"""The bundled model has Stable Diffusion's geometry, so core latent nodes give the right sizes and places."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from host_server import HostServer
from PIL import Image
from prompts import Graph, Link

SIDE = 256
Pixels = np.ndarray[Any, np.dtype[np.float32]]


def run(server: HostServer, graph: Graph, *previews: str) -> list[list[Pixels]]:
    """The pictures (H, W, 3), 0..255, of each preview."""
    shown = server.run(graph.prompt)
    return [
        [np.asarray(Image.open(io.BytesIO(server.file(item))), dtype=np.float32) for item in shown[preview]["images"]]
        for preview in previews
    ]


def drawn(graph: Graph, prompt: str, latent: Link | None = None, **inputs: Any) -> Link:
    settings = {"steps": 8, "cfg": 3.0, "seed": 0, **inputs}
    return graph.ksampler(graph.text(prompt), graph.text(""), latent or graph.empty(SIDE, SIDE), **settings)()


def reduced(picture: Pixels, factor: int = 8) -> Pixels:
    """(H / factor, W / factor, 3) means of squares, in which differences of a pixel at an edge do not count."""
    height, width = (side // factor for side in picture.shape[:2])
    return picture.reshape(height, factor, width, factor, 3).mean((1, 3))


def alike(one: Pixels, other: Pixels) -> float:
    """Correlation of two pictures of the same size."""
    assert one.shape == other.shape
    return float(np.corrcoef(reduced(one).ravel(), reduced(other).ravel())[0, 1])


@pytest.fixture(scope="module")
def apple(server: HostServer) -> Pixels:
    graph = Graph("emoji")
    ((picture,),) = run(server, graph, graph.show(drawn(graph, "red apple, twemoji")))
    assert picture.shape == (SIDE, SIDE, 3)
    return picture


@pytest.mark.parametrize("method", ["nearest-exact", "bilinear"])
def test_an_upscaled_latent_is_the_same_picture_enlarged(server: HostServer, apple: Pixels, method: str) -> None:
    graph = Graph("emoji")
    latent = drawn(graph, "red apple, twemoji")
    size = {"upscale_method": method, "width": 2 * SIDE, "height": SIDE, "crop": "disabled"}
    wide = graph.show(graph.add("LatentUpscale", samples=latent, **size)())
    ((picture,),) = run(server, graph, wide)
    assert picture.shape == (SIDE, 2 * SIDE, 3)
    assert alike(picture, np.repeat(apple, 2, axis=1)) > 0.95


def test_a_crop_shows_its_own_part(server: HostServer, apple: Pixels) -> None:
    graph = Graph("emoji")
    latent = drawn(graph, "red apple, twemoji")
    part = graph.show(graph.add("LatentCrop", samples=latent, width=128, height=96, x=64, y=32)())
    ((picture,),) = run(server, graph, part)
    assert picture.shape == (96, 128, 3)
    assert alike(picture, apple[32:128, 64:192]) > 0.9


def test_a_composite_puts_the_second_picture_where_it_is_told(server: HostServer, apple: Pixels) -> None:
    graph = Graph("emoji")
    one, two = drawn(graph, "red apple, twemoji"), drawn(graph, "lion, twemoji")
    both = graph.add("LatentComposite", samples_to=one, samples_from=two, x=128, y=0, feather=0)()
    (lion,), (picture,) = run(server, graph, graph.show(two), graph.show(both))
    assert alike(picture[:, :128], apple[:, :128]) > 0.9
    assert alike(picture[:, 128:], lion[:, :128]) > 0.9


def test_batches_are_split_and_joined(server: HostServer) -> None:
    graph = Graph("emoji")
    latent = drawn(graph, "red apple, twemoji", graph.empty(SIDE, SIDE, 3), steps=2)
    single = graph.add("RebatchLatents", latents=latent, batch_size=1)()
    (pictures,) = run(server, graph, graph.show(single))
    assert [picture.shape for picture in pictures] == [(SIDE, SIDE, 3)] * 3


def test_a_second_pass_at_a_larger_size_keeps_the_picture(server: HostServer, apple: Pixels) -> None:
    before, graph = len(server.log), Graph("emoji")
    latent = drawn(graph, "red apple, twemoji")
    larger = graph.add("LatentUpscaleBy", samples=latent, upscale_method="bilinear", scale_by=2.0)()
    ((picture,),) = run(server, graph, graph.show(drawn(graph, "red apple, twemoji", larger, denoise=0.3)))
    assert picture.shape == (512, 512, 3)
    enlarged = np.asarray(Image.fromarray(apple.astype(np.uint8)).resize((512, 512)), dtype=np.float32)
    assert alike(picture, enlarged) > 0.9
    assert "objects may repeat or stretch" not in server.log[before:]


def test_the_vae_decodes_tiles_to_the_same_picture(server: HostServer, apple: Pixels) -> None:
    graph = Graph("emoji")
    latent = drawn(graph, "red apple, twemoji")
    tiles = {"tile_size": 192, "overlap": 64, "temporal_size": 64, "temporal_overlap": 8}
    image = graph.add("VAEDecodeTiled", samples=latent, vae=graph.vae, **tiles)()
    ((picture,),) = run(server, graph, graph.add("PreviewImage", images=image)()[0])
    assert picture.shape == apple.shape
    assert alike(picture, apple) > 0.98


def test_a_picture_is_encoded_to_cells_of_eight_pixels(server: HostServer) -> None:
    graph = Graph("emoji")
    latent, _ = graph.encoded(graph.add("UniDiffuserExamplePicture", picture="sunflower")())
    shown = graph.add("PreviewImage", images=graph.add("UniDiffuserExamplePicture", picture="sunflower")())()[0]
    (given,), (decoded,) = run(server, graph, shown, graph.show(latent))
    assert given.shape == decoded.shape == (SIDE, SIDE, 3)
    assert alike(decoded, given) > 0.98
    assert 10 * np.log10(255**2 / np.square(decoded - given).mean()) > 24
