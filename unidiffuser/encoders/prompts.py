"""What of a prompt a model cannot follow: words outside its vocabulary, and what its text encoder cuts off."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ..checkpoints.tokenizers import BytePairTokenizer
from ..checkpoints.vocabulary import LONGEST_NAME, Vocabulary

FUNCTION_WORDS = frozenset(
    {"a", "an", "the", "this", "that", "these", "those", "some", "and", "or", "with", "without", "of", "in", "on", "at", "to",
     "for", "from", "by", "as", "into", "near", "is", "are", "it", "its"}
)  # fmt: skip
SUGGESTIONS = 3  # most for a word
CLOSE, CLOSE_SYNONYM = 0.8, 0.85  # lowest similarity in spelling, as difflib counts it: 1 is equal
_CLAUSE_ENDS = re.compile(r"[,;:.!?()\[\]{}|/\"\n，。；：、！？（）「」]+")
_JOINER, _COLOUR_FORM, _FIRST_TONE, _LAST_TONE = "\u200d", "\ufe0f", "\U0001f3fb", "\U0001f3ff"
_QUOTED = 60  # longest quotation, in characters


@dataclass(frozen=True)
class UnknownWords:
    """A word outside the vocabulary, or known words in a combination that no concept has.

    Attributes:
        text: the word or words, in lower case.
        nearest: up to `SUGGESTIONS` concepts or styles to use instead, nearest first.
    """

    text: str
    nearest: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f'"{shortened(self.text)}"' + (f" (nearest: {', '.join(self.nearest)})" if self.nearest else "")


@dataclass(frozen=True)
class PromptCheck:
    """What of a prompt the model cannot follow; false if there is nothing.

    Attributes:
        unknown: words outside the vocabulary; empty if the checkpoint lists none.
        lost: the end of the prompt that the text encoder does not read.
        limit: tokens that it reads.
    """

    unknown: tuple[UnknownWords, ...] = ()
    lost: str = ""
    limit: int = 0

    def __bool__(self) -> bool:
        return bool(self.unknown or self.lost)

    def __str__(self) -> str:
        found = [f"the model does not know {_listed(self.unknown)}"] if self.unknown else []
        if self.lost:
            found.append(f'cut to the text encoder\'s limit of {self.limit} tokens, which loses "{shortened(self.lost)}"')
        return "; ".join(found)


def check_prompt(prompt: str, vocabulary: Vocabulary | None, tokenizer: BytePairTokenizer, length: int) -> PromptCheck:
    """Words of a prompt that the model does not know, and the end that its text encoder does not read.

    Args:
        prompt: any text.
        vocabulary: of the checkpoint; None reports only what is cut.
        tokenizer: of the text encoder.
        length: L, tokens of a text latent, start and end included.
    """
    lost = tokenizer.lost(prompt, length)
    read = prompt[: len(prompt) - len(lost)]
    if lost and read[-1:].isalnum() and lost[0].isalnum():  # cut inside a word
        read = read[: -len(re.split(r"\s", read)[-1])]
    unknown = () if vocabulary is None else tuple(unknown_words(read, vocabulary))
    return PromptCheck(unknown, lost.strip(), length - 2)


def warning_about(prompts: Sequence[str], checks: Iterable[PromptCheck], most: int = 3) -> str:
    """One line about several prompts; "" if all can be followed. It quotes the first `most` of them."""
    found = [(prompt, check) for prompt, check in zip(prompts, checks, strict=True) if check]
    lines = [f'prompt "{shortened(prompt)}": {check}' for prompt, check in found[:most]]
    more = [f"and {len(found) - most} more prompts"] if len(found) > most else []
    return "; ".join([*lines, *more])


def unknown_words(prompt: str, vocabulary: Vocabulary) -> list[UnknownWords]:
    """Words of a prompt outside the vocabulary, each once, in order.

    A clause is covered by the longest concepts, styles and words of the vocabulary; function words are left out. The rest is
    unknown if it is no word of a concept, or if its words are of different concepts, as in "blue apple".
    """
    index = _index(vocabulary)
    found: dict[str, UnknownWords] = {}
    for clause in _CLAUSE_ENDS.split(_normalised(prompt)):
        rest = index.uncovered(list(_words(clause)))
        new = [word for word in rest if word not in index.of_word]
        known = [word for word in rest if word in index.of_word]
        for word in new:
            found.setdefault(word, UnknownWords(word, index.nearest(word)))
        if known and not set.intersection(*(index.of_word[word] for word in known)):
            phrase = " ".join(known)
            found.setdefault(phrase, UnknownWords(phrase, index.nearest_concepts(known)))
    return list(found.values())


def with_captions(vocabulary: Vocabulary, captions: Iterable[str]) -> Vocabulary:
    """A vocabulary with the unknown words of more training captions.

    A word or phrase that makes up a whole clause of a caption becomes a concept, any other a word.
    """
    concepts: dict[str, None] = {}
    words: dict[str, None] = {}
    for caption in dict.fromkeys(captions):
        clauses = {" ".join(_words(clause)) for clause in _CLAUSE_ENDS.split(_normalised(caption))}
        for found in unknown_words(caption, vocabulary):
            if len(found.text) <= LONGEST_NAME:
                (concepts if found.text in clauses else words)[found.text] = None
    rest = [word for word in words if word not in concepts]
    return replace(vocabulary, concepts=(*vocabulary.concepts, *concepts), words=(*vocabulary.words, *rest))


def shortened(text: str, limit: int = _QUOTED) -> str:
    """A text in one line of at most about `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[:limit].rstrip() + "..."


class _Index:
    """A vocabulary by its words."""

    def __init__(self, vocabulary: Vocabulary):
        self.phrases: dict[tuple[str, ...], str] = {}  # of words: the name as the vocabulary has it
        self.of_word: dict[str, set[str]] = {}  # of a word: the concepts that contain it
        for name in (*vocabulary.concepts, *vocabulary.styles, *vocabulary.words):
            self.phrases.setdefault(tuple(_words(_normalised(name))), name)
        for name in vocabulary.concepts:
            for word in _words(_normalised(name)):
                self.of_word.setdefault(word, set()).add(name)
        self.synonyms = {_normalised(word): names for word, names in vocabulary.synonyms.items()}
        self.longest = max(map(len, self.phrases), default=0)
        self.order = {name: place for place, name in enumerate(vocabulary.concepts)}
        single = (words[0] for words in self.phrases if len(words) == 1)
        self.words = list(dict.fromkeys([*single, *self.of_word]))

    def uncovered(self, words: list[str]) -> list[str]:
        """The words that belong to no phrase of the vocabulary and are no function words."""
        rest, at = [], 0
        while at < len(words):
            sizes = range(min(self.longest, len(words) - at), 0, -1)
            size = next((size for size in sizes if tuple(words[at : at + size]) in self.phrases), 0)
            if not size and words[at] not in FUNCTION_WORDS:
                rest.append(words[at])
            at += size or 1
        return rest

    def nearest(self, word: str) -> tuple[str, ...]:
        """Suggestions for an unknown word: by synonym, number, the name of a symbol, or spelling."""
        for form in _forms(word):
            if found := self.suggestions(form):
                return found
        named = [part for part in _words(_normalised(unicodedata.name(word[0], ""))) if part in self.of_word]
        if named and not word[0].isalnum():
            return self.nearest_concepts(named)
        close = [*_close(word, self.words, CLOSE), *_close(word, self.synonyms, CLOSE_SYNONYM)]
        return tuple(dict.fromkeys(name for match in close for name in self.suggestions(match)))[:SUGGESTIONS]

    def suggestions(self, word: str) -> tuple[str, ...]:
        """The names to suggest for a word of the vocabulary or a synonym."""
        if (word,) in self.phrases:
            return (self.phrases[word,],)
        named = self.synonyms.get(word) or sorted(self.of_word.get(word, ()), key=self.order.__getitem__)
        return tuple(named[:SUGGESTIONS])

    def nearest_concepts(self, words: Sequence[str]) -> tuple[str, ...]:
        """The concepts that share most words; first those with the last word, which in English is the thing itself."""
        phrase = " ".join(words)

        def closeness(name: str) -> tuple[bool, int, float]:
            shared = [word for word in words if name in self.of_word[word]]
            return words[-1] in shared, len(shared), difflib.SequenceMatcher(None, phrase, name).ratio()

        candidates = {name for word in words for name in self.of_word[word]}
        return tuple(sorted(candidates, key=lambda name: (closeness(name), -self.order[name]), reverse=True)[:SUGGESTIONS])


@lru_cache(maxsize=4)
def _index(vocabulary: Vocabulary) -> _Index:
    return _Index(vocabulary)


def _close(word: str, words: Iterable[str], least: float) -> list[str]:
    """The words most similar in spelling, best first; of equally similar ones first those with the same first letter."""
    found = difflib.get_close_matches(word, list(words), SUGGESTIONS, least)

    def closeness(other: str) -> tuple[float, bool]:
        return difflib.SequenceMatcher(None, other, word).ratio(), other[0] == word[0]

    return sorted(found, key=closeness, reverse=True)


def _normalised(text: str) -> str:
    """NFC like the tokenizer's, in lower case, with one form of the apostrophe, without the marks that ask for colour."""
    return unicodedata.normalize("NFC", text).casefold().replace("’", "'").replace(_COLOUR_FORM, "")


def _words(clause: str) -> Iterator[str]:
    """Runs of letters, digits and inner apostrophes; a pictograph or other symbol, with what is joined to it, is one word."""
    run, symbol = "", False
    for character in [*clause, " "]:
        if _continues(run, symbol, character):
            run += character
            continue
        if word := run.strip("'" + _JOINER):
            yield word
        symbol = _is_symbol(character)
        run = character if symbol or _is_letter(character) else ""


def _continues(run: str, symbol: bool, character: str) -> bool:
    if not run:
        return False
    if not symbol:
        return _is_letter(character) or character == "'"
    return character == _JOINER or run[-1] == _JOINER or _FIRST_TONE <= character <= _LAST_TONE


def _is_letter(character: str) -> bool:
    return unicodedata.category(character)[0] in "LNM"


def _is_symbol(character: str) -> bool:
    return character > "\x7f" and unicodedata.category(character) in ("So", "Sk")


def _forms(word: str) -> Iterator[str]:
    """A word, and its other number in English."""
    yield word
    if word.endswith("'s"):
        yield word[:-2]
    if word.endswith("ies"):
        yield word[:-3] + "y"
    if word.endswith("es"):
        yield word[:-2]
    if word.endswith("s"):
        yield word[:-1]
    else:
        yield from (word + "s", word + "es")
    if word.endswith("y"):
        yield word[:-1] + "ies"


def _listed(found: Sequence[UnknownWords]) -> str:
    *first, last = map(str, found)
    return f"{', '.join(first)} and {last}" if first else last
