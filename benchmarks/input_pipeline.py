r"""Does a run whose tiles do not fit its memory wait for them?

    python -m benchmarks.input_pipeline --output=benchmarks/results/input_pipeline.jsonl
    python -m benchmarks.input_pipeline --tile_size=64 --base_channels=8 --depth=3 --store_mb=1500

A private run, `training.run` itself, over a store of random tiles on disk that is larger than the
memory given to the process. `packed` maps the files and has `execution.pool=packed`; its own memory
(heap, anonymous maps, stacks of threads) may grow by --memory_mb from before anything of the run
exists, compilation included, and no further: a copy of the store does not fit, and would fail.
What is NOT bounded are pages of the mapped files, which are the system's: before each block of
rounds they are given back and the system's cache is asked to forget them, so that a block reads its
tiles from the disk, or from what caches it below the system. `resident` reads the whole store into
memory first and is not bounded. Both are processes of their own and take turns, a block each.

A step is delayed by input where the loop of the devices waits more than a millisecond for its
chunk, and the chunk before is no longer at work when it comes.
The input's CPU is that of the whole planning thread (the charge, draws, keys, packing) and of
placing chunks on the devices, over that of the process. A device's waiting for pages that a
resident pool would be mapped from is in neither.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

from benchmarks import harness, input_child
from benchmarks.harness import Record, Verdict
from benchmarks.round import Shape
from fedjax_dp.processor import use_huge_pages

_CLIENTS = flags.DEFINE_integer("clients", 4, "Sites, all in every round.", allow_override=True)
_UNITS = flags.DEFINE_integer("units", 4, "Patients a client draws in a step.", allow_override=True)
_OWN = flags.DEFINE_integer("tiles_per_unit", 4, "Tiles drawn of each patient.")
_SIDE = flags.DEFINE_integer("tile_size", 128, "Side of a tile, pixels.", allow_override=True)
_BASE = flags.DEFINE_integer(
    "base_channels", 16, "Channels of the U-Net's first level.", allow_override=True
)
_DEPTH = flags.DEFINE_integer("depth", 4, "Poolings of the U-Net.", allow_override=True)
_STEPS = flags.DEFINE_integer("local_steps", 2, "Steps of a round.", allow_override=True)
_STORE = flags.DEFINE_integer("store_mb", 4000, "Size of the store, 1e6 bytes.")
_MEMORY = flags.DEFINE_integer("memory_mb", 2000, "Memory given to the process, 1e6 bytes.")
_ROUNDS = flags.DEFINE_integer("rounds", 2, "Rounds of a block.", allow_override=True)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed blocks of rounds.", allow_override=True)
_OUTPUT = flags.DEFINE_string("output", "", "JSON lines file to append to.", allow_override=True)

DELAYED = "steps delayed by input"
CPU = "CPU share of the input"
SPEED = "tiles/s, packed / resident"

WAIT = 1e-3
"""Seconds: shorter waits are the hand-over itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """A store, and the run over it.

    Attributes:
        clients: sites, all of them in every round.
        units: patients that a client draws in a step on average.
        tiles_per_unit: tiles drawn of each; a patient has twice as many.
        tile_size: pixels.
        base_channels: of the U-Net.
        depth: of the U-Net.
        local_steps: of a client in a round.
        store_bytes: of images and labels on disk.
        given_bytes: by which the packed run's own memory may grow.
        rounds: of a block.
    """

    clients: int = 4
    units: int = 4
    tiles_per_unit: int = 4
    tile_size: int = 128
    base_channels: int = 16
    depth: int = 4
    local_steps: int = 2
    store_bytes: int = 4_000_000_000
    given_bytes: int = 2_000_000_000
    rounds: int = 2

    @property
    def tiles(self) -> int:
        """Tiles of the store; all patients have as many."""
        own = 2 * self.tiles_per_unit
        return own * max(self.clients, self.store_bytes // (4 * self.tile_size**2 * own))

    def arguments(self, folder: pathlib.Path, pool: str, repeats: int) -> dict[str, Any]:
        """What the child of one variant is told."""
        shape = Shape(
            clients=self.clients, units=self.units, tile_size=self.tile_size,
            base_channels=self.base_channels, depth=self.depth, local_steps=self.local_steps,
        )  # fmt: skip
        config = shape.config(2 + self.rounds * repeats)
        config.privacy.tiles_per_unit = self.tiles_per_unit
        config.execution.pool = pool
        return {
            "folder": str(folder),
            "config": dataclasses.asdict(config),
            "tiles": self.tiles,
            "clients": self.clients,
            "own": 2 * self.tiles_per_unit,
            "rounds": self.rounds,
            "given_bytes": self.given_bytes if pool == "packed" else 0,
        }


def write_store(folder: pathlib.Path, tiles: int, side: int) -> None:
    """Random pixels and labels of two classes: what they show does not matter here."""
    rng = np.random.default_rng(0)
    with (folder / "images").open("wb") as images, (folder / "labels").open("wb") as labels:
        for start in range(0, tiles, 256):
            count = min(256, tiles - start) * side**2
            images.write(rng.bytes(3 * count))
            labels.write((np.frombuffer(rng.bytes(count), np.uint8) & 1).tobytes())


class Child(NamedTuple):
    """A process that runs one variant."""

    process: subprocess.Popen[str]
    errors: pathlib.Path

    def block(self) -> dict[str, Any]:
        """Lets it run a block."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # why it is gone, `told` says
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        return self.told()

    def told(self) -> dict[str, Any]:
        """What it says next.

        Raises:
            RuntimeError: it ended instead; the message ends with what it wrote.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(input_child.MARK):
                return json.loads(line.removeprefix(input_child.MARK))
        code, wrote = self.process.wait(), self.errors.read_text()[-2000:]
        raise RuntimeError(f"The process ended with code {code}:\n{wrote}")


@contextlib.contextmanager
def child(folder: pathlib.Path, arguments: dict[str, Any]) -> Iterator[Child]:
    """A process that has run its first round."""
    errors = folder / f"{arguments['config']['execution']['pool']}.txt"
    with errors.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.input_child", json.dumps(arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
            cwd=pathlib.Path(__file__).resolve().parents[1],
            # Arenas of every thread are reserved and hardly used, but would be counted.
            env=os.environ | {"MALLOC_ARENA_MAX": "2"},
        )  # fmt: skip
    with process:
        try:
            made = Child(process, errors)
            made.told()
            yield made
        finally:
            process.kill()


def measure(setup: Setup, *, repeats: int) -> tuple[list[Record], list[Verdict]]:
    """The records of `packed` and `resident`, and what was promised of them."""
    blocks: dict[str, list[dict[str, Any]]] = {"packed": [], "resident": []}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = pathlib.Path(name)
        write_store(folder, setup.tiles, setup.tile_size)
        children = {
            pool: stack.enter_context(child(folder, setup.arguments(folder, pool, repeats)))
            for pool in blocks
        }
        for turn in range(repeats):
            for pool in list(blocks)[:: -1 if turn % 2 else 1]:
                blocks[pool].append(children[pool].block())
    records = [_record(setup, pool, found) for pool, found in blocks.items()]
    packed = records[0].settings
    pairs = zip(blocks["packed"], blocks["resident"], strict=True)
    speed = statistics.median(
        (p["tiles"] / p["seconds"]) / (r["tiles"] / r["seconds"]) for p, r in pairs
    )
    times = setup.store_bytes / setup.given_bytes
    of = f", {setup.tile_size} px, store {times:.1f}x memory"
    return records, [
        Verdict(DELAYED + of, packed["delayed"], 0.02, 0.0, is_at_most=True),
        Verdict(CPU + of, packed["input_cpu_share"], 0.10, 0.05, is_at_most=True),
        Verdict(SPEED + of, speed, 0.95, 0.99),
    ]


def _record(setup: Setup, pool: str, blocks: list[dict[str, Any]]) -> Record:
    waits = [wait for block in blocks for wait, _ in block["waits"]]
    delays = [wait > WAIT and is_idle for block in blocks for wait, is_idle in block["waits"]]
    total = {
        name: sum(block[name] for block in blocks)
        for name in ("seconds", "process_cpu", "planning_cpu", "packing_cpu", "placing_cpu")
    }
    tiles = statistics.fmean(block["tiles"] for block in blocks)
    # Blocks draw unlike numbers of units: what is comparable is the time of the mean block.
    scaled = [block["seconds"] * tiles / block["tiles"] for block in blocks]
    settings = dataclasses.asdict(setup) | {
        "tiles": setup.tiles,
        "tiles_per_block": tiles,
        "chunks": len(waits),
        "delayed": sum(delays) / max(len(delays), 1),
        "longest_wait": max(waits, default=0.0),
        "wait_share": sum(waits) / total["seconds"],
        "input_cpu_share": (total["planning_cpu"] + total["placing_cpu"]) / total["process_cpu"],
        "packing_cpu_share": total["packing_cpu"] / total["process_cpu"],
        "cpu_ms_per_tile": 1e3 * total["process_cpu"] / (tiles * len(blocks)),
        "packing_ms_per_tile": 1e3 * total["packing_cpu"] / (tiles * len(blocks)),
        "own_bytes": max(block["own_bytes"] for block in blocks),
        "compiles": sum(block["compiles"] for block in blocks),
    }
    return harness.summary(
        "input_pipeline", pool, scaled, settings, tiles=tiles,
        process_bytes=max(block["peak_bytes"] for block in blocks),
    )  # fmt: skip


def main(argv: list[str]) -> None:
    """Measures and reports."""
    del argv
    setup = Setup(
        clients=_CLIENTS.value, units=_UNITS.value, tiles_per_unit=_OWN.value,
        tile_size=_SIDE.value, base_channels=_BASE.value, depth=_DEPTH.value,
        local_steps=_STEPS.value, store_bytes=1_000_000 * _STORE.value,
        given_bytes=1_000_000 * _MEMORY.value, rounds=_ROUNDS.value,
    )  # fmt: skip
    records, verdicts = measure(setup, repeats=_REPEATS.value)
    for record in records:
        s = record.settings
        print(
            f"{record.name}: of {s['chunks']} chunks {100 * s['delayed']:.1f} % delayed, the "
            f"longest wait {1e3 * s['longest_wait']:.1f} ms, all of them "
            f"{100 * s['wait_share']:.3f} % of the time; {s['cpu_ms_per_tile']:.1f} CPU-ms a tile, "
            f"input {100 * s['input_cpu_share']:.2f} % of them, packing "
            f"{100 * s['packing_cpu_share']:.2f} %; own memory {1e-6 * s['own_bytes']:.0f} MB"
        )
    harness.report(records, _OUTPUT.value, baseline="resident", verdicts=verdicts)


if __name__ == "__main__":
    use_huge_pages()
    app.run(main)
