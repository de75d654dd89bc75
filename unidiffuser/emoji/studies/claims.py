"""The paper's claims about one network, shown on the bundled model: a table of rates and a sheet of pictures for each.

    python -m unidiffuser.emoji.studies.claims --data data/emoji [--only guidance,gibbs] [--out out/claims]

Pictures are scored by the judge, a classifier trained only on real pictures; captions must match to the letter. Every rate
has its 95 % interval. Finished claims are kept in claims.json and skipped by the next run.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from ...evaluation.sources import fixed_order, in_split, read_folder
from ...media.files import write_between, write_text
from ...media.images import to_tensor
from ...path import NoisePath
from ...pipeline import load
from ...samplers import sample
from ...streams import Streams, draw_noise, item_generators, noised
from ..judge import load_judge
from .bench import BATCH, SHOWN, Bench, Row, distance, rate

MARKERS = ("<!-- claims -->", "<!-- /claims -->")
COUNT = 144  # unconditional pairs, and captions to rewrite
HOLD = 60.0  # noise label of the hand-over in a Gibbs chain


def guidance(bench: Bench) -> list[Row]:
    """Guidance without extra training: the network's own p(image) is the unconditional model."""
    pairs, rows, first = bench.trained[:192], [], []
    for scale in (1.0, 2.0, 3.0, 4.0, 6.0, 8.0):
        options = {**bench.options, "guidance": scale, "batch_size": BATCH}
        pictures = bench.model.text_to_image([pair.caption for pair in pairs], **options)
        rows += bench.recognised(f"guidance {scale:g}", pictures, pairs)
        first += pictures[:SHOWN]
    bench.sheet("guidance", first, [f"{p.caption}, {s:g}" for s in (1, 2, 3, 4, 6, 8) for p in pairs[:SHOWN]])
    return rows


def variation(bench: Bench) -> list[Row]:
    """A variation keeps concept and style, but is another picture."""
    rows: list[Row] = []
    shown: list[Image.Image] = []
    under: list[str] = []
    for split, pairs in (("trained", bench.trained[:96]), ("held out", bench.held[:96])):
        given = [pair.image() for pair in pairs]
        made = bench.model.vary_image(given, count=2, seed=0, batch_size=BATCH, **bench.options)
        rows += bench.recognised(split, made, [pair for pair in pairs for _ in range(2)], " kept")
        one, two, real = to_tensor(made[::2]), to_tensor(made[1::2]), to_tensor([g.resize(made[0].size) for g in given])
        rows.append((split, "root mean square between the two variations", f"{distance(one, two).mean():.3f}"))
        rows.append((split, "and to the given picture", f"{distance(one, real).mean():.3f}"))
        for k in range(min(SHOWN // 2, len(pairs))):
            shown += [given[k].resize(made[0].size), made[2 * k], made[2 * k + 1]]
            under += [pairs[k].caption, "variation", "variation"]
    bench.sheet("variation", shown, under, columns=6)
    return rows


def gibbs(bench: Bench) -> list[Row]:
    """Gibbs chains of eight rounds keep their concept, with clean hand-over and with some noise (`hold`)."""
    starts, rounds, rows = bench.trained[:24], 8, []
    for hold in (0.0, HOLD):
        chains = [
            bench.model.gibbs(pair.caption, rounds=rounds, hold=hold, seed=k, **bench.options) for k, pair in enumerate(starts)
        ]  # (chain, round) pairs of picture and caption
        for number in (1, 2, 4, 6, 8):
            pictures, captions = zip(*(chain[number - 1] for chain in chains), strict=True)
            seen, read = bench.verdicts(pictures), [bench.parsed(caption) for caption in captions]
            place = f"round {number}" + (f", held at {hold:g}" if hold else "")
            shows = [v.label == p.label for v, p in zip(seen, starts, strict=True)]
            rows.append((place, "picture shows the start", rate(shows)))
            rows.append((place, "caption names the start", rate([s[0] == p.label for s, p in zip(read, starts, strict=True)])))
            rows.append((place, "picture and caption agree", rate([v.label == s[0] for v, s in zip(seen, read, strict=True)])))
        cells = [pair for chain in chains[:6] for pair in chain]
        name = "gibbs-held" if hold else "gibbs"
        bench.sheet(name, [picture for picture, _ in cells], [caption for _, caption in cells], columns=rounds)
    return rows


def no_style(bench: Bench) -> list[Row]:
    """A caption without a style: four seeds draw the concept in different styles."""
    labels = sorted({pair.label for pair in bench.trained[:COUNT]})[:72]
    wanted = [label for label in labels for _ in range(4)]
    made = bench.model.text_to_image(labels, count=4, seed=0, batch_size=BATCH, **bench.options)
    seen = bench.verdicts(made)
    several = [len({verdict.style for verdict in seen[k : k + 4]}) for k in range(0, len(seen), 4)]
    shown = [verdict.label == label for verdict, label in zip(seen, wanted, strict=True)]
    bench.sheet("no-style", made[: 6 * SHOWN], wanted[: 6 * SHOWN])
    return [
        ("label alone", "concept", rate(shown)),
        ("label alone", "different styles of four seeds, mean", f"{sum(several) / len(several):.2f}"),
        *(("label alone", f"drawn as {name}", rate([v.style == name for v in seen])) for name in bench.judge.styles),
    ]


def interpolation(bench: Bench) -> list[Row]:
    """Interpolation is smooth: the largest step between frames over the mean step; 1 is perfectly even."""
    frames, pairs = 9, 12
    ends = [pair.image() for pair in bench.trained[: 2 * pairs]]
    ratios, known, shown = [], [], []
    for k in range(pairs):
        made = bench.model.interpolate(ends[2 * k], ends[2 * k + 1], frames=frames, seed=0)
        pixels = to_tensor(made)
        steps = distance(pixels[1:], pixels[:-1])
        ratios.append(float(steps.max() / steps.mean()))
        labels = {bench.trained[2 * k].label, bench.trained[2 * k + 1].label}
        known += [v.label in labels for v in bench.verdicts(made)]
        shown += made if k < 6 else []
    bench.sheet("interpolation", shown, [], columns=frames)
    middle = sorted(ratios)[pairs // 2]
    return [
        ("9 frames", f"largest step over mean step, median of {pairs}", f"{middle:.2f}"),
        ("9 frames", "its range", f"{min(ratios):.2f} to {max(ratios):.2f}"),
        ("9 frames", "frames that show one of the two ends", rate(known)),
    ]


def speeds(bench: Bench) -> list[Row]:
    """Unequal speeds: pairs with the picture denoised first, the caption first, or both at several speeds."""
    plan = bench.plan()
    paths = {
        f"{a:g} : {b:g}": NoisePath.joint(plan["steps"], speeds=(a, b)) for a, b in ((1, 1), (2, 1), (1, 2), (4, 1), (1, 4))
    }
    top = (1000.0, 1000.0)
    paths["picture first"] = NoisePath.through(top, (0.0, 1000.0), (0.0, 0.0), steps=2 * plan["steps"])
    paths["caption first"] = NoisePath.through(top, (1000.0, 0.0), (0.0, 0.0), steps=2 * plan["steps"])
    rows: list[Row] = []
    shown: list[Image.Image] = []
    under: list[str] = []
    for name, path in paths.items():
        out = bench.model.run(path, Streams(), plan, item_generators(0, COUNT))
        pictures, captions = bench.model.decode_images(out, plan), bench.model.decode_texts(out, plan)
        seen, read = bench.verdicts(pictures), [bench.parsed(caption) for caption in captions]
        rows.append((name, "agree in the concept", rate([v.label == s[0] for v, s in zip(seen, read, strict=True)])))
        rows.append((name, "agree in the style", rate([v.style == s[1] for v, s in zip(seen, read, strict=True)])))
        rows.append((name, f"different concepts of {COUNT}", str(len({v.label for v in seen}))))
        shown, under = shown + pictures[:SHOWN], under + [f"{name}: {caption}" for caption in captions[:SHOWN]]
    bench.sheet("speeds", shown, under)
    return rows


def noisy_condition(bench: Bench) -> list[Row]:
    """A noisy condition: held at a label between 0 (clean) and 1000 (none), the caption is followed more and more loosely."""
    pairs, plan = bench.trained[:96], bench.plan()
    text = bench.model.encode_texts([pair.caption for pair in pairs])
    rows: list[Row] = []
    shown: list[Image.Image] = []
    under: list[str] = []
    for level in (0.0, 200.0, 400.0, 600.0, 800.0, 1000.0):
        generators = item_generators(0, len(pairs))
        given = Streams(text=noised(text, level, generators))
        path = NoisePath.text_to_image(plan["steps"], hold=level)
        pictures = bench.model.decode_images(bench.model.run(path, given, plan, generators), plan)
        rows += bench.recognised(f"caption at label {level:g}", pictures, pairs)
        shown, under = shown + pictures[:SHOWN], under + [f"{p.caption}, {level:g}" for p in pairs[:SHOWN]]
    bench.sheet("noisy-condition", shown, under)
    return rows


def rewriting(bench: Bench) -> list[Row]:
    """Part of a caption is rewritten to match a picture: the style of a wrong caption, with its label kept."""
    pairs, plan, model = [p for p in bench.trained if p.caption.endswith(f", {p.style}")][:COUNT], bench.plan(), bench.model
    styles = bench.judge.styles
    wrong = [
        f"{p.label}, {styles[(styles.index(p.style) + 1 + k % (len(styles) - 1)) % len(styles)]}" for k, p in enumerate(pairs)
    ]
    generators = item_generators(0, len(pairs))
    state = model.encode_images([p.image() for p in pairs], 1, plan, generators)
    text = model.encode_texts(wrong)
    tokenizer = model.text_encoder.tokenizer
    mask = torch.ones(len(pairs), model.text_encoder.length, 1)
    for row, pair in zip(mask, pairs, strict=True):
        row[: 1 + len(tokenizer.encode(f"{pair.label},"))] = 0  # 1: the start token
    noise = draw_noise(text.shape[1:], generators, text.device)
    state = state.replace(text=torch.where(mask.to(text) > 0, noise, text))  # at the path's start, what is not kept is noise
    with model.on_device(model.net) as net:
        out = sample(
            net,
            NoisePath.image_to_text(plan["steps"]),
            state,
            guidance=plan["guidance"],
            generator=generators,
            mask=Streams(text=mask),
        )
    read = [bench.parsed(caption) for caption in model.decode_texts(out, plan)]
    return [
        ("style word", "matches the picture after", rate([s[1] == p.style for s, p in zip(read, pairs, strict=True)])),
        ("label", "is kept", rate([s[0] == p.label for s, p in zip(read, pairs, strict=True)])),
    ]


CLAIMS: dict[str, Callable[[Bench], list[Row]]] = {
    "guidance": guidance,
    "no style": no_style,
    "variation": variation,
    "gibbs": gibbs,
    "interpolation": interpolation,
    "speeds": speeds,
    "noisy condition": noisy_condition,
    "rewriting": rewriting,
}


def table(found: dict[str, list[Row]]) -> str:
    lines = ["| claim | setting | measure | value |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {' | '.join(row)} |" for name, rows in found.items() for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--data", type=Path, required=True, help="image folder made by python -m unidiffuser.emoji prepare")
    parser.add_argument("--out", type=Path, default=Path("out/claims"))
    parser.add_argument("--only", help=f"some of: {', '.join(CLAIMS)}")
    parser.add_argument("--doc", type=Path, help="write the table into this file, between the markers")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    examples = [p for p in read_folder(args.data) if p.fields.get("demo")]
    model = load(args.model)
    usual = {"steps": model.config.defaults["steps"], "guidance": model.config.defaults["guidance"]}
    trained, held = (fixed_order(in_split(examples, split), None) for split in ("train", "heldout"))
    bench = Bench(model, load_judge(), trained, held, usual, args.out)
    path = args.out / "claims.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name in [n.strip() for n in args.only.split(",")] if args.only else CLAIMS:
        if name not in found:
            found[name] = CLAIMS[name](bench)
            write_text(path, json.dumps(found, indent=1))
            print(table({name: found[name]}), flush=True)
    ordered = {name: found[name] for name in CLAIMS if name in found}
    if args.doc:
        write_between(args.doc, table(ordered), MARKERS)


if __name__ == "__main__":
    main()
