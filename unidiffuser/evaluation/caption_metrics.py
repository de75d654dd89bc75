"""Caption metrics against references: exact match, BLEU-4 (sacrebleu) and CIDEr-D (pycocoevalcap).

The COCO caption challenge splits words with Stanford's tokenizer, a Java program; `words` covers its plain cases (lower case,
no punctuation, clitics apart) without Java, so figures on COCO can differ from published ones in the third digit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .optional import require

_TOKEN = re.compile(r"n't\b|'(?:s|m|d|re|ve|ll)\b|\w+?(?=n't\b)|\w+(?:-\w+)*|[^\w\s]", re.IGNORECASE)
_WORD = re.compile(r"\w")


def words(caption: str) -> str:
    """Lower-case words separated by single spaces, without punctuation: `"A dog, isn't it?"` -> `"a dog is n't it"`."""
    return " ".join(token for token in _TOKEN.findall(caption.lower()) if _WORD.search(token))


def exact(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[bool]:
    """For each caption, whether it equals one of its references, apart from surrounding white space."""
    _paired(captions, references)
    return [caption.strip() in {r.strip() for r in group} for caption, group in zip(captions, references, strict=True)]


def bleu4(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 (Papineni et al. 2002), unsmoothed, in [0, 100]; the number of references may vary."""
    _paired(captions, references)
    metric = require("sacrebleu.metrics").BLEU(smooth_method="none", tokenize="none", force=True)
    most = max(map(len, references))
    columns = [[words(group[k]) if k < len(group) else None for group in references] for k in range(most)]
    return float(metric.corpus_score([words(caption) for caption in captions], columns).score)


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D (Vedantam et al. 2015), about 1 for human captions; words are weighted by their rarity in these references.

    Raises:
        ValueError: fewer than two captions, for which rarity is undefined.
    """
    _paired(captions, references)
    if len(captions) < 2:
        raise ValueError("CIDEr needs two or more captions, since it weights words by their rarity")
    generated = {k: [words(caption)] for k, caption in enumerate(captions)}
    real = {k: [words(r) for r in group] for k, group in enumerate(references)}
    score, _ = require("pycocoevalcap.cider.cider").Cider().compute_score(real, generated)
    return float(score)


def _paired(captions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not captions or len(captions) != len(references) or not all(references):
        raise ValueError(f"{len(captions)} captions need as many lists of references, none of them empty")
