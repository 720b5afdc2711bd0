r"""How long until the first round of a run is done, and where does that time go?

    python -m benchmarks.startup --output=benchmarks/results/startup.jsonl
    python -m benchmarks.startup --manifest=data/manifest.csv

Each start is a process of its own: `cold` with nothing remembered, `warm` in a new workdir with
JAX's persistent compilation cache filled, `again` in the workdir of the cold one, whose noise is
calibrated already. Phases: import, data (read and cut, or drawn), calibration, programs (of all of
jax: trace, lower, compile, of which cache is fetching), before_rounds (limits, register, first
validation and pictures; `again` has the last two already, and the rest is in first_round),
first_round. `to_first_step` is from the process's start to the first client's local steps done, and
is what the verdict is about: a round takes as long as its clients are many. `command` is
`experiments.feddp` itself, warm, from its start to the line of round one in its log.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import app, flags

from benchmarks import harness, startup_child
from benchmarks.harness import Record, Verdict
from fedjax_dp.processor import use_huge_pages

_MANIFEST = flags.DEFINE_string(
    "manifest", "", "CSV of images; empty = the synthetic federation.", allow_override=True
)
_PATIENTS = flags.DEFINE_integer("patients_per_site", 20, "Of the synthetic federation.")
_TILE = flags.DEFINE_integer("tile_size", 128, "Side of a tile, pixels.", allow_override=True)
_BASE = flags.DEFINE_integer(
    "base_channels", 16, "Channels of the U-Net's first level.", allow_override=True
)
_DEPTH = flags.DEFINE_integer("depth", 4, "Poolings of the U-Net.", allow_override=True)
_REPEATS = flags.DEFINE_integer("repeats", 1, "Starts of each kind.", allow_override=True)
_OUTPUT = flags.DEFINE_string("output", "", "JSON lines file to append to.", allow_override=True)

ROOT = pathlib.Path(__file__).resolve().parents[1]
WARM = "warm start to first finished step"
WITHOUT_DATA = "the same without reading or drawing tiles"


def start(workdir: pathlib.Path, config: dict[str, Any]) -> dict[str, float]:
    """Seconds of each phase of one start, in a process of its own.

    Raises:
        RuntimeError: the process failed; the message ends with what it wrote.
    """
    begun = time.time()
    done = subprocess.run(
        [
            sys.executable, "-m", "benchmarks.startup_child",
            json.dumps({"begun": begun, "workdir": str(workdir), "config": config}),
        ],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    mark = startup_child.MARK
    line = next((x for x in done.stdout.splitlines() if x.startswith(mark)), None)
    if done.returncode or line is None:
        raise RuntimeError(f"The start failed:\n{done.stderr[-2000:]}")
    return json.loads(line[len(mark) :])


def command(workdir: pathlib.Path, config: dict[str, Any], *, timeout: float = 900.0) -> float:
    """Seconds from the start of `experiments.feddp` to the line of round one in its log.

    Raises:
        RuntimeError: it ended, or `timeout` seconds passed, before that line came.
    """
    given = [f"--config.{name}={value}" for name, value in config.items()]
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.feddp", f"--workdir={workdir}", *given],
            stdout=subprocess.DEVNULL, stderr=errors, cwd=ROOT, env=dict(os.environ),
        )  # fmt: skip
        log = workdir / "metrics.jsonl"
        try:
            while time.perf_counter() - begun < timeout:
                ended = process.poll() is not None
                if log.exists() and len(log.read_bytes().splitlines()) >= 2:
                    return time.perf_counter() - begun
                if ended:
                    break
                time.sleep(0.01)
            errors.seek(0)
            raise RuntimeError(f"No round was done:\n{errors.read()[-2000:].decode()}")
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def measure(config: dict[str, Any], *, repeats: int) -> tuple[list[Record], list[Verdict]]:
    """A record of each phase of each kind of start.

    Args:
        config: dotted names of `fedjax_dp.config.Config` and their values.
        repeats: starts of each kind; cold ones always have a cache of their own.
    """
    found: dict[tuple[str, str], list[float]] = {}
    commands = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(repeats):
            folder = pathlib.Path(scratch) / str(number)
            given = config | {"execution.compilation_cache": str(folder / "compiled")}
            for kind, run in (("cold", "first"), ("warm", "second"), ("again", "first")):
                for phase, value in start(folder / run / "run", given).items():
                    found.setdefault((kind, phase), []).append(value)
            commands.append(command(folder / "third" / "run", given))
    counts = ("compiles", "tiles")
    settings = config | {name: found[("warm", name)][0] for name in counts}
    records = [
        harness.summary("startup", f"{kind}/{phase}", values, settings)
        for (kind, phase), values in found.items()
        if phase not in counts
    ]
    records.append(harness.summary("startup", "command", commands, settings))
    whole = next(r.seconds for r in records if r.name == "warm/to_first_step")
    data = next(r.seconds for r in records if r.name == "warm/data")
    bounds = {"floor": 15, "aim": 8, "is_at_most": True, "unit": "s"}
    return records, [Verdict(WARM, whole, **bounds), Verdict(WITHOUT_DATA, whole - data, **bounds)]


def main(argv: list[str]) -> None:
    """Measures and reports."""
    del argv
    config: dict[str, Any] = {
        "data.tile_size": _TILE.value,
        "model.base_channels": _BASE.value,
        "model.depth": _DEPTH.value,
    }
    if _MANIFEST.value:
        config["data.manifest"] = str(pathlib.Path(_MANIFEST.value).resolve())
    else:
        config["data.patients_per_site"] = _PATIENTS.value
    records, verdicts = measure(config, repeats=_REPEATS.value)
    # The file's place is nobody's business.
    named = pathlib.Path(_MANIFEST.value).name if _MANIFEST.value else ""
    for record in records:
        if named:
            record.settings["data.manifest"] = named
    harness.report(records, _OUTPUT.value, verdicts=verdicts)


if __name__ == "__main__":
    use_huge_pages()
    app.run(main)
