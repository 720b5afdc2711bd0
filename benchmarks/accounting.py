r"""What does the epsilon of every client cost after each round, and what calibration?

    python -m benchmarks.accounting --output=benchmarks/results/accounting.jsonl

Hospitals of unlike size, dp_sgd, privacy loss distributions. `epsilon_first` is the first answer of
a process, which builds each hospital's distribution; `epsilon_round` is what training asks after
every later round: a number of rounds nobody asked for before, from distributions that are there.
`event_truncated` and `event_poisson` build one distribution of a step with and without the capacity
that a real draw has. The rest is asked once a run: `calibration` (and `calibration_cached`, from
the folder where a run keeps answers), `rounds_allowed` (and `rounds_allowed_calibrated`, which
looks first where the noise was calibrated for). Each is timed with nothing remembered, as in a new
process.
"""

import dataclasses
import functools
import gc
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import app, flags
from dp_accounting import dp_event

from benchmarks import harness
from benchmarks.harness import Record, Verdict
from fedjax_dp.privacy import accounting
from fedjax_dp.privacy.budgets import make_mechanisms
from fedjax_dp.privacy.mechanism import Mechanism

_CLIENTS = flags.DEFINE_list(
    "clients", ["6", "24", "48"], "Hospitals of unlike size.", allow_override=True
)
_ROUNDS = flags.DEFINE_integer("rounds", 100, "Rounds of the run.", allow_override=True)
_BATCH = flags.DEFINE_float(
    "expected_batch_size", 16.0, "Units of a step, on average.", allow_override=True
)
_EPSILON = flags.DEFINE_float("epsilon", 8.0, "Budget of the run.", allow_override=True)
_DELTA = flags.DEFINE_float("delta", 1e-5, "At which epsilon is stated.", allow_override=True)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed repeats.", allow_override=True)
_OUTPUT = flags.DEFINE_string("output", "", "JSON lines file to append to.", allow_override=True)

EACH_ROUND = "epsilon of all clients after each round"


def hospitals(num_clients: int) -> dict[str, int]:
    """Names and sizes, all unlike, from 40 to 400 patients."""
    sizes = np.linspace(40, 400, num_clients).round().astype(int)
    return {f"hospital {i}": int(size) for i, size in enumerate(sizes)}


def forget() -> None:
    """Empties every cache of `functools` in the package, so that a call is as in a new process."""
    for thing in gc.get_objects():
        if isinstance(thing, functools._lru_cache_wrapper):
            module = getattr(thing, "__module__", None) or ""
            if module.startswith("fedjax_dp"):
                thing.cache_clear()


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(
    num_clients: int,
    *,
    rounds: int,
    expected_batch_size: float,
    epsilon: float,
    delta: float,
    repeats: int,
) -> tuple[list[Record], list[Verdict]]:
    """All measures of one federation."""
    settings: dict[str, Any] = {
        "clients": num_clients, "rounds": rounds, "expected_batch_size": expected_batch_size,
        "epsilon": epsilon, "delta": delta,
    }  # fmt: skip
    sizes = hospitals(num_clients)

    def make(cache_dir: str | None, **noise: float) -> list[Mechanism]:
        made = make_mechanisms(
            sizes, placement="dp_sgd", unit="patient", expected_batch_size=expected_batch_size,
            local_steps=1, rounds=rounds, l2_clip_norm=1.0, target_delta=delta,
            cache_dir=cache_dir, **noise,
        )  # fmt: skip
        return list(made.mechanisms.values())

    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as cache_dir:
        forget()
        times["calibration"] = [timed(lambda: make(cache_dir, target_epsilon=epsilon))]
        forget()
        times["calibration_cached"] = [timed(lambda: make(cache_dir, target_epsilon=epsilon))]
        mechanisms = make(cache_dir, target_epsilon=epsilon)

    def after(done: int) -> float:
        return max(m.epsilon(done, delta) for m in mechanisms)

    forget()
    times["epsilon_first"] = [timed(lambda: after(1))]
    # Late rounds cost more than early ones: spread over the run.
    asked = np.unique(np.linspace(2, rounds, max(2, 3 * repeats)).astype(int))
    times["epsilon_round"] = [timed(lambda done=int(done): after(done)) for done in asked]
    last = mechanisms[-1]
    forget()
    times["rounds_allowed"] = [timed(lambda: last.max_rounds(epsilon, delta))]
    forget()
    calibrated = timed(lambda: last.max_rounds(epsilon, delta, start=rounds))
    times["rounds_allowed_calibrated"] = [calibrated]
    for name, event in events(last).items():
        times[name] = []
        for _ in range(repeats):
            forget()
            times[name].append(timed(lambda e=event: accounting.epsilon(e, 1, delta)))
    forget()
    records = [harness.summary("accounting", name, t, settings) for name, t in times.items()]
    for index, record in enumerate(records):
        if record.name == "epsilon_round":
            more = record.settings | {
                "worst_ms": 1e3 * max(times["epsilon_round"]),
                "ms_per_client": 1e3 * record.seconds / num_clients,
            }
            records[index] = dataclasses.replace(record, settings=more)
    found = []
    if num_clients <= 6:
        value = 1e3 * next(r.seconds for r in records if r.name == "epsilon_round")
        of = f", {num_clients} clients"
        found = [Verdict(EACH_ROUND + of, value, 150, 20, is_at_most=True, unit="ms")]
    return records, found


def events(m: Mechanism) -> dict[str, dp_event.DpEvent]:
    """A step as it is accounted, and as it would be if a draw were never cut."""
    truncated = m.headline.event
    assert truncated is not None  # dp_sgd has one
    plain = dp_event.PoissonSampledDpEvent(
        m.sampling_prob, dp_event.GaussianDpEvent(m.noise_multiplier)
    )
    return {"event_truncated": truncated, "event_poisson": plain}


def main(argv: list[str]) -> None:
    """Measures and reports."""
    del argv
    for clients in _CLIENTS.value:
        records, found = measure(
            int(clients),
            rounds=_ROUNDS.value,
            expected_batch_size=_BATCH.value,
            epsilon=_EPSILON.value,
            delta=_DELTA.value,
            repeats=_REPEATS.value,
        )
        print(f"\n{clients} hospitals")
        harness.report(records, _OUTPUT.value, verdicts=found)


if __name__ == "__main__":
    app.run(main)
