import json
import os
import signal
import subprocess
import sys

import pytest

from fedjax_dp.privacy.ledger import ChargeLog, Ledger

PRINTS = {"A": "f1", "B": "f2"}


def test_the_ledger_counts_and_never_changes():
    empty = Ledger.start(PRINTS)
    charged = empty.charge(["A"]).charge(["B", "A"])
    assert empty.counts == {"A": 0, "B": 0}
    assert charged.counts == {"A": 2, "B": 1}
    with pytest.raises(ValueError, match="C"):
        charged.charge(["C"])
    with pytest.raises(ValueError, match="distinct"):
        charged.charge(["A", "A"])


def test_the_ledger_survives_json_and_refuses_another_mechanism():
    charged = Ledger.start(PRINTS).charge(["A"])
    saved = json.loads(json.dumps(charged.to_json()))
    assert Ledger.start({"B": "f2", "A": "f1"}).restore(saved).counts == {"B": 0, "A": 1}
    for other in (PRINTS | {"B": "f3"}, {"A": "f1"}, PRINTS | {"C": "f4"}):
        with pytest.raises(ValueError, match="another mechanism"):
            Ledger.start(other).restore(saved)


def replay(path, rounds, environment="e", clients=("A", "B"), head=""):
    with ChargeLog(path) as log:
        log.rewind(head)
        return [log.charge(index, clients, environment) for index in rounds], log.head


def test_charging_counts_every_client(tmp_path):
    with ChargeLog(tmp_path / "charges") as log:
        assert log.charge(0, ["B", "A"], "e") == 0
        assert log.charge(1, ["A"], "e") == 0
        assert log.charge(2, [], "e") == 0
        assert log.counts() == {"A": 2, "B": 1}
    with ChargeLog(tmp_path / "charges") as log:
        assert log.counts() == {"A": 2, "B": 1}


def test_an_identical_replay_is_free(tmp_path):
    path = tmp_path / "charges"
    replay(path, range(4))
    body = path.read_bytes()
    nonces, _ = replay(path, range(4), clients=("B", "A"))
    assert nonces == [0] * 4
    assert path.read_bytes() == body


@pytest.mark.parametrize("change", [{"environment": "other"}, {"clients": ("A",)}])
def test_a_changed_replay_has_a_fresh_nonce_and_is_charged(tmp_path, change):
    path = tmp_path / "charges"
    replay(path, range(2))
    nonces, _ = replay(path, range(2), **change)
    assert nonces == [1, 1]
    with ChargeLog(path) as log:
        assert log.counts()["A"] == 4


def test_a_replay_after_a_changed_round_is_not_free(tmp_path):
    """The old nonce with new parameters would release two updates under one noise."""
    path = tmp_path / "charges"
    with ChargeLog(path) as log:
        log.charge(0, ["A"], "e")
        log.charge(1, ["A"], "e")
    with ChargeLog(path) as log:  # resumed before round 0, elsewhere
        assert log.charge(0, ["A"], "other") == 1
        head = log.head  # checkpoint after round 0
    with ChargeLog(path) as log:  # resumed after round 0, in the first environment again
        log.rewind(head)
        assert log.charge(1, ["A"], "e") == 1
        assert log.counts() == {"A": 4}


def test_without_rewind_a_resumed_round_is_charged_again(tmp_path):
    path = tmp_path / "charges"
    replay(path, range(3))
    with ChargeLog(path) as log:
        assert log.charge(2, ["A", "B"], "e") == 1


def test_resuming_from_a_checkpoint_goes_on_where_it_was(tmp_path):
    path = tmp_path / "charges"
    _, head = replay(path, range(3))
    replay(path, range(3, 5), head=head)
    nonces, _ = replay(path, range(3, 6), head=head)
    assert nonces == [0, 0, 0]
    with ChargeLog(path) as log:
        assert log.counts() == {"A": 6, "B": 6}
        with pytest.raises(ValueError, match="different runs"):
            log.rewind("0" * 32)


def test_would_exceed_names_who_and_replays_are_free(tmp_path):
    with ChargeLog(tmp_path / "charges") as log:
        log.charge(0, ["A", "B"], "e")
        head = log.head
        log.charge(1, ["A"], "e")
        limits = {"A": 2, "B": 2}
        assert log.would_exceed(2, ["A", "B", "C"], "e", limits) == ("A",)
        assert log.would_exceed(2, ["B"], "e", limits) == ()
        log.rewind(head)
        assert log.would_exceed(1, ["A"], "e", limits) == ()
        assert log.would_exceed(1, ["A"], "other", limits) == ("A",)


def test_a_torn_line_is_dropped_at_every_length(tmp_path):
    path = tmp_path / "charges"
    replay(path, range(2))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        path.write_bytes(whole[:cut])
        with ChargeLog(path) as log:
            assert log.counts() == {"A": 1, "B": 1}
            assert path.read_bytes() == whole[:first]
    assert replay(path, range(2))[0] == [0, 0]
    assert path.read_bytes() == whole


@pytest.mark.parametrize("line", [b"{}\n", b"not json\n", b"[1]\n", b'"x"\n'])
def test_a_damaged_line_is_an_error(tmp_path, line):
    path = tmp_path / "charges"
    replay(path, range(2))
    path.write_bytes(line + path.read_bytes())
    with pytest.raises(ValueError, match="Line 1"):
        ChargeLog(path)


def test_a_charge_is_on_disk_before_it_returns(tmp_path, monkeypatch):
    path = tmp_path / "charges"
    synced = []
    fsync = os.fsync

    def record(descriptor):
        fsync(descriptor)
        synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", record)
    with ChargeLog(path) as log:
        assert len(synced) == 2  # the new file and its directory
        log.charge(0, ["A"], "e")
        assert synced[-1] == path.stat().st_size > 0


def test_a_failed_write_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "charges"
    with ChargeLog(path) as log:
        log.charge(0, ["A"], "e")
        body, head = path.read_bytes(), log.head

        def fail(descriptor):
            raise OSError("disk full")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(OSError, match="disk full"):
                log.charge(1, ["A"], "e")
        assert path.read_bytes() == body
        assert (log.head, log.counts()) == (head, {"A": 1})
        assert log.charge(1, ["A"], "e") == 0


def test_a_second_process_is_refused(tmp_path):
    with ChargeLog(tmp_path / "charges"), pytest.raises(RuntimeError, match="Another process"):
        ChargeLog(tmp_path / "charges")


def test_a_charge_survives_kill_9(tmp_path):
    path = tmp_path / "charges"
    program = (
        "import os, signal, sys\n"
        "from fedjax_dp.privacy.ledger import ChargeLog\n"
        "log = ChargeLog(sys.argv[1])\n"
        "log.charge(0, ['A'], 'e')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    with ChargeLog(path) as log:
        assert log.counts() == {"A": 1}
        assert log.charge(0, ["A"], "e") == 0


@pytest.mark.parametrize(("index", "clients"), [(-1, ["A"]), (0, ["A", "A"])])
def test_bad_charges_are_refused(tmp_path, index, clients):
    with ChargeLog(tmp_path / "charges") as log, pytest.raises(ValueError, match="Expected"):
        log.charge(index, clients, "e")
