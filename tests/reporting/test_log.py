import json
import os
import struct
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from fedjax_dp.reporting.log import MetricsLog, read_lines, to_json, unwrap_nonprivate, write_json
from fedjax_dp.typing import NonPrivate


def read_events(workdir):
    """{(tag, step): value} of every event file: length, its crc, record, its crc."""
    scalars = {}
    for path in (workdir / "tensorboard").glob("events.out.tfevents.*"):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                assert (value.tag, event.step) not in scalars  # written once
                scalars[value.tag, event.step] = value.simple_value
    return scalars


def write_log(path, rounds):
    with MetricsLog(path) as log:
        for number in rounds:
            log.append({"round": number, "epsilon": {"max": number / 2}})


def test_lines_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append({"round": 1, "epsilon": {"max": np.float64("inf")}, "sites": ["a"]})
        log.append({"round": 2, "epsilon": {"max": np.float32(0.5)}, "seconds": jnp.float32(2)})
        expected = [
            {"round": 1, "epsilon": {"max": "infinity"}, "sites": ["a"]},
            {"round": 2, "epsilon": {"max": 0.5}, "seconds": 2.0},
        ]
        assert log.lines() == expected
        assert read_lines(path) == expected  # already there, before the log is closed
    assert read_events(path.parent) == {("epsilon/max", 2): 0.5, ("seconds", 2): 2.0}


def test_a_line_survives_a_process_that_is_killed(tmp_path):
    program = (
        "import os, sys, signal\n"
        "from fedjax_dp.reporting.log import MetricsLog\n"
        "log = MetricsLog(sys.argv[1])\n"
        "log.append({'round': 1})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "metrics.jsonl"
    assert subprocess.run([sys.executable, "-c", program, path], check=False).returncode == -9
    assert read_lines(path) == [{"round": 1}]
    write_log(path, [2])
    assert [line["round"] for line in read_lines(path)] == [1, 2]


@pytest.mark.parametrize(
    "torn",
    [b'{"round": 3', b'{"round": 3}', b'{"round": 3, "\xff', b"\0\0\0\n", b'{"epsilon": 1}\n'],
)
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write_log(path, [1, 2])
    whole = path.read_bytes()
    with open(path, "ab") as file:
        file.write(torn)
    with MetricsLog(path) as log:
        assert [line["round"] for line in log.lines()] == [1, 2]
        assert path.read_bytes() == whole
        log.append({"round": 3})
    assert [line["round"] for line in read_lines(path)] == [1, 2, 3]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": 1}\nnot json\n{"round": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        MetricsLog(path)


def test_cutting_back_forgets_later_rounds_in_both_files(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_log(path, [1, 2, 3, 4])
    assert len(read_events(tmp_path)) == 4
    for events in (tmp_path / "tensorboard").iterdir():  # as a run begun long ago would have them
        events.rename(events.with_name("events.out.tfevents.1.host"))
    with MetricsLog(path) as log:
        log.cut_back(2)
        log.append({"round": 3, "epsilon": {"max": 9.0}})
    assert [line["round"] for line in read_lines(path)] == [1, 2, 3]
    assert read_events(tmp_path) == {
        ("epsilon/max", 1): 0.5, ("epsilon/max", 2): 1.0, ("epsilon/max", 3): 9.0,
    }  # fmt: skip


def test_a_cut_that_fails_leaves_the_old_log(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write_log(path, [1, 2, 3])
    whole = path.read_bytes()
    log = MetricsLog(path)

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        log.cut_back(1)
    log.close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("line", [{}, {"round": 2}, {"round": 1}, {"round": "3"}, {"round": 3.0}])
def test_a_round_that_does_not_follow_is_refused(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append({"round": 2})
        with pytest.raises(ValueError, match="integer 'round' after 2"):
            log.append(line)
    assert read_lines(path) == [{"round": 2}]


class Aux(NamedTuple):
    loss: object
    norms: object


def test_nonprivate_values_reach_the_log_under_their_own_key_only(tmp_path):
    aux = NonPrivate(Aux(loss=jnp.float32(0.5), norms=jnp.ones(2, jnp.bfloat16)))
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for leak in ({"aux": aux}, {"deep": [{"loss": aux.value.loss, "again": aux}]}):
            with pytest.raises(TypeError, match="unwrap_nonprivate"):
                log.append({"round": 1} | leak)
        log.append({"round": 1} | unwrap_nonprivate({"client": aux, "count": 3}))
    expected = {"client": {"loss": 0.5, "norms": [1.0, 1.0]}, "count": 3}
    assert read_lines(path) == [{"round": 1, "nonprivate": expected}]
    tags = {tag for tag, _ in read_events(tmp_path)}
    assert tags == {"nonprivate/client/loss", "nonprivate/count"}


def test_json_is_standard_whatever_the_numbers(tmp_path):
    values = {
        "epsilon": [np.inf, -jnp.inf, float("nan")],
        "array": np.array([[1.0, np.inf]]),
        "count": np.int64(3),
        "flag": np.bool_(True),
        "none": None,
        "path": tmp_path,
        1: "one",
    }

    def refuse(name):
        raise AssertionError(name)

    plain = json.loads(to_json(values), parse_constant=refuse)
    assert plain == {
        "epsilon": ["infinity", "-infinity", "nan"],
        "array": [[1.0, "infinity"]],
        "count": 3,
        "flag": True,
        "none": None,
        "path": str(tmp_path),
        "1": "one",
    }
    write_json(tmp_path / "summary.json", values)
    assert json.loads((tmp_path / "summary.json").read_text()) == plain
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]  # no temporary file left


@pytest.mark.parametrize("value", [object(), len, jax.random.key(0)])
def test_what_has_no_json_form_is_an_error(value):
    with pytest.raises(TypeError):
        to_json({"value": value})
