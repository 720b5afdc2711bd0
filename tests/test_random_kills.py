"""Killed at random moments, a run never has released more than it has charged."""

import concurrent.futures
import json
import shutil

import numpy as np
import pytest

from tests import random_kills, runs
from tests.runs import compiled, no_pictures, run  # noqa: F401

# Messages of the clients, and sums of cohorts that may be empty.
CHAINS = {
    "dp_sgd": {},
    "central": {
        "privacy.placement": "central", "federation.cohort": "poisson",
        "federation.cohort_prob": 0.5,
    },
}  # fmt: skip
KILLS = 10  # of each


@pytest.mark.slow
def test_epsilon_is_never_below_what_was_spent(tmp_path):
    """Twenty kills, some between charge, release and checkpoint."""
    with concurrent.futures.ThreadPoolExecutor(len(CHAINS)) as pool:
        futures = {
            name: pool.submit(
                random_kills.kill_again_and_again,
                tmp_path / name, KILLS, seed, changes, tmp_path / "cache",
            )
            for seed, (name, changes) in enumerate(CHAINS.items())
        }  # fmt: skip
        happened = {name: future.result() for name, future in futures.items()}
    for counts in happened.values():
        assert counts["named"] >= 3
        assert counts["timed"] >= 3
        assert counts["replays"] > 0  # some rounds were released twice, and paid for twice


# --- the check itself: a whole run, and what it would look like with a charge missing


@pytest.fixture(scope="module")
def folder(compiled, no_pictures, tmp_path_factory):  # noqa: F811
    """As a child of the script leaves it, but in this process."""
    folder = tmp_path_factory.mktemp("checked")
    config = runs.tiny(**{"federation.rounds": 3, "checkpoint_every": 2})
    run(config, folder / "run")
    (folder / "computed").write_text("0 aa\n1 bb\n2 cc\n2 cc\n")
    return folder


def epsilon(client, rounds):
    return float(rounds)


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_a_sound_run_passes(folder):
    now = random_kills.check(folder, [], epsilon)
    assert [charge["round"] for charge in now] == [0, 1, 2]
    assert random_kills.check(folder, now, epsilon) == now
    assert random_kills.traces(folder) == {0, 1, 2}
    assert random_kills.events(folder) >= {1, 2, 3}


def without_charge(folder, index):
    path = folder / "run" / "charges.jsonl"
    kept = [line for line in path.read_text().splitlines() if json.loads(line)["round"] != index]
    path.write_text("".join(line + "\n" for line in kept))


@pytest.mark.parametrize("index", [0, 2])
def test_a_round_without_its_charge_is_found(folder, index, tmp_path):
    copy = copied(folder, tmp_path)
    without_charge(copy, index)
    with pytest.raises(AssertionError, match=f"{index}.*not charged"):
        random_kills.check(copy, [], epsilon)


@pytest.mark.parametrize("trace", ["computed", "metrics.jsonl", "tensorboard", "checkpoints"])
def test_each_trace_alone_is_enough(folder, trace, tmp_path):
    copy = copied(folder, tmp_path)
    without_charge(copy, 1)
    (copy / "computed").write_text("1 bb\n" if trace == "computed" else "")
    for name in ("metrics.jsonl", "tensorboard", "checkpoints"):
        path = copy / "run" / name
        if name != trace:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(AssertionError, match=r"\{1\} left traces"):
        random_kills.check(copy, [], epsilon)


def test_a_round_released_twice_under_one_charge_is_found(folder, tmp_path):
    copy = copied(folder, tmp_path)
    with (copy / "computed").open("a") as file:
        file.write("1 other\n")
    with pytest.raises(AssertionError, match="round 1 was computed with 2 noises and charged 1"):
        random_kills.check(copy, [], epsilon)


def test_a_charge_that_is_gone_is_found(folder, tmp_path):
    copy = copied(folder, tmp_path)
    before = random_kills.charged(copy)
    shutil.rmtree(copy / "run")
    (copy / "computed").write_text("")
    with pytest.raises(AssertionError, match="is gone"):
        random_kills.check(copy, before, epsilon)


def test_digests_tell_parameters_apart():
    params = {"a": np.ones(3, np.float32)}
    other = {"a": np.nextafter(params["a"], np.float32(2))}
    assert random_kills.digest(params) != random_kills.digest(other)
    assert random_kills.digest(params) == random_kills.digest(dict(params))
