r"""How much memory does ONE variant take, alone in a process?

    python -m benchmarks.memory benchmarks.clipping:alone '{"name": "private", "batch": 8, ...}'

prints the peaks of one variant; `clipping` and `round` call it for theirs. A process never gives
back what it once reached, so variants that share one cannot be told apart.

A variant is a generator function of JSON arguments that yields after each of its phases: first when
all is there that is not to be counted (imports, data), then for instance "compile" and "run". What
is told of a phase is by how much the process was, at most and during that phase, larger than at the
first yield. A phase that is yielded as (name, figures) has its figures told, too.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import pathlib
import resource
import subprocess
import sys
from typing import Any

_STATUS = pathlib.Path("/proc/self/status")
_MARK = "peaks of phases: "


def peaks(variant: str, arguments: dict[str, Any]) -> dict[str, int]:
    """Phase -> bytes above the first yield, of `variant` in a process of its own; see `phases`."""
    return {name: int(found["bytes"]) for name, found in phases(variant, arguments).items()}


def phases(
    variant: str, arguments: dict[str, Any], *, timeout: float = 3600.0
) -> dict[str, dict[str, Any]]:
    """Runs `variant` in a process of its own.

    Args:
        variant: "module:function", a generator function as this module describes.
        arguments: its keyword arguments, of JSON types.
        timeout: seconds after which the process is stopped.

    Returns:
        Phase -> its figures, and "bytes" above the first yield.

    Raises:
        RuntimeError: the process failed; the message ends with what it wrote.
    """
    root = pathlib.Path(__file__).resolve().parents[1]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", variant, json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    line = next((x for x in done.stdout.splitlines() if x.startswith(_MARK)), None)
    if done.returncode or line is None:
        raise RuntimeError(f"{variant} {arguments} failed:\n{done.stderr[-2000:]}")
    return json.loads(line[len(_MARK) :])


def resident_bytes() -> int:
    """What this process holds in memory now; where the system does not tell, its peak."""
    return status_bytes("VmRSS") or peak_bytes()


def peak_bytes() -> int:
    """The most this process held since it began, or since `forget_peak`."""
    # Not ru_maxrss where it can be helped: a child begins with what its parent had.
    if peak := status_bytes("VmHWM"):
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> None:
    """Lets `peak_bytes` begin anew, and gives free memory back; as far as the system can."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def status_bytes(field: str) -> int:
    """A field of this process's status, such as "VmRSS"; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith(f"{field}:"):
                return 1024 * int(line.split()[1])
    return 0


def main(argv: list[str]) -> None:
    """What the child does."""
    module, _, name = argv[1].partition(":")
    running = getattr(importlib.import_module(module), name)(**json.loads(argv[2]))
    next(running)
    forget_peak()
    base, found = resident_bytes(), {}
    for phase in running:
        name, figures = (phase, {}) if isinstance(phase, str) else phase
        found[name] = {"bytes": max(0, peak_bytes() - base), **figures}
        forget_peak()
    print(_MARK + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv)
