r"""What does clipping every unit, and the noise, cost against the same step without privacy?

    python -m benchmarks.clipping --output=benchmarks/results/clipping.jsonl

One local step of one client through the real client update: `nonprivate` sums gradients,
`private` clips each unit's and adds the noise; `clipped` clips alone, `noise` draws noise alone.
All batches and block sizes are timed in one interleaved run. What is ours and private is held
against the fastest `nonprivate` of that run, whatever its block size: a plan that privacy forbids
must not be left out of the comparison. Memory is the programs' own temporary bytes, and with --rss
the growth of a process that compiles and runs one variant alone.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from benchmarks import harness, memory
from benchmarks.harness import Record, Variant, Verdict
from benchmarks.machine import flops_of, matrix_peak
from fedjax_dp.federated.client import client_update
from fedjax_dp.models.layers import default_conv_variant
from fedjax_dp.models.unet import unet
from fedjax_dp.privacy.clipping import clipped_grad
from fedjax_dp.privacy.noise import add_noise
from fedjax_dp.processor import use_huge_pages
from fedjax_dp.segmentation.objective import segmentation_loss
from fedjax_dp.typing import ClientConstants, ClientKeys, ClientPlan, TilePool

_BATCHES = flags.DEFINE_list("batches", ["64"], "Units of the step, one tile each.")
_BLOCKS = flags.DEFINE_list("microbatch_sizes", ["1", "2", "8"], "Units computed together.")
_MEMORY = flags.DEFINE_list("memory_batches", ["64", "512"], "For the growth of memory.")
_TILE = flags.DEFINE_integer("tile_size", 128, "Side of a tile, pixels.", allow_override=True)
_BASE = flags.DEFINE_integer(
    "base_channels", 16, "Channels of the U-Net's first level.", allow_override=True
)
_DEPTH = flags.DEFINE_integer("depth", 4, "Poolings of the U-Net.", allow_override=True)
_VARIANT = flags.DEFINE_string("conv_variant", "", "See models.layers; empty = the backend's.")
_RSS = flags.DEFINE_boolean("rss", True, "Whether to start a process for each kind's memory.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls of each variant.", allow_override=True)
_OUTPUT = flags.DEFINE_string("output", "", "JSON lines file to append to.", allow_override=True)

CLIP_ONLY = "clip only / fastest non-private plan"
WHOLE = "whole private step / fastest non-private plan"
MEMORY = "temp memory, private / non-private, equal block"
GROWTH = "temp memory, private, growth over units"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """Network and tiles; all that variants have in common."""

    tile_size: int = 128
    base_channels: int = 16
    depth: int = 4
    conv_variant: str = ""

    def resolved(self) -> "Setup":
        """With the backend's convolution where none is named."""
        variant = self.conv_variant or default_conv_variant(jax.default_backend())
        return dataclasses.replace(self, conv_variant=variant)

    def model(self) -> tuple[Any, Any]:
        """The parameters and the loss of one unit."""
        init, apply = unet(
            2,
            base_channels=self.base_channels,
            depth=self.depth,
            conv_variant=self.resolved().conv_variant,  # type: ignore[arg-type]
        )
        return init(jax.random.key(0)), segmentation_loss(apply)

    def pool(self, batch: int) -> TilePool:
        """`batch` tiles of random pixels."""
        rng, side = np.random.default_rng(0), self.tile_size
        return TilePool(
            jnp.asarray(rng.integers(0, 256, (batch, side, side, 3), dtype=np.uint8)),
            jnp.asarray(rng.integers(0, 2, (batch, side, side), dtype=np.uint8)),
        )


def step(
    name: str, params: Any, loss: Any, pool: TilePool, batch: int, microbatch_size: int
) -> tuple[Any, tuple[Any, ...]]:
    """The function to jit, and its arguments, of the variant `name`."""
    keys = ClientKeys(jax.random.key(1), jax.random.key(2))
    if name == "noise":
        return add_noise, (keys.noise, params, 1.0)
    if name == "clipped":

        def unit_loss(params: Any, index: Any, key: Any, pool: TilePool) -> Any:
            tile_keys = jax.random.fold_in(key, index)[None]
            return loss(params, pool.images[index][None], pool.labels[index][None], 1, tile_keys)

        # The pool is an argument, as it is of the steps: a constant would be folded in.
        def clip(params: Any, index: Any, keys: Any, pool: TilePool) -> Any:
            fn = clipped_grad(lambda *a: unit_loss(*a, pool), microbatch_size=microbatch_size)
            return fn(params, index, keys, batch, 1.0)

        unit_keys = jnp.broadcast_to(keys.augmentation, (batch,))
        return clip, (params, jnp.arange(batch), unit_keys, pool)
    placement, stddev = {"nonprivate": ("none", 0.0), "private": ("dp_sgd", 1.0)}[name]
    update = client_update(
        loss,
        optax.sgd(1.0),
        placement=placement,  # type: ignore[arg-type]
        microbatch_size=microbatch_size,
    )
    constants = ClientConstants(*(np.float32(x) for x in (1.0, 1.0, stddev, 1.0 / batch, 1.0)))
    # Capacity above the draw, as in a real round: empty slots must cost nothing.
    slots = 2 * batch
    plan = ClientPlan(
        np.arange(slots, dtype=np.int32).reshape(1, slots, 1) % batch,
        np.array([batch], np.int32),
        np.ones((1, slots), np.int32),
    )
    return update, (params, keys, (), constants, plan, pool)


def alone(*, name: str, batch: int, microbatch_size: int, setup: dict[str, Any]) -> Iterator[str]:
    """One variant for `benchmarks.memory`: compiles, then runs twice."""
    made = Setup(**setup)
    params, loss = made.model()
    function, arguments = step(name, params, loss, made.pool(batch), batch, microbatch_size)
    jax.block_until_ready(arguments)
    yield "data"
    program = jax.jit(function).lower(*arguments).compile()
    yield "compile"
    for _ in range(2):
        jax.block_until_ready(program(*arguments))
    yield "run"


def unit_flops(setup: Setup) -> float:
    """Floating-point operations of the gradient of one unit of one tile."""
    params, loss = setup.model()
    pool, key = setup.pool(1), jax.random.split(jax.random.key(0), 1)
    return flops_of(jax.value_and_grad(loss), params, pool.images, pool.labels, 1, key)


def temp_of(setup: Setup, name: str, batch: int, microbatch_size: int) -> int:
    """Temporary bytes of a variant's program, which is compiled and not run."""
    params, loss = setup.model()
    side = setup.tile_size
    pool = TilePool(
        jax.ShapeDtypeStruct((batch, side, side, 3), np.uint8),
        jax.ShapeDtypeStruct((batch, side, side), np.uint8),
    )
    function, arguments = step(name, params, loss, pool, batch, microbatch_size)
    return harness.temp_bytes(jax.jit(function).lower(*arguments).compile())


def run(
    setup: Setup,
    *,
    batches: list[int],
    microbatch_sizes: list[int],
    memory_batches: list[int],
    repeats: int,
    rss: bool,
) -> tuple[list[Record], list[Verdict]]:
    """Measures everything; the records, and the largest batch held against what was promised."""
    setup = setup.resolved()
    params, loss = setup.model()
    flops = unit_flops(setup)
    variants = {}
    for batch in batches:
        pool = setup.pool(batch)
        for size in microbatch_sizes:
            for name in ("nonprivate", "clipped", "private"):
                variants[f"{name} {batch} {size}"] = Variant(
                    *step(name, params, loss, pool, batch, size),
                    tiles=batch,
                    flops=batch * flops,
                    settings={"batch": batch, "microbatch_size": size},
                    name=name,
                )
    draw = step("noise", params, loss, setup.pool(1), 1, 1)
    variants["noise"] = Variant(*draw, name="noise")
    settings = dataclasses.asdict(setup) | {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "gflop_per_tile": 1e-9 * flops,
        "matrix_gflops": matrix_peak(),
    }
    records = harness.measure("clipping", variants, settings=settings, repeats=repeats)
    if rss:
        records = [_with_rss(record, setup, records) for record in records]
    return records, verdicts(records, _growth(setup, memory_batches, microbatch_sizes, records))


def _with_rss(record: Record, setup: Setup, records: list[Record]) -> Record:
    """The record of the fastest plan of its kind at the largest batch with its process's growth."""
    largest = max(r.settings.get("batch", 0) for r in records)
    kind = [r for r in records if r.name == record.name and r.settings.get("batch") == largest]
    if record.name not in ("nonprivate", "private") or record != _fastest(kind):
        return record
    found = memory.peaks(
        "benchmarks.clipping:alone",
        {
            "name": record.name,
            "batch": largest,
            "microbatch_size": record.settings["microbatch_size"],
            "setup": dataclasses.asdict(setup),
        },
    )
    settings = record.settings | {"process_bytes_compiling": found["compile"]}
    return dataclasses.replace(record, process_bytes=found["run"], settings=settings)


def _growth(
    setup: Setup, batches: list[int], sizes: list[int], records: list[Record]
) -> float | None:
    """By which factor temporary bytes grow from the least to the most units; the worst block."""
    if len(batches) < 2:
        return None
    known = {
        (r.settings["batch"], r.settings["microbatch_size"]): r.peak_bytes
        for r in records
        if r.name == "private"
    }

    def temp(batch: int, size: int) -> int:
        return known.get((batch, size)) or temp_of(setup, "private", batch, size)

    return max(temp(max(batches), size) / temp(min(batches), size) for size in sizes)


def _fastest(records: list[Record]) -> Record:
    return min(records, key=lambda record: record.seconds)


def verdicts(records: list[Record], growth: float | None) -> list[Verdict]:
    """The measures of the largest batch, and `growth`, with the floors and aims promised."""
    largest = max(r.settings.get("batch", 0) for r in records)
    kinds = {
        name: [r for r in records if r.name == name and r.settings["batch"] == largest]
        for name in ("nonprivate", "clipped", "private")
    }
    best = {name: _fastest(found).seconds for name, found in kinds.items()}
    ratios = [
        private.peak_bytes / plain.peak_bytes
        for private, plain in zip(kinds["private"], kinds["nonprivate"], strict=True)
        if private.peak_bytes and plain.peak_bytes
    ]
    of = f", {largest} units"
    found = [
        Verdict(CLIP_ONLY + of, best["nonprivate"] / best["clipped"], 0.93, 0.98),
        Verdict(WHOLE + of, best["nonprivate"] / best["private"], 0.90, 0.95),
    ]
    if ratios:
        found.append(Verdict(MEMORY + of, max(ratios), 1.3, 1.1, is_at_most=True))
    if growth is not None:
        found.append(Verdict(GROWTH, growth, 1.05, 1.01, is_at_most=True))
    return found


def main(argv: list[str]) -> None:
    """Measures and reports."""
    del argv
    records, found = run(
        Setup(
            tile_size=_TILE.value,
            base_channels=_BASE.value,
            depth=_DEPTH.value,
            conv_variant=_VARIANT.value,
        ),
        batches=[int(x) for x in _BATCHES.value],
        microbatch_sizes=[int(x) for x in _BLOCKS.value],
        memory_batches=[int(x) for x in _MEMORY.value],
        repeats=_REPEATS.value,
        rss=_RSS.value,
    )
    settings = records[0].settings
    largest = max(r.settings.get("batch", 0) for r in records)
    kind = [r for r in records if r.name == "nonprivate" and r.settings["batch"] == largest]
    print(
        f"{settings['gflop_per_tile']:.2f} GFLOP a tile; float32 matrix products reach "
        f"{settings['matrix_gflops']:.0f} GFLOP/s here. Fastest non-private plan: "
        f"microbatch_size={_fastest(kind).settings['microbatch_size']}. Ratios of times are to the "
        "first nonprivate."
    )
    harness.report(
        records,
        _OUTPUT.value,
        baseline="nonprivate",
        varied=("batch", "microbatch_size"),
        verdicts=found,
    )


if __name__ == "__main__":
    use_huge_pages()
    app.run(main)
