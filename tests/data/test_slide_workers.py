"""A worker that dies takes its own slide with it, and nothing else."""

import ctypes
import os
import signal
import sys
import time

import pytest

from fedjax_dp.data.slide_workers import each_in_a_process


def work(job):
    if job == "error":
        raise ValueError("this file is damaged")
    if job == "bug":
        raise KeyError("surprise")
    if job == "crash":
        ctypes.string_at(0)
    if job == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if job == "leaves":
        os._exit(7)
    if job == "prints":
        sys.stdout.write("")
    if job == "slow":
        time.sleep(60)
    return f"{job} by {os.getpid()}"


def outcomes(jobs, workers):
    return {outcome.number: outcome for outcome in each_in_a_process(work, jobs, workers)}


@pytest.mark.parametrize("workers", [1, 3])
def test_every_job_has_its_own_outcome(workers):
    jobs = ["a", "error", "crash", "bug", "killed", "leaves", "b"]
    found = outcomes(jobs, workers)
    assert sorted(found) == list(range(7))
    assert found[1].error == "this file is damaged"
    assert "SIGSEGV" in found[2].error
    assert "KeyError: 'surprise'" in found[3].error
    assert "SIGKILL" in found[4].error
    assert "memory" in found[4].error
    assert "code 7" in found[5].error
    assert [number for number in found if not found[number].error] in ([0, 6], [6, 0])
    processes = {found[number].value.split()[-1] for number in (0, 6)}
    assert len(processes) == 2
    assert str(os.getpid()) not in processes


def test_a_large_result_arrives_whole(monkeypatch):
    (outcome,) = each_in_a_process(bytes, [5_000_000], 1)
    assert len(outcome.value) == 5_000_000


def test_stopping_early_ends_the_workers():
    begun = time.monotonic()
    running = each_in_a_process(work, ["a", "slow", "slow"], 3)
    assert next(running).number == 0
    running.close()
    assert time.monotonic() - begun < 30


def test_no_jobs_and_no_workers():
    assert list(each_in_a_process(work, [], 2)) == []
    with pytest.raises(ValueError, match="workers"):
        list(each_in_a_process(work, ["a"], 0))
