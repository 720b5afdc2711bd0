"""The register of runs: written ahead, torn, damaged, shared by processes, never lowered."""

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from fedjax_dp.data.sources import Holding, SiteSource
from fedjax_dp.privacy.register import Plan, Register, Run


def held(*sources):
    """What a client holds that is one whole site, or a pool of sites."""
    return Holding(sources, is_whole=True, is_patient=False)


OAK = SiteSource("oak", "f1", "p1")
ELM = SiteSource("elm", "f2", "p2")
MECHANISM = {"placement": "dp_sgd", "unit": "tile", "noise_multiplier": 1.0}


def run(number=0, rounds=10, sources=(OAK,), **changes):
    plans = {source.site: Plan(held(source), MECHANISM, rounds) for source in sources}
    settings = {"name": f"run{number}", "seed": -1, "experiment": "feddp", "tile": "32 px"}
    return Run(run_id=f"{number:032x}", **settings | {"plans": plans} | changes)


def rounds_of(register, fingerprint="f1"):
    """Name of each run -> rounds that count."""
    return {
        r.name: sum(
            p.rounds for p in r.plans.values() if p.holding.sources[0].fingerprint == fingerprint
        )
        for r in register.runs(fingerprint)
    }


@pytest.fixture
def register(tmp_path):
    return Register(tmp_path / "register.jsonl", patience=0.1)


def test_planned_rounds_count_until_the_run_ends(register):
    register.open_run(run(0, sources=(OAK, ELM)))
    register.open_run(run(1))
    assert rounds_of(register) == {"run0": 10, "run1": 10}
    assert rounds_of(register, "f2") == {"run0": 10}
    assert rounds_of(register, "f3") == {}
    register.close_run(run(0).run_id, {"oak": 7})
    assert rounds_of(register) == {"run0": 7, "run1": 10}
    assert rounds_of(register, "f2") == {"run0": 0}  # never drawn
    assert [r.has_ended for r in register.runs()] == [True, False]


def test_a_run_reads_back_as_it_was_written(register):
    written = run(0, sources=(OAK, ELM), seed=7)
    register.open_run(written)
    assert register.runs() == (written,)


def test_a_deleted_workdir_that_starts_anew_counts_twice(register):
    register.open_run(run(0, name="again"))
    register.open_run(run(1, name="again"))
    assert [(r.name, r.plans["oak"].rounds) for r in register.runs("f1")] == [("again", 10)] * 2


def test_a_pool_counts_for_each_of_its_sites(register):
    pooled = {"pooled": Plan(held(OAK, ELM), MECHANISM, 5)}
    register.open_run(run(0, plans=pooled))
    assert len(register.runs("f1")) == len(register.runs("f2")) == 1


def test_starting_again_changes_nothing_and_a_plan_only_grows(register):
    register.open_run(run(0))
    body = register.path.read_bytes()
    register.open_run(run(0))
    register.open_run(run(0, rounds=4))
    assert register.path.read_bytes() == body
    register.open_run(run(0, rounds=12))
    assert rounds_of(register) == {"run0": 12}


def test_a_run_that_goes_on_after_its_end_is_open_again(register):
    register.open_run(run(0))
    register.close_run(run(0).run_id, {"oak": 6})
    register.open_run(run(0, rounds=6))  # nothing is left to be charged
    assert register.runs()[0].has_ended
    register.open_run(run(0, rounds=9))
    assert rounds_of(register) == {"run0": 9}
    assert not register.runs()[0].has_ended
    with pytest.raises(ValueError, match="charges of \\['oak'\\] were lost"):
        register.close_run(run(0).run_id, {"oak": 5})
    register.close_run(run(0).run_id, {"oak": 8})
    assert rounds_of(register) == {"run0": 8}


def test_rounds_charged_beyond_the_plan_count(register):
    register.open_run(run(0))
    register.close_run(run(0).run_id, {"oak": 13})
    assert rounds_of(register) == {"run0": 13}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "other"}, "another name"),
        ({"seed": 3}, "another seed"),
        ({"tile": "64 px"}, "another tile"),
        ({"plans": {"oak": Plan(held(ELM), MECHANISM, 10)}}, "another data of oak"),
        (
            {"plans": {"oak": Plan(held(OAK), {"placement": "none"}, 10)}},
            "another mechanism of oak",
        ),
        ({"plans": {}}, "at least one client"),
        ({"sources": (OAK, ELM)}, "data of elm, mechanism of elm"),
    ],
)
def test_a_run_may_not_become_another(register, change, says):
    register.open_run(run(0))
    body = register.path.read_bytes()
    with pytest.raises(ValueError, match=says):
        register.open_run(run(0, **change))
    assert register.path.read_bytes() == body


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"run_id": "12"}, "32 hexadecimal"),
        ({"name": "runs/a"}, "without those above"),
        ({"name": ""}, "without those above"),
        ({"seed": -2}, "seed >= -1"),
        ({"seed": 1.0}, "seed >= -1"),
        ({"plans": {"oak": Plan(held(OAK), MECHANISM, -1)}}, "rounds >= 0"),
        ({"plans": {"oak": Plan(held(), MECHANISM, 1)}}, "one source"),
        ({"plans": {"oak": Plan(held(OAK), {}, 1)}}, "descriptor"),
        ({"plans": {"oak": Plan(held(OAK), {"placement": float("nan")}, 1)}}, "Out of range"),
    ],
)
def test_what_is_no_run_is_refused(register, change, says):
    with pytest.raises(ValueError, match=says):
        register.open_run(dataclasses.replace(run(0), **change))
    assert not register.path.exists() or not register.path.read_bytes()


def test_ends_of_unknown_runs_and_clients_are_refused(register):
    with pytest.raises(FileNotFoundError, match="restore it"):
        register.close_run(run(0).run_id, {})
    with pytest.raises(FileNotFoundError, match="no register"):
        register.runs()
    assert not register.path.exists()
    register.open_run(run(0))
    with pytest.raises(ValueError, match="was opened"):
        register.close_run(run(1).run_id, {})
    with pytest.raises(ValueError, match="elm"):
        register.close_run(run(0).run_id, {"elm": 3})
    assert rounds_of(register) == {"run0": 10}


def test_a_torn_line_is_dropped_at_every_length(register):
    register.open_run(run(0))
    first = register.path.read_bytes()
    register.open_run(run(1))
    whole = register.path.read_bytes()
    for cut in range(len(first), len(whole), 7):
        register.path.write_bytes(whole[:cut])
        assert list(rounds_of(register)) == ["run0"]
        assert register.path.read_bytes() == whole[:cut]  # a reader changes nothing
    register.open_run(run(1))
    assert register.path.read_bytes() == whole


@pytest.mark.parametrize(
    "line",
    [
        b"{}",
        b"not json",
        b"[1]",
        b'"x"',
        b"",
        b'{"kind": "close", "run_id": "00", "charged": {}}',
        b'{"kind": "forget", "run_id": "00"}',
    ],
)
def test_a_damaged_line_is_an_error(register, line):
    register.open_run(run(0))
    body = register.path.read_bytes()
    register.path.write_bytes(body + line + b"\n")
    for call in (register.runs, lambda: register.open_run(run(1))):
        with pytest.raises(ValueError, match=r"Line 2 of .*Do not go on"):
            call()
    assert register.path.read_bytes() == body + line + b"\n"


def test_a_field_of_another_version_is_an_error(register):
    register.open_run(run(0))
    record = json.loads(register.path.read_text()) | {"weight": 2}
    register.path.write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match="weight"):
        register.runs()


def test_a_plan_is_on_disk_before_it_returns(register, monkeypatch):
    synced = []
    fsync = os.fsync

    def record(descriptor):
        fsync(descriptor)
        synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", record)
    register.open_run(run(0))
    assert synced[-1] == register.path.stat().st_size > 0
    assert len(synced) == 3  # the new file, its folder, the line


def test_a_failed_write_leaves_the_file_as_it_was(register, monkeypatch):
    register.open_run(run(0))
    body = register.path.read_bytes()

    def fail(descriptor):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            register.close_run(run(0).run_id, {"oak": 1})
    assert register.path.read_bytes() == body
    assert rounds_of(register) == {"run0": 10}


def test_another_process_is_waited_for_and_then_given_up(register):
    register.open_run(run(0))
    with register.path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match=r"has held .* for 0\.1 s"):
            register.open_run(run(1))
        patient = Register(register.path)
        waiting = threading.Thread(target=patient.open_run, args=(run(2),))
        waiting.start()
        waiting.join(timeout=0.1)
        assert waiting.is_alive()
        fcntl.flock(other, fcntl.LOCK_UN)
        waiting.join(timeout=10)
    assert list(rounds_of(register)) == ["run0", "run2"]


def test_without_locks_half_a_line_may_be_another_runs(register, monkeypatch):
    register.open_run(run(0))
    body = register.path.read_bytes()

    def no_locks(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    register.open_run(run(1))
    torn = register.path.read_bytes()[:-9]
    register.path.write_bytes(torn)
    with pytest.raises(RuntimeError, match="knows no locks"):
        register.open_run(run(2))
    assert register.path.read_bytes() == torn
    assert torn.startswith(body)


PROGRAM = """
import os, signal, sys
from tests.privacy.test_register import run
from fedjax_dp.privacy.register import Register
path, start, dies = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "dies"
for number in range(start, start + 15):
    Register(path).open_run(run(number))
if dies:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_runs_of_several_processes_all_count_also_of_one_that_is_killed(register):
    programs = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, str(register.path), str(start), fate])
        for start, fate in ((0, "lives"), (100, "dies"))
    ]
    assert [program.wait(timeout=60) for program in programs] == [0, -signal.SIGKILL]
    expected = {f"run{start + n}": 10 for start in (0, 100) for n in range(15)}
    assert rounds_of(register) == expected
