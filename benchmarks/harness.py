"""Timing to be believed: warm-up, interleaved repeats, medians; compile time and memory apart.

Machines are shared and noisy: the repeats of all variants alternate, so that a slow minute hurts
all alike, and ratios within one call are what to quote.
"""

import dataclasses
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from fedjax_dp.workdir import versions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One variant's result.

    Attributes:
        benchmark: name of the benchmark.
        name: name of the variant.
        seconds: median of a call.
        seconds_low: lower quartile.
        seconds_high: upper quartile.
        tiles_per_second: work over the median.
        compile_seconds: tracing and compiling, once.
        peak_bytes: temporary bytes the compiled program needs, by its own analysis.
        settings: what was measured.
    """

    benchmark: str
    name: str
    seconds: float
    seconds_low: float
    seconds_high: float
    tiles_per_second: float
    compile_seconds: float
    peak_bytes: int
    settings: dict[str, Any]


def measure(
    benchmark: str,
    variants: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]],
    *,
    tiles: int,
    settings: Mapping[str, Any],
    repeats: int = 7,
) -> list[Record]:
    """Compiles every variant, warms it up, and times all of them in turn.

    Args:
        benchmark: its name.
        variants: name -> (a function to jit, its arguments).
        tiles: real tiles that one call works on.
        settings: what is measured, for the record.
        repeats: timed calls of each variant.

    Returns:
        One record a variant.
    """
    programs, compile_seconds, peak_bytes = {}, {}, {}
    for name, (function, arguments) in variants.items():
        start = time.perf_counter()
        programs[name] = jax.jit(function).lower(*arguments).compile()
        compile_seconds[name] = time.perf_counter() - start
        analysis = programs[name].memory_analysis()
        peak_bytes[name] = int(getattr(analysis, "temp_size_in_bytes", 0))
        jax.block_until_ready(programs[name](*arguments))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, (_, arguments) in variants.items():
            start = time.perf_counter()
            jax.block_until_ready(programs[name](*arguments))
            seconds[name].append(time.perf_counter() - start)
    records = []
    for name, times in seconds.items():
        low, median, high = statistics.quantiles(times, n=4)
        records.append(
            Record(
                benchmark=benchmark,
                name=name,
                seconds=median,
                seconds_low=low,
                seconds_high=high,
                tiles_per_second=tiles / median,
                compile_seconds=compile_seconds[name],
                peak_bytes=peak_bytes[name],
                settings=dict(settings),
            )
        )
    return records


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    device = jax.devices()[0]
    cpu = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        models = [
            x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x
        ]
        cpu = models[0] if models else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "device": f"{device.platform} {device.device_kind}",
        "load_average": os.getloadavg()[0],
        **versions(),
    }


def report(records: Sequence[Record], output: str, *, baseline: str | None = None) -> None:
    """Prints a table, and writes one JSON line a record to `output` unless it is empty.

    Args:
        records: the results.
        output: file to append to; "" writes none.
        baseline: the variant others are held against.
    """
    base = next((r.seconds for r in records if r.name == baseline), None)
    print(
        f"{'':16}{'tiles/s':>10}{'ms':>10}{'quartiles':>18}{'ratio':>8}{'compile s':>11}{'MB':>8}"
    )
    for record in records:
        ratio = f"{record.seconds / base:.3f}" if base else ""
        quartiles = f"{1e3 * record.seconds_low:.1f}-{1e3 * record.seconds_high:.1f}"
        print(
            f"{record.name:16}{record.tiles_per_second:10.2f}{1e3 * record.seconds:10.1f}"
            f"{quartiles:>18}{ratio:>8}{record.compile_seconds:11.1f}{record.peak_bytes / 1e6:8.0f}"
        )
    if output:
        path = pathlib.Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        on = machine()
        with path.open("a", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps({**dataclasses.asdict(record), "machine": on}) + "\n")
