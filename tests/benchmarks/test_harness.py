"""What the numbers of `benchmarks` rest on: medians of interleaved calls, peaks of one process."""

import importlib
import json
import pathlib
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

import benchmarks
from benchmarks import harness, machine, memory
from benchmarks.harness import Variant, Verdict

FOLDER = pathlib.Path(benchmarks.__file__).parent
MODULES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem[0] != "_")


@pytest.mark.parametrize("order", [MODULES, MODULES[::-1]], ids=["forwards", "backwards"])
def test_benchmarks_and_experiments_can_be_imported_side_by_side(order):
    experiments = sorted(path.stem for path in pathlib.Path("experiments").glob("*.py"))
    names = [f"benchmarks.{name}" for name in order]
    names += [f"experiments.{name}" for name in experiments if name[0] != "_"]
    program = "\n".join(["import importlib", *(f"importlib.import_module({n!r})" for n in names)])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", MODULES)
def test_each_begins_with_the_question_it_answers_and_its_command(name):
    doc = importlib.import_module(f"benchmarks.{name}").__doc__
    assert "?" in doc.split("\n\n")[0]
    assert "    python -m benchmarks." in doc


# --- timing


def test_calls_alternate_and_every_other_turn_runs_backwards():
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    seconds = harness.interleaved(calls, repeats=3)
    assert "".join(called) == "abc" + "abc" + "cba" + "abc"
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abc", 3)


def test_the_warm_up_is_not_timed():
    waits = iter([0.2, 0.0, 0.0])
    seconds = harness.interleaved({"a": lambda: time.sleep(next(waits))}, repeats=2)
    assert max(seconds["a"]) < 0.1


def test_a_slow_moment_does_not_move_the_median():
    record = harness.summary("b", "n", [1.0, 1.0, 1.0, 1.0, 50.0], {}, tiles=4)
    assert (record.seconds_low, record.seconds, record.seconds_high) == (1.0, 1.0, 1.0)
    assert record.tiles_per_second == 4.0
    assert harness.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert harness.quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_measure_waits_for_the_result_and_tells_variants_apart():
    matrix = jnp.ones((400, 400))

    def products(a, times):
        for _ in range(times):
            a = a @ matrix / 400
        return a

    records = harness.measure(
        "b",
        {
            "one": (lambda a: products(a, 1), (matrix,)),
            "forty": Variant(
                lambda a: products(a, 40), (matrix,), tiles=3, flops=40 * 2 * 400**3,
                settings={"times": 40}, name="many",
            ),
        },
        tiles=1, settings={"times": 1}, repeats=5,
    )  # fmt: skip
    one, many = records
    assert (one.name, many.name) == ("one", "many")
    assert many.seconds > 5 * one.seconds
    assert many.settings["times"] == 40
    assert many.tiles_per_second == pytest.approx(3 / many.seconds)
    assert many.gflops == pytest.approx(1e-9 * 40 * 2 * 400**3 / many.seconds)
    assert one.gflops is None
    assert one.compile_seconds > 0
    assert one.peak_bytes >= 0


def test_temporary_bytes_are_those_of_the_program():
    def outer(a):
        return jnp.sum(jnp.sort(a[:, None] * a[None, :], axis=0))

    small, large = (
        harness.measure("b", {"x": (outer, (jnp.ones(n),))}, settings={}, repeats=1)[0]
        for n in (500, 1000)
    )
    assert large.peak_bytes >= 4 * 1000**2
    assert large.peak_bytes == pytest.approx(4 * small.peak_bytes, rel=0.05)


@pytest.mark.parametrize(
    ("value", "outcome"), [(0.97, "aim reached"), (0.9, "floor reached"), (0.89, "BELOW FLOOR")]
)
def test_verdicts_know_their_direction(value, outcome):
    assert Verdict("m", value, 0.9, 0.95).outcome == outcome
    assert Verdict("m", 1 / value, 1 / 0.9, 1 / 0.95, is_at_most=True).outcome == outcome


def test_records_are_lines_with_machine_and_verdicts(tmp_path, capsys):
    path = tmp_path / "results" / "b.jsonl"
    records = [
        harness.summary("b", name, [seconds], {"k": k})
        for name, seconds, k in (("base", 2.0, 1), ("other", 1.0, 2))
    ]
    for _ in range(2):  # it appends
        harness.report(
            records, str(path), baseline="base", varied=("k",),
            verdicts=[Verdict("measure", 1.0, 0.9, 2.0)],
        )  # fmt: skip
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["name"] for line in lines] == ["base", "other"] * 2
    for line in lines:
        assert {"benchmark", "name", "tiles_per_second", "peak_bytes", "compile_seconds"} <= set(
            line
        )
        assert line["machine"]["jax"]
        assert line["machine"]["cores"] >= 1
        assert line["verdicts"][0]["outcome"] == "floor reached"
    shown = capsys.readouterr().out
    assert "other k=2" in shown
    assert "0.500" in shown
    assert "floor reached" in shown


# --- the machine


def test_operations_of_a_matrix_product_are_counted():
    a, b = jnp.ones((30, 40)), jnp.ones((40, 50))
    assert machine.flops_of(jnp.matmul, a, b) == 2 * 30 * 40 * 50


def test_no_program_is_faster_than_the_peak():
    assert 0.1 < machine.matrix_peak(256, 0.2) < 1e6


def test_compilations_are_seen_while_watched():
    with machine.compile_log() as log:
        function = machine.jax.jit(lambda x: x * 3 + np.float32(1.25))
        function(jnp.ones(7))
        first = log.compiles
        function(jnp.ones(7))
        assert log.compiles == first >= 1
        function(jnp.ones(8))
        assert log.compiles > first
    seen = log.compiles
    function(jnp.ones(9))
    assert log.compiles == seen


# --- memory of a process


def allocates(*, megabytes):
    """A variant: what is there before the first yield is not counted."""
    kept = [np.ones(50 * 2**20 // 8)]
    yield "data"
    held = np.ones(megabytes * 2**20 // 8)
    kept.append(held[:1].copy())
    del held  # the peak remembers
    yield "run"
    yield ("rest", {"figure": 3})


def fails():
    yield "data"
    raise ValueError("because")


@pytest.fixture
def here(monkeypatch):
    """Name of this module for a process of its own, which then can import it."""
    folder = pathlib.Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return pathlib.Path(__file__).stem


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_variant_that_allocates_200_mb_more_shows(here):
    small, large = (
        memory.phases(f"{here}:allocates", {"megabytes": m}) for m in (10, 210)
    )  # fmt: skip
    more = large["run"]["bytes"] - small["run"]["bytes"]
    assert more == pytest.approx(200 * 2**20, rel=0.05)
    assert small["run"]["bytes"] < 20 * 2**20
    # What the phase before it reached is forgotten.
    assert large["rest"]["bytes"] < 100 * 2**20
    assert large["rest"]["figure"] == 3


def test_a_failing_variant_says_why(here):
    with pytest.raises(RuntimeError, match="because"):
        memory.peaks(f"{here}:fails", {})
