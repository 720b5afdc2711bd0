"""What is written and printed of a run beside other libraries; `benchmarks.harness` has the form.

python -m benchmarks.peers.clipping --output=benchmarks/results/peers.jsonl
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax

from benchmarks import harness
from benchmarks.harness import Verdict
from benchmarks.peers.interleave import Running, Variant
from benchmarks.peers.problem import NUM_CLASSES, NUM_GROUPS, Problem, Sizes, make
from fedjax_dp.models.unet import unet

_PACKAGES = ("torch", "opacus", "jax_privacy", "flwr", "ray")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One arrangement's.

    Attributes:
        variant: what it is.
        is_best: whether it stands for its name.
        seconds: timed repeats.
        peak_bytes: by how much a step makes its processes grow, together.
        error: relative, of its sum against ours.
        info: what its worker said.
    """

    variant: Variant
    is_best: bool
    seconds: tuple[float, ...]
    peak_bytes: int
    error: float
    info: Mapping[str, Any]


def result(running: Running, error: float, *, is_best: bool = False) -> Result:
    """What is kept of a variant that is about to be stopped."""
    return Result(
        variant=running.variant,
        is_best=is_best,
        seconds=tuple(running.seconds),
        peak_bytes=running.peak_bytes(),
        error=error,
        info=running.info,
    )


def make_problem(sizes: Sizes) -> Problem:
    """Our weights and synthetic tiles of the given sizes."""
    init, _ = unet(
        NUM_CLASSES,
        base_channels=sizes.base_channels,
        depth=sizes.depth,
        num_groups=NUM_GROUPS,
    )
    leaves, _ = jax.tree.flatten_with_path(init(jax.random.key(0)))
    weights = {"/".join(entry.key for entry in path): jax.device_get(x) for path, x in leaves}
    return make(sizes, weights)


def to_record(benchmark: str, found: Result, sizes: Sizes) -> harness.Record:
    """The record; the best arrangement bears the plain name, the others their label too.

    Both byte counts are resident memory, for a program's own analysis exists in JAX alone; that is
    `program_temp_bytes` of the settings.
    """
    variant = found.variant
    record = harness.summary(
        benchmark,
        variant.name if found.is_best else variant.title,
        found.seconds,
        {
            **dataclasses.asdict(sizes),
            "arrangement": variant.label,
            "processes": variant.processes,
            "options": dict(variant.options),
            "relative_error": found.error,
            "peak_bytes_are": "growth of the resident memory of all processes by a step",
            **found.info,
            "libraries": _versions(),
        },
        tiles=sizes.num_tiles,
    )
    return dataclasses.replace(
        record,
        # Preparing ends with one step.
        compile_seconds=max(found.info["prepare_seconds"] - record.seconds, 0.0),
        peak_bytes=found.peak_bytes,
        process_bytes=found.peak_bytes,
    )


def report(
    benchmark: str,
    results: Sequence[Result],
    sizes: Sizes,
    output: str,
    targets: Mapping[str, tuple[float, float]],
) -> None:
    """Prints the best of each name and what they say of the targets; appends all to `output`."""
    ordered = sorted(results, key=lambda r: not r.is_best)
    found = [to_record(benchmark, r, sizes) for r in ordered]
    best = {record.name: record for record in found[: sum(r.is_best for r in ordered)]}
    verdicts = [
        Verdict(
            f"ours private / {name}, base {sizes.base_channels}, {sizes.tile_size} px, tiles/s",
            best["private"].tiles_per_second / best[name].tiles_per_second,
            floor,
            aim,
        )
        for name, (floor, aim) in targets.items()
        if name in best and "private" in best
    ]
    harness.report(
        list(best.values()),
        "",
        baseline="private",
        varied=("arrangement",),
        verdicts=verdicts,
    )
    if output:
        harness.append(found, output, verdicts)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
