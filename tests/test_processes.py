"""Contract of several processes: the same model, one leader, and nobody goes on alone."""

import json
import os
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest

from experiments import processes
from fedjax_dp.reporting.log import read_lines
from tests import runs
from tests.oracles import distance
from tests.runs import ROOT, charges, compiled, no_pictures, run, tiny  # noqa: F401

PLACEMENTS = {
    "none": {"privacy.placement": "none"},
    "dp_sgd": {"privacy.placement": "dp_sgd"},
    "packed": {"privacy.placement": "dp_sgd", "execution.pool": "packed"},
    "distributed": {"privacy.placement": "distributed"},
    "central": {"privacy.placement": "central", "federation.weights": "uniform"},
}
ONE_ROUND = {"federation.rounds": 1, "execution.devices": 1}


@pytest.fixture(scope="module")
def two(compiled, tmp_path_factory):  # noqa: F811
    """One round of every placement in two processes."""
    folder = tmp_path_factory.mktemp("two")
    changes = {name: changes | ONE_ROUND for name, changes in PLACEMENTS.items()}
    started = [sys.executable, "-m", "tests.two_processes", str(folder), json.dumps(changes)]
    with mock.patch.dict(os.environ, runs.subprocess_environment(compiled)):
        assert processes.run_processes(started, 2) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACEMENTS)
def test_two_processes_send_what_one_sends(name, two, tmp_path, compiled, no_pictures):  # noqa: F811
    run(tiny(**PLACEMENTS[name], **ONE_ROUND), tmp_path)
    start = runs.device(tiny(**PLACEMENTS[name], **ONE_ROUND)).state.params
    alone, shared = (runs.saved(folder)[0]["params"] for folder in (tmp_path, two / name))
    moved = distance(alone, start)
    assert moved > 0
    assert distance(alone, shared) <= 1e-5 * moved
    apart = {"environment"}  # other devices sum in another order
    ours, theirs = (
        [{k: v for k, v in charge.items() if k not in apart} for charge in charges(folder)]
        for folder in (tmp_path, two / name)
    )
    assert ours == theirs


@pytest.mark.slow
def test_the_leader_alone_charges_and_logs(two):
    for name in PLACEMENTS:
        assert [charge["round"] for charge in charges(two / name)] == [0]
        assert [line["round"] for line in read_lines(two / name / "metrics.jsonl")] == [0, 1]


FLAGS = (
    "--config.data.tile_size=32", "--config.data.patients_per_site=3",
    "--config.data.tiles_per_patient=2", "--config.model.base_channels=4",
    "--config.model.depth=1", "--config.model.num_groups=2", "--config.privacy.unit=tile",
    "--config.privacy.expected_batch_size=2", "--config.privacy.noise_multiplier=1",
    "--config.checkpoint_every=1", "--config.eval_every=1000",
)  # fmt: skip


def command(folder, *more):
    return [sys.executable, "-m", "experiments.feddp", f"--workdir={folder}", *FLAGS, *more]


def children(pid):
    """The processes that `pid` started, in their order."""
    text = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    ).stdout
    return sorted(int(word) for word in text.split())


def wait_for(condition, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_one_dies_the_others_stop_and_another_number_goes_on(victim, tmp_path):
    folder, rounds = tmp_path / "run", 100_000
    started = subprocess.Popen(
        command(folder, f"--config.federation.rounds={rounds}", "--config.execution.processes=2"),
        cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    log = folder / "metrics.jsonl"
    wait_for(lambda: started.poll() is not None or (log.exists() and len(read_lines(log)) > 2))
    workers = children(started.pid)
    assert len(workers) == 2, started.communicate()[1]
    os.kill(workers[victim], signal.SIGKILL)
    told = started.communicate(timeout=60)[1]
    assert started.returncode == processes.EXIT_DIED
    assert f"Process {victim} of 2 was killed by SIGKILL" in told
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)
    if victim == 0:
        return
    before = len(read_lines(log)) - 1
    charged = {charge["round"] for charge in charges(folder)}

    going_on = subprocess.Popen(
        command(folder, f"--config.federation.rounds={rounds}"),
        cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    wait_for(lambda: going_on.poll() is not None or len(read_lines(log)) - 1 > before + 1)
    going_on.send_signal(signal.SIGINT)
    told = going_on.communicate(timeout=120)[1]
    assert going_on.returncode == 130, told
    after = charges(folder)
    # Other devices sum in another order: what was charged and lost is charged again.
    assert charged <= {charge["round"] for charge in after}
    lost = {round_ for round_ in charged if round_ >= before}
    assert lost <= {charge["round"] for charge in after if charge["nonce"] > 0}
    rounds_logged = [line["round"] for line in read_lines(log)]
    assert rounds_logged == list(range(len(rounds_logged)))


# --- the parent alone


def script(*lines):
    return [sys.executable, "-c", "; ".join(lines)]


WHO = "import os, sys, time, signal; i = int(os.environ['FEDJAX_DP_PROCESS_ID'])"


def test_the_exit_code_is_the_leaders():
    assert processes.run_processes(script(WHO, "sys.exit(0)"), 2) == 0
    assert processes.run_processes(script(WHO, "sys.exit(130 if i == 0 else 0)"), 2) == 130
    assert processes.run_processes(script(WHO, "sys.exit(1)"), 3) == 1  # everyone's own mistake


def test_whoever_a_signal_killed_is_named_and_nobody_is_left(capfd):
    dies = "os.kill(os.getpid(), signal.SIGKILL) if i == 2 else None"
    start = time.monotonic()
    code = processes.run_processes(script(WHO, dies, "time.sleep(0.5)", "sys.exit(1)"), 3)
    assert (code, time.monotonic() - start < 10) == (processes.EXIT_DIED, True)
    assert "Process 2 of 3 was killed by SIGKILL" in capfd.readouterr().err


def test_one_that_hangs_is_ended(monkeypatch, capfd):
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 0.5)
    fails = "sys.exit(7) if i == 1 else time.sleep(600)"
    start = time.monotonic()
    assert processes.run_processes(script(WHO, fails), 2) == processes.EXIT_DIED
    assert time.monotonic() - start < 30
    assert "Process 1 of 2 ended with code 7" in capfd.readouterr().err


def test_cores_are_shared_out_and_overlap_nowhere(tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    write = f"open(r'{tmp_path}/' + str(i), 'w').write(repr(sorted(os.sched_getaffinity(0))))"
    assert processes.run_processes(script(WHO, "time.sleep(0.5)", write), 2) == 0
    first, second = (eval((tmp_path / name).read_text()) for name in "01")
    if len(cores) < 2:
        assert first == second == cores
    else:
        assert sorted(first + second) == cores
        assert abs(len(first) - len(second)) <= 1


@pytest.mark.parametrize(
    "given",
    [
        {"FEDJAX_DP_COORDINATOR": "here:1"},
        {
            "FEDJAX_DP_COORDINATOR": "here:1",
            "FEDJAX_DP_NUM_PROCESSES": "two",
            "FEDJAX_DP_PROCESS_ID": "0",
        },
    ],
)
def test_half_an_environment_is_refused(given, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="FEDJAX_DP_COORDINATOR like host:port"):
        processes.from_environment()


def test_no_environment_is_one_process():
    assert processes.from_environment() is None


@pytest.mark.slow
def test_a_users_mistake_is_said_once(tmp_path):
    done = subprocess.run(
        command(tmp_path / "run", "--config.execution.processes=2", "--config.privacy.unit=person"),
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("'person'") == 1
    assert "died" not in done.stderr
    assert not (tmp_path / "run" / "config.json").exists()
