"""The processes of one run on this machine: started together, watched, and ended together.

The parent never imports jax: it starts the same command once a process, shares the cores out among
them, and says which one died.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

COORDINATOR = "FEDJAX_DP_COORDINATOR"
NUM_PROCESSES = "FEDJAX_DP_NUM_PROCESSES"
PROCESS_ID = "FEDJAX_DP_PROCESS_ID"
"""Environment of each process: host:port of the first, how many there are, which this is, from 0.
Set by hand on every machine, they start a run over several."""

EXIT_DIED = 1
_GRACE_SECONDS = 15.0


def from_environment() -> tuple[str, int, int] | None:
    """Coordinator, number and index of this process; None where it is not one of several.

    Raises:
        ValueError: only some of the three variables are set, or one is no number.
    """
    given = {name: os.environ.get(name, "") for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID)}
    if not any(given.values()):
        return None
    if not (all(given.values()) and given[NUM_PROCESSES].isdigit() and given[PROCESS_ID].isdigit()):
        raise ValueError(
            f"Expected {COORDINATOR} like host:port, {NUM_PROCESSES} and {PROCESS_ID} as numbers, "
            f"or none of the three, got {given}."
        )
    return given[COORDINATOR], int(given[NUM_PROCESSES]), int(given[PROCESS_ID])


def run_processes(command: Sequence[str], count: int) -> int:
    """Runs `command` in `count` processes; returns the exit code of the first, which leads.

    Where another process ends before the leader, all are ended, and the code is `EXIT_DIED`.
    Ctrl-C reaches the leader, which stops after the clients at work.

    Args:
        command: program and arguments.
        count: processes, at least 2.
    """
    environment = {
        **os.environ,
        COORDINATOR: f"127.0.0.1:{_free_port()}",
        NUM_PROCESSES: str(count),
    }
    children: list[subprocess.Popen] = []
    # A terminal sends Ctrl-C to every process of the group; the leader alone acts on it.

    def pass_on(number: int, frame: Any) -> None:
        del frame
        if children:
            children[0].send_signal(number)

    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on),
    }
    try:
        for index, cores in enumerate(_shares(count)):
            own = {PROCESS_ID: str(index)}
            if cores:
                # With a single thread XLA's compiler waits for itself as soon as it shares a mesh.
                own["NPROC"] = str(max(len(cores), 2))
            child = subprocess.Popen(command, env={**environment, **own})
            children.append(child)
            if cores:
                os.sched_setaffinity(child.pid, cores)  # before it can ask how many it has
        return _watch(children)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(children: Sequence[subprocess.Popen]) -> int:
    """Waits for the leader, or for the first that dies."""
    while all(child.poll() is None for child in children):
        time.sleep(0.05)
    leader = children[0]
    deadline = time.monotonic() + _GRACE_SECONDS
    # The death of one breaks the others within moments: whom a signal killed was the first.
    while time.monotonic() < deadline and any(child.poll() is None for child in children):
        time.sleep(0.05)
    codes = {index: code for index, child in enumerate(children) if (code := child.poll())}
    killed = [index for index, code in codes.items() if code < 0]
    failed = [index for index in codes if index > 0]
    if not killed and leader.returncode is not None and (leader.returncode or not failed):
        return leader.returncode
    index = (killed or failed)[0]
    code = codes[index]
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    print(
        f"Process {index} of {len(children)} {how}; the others were stopped. The last checkpoint "
        "is whole, and the same command goes on from it, with any number of processes.",
        file=sys.stderr,
    )
    return EXIT_DIED


def _shares(count: int) -> list[set[int]]:
    """The cores of each process; empty sets where there are fewer cores than processes."""
    if not hasattr(os, "sched_getaffinity"):
        return [set() for _ in range(count)]
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < count:
        return [set() for _ in range(count)]
    return [set(cores[index::count]) for index in range(count)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
