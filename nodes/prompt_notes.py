"""Notes in a CONDITIONING on what of its prompt the model cannot follow, and the warning on the node that samples with it.

The CLIP of a checkpoint writes the note, since CLIP Text Encode is a node of the host; KSampler shows it through a wrapper of
the MODEL, the nodes of this pack by `show_prompt_warning`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..unidiffuser.checkpoints.vocabulary import Vocabulary
from ..unidiffuser.encoders.prompts import PromptCheck, unknown_words
from .types import show_warning

NOTE = "unidiffuser_prompt"  # in a CONDITIONING: the `PromptCheck` of its prompt, if there is anything to say
PROMPT_ROWS = 77  # of a prompt in the host, at least: packs made for Stable Diffusion count on them
Chunks = Sequence[Sequence[tuple[Any, ...]]]


def rows_of_prompt(length: int) -> int:
    """Rows of one prompt in a CONDITIONING, for a model that reads the first `length`; the others are zero."""
    return max(length, PROMPT_ROWS)


def check_tokens(chunks: Chunks, tokenizer: Any, vocabulary: Vocabulary | None, length: int) -> PromptCheck:
    """The check of a prompt that the host has split into chunks of tokens, of which the model reads the first.

    Args:
        chunks: lists of (token id or textual inversion, weight).
        tokenizer: decodes ids to text.
        vocabulary: of the checkpoint; None reports only what is cut.
        length: tokens of the first chunk that it reads, start and end included.
    """

    def text(part: Iterable[Sequence[tuple[Any, ...]]]) -> str:
        ids = [token[0] for chunk in part for token in chunk if isinstance(token[0], int)]
        return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()

    first = chunks[0]
    read, whole = text([first[: length - 1]]), text([first])
    if whole[len(read) : len(read) + 1].strip():  # cut inside a word
        read = read[: -len(read.split()[-1])]
    unknown = () if vocabulary is None else tuple(unknown_words(read, vocabulary))
    return PromptCheck(unknown, text([first[length - 1 :], *chunks[1:]]), length - 2)


def show_prompt_warning(model: Any, *conditionings: Sequence[Any] | None) -> None:
    """Show the notes of CONDITIONINGs in the node that is running."""
    show_warning(_warning(model, (extra for conditioning in conditionings for _, extra in conditioning or ())))


def warn_about_length(rows: int, one_prompt: int, check: PromptCheck | None = None) -> None:
    """Show that a CONDITIONING has more rows than one prompt, unless the check of its prompt says so already."""
    if rows > one_prompt and not (check and check.lost):
        show_warning(
            f"The CONDITIONING has {rows} rows, as 'Conditioning (Concat)' makes it, but this model reads only the first "
            f"prompt, of {one_prompt} rows. For two prompts use 'Conditioning (Combine)'."
        )


def warn_about_prompts(executor: Any, *arguments: Any, **named: Any) -> Any:
    """OUTER_SAMPLE wrapper that shows the notes of all conditions in the node that is running."""
    guider = executor.class_obj
    show_warning(_warning(guider.model_patcher, (cond for conds in guider.conds.values() for cond in conds or ())))
    return executor(*arguments, **named)


def _warning(model: Any, extras: Iterable[Mapping[str, Any]]) -> str:
    checks = [extra[NOTE] for extra in extras if NOTE in extra]
    if model.patches:  # the words of a LoRA cannot be told
        checks = [replace(check, unknown=()) for check in checks]
    sentences = dict.fromkeys(str(check) for check in checks if check)
    return "\n".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)
