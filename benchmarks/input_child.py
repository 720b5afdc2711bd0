r"""Where does the time of rounds over a store on disk go? One variant, alone in a process.

    python -m benchmarks.input_child '{"folder": "/tmp/store", "pool": "packed", ...}'

is what `benchmarks.input_pipeline` starts. It runs a private federation over a store on disk, says
"ready" after its first round, and then, for each line that it reads, runs a block of rounds and
tells where its time went. So several processes can take turns, each with memory of its own.
"""

import contextlib
import dataclasses
import json
import mmap
import os
import pathlib
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from benchmarks import memory
from benchmarks.machine import CompileLog, compile_log
from fedjax_dp import training
from fedjax_dp.assembly import programs
from fedjax_dp.assembly.programs import Programs
from fedjax_dp.config import Config
from fedjax_dp.data.federation import Federation
from fedjax_dp.data.tiles import TileTable, concatenate
from fedjax_dp.federated import cohort, rounds
from fedjax_dp.federated.rounds import ChunkInput, RoundInput
from fedjax_dp.reporting.log import MetricsLog

MARK = "input child: "


class _Enough(Exception):  # noqa: N818, it is no error
    """Ends a run of which nothing more is asked."""


@dataclasses.dataclass
class Meter:
    """Where the time of a run goes, seconds; the clocks only run on.

    Attributes:
        waits: of each chunk, how long the loop of the devices waited for the planning thread, and
            whether the devices had nothing else to do when it came.
        cpu: CPU seconds by what they were spent on: "planning" (the whole planning thread, packing
            included), "packing" alone, "placing" (from the host's memory to the devices').
    """

    waits: list[tuple[float, bool]] = dataclasses.field(default_factory=list)
    cpu: dict[str, float] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(("planning", "packing", "placing"), 0.0)
    )
    _at_work: list[Any] = dataclasses.field(default_factory=list)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose CPU seconds in the calling thread count as `name`."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.cpu[name] += time.thread_time() - start

        return wrapped

    def compile_programs(self, *args: Any) -> Programs:
        """`programs.compile_programs`, whose `visit` shows what it is at work on."""
        made = programs.compile_programs(*args)

        def visit(*args: Any) -> Any:
            results = made.visit(*args)
            self._at_work = jax.tree.leaves(results[2])
            return results

        return made._replace(visit=visit)

    def ahead(
        self, make: Callable[[int], RoundInput | None], first: int, last: int
    ) -> Generator[RoundInput, None, None]:
        """`rounds.ahead`, watched from both its threads."""

        def planned(index: int) -> RoundInput | None:
            made = self.timed("planning", make)(index)
            if made is None:
                return None
            step = self.timed("planning", lambda chunks: next(chunks, None))
            return made._replace(chunks=iter(lambda: step(made.chunks), None))

        coming = rounds.ahead(planned, first, last)
        try:
            while True:
                start = time.perf_counter()
                if (made := next(coming, None)) is None:
                    return
                wait = time.perf_counter() - start
                yield made._replace(chunks=self._awaited(made.chunks, wait))
        finally:
            coming.close()

    def _awaited(self, chunks: Iterator[ChunkInput], wait: float) -> Iterator[ChunkInput]:
        while True:
            start = time.perf_counter()
            if (chunk := next(chunks, None)) is None:
                return
            # The first chunk of a round also waited for the round.
            is_idle = all(leaf.is_ready() for leaf in self._at_work)
            self.waits.append((wait + time.perf_counter() - start, is_idle))
            wait = 0.0
            yield chunk


class Store:
    """Tiles in two files, mapped and not read.

    Attributes:
        table: whose arrays are the mapped files.
    """

    def __init__(self, folder: pathlib.Path, shape: tuple[int, int], clients: int, own: int):
        """Maps the files.

        Args:
            folder: holds "images" and "labels".
            shape: number of tiles and their side, pixels.
            clients: sites.
            own: tiles of a patient.
        """
        tiles, side = shape
        self._files = [(folder / name).open("rb") for name in ("images", "labels")]
        self._maps = [mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ) for f in self._files]
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_RANDOM)  # a page's neighbours belong to tiles not drawn
        images, labels = (np.frombuffer(mapped, np.uint8) for mapped in self._maps)
        patient = (np.arange(tiles) // own).astype(np.int32)
        site = (patient * clients // (patient[-1] + 1)).astype(np.int32)
        self.table = TileTable(
            images=images.reshape(tiles, side, side, 3),
            labels=labels.reshape(tiles, side, side),
            site=site,
            slide=patient,
            patient=patient,
            sites=tuple(f"site {i}" for i in range(clients)),
            slides=tuple(f"slide {i}" for i in range(patient[-1] + 1)),
            patients=tuple(f"patient {i}" for i in range(patient[-1] + 1)),
        )

    def forget(self) -> None:
        """Gives the files' pages back, and asks the system's cache to forget them."""
        for mapped, file in zip(self._maps, self._files, strict=True):
            mapped.madvise(mmap.MADV_DONTNEED)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bound_memory(given: int) -> None:
    """Lets the process's own memory grow by `given` bytes, and no further; 0 does not bound it.

    Bounded is what the process writes to: heap, anonymous maps, the stacks of its threads
    (RLIMIT_DATA). Pages of files that are only read are not: they are the system's, which takes
    them back when it needs them.
    """
    if given:
        limit = memory.status_bytes("VmData") + given
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def in_memory(array: np.ndarray) -> np.ndarray:
    """A copy that begins with a page: on CPU the devices then read it where it lies."""
    # Private: a shared map would not count among the process's own memory.
    pages = mmap.mmap(-1, array.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    copy = np.frombuffer(pages, np.uint8).reshape(array.shape)
    np.copyto(copy, array)
    return copy


@dataclasses.dataclass
class Turns:
    """A block of rounds for each line of the input.

    Attributes:
        meter: of the run.
        compiled: programs of the run.
        store: whose files are forgotten before each block.
        rounds: of a block.
        base: bytes of the process before the run.
    """

    meter: Meter
    compiled: CompileLog
    store: Store
    rounds: int
    base: int
    _tiles: int = 0
    _before: dict[str, float] = dataclasses.field(default_factory=dict)

    def logged(self, line: dict[str, Any]) -> None:
        """To be called when a round is in the log."""
        if line["round"] == 0:
            return
        if line["round"] == 1:  # compiled, and caches are filled
            self.store.forget()  # all of it was read, for its fingerprint
            memory.forget_peak()
            self._tell({})
            self._begin()
            return
        self._tiles += line["nonprivate"]["tiles"]
        if (line["round"] - 1) % self.rounds:
            return
        spent = {name: now - self._before[name] for name, now in self._clocks().items()}
        self._tell(
            {
                "tiles": self._tiles,
                # Until the queue is full, chunks were made in the pause before the block.
                "waits": self.meter.waits[2:],
                "peak_bytes": memory.peak_bytes() - self.base,
                "own_bytes": memory.status_bytes("RssAnon"),
                **spent,
            }
        )
        self._begin()

    def _clocks(self) -> dict[str, float]:
        return {
            "seconds": time.perf_counter(),
            "process_cpu": time.process_time(),
            "compiles": self.compiled.compiles,
            **{f"{name}_cpu": now for name, now in self.meter.cpu.items()},
        }

    def _begin(self) -> None:
        """Waits for the next line, then starts the clocks."""
        if not sys.stdin.readline():
            raise _Enough
        self.store.forget()
        self.meter.waits.clear()
        self._tiles, self._before = 0, self._clocks()

    def _tell(self, found: dict[str, Any]) -> None:
        print(MARK + json.dumps(found), flush=True)


def run(config: Config, federation: Federation, store: Store, *, rounds_: int, base: int) -> None:
    """Runs `training.run` for as long as there are lines to read."""
    meter, append = Meter(), MetricsLog.append
    with contextlib.ExitStack() as stack:
        turns = Turns(meter, stack.enter_context(compile_log()), store, rounds_, base)

        def appended(log: MetricsLog, line: dict[str, Any]) -> None:
            append(log, line)
            turns.logged(line)

        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for owner, name, watched in (
            (training, "ahead", meter.ahead),
            (training, "compile_programs", meter.compile_programs),
            (rounds, "pack", meter.timed("packing", rounds.pack)),
            (cohort, "place", meter.timed("placing", cohort.place)),
            (MetricsLog, "append", appended),
        ):
            stack.enter_context(mock.patch.object(owner, name, watched))
        stack.enter_context(contextlib.suppress(_Enough))
        training.run(config, pathlib.Path(folder) / "run", federation=federation, progress=False)


def main(argv: list[str]) -> None:
    """What the child does."""
    given = json.loads(argv[1])
    logging.set_verbosity(logging.WARNING)
    config = Config(**{k: v for k, v in given["config"].items() if not isinstance(v, dict)})
    for section, values in given["config"].items():
        if isinstance(values, dict):
            vars(getattr(config, section)).update(values)
    side = config.data.tile_size
    store = Store(
        pathlib.Path(given["folder"]), (given["tiles"], side), given["clients"], given["own"]
    )
    jnp.zeros(1).block_until_ready()
    memory.forget_peak()
    base = memory.resident_bytes()
    bound_memory(given["given_bytes"])
    table = store.table
    if config.execution.pool == "resident":  # as it lies where there is memory for all
        images, labels = in_memory(table.images), in_memory(table.labels)
        table = dataclasses.replace(table, images=images, labels=labels)
    none = concatenate([], [], side)
    federation = Federation(
        name="random pixels", class_names=("background", "nucleus"), train=table,
        validation=none, test=none, external=none, is_public=True,
    )  # fmt: skip
    run(config, federation, store, rounds_=given["rounds"], base=base)


if __name__ == "__main__":
    main(sys.argv)
