r"""What does a whole private round take against the bare compute of the units it drew?

    python -m benchmarks.round --output=benchmarks/results/round.jsonl
    python -m benchmarks.round --clients=3 --units=64 --tile_sizes=128 --base_channels=16 --depth=4
    python -m benchmarks.round --clients= --populations=100,1000,10000 --cohorts=10,100,1000

`round` is `training.run` itself, from one line of its log to the next: charge on disk, cohort and
units drawn, chunks stacked and placed, clients visited, the server's step, epsilon of every client,
ledger and log. `bare` is ONE call of a program that sums the clipped gradients of exactly the units
those rounds drew, shared out evenly over all devices, and nothing else: no noise, no optimiser, no
client, no server. That is the honest baseline, for it is the work that cannot be left out, and no
device waits. `placed` runs the round's own programs
once more on chunks that are already on the devices: what it takes above `bare` is spent there
(noise, optimiser, a call for each chunk), and what `round` takes above `placed` is the host's.
The three alternate in blocks of rounds, and ratios are medians over the blocks.

With --populations each pair of population and cohort runs in a process of its own, patients as
clients; what is told is by how much the process grew, and the time of a tile.
"""

import dataclasses
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import harness, memory
from benchmarks.harness import Record, Verdict
from benchmarks.machine import CompileLog, compile_log, flops_of
from experiments.launcher import split_cpu
from fedjax_dp import training
from fedjax_dp.assembly.programs import Device, Programs, make_model
from fedjax_dp.config import Config
from fedjax_dp.data.federation import Federation
from fedjax_dp.data.tiles import TileTable, concatenate
from fedjax_dp.federated import cohort
from fedjax_dp.federated.client import UnitTiles, pooled_loss
from fedjax_dp.privacy.clipping import clipped_grad, summed_grad
from fedjax_dp.processor import use_huge_pages
from fedjax_dp.reporting.log import MetricsLog
from fedjax_dp.segmentation.objective import segmentation_loss

_CLIENTS = flags.DEFINE_list("clients", ["1", "3", "10", "100", "1000"], "All in every round.")
_UNITS = flags.DEFINE_list("units", ["16"], "Units (patients of one tile) a client draws, B.")
_TILES = flags.DEFINE_list("tile_sizes", ["32"], "Sides of a tile, pixels.")
_POPULATIONS = flags.DEFINE_list("populations", [], "Patients as clients: how many there are.")
_COHORTS = flags.DEFINE_list("cohorts", ["10", "100", "1000"], "And how many of them in a round.")
_BASE = flags.DEFINE_integer(
    "base_channels", 8, "Channels of the U-Net's first level.", allow_override=True
)
_DEPTH = flags.DEFINE_integer("depth", 2, "Poolings of the U-Net.", allow_override=True)
_STEPS = flags.DEFINE_integer("local_steps", 1, "Steps of a client in a round.")
_SPREAD = flags.DEFINE_float("spread", 0.0, "Clients differ in size by up to this fraction.")
_BLOCK = flags.DEFINE_integer("clients_per_block", 1, "See config.ExecutionConfig.")
_DEVICES = flags.DEFINE_integer("devices", 0, "Of a CPU; 0 = one a core, as experiments do.")
_MICRO = flags.DEFINE_integer("microbatch_size", 0, "See config.ExecutionConfig.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed blocks of rounds.", allow_override=True)
_OUTPUT = flags.DEFINE_string("output", "", "JSON lines file to append to.", allow_override=True)

RATIO = "round wall time / bare compute of the units drawn"
PLACED = "round wall time / the same programs on placed chunks"
COMPILES = "backend compiles after round one"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One federation and network.

    Attributes:
        clients: sites, all of them in every round; or patients, see `cohort`.
        units: that a client draws in a step on average; one tile each.
        tile_size: pixels.
        base_channels: of the U-Net.
        depth: of the U-Net.
        local_steps: of a client.
        spread: by which fraction clients differ in size.
        clients_per_block: see `config.ExecutionConfig`.
        microbatch_size: see `config.ExecutionConfig`.
        cohort: clients are patients of two tiles, `cohort` of them drawn in a round on average, and
            the trusted server adds the noise; 0 = clients are sites.
    """

    clients: int
    units: int = 16
    tile_size: int = 32
    base_channels: int = 8
    depth: int = 2
    local_steps: int = 1
    spread: float = 0.0
    clients_per_block: int = 1
    microbatch_size: int = 0
    cohort: int = 0

    def config(self, rounds: int) -> Config:
        """The run's configuration: no evaluation or checkpoint before the end."""
        config = Config(seed=0, eval_every=10**9, checkpoint_every=10**9)
        config.data.tile_size = self.tile_size
        config.model.base_channels, config.model.depth = self.base_channels, self.depth
        privacy, federation, execution = config.privacy, config.federation, config.execution
        privacy.unit, privacy.noise_multiplier, privacy.target_epsilon = "patient", 1.0, 0.0
        privacy.expected_batch_size, privacy.tiles_per_unit = float(self.units), 1
        federation.rounds, federation.local_steps = rounds, self.local_steps
        execution.clients_per_block = self.clients_per_block
        execution.microbatch_size = self.microbatch_size
        if self.cohort:
            privacy.placement, privacy.tiles_per_unit = "central", 2
            privacy.expected_batch_size = 1.0
            federation.clients, federation.cohort = "patient", "poisson"
            federation.cohort_prob = min(1.0, self.cohort / self.clients)
        return config

    def federation(self) -> Federation:
        """Random pixels: what they show does not matter here."""
        rng = np.random.default_rng(0)
        if self.cohort:
            site, patient = np.zeros(2 * self.clients), np.repeat(np.arange(self.clients), 2)
        else:
            # Two and a half times what is drawn, so that draws vary.
            spread = 1.0 + self.spread * rng.uniform(-1, 1, self.clients)
            sizes = np.maximum(1, np.round(2.5 * self.units * spread)).astype(int)
            site, patient = np.repeat(np.arange(self.clients), sizes), np.arange(sizes.sum())
        tiles, side = len(site), self.tile_size
        table = TileTable(
            images=rng.integers(0, 256, (tiles, side, side, 3), dtype=np.uint8),
            labels=rng.integers(0, 2, (tiles, side, side), dtype=np.uint8),
            site=site.astype(np.int32),
            slide=patient.astype(np.int32),
            patient=patient.astype(np.int32),
            sites=tuple(f"site {i}" for i in range(int(site.max()) + 1)),
            slides=tuple(f"slide {i}" for i in range(int(patient.max()) + 1)),
            patients=tuple(f"patient {i}" for i in range(int(patient.max()) + 1)),
        )
        none = concatenate([], [], side)
        return Federation(
            name="random pixels", class_names=("background", "nucleus"), train=table,
            validation=none, test=none, external=none, is_public=True,
        )  # fmt: skip


class _Enough(Exception):  # noqa: N818, it is no error
    """Ends a run whose rounds are all measured."""


@dataclasses.dataclass
class Watched:
    """What a run showed while it went on; seconds are of a block of rounds.

    Attributes:
        rounds: of a block.
        blocks: to be timed.
        log: of compilations.
        after: called with the block's visits after each, outside what is timed.
        begun: called after round one.
        wall: seconds of each block.
        tiles: drawn in each block.
        visits: (state, chunks, release) of each round of the present block; empty without `after`.
        compiles: programs compiled after round one, those of `after` left out.
        setup_seconds: from the call to the first line of the log.
        device: of the run.
        programs: of the run.
    """

    rounds: int
    blocks: int
    log: CompileLog
    after: Callable[["Watched", Programs], None] | None = None
    begun: Callable[[], None] = lambda: None
    wall: list[float] = dataclasses.field(default_factory=list)
    tiles: list[int] = dataclasses.field(default_factory=list)
    visits: list[tuple[Any, list[Any], Any]] = dataclasses.field(default_factory=list)
    compiles: int = 0
    setup_seconds: float = 0.0
    device: Any = None
    programs: Any = None
    _start: float = 0.0
    _drawn: int = 0
    _compiled: int = 0

    def run(self, config: Config, federation: Federation) -> None:
        """Runs `training.run` until all blocks are timed."""
        compile_programs, append = training.compile_programs, MetricsLog.append

        def compiled(config: Config, device: Device, *rest: Any) -> Programs:
            self.device = device
            self.programs = compile_programs(config, device, *rest)
            return self.programs if self.after is None else self._recording(self.programs)

        def appended(log: MetricsLog, line: dict[str, Any]) -> None:
            append(log, line)
            self._logged(line)

        # As experiments do: Orbax tells of every file, and the run's own lines are few.
        logging.set_verbosity(logging.WARNING)
        self._start = time.perf_counter()
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(training, "compile_programs", compiled),
            mock.patch.object(MetricsLog, "append", appended),
        ):
            try:
                training.run(config, pathlib.Path(folder) / "run", federation=federation,
                             progress=False)  # fmt: skip
            except _Enough:
                return
        raise RuntimeError("The run ended before its rounds were measured.")

    def _recording(self, made: Programs) -> Programs:
        def begin(state: Any) -> Any:
            self.visits.append((state, [], None))
            return made.begin(state)

        def visit(acc: Any, state: Any, chunk: Any) -> Any:
            self.visits[-1][1].append(chunk)
            return made.visit(acc, state, chunk)

        def finish(state: Any, acc: Any, release: Any) -> Any:
            self.visits[-1] = (*self.visits[-1][:2], release)
            return made.finish(state, acc, release)

        return made._replace(begin=begin, visit=visit, finish=finish)

    def _logged(self, line: dict[str, Any]) -> None:
        now, number = time.perf_counter(), line["round"]
        if number == 0:
            self.setup_seconds = now - self._start
            return
        if number == 1:  # fills caches
            self.begun()
        else:
            self._drawn += int(line["nonprivate"]["tiles"])
            if (number - 1) % self.rounds:
                return
            self.compiles += self.log.compiles - self._compiled
            self.wall.append(now - self._start)
            self.tiles.append(self._drawn)
            if self.after is not None:
                self.after(self, self.programs)
            if len(self.wall) == self.blocks:
                raise _Enough
        # Forgotten here, not in the block: its last reference frees a block's arrays.
        self.visits.clear()
        self._drawn, self._compiled = 0, self.log.compiles
        self._start = time.perf_counter()


def placed(watched: Watched, programs: Programs) -> float:
    """Seconds of the block's rounds once more, on chunks that are on the devices."""
    there = cohort.by_client(watched.device.mesh)
    visits = [(s, jax.device_put(chunks, there), release) for s, chunks, release in watched.visits]
    jax.block_until_ready(visits)
    start = time.perf_counter()
    for state, chunks, release in visits:
        acc = programs.begin(state)
        for chunk in chunks:
            acc, _, info = programs.visit(acc, state, chunk)
            jax.block_until_ready(info)
        jax.block_until_ready(programs.finish(state, acc, release))
    return time.perf_counter() - start


def bare_program(config: Config) -> Callable[..., Any]:
    """`(params, tile_index [M, T], num_tiles [M], keys [M], num_units, clip, pool) -> sum`."""
    loss = segmentation_loss(make_model(config, 2).apply, **vars(config.objective))
    size = config.execution.microbatch_size or (1 if jax.default_backend() == "cpu" else 32)
    make = clipped_grad if config.privacy.placement == "dp_sgd" else summed_grad

    def bare(
        params: Any, index: Any, num_tiles: Any, keys: Any, num_units: Any, clip: Any, pool: Any
    ) -> Any:
        fn = make(pooled_loss(loss, pool), microbatch_size=size)
        return fn(params, UnitTiles(index, num_tiles), keys, num_units, clip)[0]

    return bare


class Bare:
    """The bare program, compiled once, on the units of a block of rounds."""

    def __init__(self, config: Config) -> None:
        self._function, self._program = bare_program(config), None
        self._devices = np.array(jax.local_devices())
        self._mesh = Mesh(self._devices, ("devices",))

    def total(self) -> Any:
        """The sum of the last call."""
        return jax.tree.map(lambda leaf: leaf.sum(0), self._last)

    def __call__(self, watched: Watched) -> float:
        """Seconds of one call on all the units that the block drew."""
        chunks = [chunk for _, chunks, _ in watched.visits for chunk in chunks]
        units, counts, slots = [], [], 0
        for chunk in chunks:
            index, number, tiles = (np.asarray(leaf) for leaf in chunk.plan)
            slots += number.size * tiles.shape[-1]
            real = (np.arange(tiles.shape[-1]) < number[..., None]).reshape(-1)
            real &= np.repeat(np.asarray(chunk.constants.is_active) > 0, real.size // len(number))
            units.append(index.reshape(-1, index.shape[-1])[real])
            counts.append(tiles.reshape(-1)[real])
        if self._program is None:
            self._slots = 2 * slots  # a later block may have more chunks where cohorts vary
        shares = len(self._devices)
        index = np.zeros((shares, self._slots, units[0].shape[-1]), np.int32)
        tiles = np.ones((shares, self._slots), np.int32)
        num_units = np.zeros(shares, np.int32)
        for share in range(shares):
            mine = np.concatenate(units)[share::shares]
            index[share, : len(mine)], num_units[share] = mine, len(mine)
            tiles[share, : len(mine)] = np.concatenate(counts)[share::shares]
        keys = jnp.broadcast_to(jax.random.key(0), (self._slots,))
        own = NamedSharding(self._mesh, PartitionSpec("devices"))
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        params, pool = watched.visits[0][0].params, watched.device.pool
        arguments = (
            *jax.device_put((index, tiles, num_units), own),
            *jax.device_put((params, keys, np.float32(1), pool), everywhere),
        )
        if self._program is None:
            self._program = jax.jit(self._shared).lower(*arguments).compile()
            jax.block_until_ready(self._program(*arguments))
        start = time.perf_counter()
        self._last = jax.block_until_ready(self._program(*arguments))
        return time.perf_counter() - start

    def _shared(self, index: Any, tiles: Any, num_units: Any, *alike: Any) -> Any:
        def on_device(index: Any, tiles: Any, num_units: Any, *alike: Any) -> Any:
            params, keys, clip, pool = alike
            params = jax.lax.pcast(params, "devices", to="varying")
            one = self._function(params, index[0], tiles[0], keys, num_units[0], clip, pool)
            return jax.tree.map(lambda leaf: leaf[None], one)

        own, whole = PartitionSpec("devices"), PartitionSpec()
        shared = jax.shard_map(
            on_device,
            mesh=self._mesh,
            in_specs=(own, own, own, *[whole] * len(alike)),
            out_specs=own,
        )
        return shared(index, tiles, num_units, *alike)


def measure(shape: Shape, *, repeats: int) -> tuple[list[Record], list[Verdict]]:
    """The records of `round`, `placed` and `bare`, and what was promised of them."""
    rounds = max(1, min(40 // shape.clients, 500 // (shape.clients * shape.units)))
    config = shape.config(2 + rounds * repeats)
    bare, times = Bare(config), {"placed": [], "bare": []}

    def after(watched: Watched, programs: Programs) -> None:
        times["placed"].append(placed(watched, programs))
        times["bare"].append(bare(watched))

    with compile_log() as log:
        watched = Watched(rounds, repeats, log, after)
        watched.run(config, shape.federation())
    tiles = statistics.fmean(watched.tiles)
    flops = _tile_flops(config)
    settings = dataclasses.asdict(shape) | {
        "rounds": rounds,
        "tiles_per_round": tiles / rounds,
        "mesh": dict(watched.device.mesh.shape),
        "compiles_after_round_one": watched.compiles,
        "setup_seconds": watched.setup_seconds,
        "gflop_per_tile": 1e-9 * flops,
    }
    walls = {"round": watched.wall, **times}
    ratios = {
        name: statistics.median(w / t for w, t in zip(watched.wall, walls[name], strict=True))
        for name in ("placed", "bare")
    }
    settings["host_ms_per_client"] = 1e3 * statistics.median(
        (w - p) / (rounds * shape.clients)
        for w, p in zip(watched.wall, times["placed"], strict=True)
    )
    records = []
    for name, seconds in walls.items():
        # Blocks draw unlike numbers of units: what is comparable is the time of the mean block.
        scaled = [s * tiles / t for s, t in zip(seconds, watched.tiles, strict=True)]
        more = settings if name == "round" else settings | {"round_over_this": ratios[name]}
        record = harness.summary(
            "round", name, [s / rounds for s in scaled], more, tiles=tiles / rounds,
            compile_seconds=watched.programs.compile_seconds if name == "round" else None,
        )  # fmt: skip
        gflops = 1e-9 * flops * (record.tiles_per_second or 0.0)
        records.append(dataclasses.replace(record, gflops=gflops))
    of = f", {shape.clients} clients, {shape.units} units, {shape.tile_size} px"
    found = [Verdict(COMPILES + of, watched.compiles, 0, 0, is_at_most=True)]
    if shape.units >= 16:
        found.insert(0, Verdict(RATIO + of, ratios["bare"], 1.10, 1.03, is_at_most=True))
    return records, found


def _tile_flops(config: Config) -> float:
    model = make_model(config, 2)
    loss = segmentation_loss(model.apply, **vars(config.objective))
    side = config.data.tile_size
    shapes = (
        jax.eval_shape(model.init, jax.random.key(0)),
        jax.ShapeDtypeStruct((1, side, side, 3), np.uint8),
        jax.ShapeDtypeStruct((1, side, side), np.uint8),
        1,
        jax.random.split(jax.random.key(0), 1),
    )
    return flops_of(jax.value_and_grad(loss), *shapes)


def alone(*, shape: dict[str, Any], rounds: int) -> Iterator[Any]:
    """One population and cohort for `benchmarks.memory`."""
    made = Shape(**shape)
    federation = made.federation()
    pool_bytes = federation.train.images.nbytes + federation.train.labels.nbytes
    jnp.zeros(1).block_until_ready()
    yield "data"
    config, base = made.config(3 + rounds), memory.resident_bytes()
    with compile_log() as log:
        # Compiling reaches a peak of its own, under which that of the rounds would not be seen.
        watched = Watched(rounds, 1, log, begun=memory.forget_peak)
        watched.run(config, federation)
    figures = {
        "rounds_bytes": memory.peak_bytes() - base,
        "seconds_per_round": watched.wall[0] / rounds,
        "tiles_per_round": watched.tiles[0] / rounds,
        "compiles": watched.compiles,
        "setup_seconds": watched.setup_seconds,
        "pool_bytes": pool_bytes,
        "compile_seconds": watched.programs.compile_seconds,
    }
    yield "run", figures


def populations(shapes: list[Shape], *, rounds: int = 5) -> tuple[list[Record], list[Verdict]]:
    """A record of each of `shapes`, measured in a process of its own."""
    records = []
    for shape in shapes:
        found = memory.phases(
            "benchmarks.round:alone", {"shape": dataclasses.asdict(shape), "rounds": rounds}
        )["run"]
        tiles = found["tiles_per_round"]
        settings = dataclasses.asdict(shape) | {"population": shape.clients} | found
        settings["ms_per_tile"] = 1e3 * found["seconds_per_round"] / max(tiles, 1e-9)
        records.append(
            harness.summary(
                "round", "population", [found["seconds_per_round"]], settings,
                tiles=tiles, compile_seconds=found["compile_seconds"],
                # The device's copy of the tiles is the data's, whatever is done with it.
                process_bytes=found["rounds_bytes"] - found["pool_bytes"],
            )
        )  # fmt: skip
    return records, _flatness(records)


def _flatness(records: list[Record]) -> list[Verdict]:
    """How memory and the time of a tile grow along populations and along cohorts."""
    found = []
    for along, fixed in (("population", "cohort"), ("cohort", "population")):
        for value in sorted({r.settings[fixed] for r in records}):
            line = [r for r in records if r.settings[fixed] == value]
            line.sort(key=lambda r: r.settings[along])
            if len(line) < 2:
                continue
            first, last = line[0], line[-1]
            of = f", {along} {first.settings[along]} to {last.settings[along]}, {fixed} {value}"
            grown = (last.process_bytes or 0) / max(first.process_bytes or 1, 1)
            slower = last.settings["ms_per_tile"] / first.settings["ms_per_tile"]
            found.append(Verdict(f"memory{of}", grown, 1.1, 1.02, is_at_most=True))
            found.append(Verdict(f"time of a tile{of}", slower, 1.25, 1.1, is_at_most=True))
    return found


def main(argv: list[str]) -> None:
    """Measures and reports."""
    del argv
    split_cpu(_DEVICES.value)
    common = {
        "base_channels": _BASE.value, "depth": _DEPTH.value, "local_steps": _STEPS.value,
        "spread": _SPREAD.value, "clients_per_block": _BLOCK.value,
        "microbatch_size": _MICRO.value,
    }  # fmt: skip
    sides = [int(x) for x in _TILES.value]
    for clients in _CLIENTS.value:
        for units in _UNITS.value:
            for side in sides:
                shape = Shape(clients=int(clients), units=int(units), tile_size=side, **common)
                # A block of a thousand clients is long enough to be believed.
                repeats = min(_REPEATS.value, max(2, 2000 // shape.clients))
                records, found = measure(shape, repeats=repeats)
                settings = records[0].settings
                print(
                    f"\n{shape.clients} clients, {settings['tiles_per_round']:.1f} tiles a round, "
                    f"host {settings['host_ms_per_client']:.2f} ms a client, until round one "
                    f"{settings['setup_seconds']:.1f} s"
                )
                harness.report(records, _OUTPUT.value, baseline="bare", verdicts=found)
    shapes = [
        Shape(clients=int(population), cohort=int(cohort), tile_size=sides[0], **common)
        for population in _POPULATIONS.value
        for cohort in _COHORTS.value
        if int(cohort) <= int(population)
    ]
    if shapes:
        records, found = populations(shapes)
        varied = ("population", "cohort")
        harness.report(records, _OUTPUT.value, varied=varied, verdicts=found)
        for record in records:
            s = record.settings
            print(
                f"population {s['population']}, cohort {s['cohort']}: {s['ms_per_tile']:.2f} ms a "
                f"tile, {s['setup_seconds']:.1f} s until round one, {s['compiles']} compiles after"
            )


if __name__ == "__main__":
    use_huge_pages()
    app.run(main)
