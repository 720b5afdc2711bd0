"""How are arrangements chosen, and libraries then timed against each other?

    python -m benchmarks.peers.clipping --qualifying=3 --finalists=2 --repeats=9

Every arrangement is checked (`agreement`) and timed briefly; the fastest of each name compete,
alternating (`interleave`), in the one run whose ratios count; the best of them stands for its name.
"""

import contextlib
import dataclasses
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence

from absl import flags

from benchmarks.peers import records
from benchmarks.peers.agreement import Agreement
from benchmarks.peers.interleave import Running, Variant, first_cores, started, take_turns
from benchmarks.peers.problem import Sizes

_COLUMNS = flags.DEFINE_list(
    "columns", [], "Problems base:tile_size:batch[:steps[:clients]]; empty = those of the question."
)
_ONLY = flags.DEFINE_list(
    "only", [], "Names beside ours to measure; empty = all.", allow_override=True
)
_LIST = flags.DEFINE_boolean("list", False, "Print the arrangements and stop.")
_CORES = flags.DEFINE_integer("cores", 2, "Cores that every variant gets.", allow_override=True)
_QUALIFYING = flags.DEFINE_integer("qualifying", 2, "Timed repeats of every arrangement.")
_FINALISTS = flags.DEFINE_integer("finalists", 2, "Arrangements of a name that compete.")
_REPEATS = flags.DEFINE_integer(
    "repeats", 9, "Timed repeats of the arrangements that compete.", allow_override=True
)
_LATER = flags.DEFINE_integer(
    "later_repeats", 3, "The same in every column after the first, which are larger."
)
_ALL = flags.DEFINE_boolean(
    "all_columns", False, "Try all arrangements in every column, not only the first's best."
)
_OUTPUT = flags.DEFINE_string("output", "", "JSON lines file to append to.", allow_override=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What is measured.

    Attributes:
        benchmark: its name in the records.
        columns: default of `--columns`.
        variants: `variants(cores)`: arrangements in one process, ours first.
        split: `split(variant, cores)`: the same over processes of one core; None has no such.
        finalists: bound on `--finalists`.
        targets: name -> floor and aim of ours private over it, in tiles per second.
    """

    benchmark: str
    columns: Sequence[str]
    variants: Callable[[int], list[Variant]]
    split: Callable[[Variant, int], Variant] | None
    targets: Mapping[str, tuple[float, float]]
    finalists: int = 100


def run(question: Question) -> None:
    """Measures every column as the flags say."""
    cores = _CORES.value
    variants = question.variants(cores)
    if _ONLY.value:
        variants = [v for v in variants if v.name in {*_ONLY.value, "private", "nonprivate"}]
    if _LIST.value:
        print("\n".join(variant.title for variant in variants))
        return
    for index, text in enumerate(_COLUMNS.value or question.columns):
        is_first = index == 0
        winners = _column(
            question,
            sizes_of(text),
            variants,
            split=question.split if is_first or _ALL.value else None,
            finalists=min(_FINALISTS.value if is_first or _ALL.value else 1, question.finalists),
            qualifying=_QUALIFYING.value if is_first or _ALL.value else 0,
            repeats=_REPEATS.value if is_first else _LATER.value,
        )
        variants = variants if _ALL.value else winners


def sizes_of(text: str) -> Sizes:
    """Sizes from base:tile_size:batch[:steps[:clients]].

    Raises:
        ValueError: it is not of this form.
    """
    names = ("base_channels", "tile_size", "batch", "steps", "clients")
    numbers = text.split(":")
    if not 3 <= len(numbers) <= len(names) or not all(n.isdigit() for n in numbers):
        raise ValueError(
            f"Expected --columns of base:tile_size:batch[:steps[:clients]], got {text!r}."
        )
    given = dict(zip(names, map(int, numbers), strict=False))
    if given.get("steps", 1) > 1:  # they must not leave the network they started from far behind
        return Sizes(**given, learning_rate=0.5)
    return Sizes(**given)


def best(candidates: Sequence[Running], count: int) -> list[Running]:
    """The `count` fastest of each name by their median so far; all if none was timed."""
    chosen: list[Running] = []
    for name in dict.fromkeys(running.variant.name for running in candidates):
        mine = [running for running in candidates if running.variant.name == name]
        if all(running.seconds for running in mine):
            mine = sorted(mine, key=lambda r: statistics.median(r.seconds))[:count]
        chosen += mine
    return chosen


def _column(
    question: Question,
    sizes: Sizes,
    variants: Sequence[Variant],
    *,
    split: Callable[[Variant, int], Variant] | None,
    finalists: int,
    qualifying: int,
    repeats: int,
) -> list[Variant]:
    """Measures and reports one problem; returns each name's best arrangement."""
    print(
        f"\n{question.benchmark}: base {sizes.base_channels}, {sizes.tile_size} px, "
        f"{sizes.clients} client(s) x {sizes.steps} step(s) x batch {sizes.batch}",
        flush=True,
    )
    agreement, alive, results = Agreement(), [], []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = pathlib.Path(folder) / "problem.npz"
        records.make_problem(sizes).save(path)

        def enter(candidates: Sequence[Variant]) -> None:
            nonlocal alive
            for variant in candidates:
                running = stack.enter_context(started(variant, path, first_cores(_CORES.value)))
                error = agreement.check(running)
                take_turns([running], qualifying)
                seconds = f"{statistics.median(running.seconds):.3f} s" if qualifying else ""
                print(f"  {variant.title:52}{seconds:>10}  agrees within {error:.0e}", flush=True)
                alive.append(running)
                kept = best(alive, finalists)
                for loser in (r for r in alive if r not in kept):
                    results.append(records.result(loser, agreement.errors[loser.variant.title]))
                    loser.stop()
                alive = kept

        enter(variants)
        if split is not None:
            enter([split(running.variant, _CORES.value) for running in list(alive)])
        for running in alive:
            running.seconds.clear()  # what counts is one interleaved run
        take_turns(alive, repeats)
        winners = best(alive, 1)
        for running in alive:
            error = agreement.errors[running.variant.title]
            results.append(records.result(running, error, is_best=running in winners))
        records.report(question.benchmark, results, sizes, _OUTPUT.value, question.targets)
        return [running.variant for running in winners]
