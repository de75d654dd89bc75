"""Nodes that hand over what a person may hand over by mistake, and one that looks inside.

The tests copy this file into the server's custom_nodes."""

from __future__ import annotations

from typing import Any

import torch


class ForeignConditioning:
    """CONDITIONING of SDXL's width."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "run", "tests"

    def run(self) -> tuple[Any]:
        return ([[torch.randn(1, 77, 2048), {}]],)


class ForeignModel:
    """A MODEL of another architecture, as far as our nodes look."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "tests"

    def run(self) -> tuple[Any]:
        class Patcher:
            model = torch.nn.Linear(1, 1)

        return (Patcher(),)


class OutOfMemory:
    """A MODEL that runs out of memory when it is called."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "kind": (["MemoryError", "OutOfMemoryError"],)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "tests"

    def run(self, model: Any, kind: str) -> tuple[Any]:
        error = MemoryError if kind == "MemoryError" else torch.OutOfMemoryError

        def fail(apply: Any, arguments: Any) -> None:
            raise error("out of memory, raised by a test")

        patched = model.clone()
        patched.set_model_unet_function_wrapper(fail)
        return (patched,)


class DumpToken:
    """Writes the embedding of a CLIP_VISION_OUTPUT to a file."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"output": ("CLIP_VISION_OUTPUT",), "file": ("STRING",)}})
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "run", "tests", True

    def run(self, output: Any, file: str) -> tuple[()]:
        torch.save(output["image_embeds"], file)
        return ()


NODE_CLASS_MAPPINGS = {
    "TestDumpToken": DumpToken,
    "TestForeignConditioning": ForeignConditioning,
    "TestForeignModel": ForeignModel,
    "TestOutOfMemory": OutOfMemory,
}
