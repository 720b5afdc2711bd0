"""A run that is stopped or killed anywhere and called again ends as if nothing had happened."""

import os
import shutil
import signal
import stat
import subprocess
import sys

import jax
import numpy as np
import pytest

from fedjax_dp.assembly.sites import make_sites
from fedjax_dp.interrupts import Stopped
from fedjax_dp.privacy.statement import recompute_epsilon
from fedjax_dp.reporting.log import read_lines
from tests import runs
from tests.runs import (
    ALDER,
    BIRCH,
    charges,
    compiled,  # noqa: F401
    federation,
    limits,
    no_pictures,  # noqa: F401
    read_json,
    run,
    run_with_crashes,
    saved,
    tiny,
)

pytestmark = pytest.mark.usefixtures("compiled", "no_pictures")

ROUNDS = 4  # of 2 clients, one call to the devices each; saved after the second and the last
AHEAD = "visited 5"  # in the middle of the third round, with the fourth charged ahead
CRASHES = {
    "charged 0": 1,  # charged, and nothing of it computed
    "visited 1": 2,  # in the middle of the first round
    "logged 2": 0,  # the round is reported, and not saved
    "after a part of a checkpoint": 0,  # in the middle of the first save
    "before checkpoints/2": 0,
    "after checkpoints/2": 0,
    AHEAD: 4,
    "logged 3": 0,  # the log is ahead of the checkpoint
    "after checkpoints/4": 4,  # trained, not evaluated
    "before summary.json": 4,
}


@pytest.fixture(scope="module")
def whole(compiled, no_pictures, tmp_path_factory):  # noqa: F811
    """A run that nothing disturbed, and its workdir at every moment of `CRASHES`."""
    folder = tmp_path_factory.mktemp("whole")
    _, crashed = run_with_crashes(tiny(), folder / "run", CRASHES, folder)
    return folder / "run", crashed


def copy(source, tmp_path):
    return shutil.copytree(source, tmp_path / "run")


@pytest.mark.parametrize("moment", CRASHES)
def test_a_killed_run_goes_on_to_the_same_end(whole, moment, tmp_path):
    folder = copy(whole[1][moment], tmp_path)
    run(tiny(), folder)
    runs.assert_same_end(folder, whole[0])
    assert [line["round"] for line in read_lines(folder / "metrics.jsonl")] == [*range(ROUNDS + 1)]


def test_the_crashes_are_where_they_are_said_to_be(whole):
    """Else the test above would resume what had not been cut off."""
    rounds = {moment: {c["round"] for c in charges(f)} for moment, f in whole[1].items()}
    assert 0 in rounds["charged 0"]
    unsaved = [*CRASHES][: [*CRASHES].index("before checkpoints/2") + 1]
    for moment in unsaved:
        assert not (whole[1][moment] / "checkpoints" / "2").exists()
    assert any((whole[1]["after a part of a checkpoint"] / "checkpoints").iterdir())
    for moment in [*CRASHES][len(unsaved) :]:
        assert (whole[1][moment] / "checkpoints" / "2").exists()
    assert rounds["before summary.json"] == set(range(ROUNDS))


def test_another_seed_ends_elsewhere(whole, tmp_path):
    run(tiny(seed=1), tmp_path / "run")
    with pytest.raises(AssertionError):
        runs.assert_same_end(tmp_path / "run", whole[0])


@pytest.mark.slow
def test_kill_9_of_the_process_again_and_again(whole, compiled, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    deaths = ("charged 1", "after a part of a checkpoint")
    for moment in (*deaths, ""):
        done = subprocess.run(
            [sys.executable, "-m", "tests.runs", str(folder), moment, "{}"],
            cwd=runs.ROOT,
            env=runs.subprocess_environment(compiled),
            capture_output=True,
            text=True,
        )
        assert done.returncode == (-signal.SIGKILL if moment else 0), done.stderr
        assert ("finished" in done.stdout) == (not moment)
    runs.assert_same_end(folder, whole[0])


# --- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_last_whole_round(whole, number, tmp_path):
    folder, before = tmp_path / "run", signal.getsignal(number)

    def reached(name):
        if name == "visited 3":  # in the second round
            os.kill(os.getpid(), number)

    with runs.moments(folder, reached), pytest.raises(Stopped, match="after round 1, which is sav"):
        run(tiny(), folder)
    assert signal.getsignal(number) is before
    assert saved(folder)[1]["round"] == 1
    assert not (folder / "summary.json").exists()
    run(tiny(), folder)
    runs.assert_same_end(folder, whole[0])


def test_a_second_signal_ends_at_once(whole, tmp_path):
    folder = tmp_path / "run"

    def reached(name):
        if name == "visited 3":
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with runs.moments(folder, reached), pytest.raises(KeyboardInterrupt) as caught:
        run(tiny(), folder)
    assert not isinstance(caught.value, Stopped)
    run(tiny(), folder)
    runs.assert_same_end(folder, whole[0])


# --- the write-ahead charge


def test_a_replay_on_another_machine_is_charged_again(whole, tmp_path):
    folder = copy(whole[1][AHEAD], tmp_path)
    before = charges(folder)
    assert [c["round"] for c in before] == [0, 1, 2, 3]
    summary = run(tiny(**{"execution.microbatch_size": 4}), folder)
    after = charges(folder)
    assert after[: len(before)] == before
    assert [(c["round"], c["nonce"]) for c in after[len(before) :]] == [(2, 1), (3, 1)]
    stated = read_json(folder / "privacy.json")
    assert {c["rounds"] for c in stated["clients"].values()} == {ROUNDS + 2}
    theirs = read_json(whole[0] / "summary.json")["privacy"]["epsilon"]["per_client"]
    for client, epsilon in summary["privacy"]["epsilon"]["per_client"].items():
        assert epsilon > theirs[client]
    assert recompute_epsilon(stated) == pytest.approx(summary["privacy"]["epsilon"]["per_client"])
    assert summary["rounds"] == ROUNDS


def test_a_replay_on_another_machine_halts_where_the_budget_ends(whole, tmp_path, capsys):
    """The noise is calibrated to four rounds: two are saved, two were charged and lost."""
    changes = {"privacy.noise_multiplier": 0.0, "privacy.target_epsilon": 8.0}
    summary, crashed = run_with_crashes(
        tiny(**changes), tmp_path / "a", {AHEAD: ROUNDS}, tmp_path / "copies"
    )
    assert summary["rounds"] == ROUNDS
    changes["execution.microbatch_size"] = 4
    halted = run(tiny(**changes), crashed[AHEAD], progress=True)
    assert "The privacy budget of every client is spent after round 2." in capsys.readouterr().out
    assert halted["rounds"] == 2
    assert halted["privacy"]["epsilon"] == summary["privacy"]["epsilon"]  # of four charges each
    assert 7.5 < halted["privacy"]["epsilon"]["max"] <= 8.0
    assert len(charges(crashed[AHEAD])) == ROUNDS


def test_the_first_parameters_belong_to_the_environment(whole, tmp_path):
    """The folder of `init_from` may change; the same noise on other messages must not be free."""
    start = copy(whole[0], tmp_path)
    config = tiny(**{"model.init_from": str(start)})
    _, crashed = run_with_crashes(config, tmp_path / "a", {"visited 1": 2}, tmp_path / "copies")
    shutil.rmtree(start)
    run(tiny(seed=1), start)
    folder = crashed["visited 1"]
    charged = [c["round"] for c in charges(folder)]
    run(config, folder)
    assert [c["round"] for c in charges(folder)] == [*charged, *range(ROUNDS)]
    nonces = [c["nonce"] for c in charges(folder)]
    assert nonces == [0] * len(charged) + [int(r in charged) for r in range(ROUNDS)]


def test_a_lost_charge_log_is_noticed(whole, tmp_path):
    folder = copy(whole[1][AHEAD], tmp_path)
    (folder / "charges.jsonl").unlink()
    with pytest.raises(ValueError, match="belong to different runs"):
        run(tiny(), folder)


def test_a_replay_keeps_who_had_left(tmp_path):
    """Where every budget was charged up ahead, replaying is free: nobody leaves earlier for it."""
    (alder,) = (s for s in make_sites(tiny(), federation()).sites if s.name == ALDER)
    target = alder.mechanism.epsilon(4, tiny().privacy.target_delta) * (1 + 1e-9)
    allowed = limits(target)
    assert allowed[ALDER] == 4
    assert 1 <= allowed[BIRCH] <= 3
    config = tiny(**{"privacy.target_epsilon": target, "federation.rounds": 6})
    folder = tmp_path / "run"
    # At the end of the third round the fourth, and the last within a budget, is charged.
    summary, crashed = run_with_crashes(config, folder, {"logged 3": 4}, tmp_path / "copies")
    assert summary["rounds"] == 4
    left = [line["left"] for line in read_lines(folder / "metrics.jsonl")[1:]]
    assert left == [[BIRCH] if number >= allowed[BIRCH] else [] for number in range(4)]
    (crash,) = crashed.values()
    run(config, crash)
    runs.assert_same_end(crash, folder)


# --- secret randomness


@pytest.mark.slow
def test_secrets_are_kept_for_the_run_alone(tmp_path):
    config, folder = tiny(seed=-1), tmp_path / "run"
    modes = []

    def reached(name):
        if name.startswith("visited"):
            modes.append(stat.S_IMODE((folder / "secrets").stat().st_mode))

    with runs.moments(folder, reached):
        run(config, folder)
    assert modes == [0o600] * 2 * ROUNDS
    assert not [path for path in folder.rglob("*") if "secret" in path.name]
    assert read_json(folder / "privacy.json")["private"] is True

    names = {"secrets saved": 0, AHEAD: 4}
    _, crashed = run_with_crashes(config, tmp_path / "other", names, tmp_path / "copies")
    mine, theirs = saved(folder)[0]["params"], saved(tmp_path / "other")[0]["params"]
    same = jax.tree.map(np.array_equal, mine, theirs)
    assert not any(jax.tree.leaves(same))
    for crash in crashed.values():
        resumed = shutil.copytree(crash, crash.with_name(f"{crash.name}-resumed"))
        run(config, resumed)
        runs.assert_same_end(resumed, tmp_path / "other")
        assert not (resumed / "secrets").exists()

    (crashed[AHEAD] / "secrets").unlink()
    with pytest.raises(ValueError, match=r"secrets at .* are gone.*another --workdir"):
        run(config, crashed[AHEAD])
    (crashed["secrets saved"] / "secrets").chmod(0o644)
    with pytest.raises(PermissionError, match="0600"):
        run(config, crashed["secrets saved"])
