"""Which process does the work: one variant on its own cores, for as long as it is asked to.

    echo '{"do": "run"}' | python -m benchmarks.peers.worker SPEC

SPEC is JSON: `factory` ("module:function"), `options` (its keyword arguments), `problem` (a file of
`problem.save`), `part` ([index, count]), `cores` (to be pinned to). Commands come as JSON lines on
standard input, answers leave as JSON lines on standard output. `interleave` is the other end.
"""

import contextlib
import importlib
import json
import os
import pathlib
import sys
import time
from typing import Any, Protocol


class Peer(Protocol):
    """What a factory returns."""

    def step(self) -> None:
        """Works on all its tiles, and returns when that is finished."""
        ...

    def summed(self) -> dict[str, Any]:
        """What must agree over all variants, arrays by the names of our parameters."""
        ...

    def info(self) -> dict[str, Any]:
        """What the record should say beside."""
        ...


class Host:
    """Answers commands with a peer that is made at the first of them."""

    def __init__(self, spec: dict[str, Any]):
        self._spec = spec
        self._peer: Any = None
        self._imported = 0

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """One answer; exceptions are the caller's to report."""
        action = command["do"]
        if action == "prepare":
            return self._prepare()
        if action == "run":
            start = time.perf_counter()
            self._peer.step()
            return {"seconds": time.perf_counter() - start}
        if action == "sum":
            import numpy as np

            np.savez(command["path"], **self._peer.summed())
            return {}
        if action == "peak":
            return {"peak_bytes": self._growth()}
        raise ValueError(f"Unknown command {action!r}.")

    def close(self) -> None:
        """Ends what the peer started, if it started anything."""
        if hasattr(self._peer, "close"):
            self._peer.close()

    def _prepare(self) -> dict[str, Any]:
        from benchmarks.peers import problem as problems

        spec = self._spec
        module, _, name = spec["factory"].partition(":")
        factory = getattr(importlib.import_module(module), name)
        problem = problems.load(spec["problem"]) if spec.get("problem") else None
        if problem is not None and spec["part"][1] > 1:
            problem = problem.part(*spec["part"])
        self._imported, made = resident("VmRSS"), time.perf_counter()
        self._peer = factory(problem, **spec["options"])
        self._peer.step()  # compiles, where that happens on first use
        return {"prepare_seconds": time.perf_counter() - made, **self._peer.info()}

    def _growth(self) -> int:
        """By how much a step's peak is above the process before the peer was made.

        The system's high-water mark also knows what compiling took, so it is reset first.
        """
        with contextlib.suppress(OSError):
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        self._peer.step()
        return resident("VmHWM") - self._imported + self._peer.info().get("children_bytes", 0)


def resident(what: str) -> int:
    """Bytes of this process in memory: now ("VmRSS") or at most ("VmHWM"); 0 if nobody tells."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith(what):
                return 1024 * int(line.split()[1])
    return 0


def main() -> None:
    """Serves until standard input ends."""
    spec = json.loads(sys.argv[1])
    # Before any library asks how many cores there are.
    if spec.get("cores") and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, spec["cores"])
    # What libraries print must not mix with the answers, nor their processes hold the commands.
    commands, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    host = Host(spec)
    for line in commands:
        try:
            answer = host.answer(json.loads(line))
        except Exception as error:  # the parent must hear of it, whatever it is
            import traceback

            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    host.close()


if __name__ == "__main__":
    main()
