"""The words that a checkpoint was trained on, as far as its metadata lists them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MOST_NAMES, LONGEST_NAME = 100_000, 100  # of a list and in characters; comparing words stays quick, whatever a file holds


@dataclass(frozen=True)
class Vocabulary:
    """Words and phrases of a checkpoint's training captions.

    Attributes:
        concepts: what the model can draw and caption, such as "red apple".
        styles: styles that a caption may name after the concept, such as "watercolour".
        words: further words of the training captions that are known on their own.
        synonyms: words outside the training captions, each with the concepts to suggest in its place.
    """

    concepts: tuple[str, ...]
    styles: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    synonyms: dict[str, tuple[str, ...]] = field(default_factory=dict, hash=False)

    @classmethod
    def from_dict(cls, data: Any) -> Vocabulary:
        """The vocabulary of a JSON object; unknown fields, of newer versions, are ignored.

        Raises:
            ValueError: a field is no list of names; the text has the field's name.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"the configuration's 'vocabulary' must be an object, not {data!r}.")
        lists = {name: _names(name, data.get(name, ())) for name in ("concepts", "styles", "words")}
        if not lists["concepts"]:
            raise ValueError("the vocabulary's 'concepts' must be a list of at least one name.")
        synonyms = data.get("synonyms", {})
        if not isinstance(synonyms, Mapping):
            raise ValueError(f"the vocabulary's 'synonyms' must be an object, not {synonyms!r}.")
        _names("synonyms", list(synonyms))
        return cls(**lists, synonyms={word: _names("synonyms", concepts) for word, concepts in synonyms.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, ready for JSON, without empty fields."""
        plain = {**dataclasses.asdict(self), "synonyms": {word: list(names) for word, names in self.synonyms.items()}}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items() if value}

    def summary(self, most: int | None = None) -> str:
        """Styles and concepts in two lines; of the concepts only the first `most`."""
        shown = self.concepts[:most]
        more = f" and {len(self.concepts) - len(shown)} more" if len(shown) < len(self.concepts) else ""
        styles = [f"{len(self.styles)} styles: {', '.join(self.styles)}"] if self.styles else []
        return "\n".join([*styles, f"{len(self.concepts)} concepts: {', '.join(shown)}{more}"])


def _names(field_name: str, given: Any) -> tuple[str, ...]:
    if not isinstance(given, (list, tuple)) or len(given) > MOST_NAMES:
        raise ValueError(f"the vocabulary's {field_name!r} must be a list of at most {MOST_NAMES} names.")
    for name in given:
        if not isinstance(name, str) or not name.strip() or len(name) > LONGEST_NAME:
            raise ValueError(
                f"the vocabulary's {field_name!r} must hold texts of 1 to {LONGEST_NAME} characters, not {name!r}."
            )
    return tuple(given)
