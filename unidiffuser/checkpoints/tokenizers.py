"""Byte-pair tokenizers of CLIP and GPT-2, from a vocabulary and merges in memory.

They are built on the `tokenizers` library, whose interface is more stable than transformers' tokenizer classes. The merges of
the published models are bundled (see assets/ATTRIBUTIONS.md), so nothing is downloaded; a checkpoint may contain its own.

CLIP (Radford et al., arXiv 2103.00020) lower-cases, and its words end with "</w>"; GPT-2 (Radford et al., 2019) keeps the case,
and its words begin with their space. A vocabulary with a token that ends with "</w>" is taken for CLIP's.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from ..media.json_files import brief

START, END, STOP = "<|startoftext|>", "<|endoftext|>", "<|EOS|>"
_WORD_END = "</w>"
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""CLIP's pre-tokenization: each match is one word, split further by the merges."""
_CLIP_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|" + CLIP_WORDS

Spec = dict[str, Any]  # {"vocab": {token: id}, "merges": ["a b", ...]}, as in a checkpoint's metadata


class BytePairTokenizer:
    """Byte-pair tokenizer, in CLIP's or GPT-2's form by its vocabulary.

    Args:
        vocab: id of every token. START, END and STOP are special tokens if they are in it.
        merges: pairs "a b" in order of priority.

    Raises:
        ValueError: the merges use tokens that the vocabulary lacks.
    """

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[str]):
        self.vocab, self.merges = dict(vocab), list(merges)
        self._lowercase = any(token.endswith(_WORD_END) for token in vocab)
        options = {"end_of_word_suffix": _WORD_END} if self._lowercase else {}
        if END in vocab:
            options["unk_token"] = END
        try:
            model = BPE(vocab=self.vocab, merges=[_pair(merge) for merge in merges], **options)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(
                f"the tokenizer's vocab and merges contradict each other ({str(error)[:200]}); save both again."
            ) from error
        self._tokenizer = Tokenizer(model)
        if self._lowercase:
            self._tokenizer.normalizer = normalizers.Sequence(
                [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
            )
            self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(_CLIP_SPLIT), behavior="removed", invert=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        else:
            self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = decoders.ByteLevel()
        special = [token for token in (START, END, STOP) if token in vocab]
        self._tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])

    @classmethod
    def from_spec(cls, spec: Spec) -> BytePairTokenizer:
        """The tokenizer of a `spec`; ValueError if it is none."""
        if not isinstance(spec.get("vocab"), dict) or not isinstance(spec.get("merges"), list):
            raise ValueError('a tokenizer must be given as {"vocab": {token: id}, "merges": ["a b", ...]}.')
        return cls(spec["vocab"], spec["merges"])

    @property
    def spec(self) -> Spec:
        """{"vocab": {token: id}, "merges": ["a b", ...]}, ready for JSON."""
        return {"vocab": self.vocab, "merges": self.merges}

    def __len__(self) -> int:
        return len(self.vocab)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without start and end tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; invalid UTF-8 becomes the replacement character."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text.replace(_WORD_END, " ").strip() if self._lowercase else text

    def lost(self, text: str, length: int) -> str:
        """The end of a text that a text encoder of `length` tokens, START and END included, cuts off; "" if it reads all."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return text[encoding.offsets[length - 2][0] :] if len(encoding.ids) > length - 2 else ""

    def __call__(self, texts: Sequence[str], length: int) -> Tensor:
        """Token ids for a text encoder, padded with END.

        Args:
            texts: B of them. One of more than length - 2 tokens is cut, see `lost`.
            length: tokens of each row, START and END included.

        Returns:
            (B, length) int64: START, the text, END, END, ...
        """
        start, end = self.vocab[START], self.vocab[END]
        rows = []
        for text in texts:
            ids = self.encode(text)[: length - 2]
            rows.append([start, *ids, *[end] * (length - 1 - len(ids))])
        return torch.tensor(rows, dtype=torch.long).reshape(len(rows), length)


def check_spec(spec: Spec, needed: Sequence[str] = (), size: int | None = None) -> None:
    """Refuse a tokenizer from a file that is damaged or belongs to another model.

    Args:
        spec: as read from JSON.
        needed: tokens that its vocabulary must have.
        size: of the vocabulary that the model was built for; None for any.

    Raises:
        ValueError: another type than `Spec`, a missing token, or an id outside the vocabulary.
    """
    if not isinstance(spec, dict) or not isinstance(spec.get("vocab"), dict) or not isinstance(spec.get("merges"), list):
        raise ValueError('a tokenizer must be given as {"vocab": {token: id}, "merges": ["a b", ...]}')
    for token, number in spec["vocab"].items():
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < (size or 1 << 31):
            raise ValueError(f"the token {brief(token)} has the id {brief(number)}, which must be 0 to {(size or 1 << 31) - 1}")
    for merge in spec["merges"]:
        if not isinstance(merge, str):
            raise ValueError(f"a merge must be a text such as 'a b', not {brief(merge)}")
    if missing := [token for token in needed if token not in spec["vocab"]]:
        raise ValueError(f"the token {missing[0]} is missing")


def _pair(merge: str) -> tuple[str, str]:
    first, _, second = merge.partition(" ")
    return first, second


@lru_cache(maxsize=1)
def clip_spec() -> Spec:
    """CLIP's published tokenizer: 49,408 tokens, the last two for start and end."""
    merges = _bundled_merges("clip_merges.txt.gz")
    letters = _byte_letters()
    tokens = [*letters, *(letter + _WORD_END for letter in letters), *_merged(merges), START, END]
    return {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}


@lru_cache(maxsize=1)
def gpt2_spec() -> Spec:
    """GPT-2's published tokenizer, 50,257 tokens, and the stop token with id 50257."""
    merges = _bundled_merges("gpt2_merges.txt.gz")
    tokens = [*_byte_letters(), *_merged(merges), END, STOP]
    return {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}


def _bundled_merges(name: str) -> list[str]:
    data = (Path(__file__).parents[1] / "assets" / name).read_bytes()
    return gzip.decompress(data).decode("utf-8").splitlines()


def _merged(merges: list[str]) -> list[str]:
    return [merge.replace(" ", "") for merge in merges]


def _byte_letters() -> list[str]:
    """A printable character for each byte, in both vocabularies' order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def read_spec(folder: Path) -> Spec | None:
    """Read a tokenizer folder of transformers; None if it holds no tokenizer.

    Raises:
        ValueError: its files are damaged.
    """
    fast = folder / "tokenizer.json"
    vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    try:
        if vocab_file.is_file() and merges_file.is_file():
            vocab = json.loads(vocab_file.read_text(encoding="utf-8"))
            lines = merges_file.read_text(encoding="utf-8").split("\n")
            merges = [line for line in lines if line and not line.startswith("#version")]
            added = folder / "added_tokens.json"
            if added.is_file():
                vocab |= json.loads(added.read_text(encoding="utf-8"))
        elif fast.is_file():
            data = json.loads(fast.read_text(encoding="utf-8"))
            vocab = data["model"]["vocab"] | {token["content"]: token["id"] for token in data["added_tokens"]}
            merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in data["model"]["merges"]]
        else:
            return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = brief(str(error) or type(error).__name__)
        raise ValueError(f"the tokenizer files in {folder} are damaged ({reason}); download them again.") from error
    return {"vocab": vocab, "merges": merges}
