"""Prompt Helper: a prompt from the words that a checkpoint lists."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io
from safetensors import SafetensorError, safe_open

from ..unidiffuser.checkpoints.checkpoint import load_checkpoint
from ..unidiffuser.checkpoints.vocabulary import Vocabulary
from ..unidiffuser.encoders.prompts import unknown_words
from ..unidiffuser.media.json_files import parse_json
from . import folders
from .types import CATEGORY

NO_STYLE = "(none)"


class PromptHelper(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        known = vocabularies()
        concepts = dict.fromkeys(name for vocabulary in known for name in vocabulary.concepts)
        styles = dict.fromkeys(name for vocabulary in known for name in vocabulary.styles)
        return io.Schema(
            node_id="UniDiffuserPromptHelper",
            display_name="Prompt Helper",
            category=CATEGORY,
            description="Writes a prompt from the concepts and styles that a checkpoint was trained on. Connect the prompt to "
            "the text of CLIP Text Encode.",
            search_aliases=["prompt", "concepts", "styles", "vocabulary", "words", "emoji", "txt2img"],
            inputs=[
                io.Combo.Input(
                    "concept",
                    options=list(concepts),
                    tooltip="What the image shows. Lists the concepts of 'emoji' and of the files in models/unidiffuser that "
                    "name theirs.",
                ),
                io.Combo.Input(
                    "style", options=[NO_STYLE, *styles], tooltip="The style of the image. Naming one gives cleaner images."
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="From Load UniDiffuser. Connect it to check the words for the checkpoint that is loaded.",
                ),
            ],
            outputs=[io.String.Output(display_name="prompt", tooltip="The prompt, for CLIP Text Encode or Text to Pair.")],
        )

    @classmethod
    def validate_inputs(cls, concept: str, style: str) -> bool:
        return True  # a workflow may name words of a checkpoint that is loaded from elsewhere; `execute` checks them

    @classmethod
    def execute(cls, concept: str, style: str, clip: Any = None) -> io.NodeOutput:
        styles = [] if style == NO_STYLE else [style]
        vocabulary: Vocabulary | None = getattr(getattr(clip, "tokenizer", None), "vocabulary", None)
        if vocabulary is not None:
            check("concept", [concept], vocabulary, vocabulary.concepts)
            check("style", styles, vocabulary, vocabulary.styles)
        return io.NodeOutput(", ".join([concept, *styles]))


def check(name: str, chosen: list[str], vocabulary: Vocabulary, known: tuple[str, ...]) -> None:
    """ValueError if an input names no word of the loaded checkpoint; the text has the nearest ones."""
    for value in chosen:
        if value not in known:
            near = [word for found in unknown_words(value, vocabulary) for word in found.nearest if word in known]
            hint = f"Nearest: {', '.join(near)}." if near else f"Choose one of: {', '.join(known[:20])}."
            raise ValueError(f"'{name}' is '{value}', which the loaded checkpoint does not know. {hint}")


def vocabularies() -> list[Vocabulary]:
    """Of the bundled model and of the files in models/unidiffuser that have one."""
    found = [load_checkpoint(folders.BUNDLED).config.vocabulary]
    for name in folder_paths.get_filename_list(folders.FOLDER):
        path = folder_paths.get_full_path(folders.FOLDER, name)
        if path is not None and path.endswith(".safetensors"):
            found.append(_of_file(path, Path(path).stat().st_mtime_ns))
    return [vocabulary for vocabulary in found if vocabulary is not None]


@lru_cache(maxsize=64)
def _of_file(path: str, changed: int) -> Vocabulary | None:
    """The vocabulary in a file's header; None if it has none, or is damaged, which the loader reports."""
    try:
        with safe_open(path, framework="pt") as file:
            config = parse_json((file.metadata() or {}).get("config", "{}"), "the config")
        return Vocabulary.from_dict(config["vocabulary"]) if config.get("vocabulary") else None
    except (SafetensorError, OSError, ValueError, AttributeError):
        return None


NODES = [PromptHelper]
