"""Mutated files in processes that may die: what became of each, and a tally.

A reader is given one mutated file after the other, in a process with limited memory and time. A
process that dies or hangs is a failure of the file it was at, and another goes on behind it.
"""

import argparse
import collections
import json
import multiprocessing
import pathlib
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

MEMORY = 3 * 2**30
SECONDS = 20.0
BATCH = 200
"""Files of one process."""


class Target(NamedTuple):
    """What is fuzzed.

    Attributes:
        bases: folder for its scratch files -> kind of file -> what `mutated` takes.
        mutated: (base, rng) -> the bytes of one mutated file.
        look: path -> (outcome, whether the reader came as far as the content).
        good: the outcomes that are no failures.
        suffix: of the files.
    """

    bases: Callable[[pathlib.Path], dict[str, Any]]
    mutated: Callable[[Any, np.random.Generator], bytes]
    look: Callable[[pathlib.Path], tuple[str, bool]]
    good: tuple[str, ...]
    suffix: str


class Finding(NamedTuple):
    """What became of one file; see `Target.look`."""

    number: int
    outcome: str
    is_reached: bool
    seconds: float


class Tally(NamedTuple):
    """What became of all files.

    Attributes:
        outcomes: kind of file -> outcome -> number of files.
        reached: the fraction of which the reader saw the content.
        longest: seconds of the slowest.
    """

    outcomes: dict[str, dict[str, int]]
    reached: float
    longest: float


def supervised(
    work: Callable[[int], tuple[str, bool]], numbers: Sequence[int], seconds: float = SECONDS
) -> Iterator[Finding]:
    """What `work` returns for each number, in forked processes that may die or hang.

    Guarantees: every number has exactly one finding, in their order. Whatever goes wrong counts
    for the first number without one, so that a process which dies before its first word costs one
    number and no more.

    Args:
        work: called in the process; whatever it raises becomes the outcome.
        numbers: its arguments, one after the other.
        seconds: for each.
    """
    context = multiprocessing.get_context("fork")
    left = collections.deque(numbers)
    while left:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(work, tuple(left), sender))
        process.start()
        sender.close()
        try:
            while left:
                if not receiver.poll(seconds):
                    number = left.popleft()
                    yield Finding(number, f"hangs ({number})", True, seconds)
                    break
                outcome, is_reached, taken = receiver.recv()
                yield Finding(left.popleft(), outcome, is_reached, taken)
        except (EOFError, OSError):  # between two messages, or within one
            process.join(seconds)
            number = left.popleft()
            yield Finding(number, f"dies ({process.exitcode}, {number})", True, 0.0)
        finally:
            process.kill()
            process.join()
            receiver.close()


def _work(work: Callable[[int], tuple[str, bool]], numbers: Sequence[int], sender: Any) -> None:
    """One process: a message for every number that it is through with."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for number in numbers:
        start = time.monotonic()
        try:
            outcome, is_reached = work(number)
        except Exception as error:
            outcome, is_reached = f"raised {type(error).__name__}: {error}"[:90], True
        sender.send((outcome, is_reached, time.monotonic() - start))


def run(target: Target, count: int, seed: int, folder: pathlib.Path) -> Tally:
    """Looks at `count` mutated files, the kinds in turn; those that failed stay in the folder."""
    bases = target.bases(folder)
    names = sorted(bases)

    def work(number: int) -> tuple[str, bool]:
        path = folder / f"{number}{target.suffix}"
        rng = np.random.default_rng([seed, number])
        path.write_bytes(target.mutated(bases[names[number % len(names)]], rng))
        outcome, is_reached = target.look(path)
        if outcome in target.good:
            path.unlink()
        return outcome, is_reached

    tally: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    reached, longest = 0, 0.0
    for start in range(0, count, BATCH):
        for found in supervised(work, range(start, min(start + BATCH, count))):
            tally[names[found.number % len(names)]][found.outcome] += 1
            reached += found.is_reached
            longest = max(longest, found.seconds)
    outcomes = {name: dict(tally[name]) for name in sorted(tally)}
    return Tally(outcomes, reached / max(count, 1), longest)


def failures(
    outcomes: dict[str, dict[str, int]], good: tuple[str, ...]
) -> dict[str, dict[str, int]]:
    """The part of a tally that is no good outcome; kinds without any are left out."""
    found = {
        name: {outcome: n for outcome, n in some.items() if outcome not in good}
        for name, some in outcomes.items()
    }
    return {name: bad for name, bad in found.items() if bad}


def main(target: Target, description: str | None, content: str) -> None:
    """Flags, the run, the tally, and the exit code 1 where anything failed.

    Args:
        target: what is fuzzed.
        description: for --help.
        content: what the reader reached, in words.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", default="", help="Folder for files that failed.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(options.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        tally = run(target, options.count, options.seed, folder)
    print(json.dumps(tally.outcomes, indent=1))
    print(
        f"{options.count} files, {tally.reached:.0%} reached {content}, "
        f"the longest took {tally.longest:.1f} s"
    )
    sys.exit(bool(failures(tally.outcomes, target.good)))
