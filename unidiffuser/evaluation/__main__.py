"""``python -m unidiffuser.evaluation --model emoji --data FOLDER --out FOLDER``: judge a model and print the table."""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from unidiffuser.evaluation.emoji import SPLITS, TASKS, Settings, evaluate
from unidiffuser.evaluation.judge import BUNDLED, file_digest, load_judge
from unidiffuser.evaluation.report import markdown_table
from unidiffuser.files import write_text

if TYPE_CHECKING:
    from unidiffuser.checkpoints import Checkpoint

log = logging.getLogger("unidiffuser.evaluation")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code: 0, 2 for bad input, 130 after Ctrl-C (finished cells are kept)."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        _run(options)
    except (FileNotFoundError, ValueError) as error:
        log.error("%s", error)
        return 2
    except KeyboardInterrupt:
        log.error("interrupted; run the same command again to go on after the last finished cell")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m unidiffuser.evaluation", description=__doc__)
    parser.add_argument("--model", default="emoji", help="name, file or folder, as for unidiffuser.load")
    parser.add_argument("--data", type=Path, required=True, help="image folder made by unidiffuser.training.emoji")
    parser.add_argument("--out", type=Path, required=True, help="folder for cells, scores, table and grids")
    parser.add_argument("--judge", type=Path, default=BUNDLED, help="the judge's file (default: the bundled one)")
    parser.add_argument("--splits", type=_words, default=SPLITS, help="comma-separated (default %(default)s)")
    parser.add_argument("--tasks", type=_words, default=TASKS, help="comma-separated (default %(default)s)")
    parser.add_argument("--seeds", type=_numbers, default=(0,), help="comma-separated (default 0)")
    parser.add_argument("--limit", type=int, help="most pictures of a split (default: all)")
    parser.add_argument("--pairs", type=int, default=256, help="joint pairs of a seed (default 256)")
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--guidance", type=float, help="default: the model's own")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", type=torch.device)
    return parser


def _run(options: argparse.Namespace) -> None:
    import unidiffuser

    judge = load_judge(options.judge)
    model = unidiffuser.load(options.model, device=options.device)
    settings = Settings(
        model=weights_digest(model.checkpoint),
        judge=file_digest(options.judge),
        steps=options.steps,
        guidance=options.guidance,
        limit=options.limit,
        pairs=options.pairs,
        batch=options.batch,
    )
    report = evaluate(
        model,
        options.data,
        options.out,
        judge,
        settings,
        splits=options.splits,
        seeds=options.seeds,
        tasks=options.tasks,
    )
    table = markdown_table(report["rows"])
    write_text(options.out / "scores.md", table)
    log.info("%s", table)


def weights_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 over the names and weights of all parts: the same for one model in whichever file layout it lies."""
    digest = hashlib.sha256()
    for part in sorted(checkpoint.parts()):
        for name, value in sorted(checkpoint.state_dict(part).items()):
            digest.update(f"{part}.{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


if __name__ == "__main__":
    raise SystemExit(main())
