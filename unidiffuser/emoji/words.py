"""The vocabulary of the bundled model: its concepts and styles, with synonyms and emoji characters to suggest concepts for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..checkpoints.vocabulary import Vocabulary
from ..media.files import read_lines
from .packages import STYLES

CONCEPTS_FILE, SYNONYMS_FILE = (Path(__file__).with_name(name) for name in ("concepts.txt", "synonyms.txt"))


def emoji_vocabulary() -> Vocabulary:
    """Concepts of `concepts.txt`, the four styles, and suggestions for `synonyms.txt` and each concept's emoji character."""
    characters = {}
    for line in _lines(CONCEPTS_FILE):
        code, label = line.split(" ", 1)
        characters["".join(chr(int(part, 16)) for part in code.split("-"))] = label
    found: dict[str, list[str]] = {character: [label] for character, label in characters.items()}
    for line in _lines(SYNONYMS_FILE):
        label, words = line.split(":", 1)
        for word in words.split(","):
            found.setdefault(word.strip(), []).append(label)
    concepts = tuple(characters.values())
    return Vocabulary(concepts, STYLES, synonyms={word: tuple(labels) for word, labels in found.items()})


def vocabulary_of(concepts: Iterable[str], styles: Iterable[str]) -> Vocabulary:
    """A vocabulary of other concepts and styles, with the suggestions of `emoji_vocabulary` that lead to these concepts."""
    names, synonyms = set(concepts), {}
    for word, labels in emoji_vocabulary().synonyms.items():
        if word not in names and (known := tuple(label for label in labels if label in names)):
            synonyms[word] = known
    return Vocabulary(tuple(sorted(names)), tuple(sorted(set(styles))), synonyms=synonyms)


def _lines(path: Path) -> list[str]:
    return [line for line in read_lines(path) if line and not line.startswith("#")]
