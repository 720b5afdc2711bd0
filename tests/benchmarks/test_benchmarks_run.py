"""Every benchmark runs, tiny, and writes records that can be read and believed."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import accounting, clipping, input_pipeline, machine, round, startup
from fedjax_dp.privacy import pld

KEYS = {"benchmark", "name", "tiles_per_second", "peak_bytes", "compile_seconds", "settings"}
TINY = clipping.Setup(tile_size=16, base_channels=8, depth=1)
SHAPE = {"tile_size": 16, "base_channels": 8, "depth": 1}


@pytest.fixture(autouse=True)
def cheap():
    """Compiles cheaply: what is tested is the benchmark."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def command(name, **given):
    """What `python -m benchmarks.NAME` prints with these flags."""
    arguments = [f"--{flag}={value}" for flag, value in given.items()]
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments],
        capture_output=True, text=True, check=False,
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def read(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        assert set(line) >= KEYS
        assert 0 < line["seconds_low"] <= line["seconds"] <= line["seconds_high"]
    return lines


@pytest.mark.slow
def test_clipping(tmp_path):
    path = tmp_path / "clipping.jsonl"
    shown = command(
        "clipping", batches="4", microbatch_sizes="1,2", memory_batches="4,16", repeats=2,
        rss=False, output=path, **SHAPE,
    )  # fmt: skip
    lines = read(path)
    plans = {
        (line["name"], line["settings"]["batch"], line["settings"]["microbatch_size"])
        for line in lines
        if line["name"] != "noise"
    }
    names = ("nonprivate", "clipped", "private")
    assert plans == {(n, 4, m) for n in names for m in (1, 2)}
    for line in lines[:-1]:
        assert line["tiles_per_second"] == pytest.approx(
            line["settings"]["batch"] / line["seconds"]
        )
        assert line["gflops"] > 0
    assert clipping.WHOLE in shown
    verdicts = {v["measure"]: v for v in lines[0]["verdicts"]}
    fastest = {
        name: min(x["seconds"] for x in lines if x["name"] == name and x["settings"]["batch"] == 4)
        for name in names
    }
    # Held against the fastest plan of the run, whatever its block.
    assert verdicts[f"{clipping.WHOLE}, 4 units"]["value"] == pytest.approx(
        fastest["nonprivate"] / fastest["private"]
    )
    # Nothing of a unit is kept: memory does not grow with their number.
    assert verdicts[clipping.GROWTH]["value"] == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_memory_of_a_step_alone():
    found = clipping.memory.peaks(
        "benchmarks.clipping:alone",
        {"name": "private", "batch": 2, "microbatch_size": 1, "setup": SHAPE},
    )
    assert set(found) == {"compile", "run"}
    assert all(value > 0 for value in found.values())


def test_operations_of_a_unit_are_six_for_each_multiply_add():
    from fedjax_dp.models.unet import multiply_adds

    setup = clipping.Setup(tile_size=64, base_channels=8, depth=2)
    expected = 6 * multiply_adds(64, 2, base_channels=8, depth=2)
    # Normalisation and augmentation add, the first layer needs no gradient of its images.
    assert clipping.unit_flops(setup) == pytest.approx(expected, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("clients", [1, 3])
def test_round(clients):
    shape = round.Shape(clients=clients, units=2, spread=0.5, **SHAPE)
    records, verdicts = round.measure(shape, repeats=2)
    assert [record.name for record in records] == ["round", "placed", "bare"]
    by_name = {record.name: record for record in records}
    assert by_name["bare"].seconds < by_name["round"].seconds
    assert by_name["round"].settings["compiles_after_round_one"] == 0
    assert verdicts[-1].measure.startswith(round.COMPILES)
    # Work is what was drawn: two units of one tile a client, on average.
    assert by_name["round"].settings["tiles_per_round"] == pytest.approx(2 * clients, rel=0.5)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.slow
def test_the_bare_program_does_the_work_of_the_round_and_no_other():
    """Without augmentation, its sum is that of the clients' deltas but for their noise."""
    shape = round.Shape(clients=2, units=3, **SHAPE)
    config = shape.config(4)
    config.privacy.noise_multiplier, config.federation.weights = 0.01, "uniform"
    objective = config.objective
    objective.flips, objective.rotate, objective.hed_jitter = False, False, 0.0
    bare, sums = round.Bare(config), []

    def after(watched, programs):
        bare(watched)
        state, chunks, _ = watched.visits[0]
        acc = programs.begin(state)
        for chunk in chunks:
            acc, _, _ = programs.visit(acc, state, chunk)
        sums.append((flat(bare.total()), flat(acc.total), watched.tiles[-1]))

    with machine.compile_log() as log:
        round.Watched(1, 2, log, after).run(config, shape.federation())
    for total, deltas, tiles in sums:
        assert tiles > 0
        # A client's delta is minus its noised sum over the expected batch.
        noise = deltas + total / shape.units
        stddev = 0.01 * np.sqrt(2) / shape.units
        assert noise.std() == pytest.approx(stddev, rel=0.1)
        assert (total / shape.units).std() > 2 * stddev  # the test has power


@pytest.mark.slow
def test_populations_are_measured_in_processes_of_their_own(monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    shapes = [round.Shape(clients=n, cohort=4, **SHAPE) for n in (8, 16)]
    records, verdicts = round.populations(shapes, rounds=2)
    assert [record.settings["population"] for record in records] == [8, 16]
    assert all(record.settings["compiles"] == 0 for record in records)
    assert all(record.process_bytes > 0 for record in records)
    assert {v.measure.split(",")[0] for v in verdicts} == {"memory", "time of a tile"}


@pytest.mark.slow
def test_input_pipeline(monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    setup = input_pipeline.Setup(
        clients=2, units=2, tiles_per_unit=2, local_steps=1, store_bytes=1_000_000,
        given_bytes=900_000_000, **SHAPE,
    )  # fmt: skip
    (packed, resident), verdicts = input_pipeline.measure(setup, repeats=2)
    assert (packed.name, resident.name) == ("packed", "resident")
    # The seed is the same, and so are the draws.
    assert packed.settings["tiles_per_block"] == resident.settings["tiles_per_block"] > 0
    assert packed.settings["chunks"] == 2 * (2 * 2 - 2)  # two of each block are made before it
    assert packed.settings["compiles"] == resident.settings["compiles"] == 0
    assert packed.settings["packing_cpu_share"] > 5 * resident.settings["packing_cpu_share"]
    assert 0 < packed.settings["input_cpu_share"] < 1
    assert [v.measure.split(", 16 px")[0] for v in verdicts] == [
        input_pipeline.DELAYED, input_pipeline.CPU, input_pipeline.SPEED,
    ]  # fmt: skip


@pytest.mark.slow
def test_a_store_larger_than_the_memory_given_is_packed_and_cannot_be_copied(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    setup = input_pipeline.Setup(
        clients=2, units=2, tiles_per_unit=2, local_steps=1, store_bytes=1_300_000_000,
        given_bytes=900_000_000, **SHAPE | {"tile_size": 128},
    )  # fmt: skip
    for name, channels in (("images", 3), ("labels", 1)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(setup.tiles * 128**2 * channels)  # holes take no disk
    arguments = setup.arguments(tmp_path, "packed", repeats=1)
    with input_pipeline.child(tmp_path, arguments) as running:
        found = running.block()
    assert found["tiles"] > 0
    assert 0 < found["own_bytes"] < setup.given_bytes < setup.store_bytes
    copied = setup.arguments(tmp_path, "resident", repeats=1)
    copied["given_bytes"] = setup.given_bytes  # the bound has power
    with pytest.raises(RuntimeError, match="ended with code"):
        input_pipeline.child(tmp_path, copied).__enter__()


@pytest.mark.slow
def test_accounting(tmp_path):
    path = tmp_path / "accounting.jsonl"
    command("accounting", clients=2, rounds=20, repeats=2, output=path)
    lines = {line["name"]: line for line in read(path)}
    assert set(lines) >= {
        "calibration", "calibration_cached", "epsilon_first", "epsilon_round", "rounds_allowed",
        "rounds_allowed_calibrated", "event_truncated", "event_poisson",
    }  # fmt: skip
    assert lines["calibration_cached"]["seconds"] < lines["calibration"]["seconds"]
    assert lines["epsilon_round"]["settings"]["worst_ms"] >= 1e3 * lines["epsilon_round"]["seconds"]


def test_forgetting_empties_the_package_s_caches():
    mechanism = next(iter(accounting.make_mechanisms(
        {"a": 50}, placement="dp_sgd", unit="patient", expected_batch_size=5.0, local_steps=1,
        rounds=2, l2_clip_norm=1.0, noise_multiplier=1.0,
    ).mechanisms.values()))  # fmt: skip
    mechanism.epsilon(2, 1e-5)
    assert pld.composed.cache_info().currsize
    accounting.forget()
    assert not pld.composed.cache_info().currsize


@pytest.mark.slow
def test_startup(monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    config = {
        "data.tile_size": 16, "data.patients_per_site": 2, "data.tiles_per_patient": 1,
        "model.base_channels": 8, "model.depth": 1, "privacy.expected_batch_size": 1.0,
        "federation.rounds": 3,
    }  # fmt: skip
    records, verdicts = startup.measure(config, repeats=1)
    seconds = {record.name: record.seconds for record in records}
    for kind in ("cold", "warm", "again"):
        parts = ("import", "data", "calibration", "programs", "before_rounds", "first_round")
        phases = sum(seconds.get(f"{kind}/{part}", 0.0) for part in parts)
        assert phases <= 1.01 * seconds[f"{kind}/whole"]
        assert phases > 0.5 * seconds[f"{kind}/whole"]
    assert seconds["warm/jax_cache"] > 0
    assert seconds["cold/jax_cache"] == 0
    assert seconds["command"] > 1
    assert [v.measure for v in verdicts] == [startup.WARM, startup.WITHOUT_DATA]


def test_a_start_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="tile_size"):
        startup.start(tmp_path / "run", {"data.tile_size": 17})
