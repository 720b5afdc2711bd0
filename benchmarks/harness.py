"""How long does each of several variants take? Timing to be believed, for all benchmarks here.

    python -m benchmarks.clipping --output=benchmarks/results/clipping.jsonl

uses it, and so do the others. Warm-up, interleaved repeats, medians; compile time and memory apart.
Machines are shared and noisy: the repeats of all variants alternate, so that a slow minute hurts
all alike, and ratios within one call are what to quote.
"""

import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from benchmarks.machine import flops_of, machine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One variant's result; None is what a benchmark does not measure.

    Attributes:
        benchmark: name of the benchmark.
        name: name of the variant; variants of one name differ in `settings`.
        seconds: median of a call.
        seconds_low: lower quartile.
        seconds_high: upper quartile.
        tiles_per_second: work over the median.
        compile_seconds: tracing and compiling, once.
        peak_bytes: temporary bytes the compiled program needs, by its own analysis.
        process_bytes: by how much a process that runs this variant alone grows; see `memory`.
        gflops: 1e9 floating-point operations a second that the work needs, whoever does it.
        settings: what was measured.
    """

    benchmark: str
    name: str
    seconds: float
    seconds_low: float
    seconds_high: float
    tiles_per_second: float | None = None
    compile_seconds: float | None = None
    peak_bytes: int | None = None
    process_bytes: int | None = None
    gflops: float | None = None
    settings: dict[str, Any]


class Variant(NamedTuple):
    """What `measure` compiles and times.

    Attributes:
        function: to be jitted.
        arguments: of every call.
        tiles: real tiles that one call works on; as all others where None.
        flops: floating-point operations of a call; unknown where None.
        settings: of this variant alone.
        name: of its record; its key where empty.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    tiles: int | None = None
    flops: float | None = None
    settings: Mapping[str, Any] = {}
    name: str = ""


def measure(
    benchmark: str,
    variants: Mapping[str, Variant | tuple[Callable[..., Any], tuple[Any, ...]]],
    *,
    tiles: int | None = None,
    settings: Mapping[str, Any],
    repeats: int = 7,
) -> list[Record]:
    """Compiles every variant, warms it up, and times all of them in turn.

    Args:
        benchmark: its name.
        variants: label -> variant, or (a function to jit, its arguments).
        tiles: real tiles that one call works on, where a variant does not say.
        settings: what is measured, for the record.
        repeats: timed calls of each variant.

    Returns:
        One record a variant.
    """
    chosen = {label: Variant(*variant) for label, variant in variants.items()}
    calls: dict[str, Callable[[], Any]] = {}
    compile_seconds, peak_bytes = {}, {}
    for label, variant in chosen.items():
        start = time.perf_counter()
        program = jax.jit(variant.function).lower(*variant.arguments).compile()
        compile_seconds[label] = time.perf_counter() - start
        peak_bytes[label] = temp_bytes(program)
        calls[label] = lambda program=program, arguments=variant.arguments: program(*arguments)
    records = []
    for label, times in interleaved(calls, repeats=repeats).items():
        variant = chosen[label]
        work = tiles if variant.tiles is None else variant.tiles
        record = summary(
            benchmark, variant.name or label, times, {**settings, **variant.settings}, tiles=work
        )
        gflops = None if variant.flops is None else 1e-9 * variant.flops / record.seconds
        records.append(
            dataclasses.replace(
                record,
                compile_seconds=compile_seconds[label],
                peak_bytes=peak_bytes[label],
                gflops=gflops,
            )
        )
    return records


def interleaved(
    calls: Mapping[str, Callable[[], Any]], *, repeats: int, warm_ups: int = 1
) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each, taken in turn; every other turn runs backwards.

    A call's result is waited for where jax computes it. What a call does first (compiling, filling
    caches) belongs to the warm-ups, which are not timed.
    """
    seconds: dict[str, list[float]] = {label: [] for label in calls}
    for call in calls.values():
        for _ in range(warm_ups):
            jax.block_until_ready(call())
    for turn in range(repeats):
        # Backwards, too, so that nobody always follows the same neighbour's heat or cache.
        for label in list(calls)[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            jax.block_until_ready(calls[label]())
            seconds[label].append(time.perf_counter() - start)
    return seconds


def quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of one time, itself."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, median, high


def summary(
    benchmark: str,
    name: str,
    times: Sequence[float],
    settings: Mapping[str, Any],
    *,
    tiles: float | None = None,
    **others: Any,
) -> Record:
    """The record of measured `times`; `others` are fields of `Record`."""
    low, median, high = quartiles(times)
    return Record(
        benchmark=benchmark,
        name=name,
        seconds=median,
        seconds_low=low,
        seconds_high=high,
        tiles_per_second=None if tiles is None else tiles / median,
        settings={**settings, "repeats": len(times)},
        **others,
    )


def temp_bytes(program: Any) -> int:
    """Temporary bytes of a compiled program, by its own analysis."""
    return int(getattr(program.memory_analysis(), "temp_size_in_bytes", 0))


class Verdict(NamedTuple):
    """A measure held against what was promised.

    Attributes:
        measure: what it is.
        value: measured.
        floor: what it must reach.
        aim: what it should reach.
        is_at_most: whether floor and aim are upper bounds.
        unit: of the three.
    """

    measure: str
    value: float
    floor: float
    aim: float
    is_at_most: bool = False
    unit: str = ""

    @property
    def outcome(self) -> str:
        """Either "aim reached", "floor reached" or "BELOW FLOOR"."""
        sign = -1.0 if self.is_at_most else 1.0
        if sign * self.value >= sign * self.aim:
            return "aim reached"
        return "floor reached" if sign * self.value >= sign * self.floor else "BELOW FLOOR"


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    """A line for each: measure, value, floor, aim, outcome."""
    if verdicts:
        print(f"\n{'measure':66}{'value':>10}{'floor':>9}{'aim':>8}  outcome")
    for v in verdicts:
        sign = "<=" if v.is_at_most else ">="
        print(
            f"{v.measure:66}{v.value:10.3f}{sign + f'{v.floor:g}':>9}{sign + f'{v.aim:g}':>8}  "
            f"{v.outcome}{f' ({v.unit})' if v.unit else ''}"
        )


def report(
    records: Sequence[Record],
    output: str,
    *,
    baseline: str | None = None,
    varied: Sequence[str] = (),
    verdicts: Sequence[Verdict] = (),
) -> None:
    """Prints a table, and writes one JSON line a record to `output` unless it is empty.

    Args:
        records: the results.
        output: file to append to; "" writes none.
        baseline: name of the variant that the ratios of times are against.
        varied: settings that tell records of one name apart, shown beside it.
        verdicts: printed below the table, and written beside each record's settings.
    """
    base = next((r.seconds for r in records if r.name == baseline), None)
    labels = [
        " ".join([r.name, *(f"{v}={r.settings[v]}" for v in varied if v in r.settings)])
        for r in records
    ]
    wide = max([16, *(len(label) + 1 for label in labels)])
    print(
        f"{'':{wide}}{'tiles/s':>10}{'ms':>10}{'quartiles':>18}{'ratio':>8}"
        f"{'compile s':>11}{'temp MB':>9}{'RSS MB':>9}{'GFLOP/s':>9}"
    )
    for label, record in zip(labels, records, strict=True):
        digits = 1 if record.seconds >= 1e-2 else 3
        low, high = (f"{1e3 * t:.{digits}f}" for t in (record.seconds_low, record.seconds_high))
        print(
            f"{label:{wide}}{_cell(record.tiles_per_second, 10, 2)}"
            f"{1e3 * record.seconds:10.{digits}f}{f'{low}-{high}':>18}"
            f"{_cell(record.seconds / base if base else None, 8, 3)}"
            f"{_cell(record.compile_seconds, 11, 1)}{_cell(record.peak_bytes, 9, 1, 1e-6)}"
            f"{_cell(record.process_bytes, 9, 0, 1e-6)}{_cell(record.gflops, 9, 1)}"
        )
    print_verdicts(verdicts)
    if output:
        append(records, output, verdicts)


def append(records: Sequence[Record], output: str, verdicts: Sequence[Verdict] = ()) -> None:
    """Adds one JSON line a record to the file `output`, each with the machine and versions."""
    path = pathlib.Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    shared: dict[str, Any] = {"machine": machine()}
    if verdicts:
        shared["verdicts"] = [v._asdict() | {"outcome": v.outcome} for v in verdicts]
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps({**dataclasses.asdict(record), **shared}) + "\n")


def _cell(value: float | None, width: int, digits: int, scale: float = 1.0) -> str:
    return f"{'':{width}}" if value is None else f"{scale * value:{width}.{digits}f}"


__all__ = [
    "Record",
    "Variant",
    "Verdict",
    "append",
    "flops_of",
    "interleaved",
    "machine",
    "measure",
    "print_verdicts",
    "quartiles",
    "report",
    "summary",
    "temp_bytes",
]
