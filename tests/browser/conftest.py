"""The nodes' front-end code in a real browser: every front end that is found, in both renderers.

The host's own front end is tested, and those in the folders of COMFYUI_FRONT_ENDS (separated like PATH; each the `static`
folder of a comfyui-frontend-package). Skipped without a ComfyUI, playwright or Chromium.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_server import HOW, find_comfyui, tiny_server

pytest.importorskip("playwright", reason="NO BROWSER TESTS: pip install playwright")

from front_end import front_end
from node_page import NodePage

FRONT_ENDS = ["own", *filter(None, os.environ.get("COMFYUI_FRONT_ENDS", "").split(os.pathsep))]
RENDERERS = ["classic", "vue"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    reason = HOW if find_comfyui() is None else None if chromium else "NO BROWSER: install Chromium or set CHROMIUM"
    for item in items:
        if reason and item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", params=FRONT_ENDS, ids=lambda folder: Path(folder).name)
def pages(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodePage]:
    arguments = [] if request.param == "own" else ["--front-end-root", request.param]
    with tiny_server(tmp_path_factory.mktemp("comfyui"), *arguments) as server, front_end(server, 1300, 1000) as page:
        yield NodePage(page, "classic")


@pytest.fixture(params=RENDERERS)
def page(request: pytest.FixtureRequest, pages: NodePage) -> Iterator[NodePage]:
    """An empty workflow in each renderer; afterwards no message of this pack is on the console."""
    pages.look(request.param)
    pages.clear()
    yield pages
    assert pages.messages() == []
