"""Byte-pair vocabularies in CLIP's form and in GPT-2's, trained on captions with `tokenizers`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from ..checkpoints.tokenizers import CLIP_WORDS, END, START, STOP


def clip_vocabulary(captions: Iterable[str], size: int) -> dict[str, Any]:
    """A vocabulary of lower-case words ending in `</w>`, split as in CLIP: {"vocab": token -> id, "merges": ["a b", ...]}."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2 - len(alphabet), initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    # CLIP's layout: bytes, bytes that end a word, merges in order, then the two special tokens.
    tokens = sorted(alphabet)
    tokens += [t + "</w>" for t in tokens]
    tokens += [a + b for a, b in learned["merges"] if a + b not in set(tokens)]
    tokens += [START, END]
    return {"vocab": {t: i for i, t in enumerate(tokens)}, "merges": [" ".join(m) for m in learned["merges"]]}


def gpt2_vocabulary(captions: Iterable[str], size: int) -> dict[str, Any]:
    """The same as byte-level BPE in GPT-2's form; `<|endoftext|>` and `<|EOS|>` are the last two ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - 2, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    tokens = [*sorted(learned["vocab"], key=learned["vocab"].__getitem__), END, STOP]
    return {"vocab": {t: i for i, t in enumerate(tokens)}, "merges": [" ".join(m) for m in learned["merges"]]}
