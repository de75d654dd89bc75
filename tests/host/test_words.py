"""Words in and out: captions of encoded prompts, what the model does not know of a prompt."""

from __future__ import annotations

from host_server import HostServer
from prompts import Graph


def test_a_half_precision_decoder_repeats_encoded_prompts(server: HostServer) -> None:
    """The decoder of the bundled file is stored in float16, CLIP text of the host is float32."""
    graph = Graph("emoji")
    prompt = "red apple, twemoji"
    texts = [
        graph.text(prompt),
        graph.add("UniDiffuserRewriteWords", clip=graph.clip, text=prompt, words="apple", rest=True)(),
    ]
    captions = [graph.caption(text)()[0] for text in texts]
    shown = server.run(graph.prompt)
    assert [shown[caption]["text"][0] for caption in captions] == [prompt, prompt]
