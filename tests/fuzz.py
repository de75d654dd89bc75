# ruff: noqa: T201 (a script that prints)
"""Fuzzing of every file and text that comes from outside: each mutant loads, or ends in one line that says what is wrong.

    python tests/fuzz.py [--kinds checkpoint,picture] [--count 5000] [--first 0]

A mutant is bad if anything but ValueError, FileNotFoundError or another OSError of one line comes out, if it takes more than
10 s of CPU time or 1 GB, ends the process, starts a program, or writes outside its folder. Mutant N of a kind is always
the same.
The kind "saved_model" runs with ComfyUI's interpreter, in ComfyUI's folder, see its docstring.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/host")]

Trial = Callable[[random.Random], None]
MOST_SECONDS, MOST_BYTES, LONGEST = 10.0, 1 << 30, 2000
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn", "socket.connect")


@dataclass
class Outcome:
    """Counts of a kind's mutants, and what was extreme."""

    counts: Counter[str] = field(default_factory=Counter)
    bad: dict[int, str] = field(default_factory=dict)
    slowest: tuple[float, int] = (0.0, -1)
    peak: tuple[int, int] = (0, -1)
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, number: int, verdict: str, text: str, seconds: float, grown: int) -> None:
        self.counts[verdict] += 1
        self.slowest, self.peak = max(self.slowest, (seconds, number)), max(self.peak, (grown, number))
        if verdict == "bad":
            self.bad[number] = text
        elif verdict == "error":
            self.errors[text.split("(")[0][-60:]] += 1

    def line(self, kind: str) -> str:
        c = self.counts
        return (
            f"| {kind} | {sum(c.values())} | {c['loaded']} | {c['error']} | {c['bad']} | {self.peak[0] / 1e6:.0f} MB "
            f"| {self.slowest[0]:.1f} s |"
        )


class _TooLong(BaseException):
    pass


def _memory(name: str) -> int:
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) * 1024


def _verdict(error: BaseException | None) -> tuple[str, str]:
    """Whether an error is one line with a remedy; no raw one of a library."""
    if error is None:
        return "loaded", ""
    text = str(error)
    ours = isinstance(error, OSError) or type(error) is ValueError or type(error).__module__.startswith("unidiffuser")
    if ours and text and "\n" not in text.strip() and len(text) <= LONGEST:
        return "error", text
    where = [
        f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__) if "unidiffuser" in f.filename
    ]
    return "bad", f"{type(error).__name__}: {text[:300]!r} at {' '.join(where[-4:])}"


def _work(kind: str, numbers: Iterable[int], out: Connection) -> None:
    """Run mutants in this process and send the outcome of each."""
    import torch
    from fuzz_kinds import KINDS

    torch.set_num_threads(1)  # threads that wait for each other on a busy machine use up CPU time
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    forbidden: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        tempfile.tempdir = name  # temporary files of the code under test count as inside
        trial = KINDS[kind](Path(name).resolve())
        allowed = (str(Path(name).resolve()), "/dev/null")

        def audit(event: str, args: tuple[Any, ...]) -> None:
            writes = event == "open" and isinstance(args[1], str) and args[1][0] in "wax" and isinstance(args[0], str)
            if event in FORBIDDEN or (writes and not args[0].startswith(allowed)):
                forbidden.append(f"{event} {args[:2]}")

        sys.addaudithook(audit)
        resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + 4 * MOST_BYTES,) * 2)

        def stop(*args: Any) -> None:
            raise _TooLong(f"more than {MOST_SECONDS:.0f} s")

        signal.signal(signal.SIGPROF, stop)
        for number in numbers:
            out.send((number, "begin", "", 0.0, 0))
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            before, start, error = _memory("VmRSS"), time.process_time(), None
            forbidden.clear()
            signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
            try:
                trial(random.Random(f"{kind} {number}"))
                signal.setitimer(signal.ITIMER_PROF, 0)
            except BaseException as caught:
                error = caught
            signal.setitimer(signal.ITIMER_PROF, 0)
            seconds, grown = time.process_time() - start, _memory("VmHWM") - before
            verdict, text = _verdict(error)
            if forbidden or grown > MOST_BYTES:
                verdict, text = "bad", f"{forbidden or f'{grown / 1e9:.1f} GB'}; {text}"
            out.send((number, verdict, text, seconds, grown))
    out.send(None)


def run(kind: str, numbers: Iterable[int]) -> Outcome:
    """Try mutants of a kind in processes of their own; one that dies is followed by another."""
    outcome, left = Outcome(), list(numbers)
    context = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads can wait for ever
    while left:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(kind, left, theirs))
        process.start()
        theirs.close()
        begun, done = -1, False
        try:
            while ours.poll(60 + 30 * MOST_SECONDS * (begun < 0)):
                message = ours.recv()
                if message is None:
                    done = True
                    break
                if message[1] == "begin":
                    begun = message[0]
                else:
                    outcome.add(*message)
        except EOFError:
            pass
        process.kill()
        process.join()
        if done:
            break
        if begun < 0:
            raise RuntimeError(f"the set-up of {kind} failed")
        outcome.add(begun, "bad", f"the process ended or hung (exit code {process.exitcode})", MOST_SECONDS, 0)
        left = left[left.index(begun) + 1 :]
    return outcome


def main() -> None:
    from fuzz_kinds import HOST, KINDS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(name for name in KINDS if name not in HOST))
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--errors", action="store_true", help="also list the clean errors")
    args = parser.parse_args()
    print("| kind | mutants | loaded | clean error | bad | most memory | slowest |\n|---|---|---|---|---|---|---|", flush=True)
    for kind in args.kinds.split(","):
        outcome = run(kind, range(args.first, args.first + args.count))
        print(outcome.line(kind), flush=True)
        seen: Counter[str] = Counter()
        for number, text in outcome.bad.items():
            seen[text.split(":")[0] + text.split(" at ")[-1]] += 1
            if seen[text.split(":")[0] + text.split(" at ")[-1]] <= 2:
                print(f"  bad {kind} {number}: {text}", flush=True)
        if args.errors:
            print(json.dumps(outcome.errors.most_common(60), indent=1))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
