"""Run (On Change) while one types: with a fast model at each letter, with another as the front end does it.

Front ends from 1.58 draw at each letter themselves.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from node_page import NodePage

PATIENCE = 60  # seconds
TOLD = """async () => {
    const { api } = comfyAPI.api, tell = api.dispatchCustomEvent, told = [];
    api.dispatchCustomEvent = (name, ...rest) => { told.push(name); return tell.call(api, name, ...rest); };
    document.querySelector('textarea').dispatchEvent(new Event('input', {bubbles: true}));
    await new Promise((resolve) => setTimeout(resolve, 500));
    api.dispatchCustomEvent = tell;
    return told.includes('autoQueueGraphChanged');
}"""


def draw_a_text(page: NodePage, model: str) -> None:
    fixed = {"control_after_generate": "fixed"}  # a new seed after each run would be a change
    page.draw_a_text(model, 256, steps=1, cfg=1.0, sampler_name="lcm", scheduler="simple", **fixed)


def choose_mode(page: NodePage, mode: str) -> None:
    item = page.page.get_by_role("menu").get_by_text(mode, exact=True)
    for _ in range(3):  # the menu stays open after a choice, in some front ends
        if not item.is_visible():
            page.page.get_by_test_id("queue-mode-menu-trigger").click()
            page.page.wait_for_timeout(1000)
    item.click()
    page.press("Escape")


def texts_drawn(page: NodePage) -> list[Any]:
    """The texts of all prompts that ran, oldest first."""
    prompts = [entry["prompt"][2] for entry in page.front_end.server.get("/history").values()]
    return [node["inputs"]["text"] for prompt in prompts for node in prompt.values() if node["class_type"] == "CLIPTextEncode"]


def is_drawn(page: NodePage, text: str) -> bool:
    """Whether the last prompt that ran has this text, after a while."""
    end = time.monotonic() + PATIENCE
    while texts_drawn(page)[-1:] != [text] and time.monotonic() < end:
        page.page.wait_for_timeout(200)
    return texts_drawn(page)[-1:] == [text]


def settle(page: NodePage) -> None:
    """Wait for the runs of earlier changes, after which the front end looks for others."""
    runs = -1
    while runs != len(texts_drawn(page)):
        runs = len(texts_drawn(page))
        page.page.wait_for_timeout(3000)


@pytest.fixture
def on_change(page: NodePage) -> Iterator[NodePage]:
    choose_mode(page, "Run (On Change)")
    yield page
    choose_mode(page, "Run")


def test_letters_are_changes_with_a_fast_model(on_change: NodePage) -> None:
    page = on_change
    draw_a_text(page, "emoji (fast)")
    page.page.get_by_test_id("queue-button").click()
    page.page.wait_for_timeout(1000)
    field = page.page.locator("textarea:visible").first
    field.click()
    settle(page)
    field.press_sequentially("owl, flat", delay=40)
    assert is_drawn(page, "owl, flat")


@pytest.mark.parametrize(("model", "fast"), [("emoji (fast)", True), ("emoji", False)])
def test_the_queue_is_told_with_a_fast_model_alone(page: NodePage, model: str, fast: bool) -> None:
    draw_a_text(page, model)
    assert page.page.evaluate(TOLD) is fast
