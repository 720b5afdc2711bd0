"""How do you time libraries that cannot share a process? In turn, each in a process that waits.

    python -m benchmarks.peers.clipping

Every variant lives in one or two worker processes pinned to their cores. The parent asks one
variant at a time for one repeat, round after round, so that a slow minute hurts all alike. Where a
variant has two processes they work at the same time, and the slower one counts.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.peers import problem as problems
from fedjax_dp.processor import wanted_environment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to do the work.

    Attributes:
        name: of the library or kind; the best variant of a name stands for it.
        label: how it differs from others of its name.
        factory: "module:function" that makes a `worker.Peer`.
        options: keyword arguments of the factory.
        processes: processes that share the batch, and the cores.
        environment: variables of the processes.
    """

    name: str
    label: str
    factory: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    processes: int = 1
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def title(self) -> str:
        """Name and label."""
        return f"{self.name}: {self.label}"


class WorkerError(RuntimeError):
    """A worker could not do what it was asked."""


class Running:
    """The processes of one variant, ready to work.

    Attributes:
        variant: what runs.
        info: what the workers said when they were prepared, the first one's; compile time and
            memory of the first.
        seconds: all timed repeats.
    """

    def __init__(self, variant: Variant, problem_path: pathlib.Path | None, cores: Sequence[int]):
        """Starts and prepares the processes.

        Raises:
            WorkerError: one of them fails.
        """
        self.variant, self.seconds = variant, []
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        threads = len(cores) // variant.processes
        environment = {
            **os.environ,
            **{name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")},
            "JAX_PLATFORMS": "cpu",
            **wanted_environment(),
            **variant.environment,
        }
        self._workers = []
        for index in range(variant.processes):
            spec = {
                "factory": variant.factory,
                "options": dict(variant.options),
                "problem": str(problem_path or ""),
                "part": [index, variant.processes],
                "cores": list(cores[index * threads : (index + 1) * threads]),
            }
            self._workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.peers.worker", json.dumps(spec)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._log,
                    env=environment,
                    text=True,
                )
            )
        try:
            self.info = self.ask({"do": "prepare"})[0]
        except WorkerError:
            self.stop()
            raise

    def ask(self, *commands: dict[str, Any]) -> list[dict[str, Any]]:
        """One command for all processes, or one for each; they work at the same time."""
        each = commands if len(commands) > 1 else commands * len(self._workers)
        with contextlib.suppress(BrokenPipeError):  # its answer is missing then
            for worker, command in zip(self._workers, each, strict=True):
                worker.stdin.write(json.dumps(command) + "\n")
                worker.stdin.flush()
        answers = []
        for worker in self._workers:
            line = worker.stdout.readline()
            answers.append(json.loads(line) if line else {"error": "the process died"})
        if errors := [a["error"] for a in answers if "error" in a]:
            raise WorkerError(f"{self.variant.title}: {errors[0]}\n{self._last_lines()}")
        return answers

    def repeat(self) -> float:
        """One timed repeat after an untimed one; of several processes the slower.

        What other libraries left in caches and pages would else be this one's to pay for.
        """
        self.ask({"do": "run"})
        self.seconds.append(max(answer["seconds"] for answer in self.ask({"do": "run"})))
        return self.seconds[-1]

    def summed(self) -> problems.Flat:
        """The sum over the parts of what must agree."""
        with tempfile.TemporaryDirectory() as folder:
            paths = [f"{folder}/{index}.npz" for index in range(len(self._workers))]
            self.ask(*({"do": "sum", "path": path} for path in paths))
            parts = []
            for path in paths:
                with np.load(path) as file:
                    parts.append({name: file[name] for name in file.files})
        return {name: sum(part[name] for part in parts) for name in parts[0]}

    def peak_bytes(self) -> int:
        """The most memory its processes held, together."""
        return sum(answer["peak_bytes"] for answer in self.ask({"do": "peak"}))

    def stop(self) -> None:
        """Ends the processes."""
        for worker in self._workers:
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.close()
        for worker in self._workers:
            try:
                worker.wait(timeout=120)  # it may have processes of its own to end
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
            worker.stdout.close()
        self._log.close()

    def _last_lines(self, count: int = 8) -> str:
        self._log.seek(0)
        return "".join(self._log.readlines()[-count:])


@contextlib.contextmanager
def started(
    variant: Variant, problem_path: pathlib.Path | None, cores: Sequence[int]
) -> Iterator[Running]:
    """`Running`, stopped at the end."""
    running = Running(variant, problem_path, cores)
    try:
        yield running
    finally:
        running.stop()


def take_turns(runs: Sequence[Running], repeats: int) -> None:
    """`repeats` timed repeats of each, alternating."""
    for _ in range(repeats):
        for running in runs:
            running.repeat()


def first_cores(count: int) -> list[int]:
    """Cores this process may use, the first `count`.

    Raises:
        ValueError: there are fewer.
    """
    allowed = getattr(os, "sched_getaffinity", None)
    cores = sorted(allowed(0)) if allowed else list(range(os.cpu_count() or 1))
    if len(cores) < count:
        raise ValueError(f"Expected at least --cores={count} cores, got {len(cores)}.")
    return cores[:count]
