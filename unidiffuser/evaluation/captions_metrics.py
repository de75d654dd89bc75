"""How near made captions come to the references: the same letters, BLEU-4 and CIDEr-D.

BLEU is sacrebleu's and CIDEr-D is pycocoevalcap's, the scorer of the COCO caption challenge. That challenge splits words with
Stanford's tokenizer, a Java program; :func:`words` does its plain cases (lower case, punctuation dropped, clitics apart)
without Java, so numbers on COCO can differ from published ones in the third digit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from unidiffuser.evaluation.needs import needed

_TOKEN = re.compile(r"n't\b|'(?:s|m|d|re|ve|ll)\b|\w+?(?=n't\b)|\w+(?:-\w+)*|[^\w\s]", re.IGNORECASE)
_WORD = re.compile(r"\w")


def words(caption: str) -> str:
    """Lower-case words between single blanks, without punctuation: ``"A dog, isn't it?"`` -> ``"a dog is n't it"``."""
    return " ".join(token for token in _TOKEN.findall(caption.lower()) if _WORD.search(token))


def exact(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[bool]:
    """For each caption, whether it is letter by letter one of its references (blanks at the ends aside)."""
    _paired(captions, references)
    return [caption.strip() in {r.strip() for r in mine} for caption, mine in zip(captions, references, strict=True)]


def bleu4(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 (Papineni et al. 2002), unsmoothed, in [0, 100]; captions may have different numbers of references."""
    _paired(captions, references)
    metric = needed("sacrebleu.metrics").BLEU(smooth_method="none", tokenize="none", force=True)
    most = max(map(len, references))
    columns = [[words(mine[k]) if k < len(mine) else None for mine in references] for k in range(most)]
    return float(metric.corpus_score([words(caption) for caption in captions], columns).score)


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D (Vedantam et al. 2015), about 1 for people; the weights of words are those of these references.

    Raises:
        ValueError: fewer than two captions: rarity of words means nothing in one.
    """
    _paired(captions, references)
    if len(captions) < 2:
        raise ValueError("CIDEr needs two or more captions, since it weighs words by their rarity")
    made = {k: [words(caption)] for k, caption in enumerate(captions)}
    real = {k: [words(r) for r in mine] for k, mine in enumerate(references)}
    score, _ = needed("pycocoevalcap.cider.cider").Cider().compute_score(real, made)
    return float(score)


def _paired(captions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not captions or len(captions) != len(references) or not all(references):
        raise ValueError(f"{len(captions)} captions need as many lists of references, none of them empty")
