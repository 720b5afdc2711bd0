"""What were the numbers measured on, and what can it do at most?

    python -m benchmarks.machine

prints processor, versions and the measured peak of float32 matrix products, which GFLOP/s of the
other benchmarks are to be held against.
"""

import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

from fedjax_dp.processor import cores
from fedjax_dp.workdir import versions


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
        "cores": cores(),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "device": f"{device.platform} {device.device_kind}",
        "load_average": os.getloadavg()[0],
        **versions(),
    }


def matrix_peak(size: int = 2048, seconds: float = 2.0) -> float:
    """GFLOP/s of a product of two float32 matrices of `size`, on all cores; the best of many.

    The best, not the median: it stands for what the machine can do, and others only take from it.
    On accelerators the precision is the backend's default, as it is in training.
    """
    matrix = jnp.ones((size, size), jnp.float32)
    multiply = jax.jit(lambda a, b: a @ b)
    multiply(matrix, matrix).block_until_ready()
    best, end = np.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        multiply(matrix, matrix).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2e-9 * size**3 / best


def flops_of(function: Callable[..., Any], *arguments: Any) -> float:
    """Floating-point operations of one call, as XLA counts them before it optimises.

    Only of what has no loop worth mentioning: of a while loop XLA counts the body once. So count
    one unit's gradient, and multiply by the units. Counted before optimisation, because what a
    backend hands to a library counts as nothing after it.
    """
    return float(jax.jit(function).lower(*arguments).cost_analysis()["flops"])


_EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
    "/jax/compilation_cache/cache_retrieval_time_sec": "cache",
}


class CompileLog:
    """What jax told while it was watched: kind of event -> seconds of each.

    Kinds: "trace", "lower", "compile" (by the backend, or fetched from the persistent cache) and
    "cache" (the part of "compile" that is fetching).
    """

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {kind: [] for kind in _EVENTS.values()}

    def __call__(self, event: str, duration: float, **_: Any) -> None:
        """Notes one event."""
        if event in _EVENTS:
            self.seconds[_EVENTS[event]].append(duration)

    @property
    def compiles(self) -> int:
        """Programs that the backend compiled or the cache gave."""
        return len(self.seconds["compile"])

    def total(self, kind: str) -> float:
        """Seconds of all events of a kind."""
        return sum(self.seconds[kind])


@contextmanager
def compile_log() -> Iterator[CompileLog]:
    """Watches what jax traces and compiles within the context."""
    log = CompileLog()
    jax.monitoring.register_event_duration_secs_listener(log)
    try:
        yield log
    finally:
        jax.monitoring.unregister_event_duration_listener(log)


def main(argv: list[str]) -> None:
    """Prints the machine and its peak."""
    del argv
    print(json.dumps({**machine(), "matrix_gflops": round(matrix_peak(), 1)}, indent=1))


if __name__ == "__main__":
    app.run(main)
