"""A checkpoint is whole or absent, exact to the bit, and its ledger is of the same round."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_dp.checkpoint import Checkpoints, Position, load_params
from fedjax_dp.federated.algorithms.base import ServerState
from tests.oracles import assert_trees_equal


def state(number=0, size=3):
    params = {"layer": {"kernel": jnp.full((size, 2), 0.1 + number), "bias": jnp.zeros(2)}}
    averaged = jax.tree.map(lambda leaf: leaf + 1 / 3, params)
    optimizer_state = ({"mu": jnp.full((size,), 1e-38), "count": jnp.int32(number)}, ())
    return ServerState(params, optimizer_state, averaged, jnp.int32(number))


def position(number):
    ledger = {"fingerprints": {"a": "x"}, "charged": {"a": number}}
    return Position(number, ledger, f"head {number}", 1 / 3, 0.1, 7 * number)


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path / "checkpoints")
    yield made
    made.close()


def reopened(tmp_path):
    return Checkpoints(tmp_path / "checkpoints")


def test_what_is_restored_is_what_was_saved(checkpoints, tmp_path):
    checkpoints.save(state(5), position(5))
    again = reopened(tmp_path)
    found, where = again.restore(state())
    again.close()
    assert isinstance(found, ServerState)
    assert_trees_equal(found, state(5))
    assert [leaf.dtype for leaf in jax.tree.leaves(found)] == [
        leaf.dtype for leaf in jax.tree.leaves(state())
    ]
    assert where == position(5)
    assert again.latest_round == 5


def test_without_a_checkpoint_there_is_none(checkpoints):
    assert checkpoints.latest_round is None
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoints.restore(state())


def test_the_newest_counts_and_old_ones_go(checkpoints, tmp_path):
    for number in range(4):
        checkpoints.save(state(number), position(number))
    assert_trees_equal(checkpoints.restore(state())[0], state(3))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == [
        "2",
        "3",
    ]


def test_a_round_is_saved_once(checkpoints):
    checkpoints.save(state(1), position(1))
    checkpoints.save(state(2), position(1))
    assert_trees_equal(checkpoints.restore(state())[0], state(1))


def test_a_save_that_was_cut_off_is_absent_and_may_be_repeated(checkpoints, tmp_path, monkeypatch):
    checkpoints.save(state(1), position(1))
    rename = os.rename

    def cut_off(source, target, *rest, **kwargs):
        if os.fspath(target).endswith("/checkpoints/2"):
            raise InterruptedError
        return rename(source, target, *rest, **kwargs)

    monkeypatch.setattr(os, "rename", cut_off)
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it is called on its way
        checkpoints.save(state(2), position(2))
    monkeypatch.undo()
    assert any("2" in path.name for path in (tmp_path / "checkpoints").iterdir())
    again = reopened(tmp_path)
    assert again.latest_round == 1
    assert_trees_equal(again.restore(state())[0], state(1))
    again.save(state(2), position(2))
    assert_trees_equal(again.restore(state())[0], state(2))
    again.close()


# --- a warm start


def test_a_warm_start_takes_the_averaged_parameters(checkpoints, tmp_path):
    checkpoints.save(state(1), position(1))
    checkpoints.save(state(4), position(4))
    loaded = load_params(tmp_path / "checkpoints", state().params)
    assert_trees_equal(loaded, state(4).averaged_params)
    assert not np.array_equal(loaded["layer"]["kernel"], state(4).params["layer"]["kernel"])


def test_another_network_is_no_start(checkpoints, tmp_path):
    checkpoints.save(state(1), position(1))
    with pytest.raises(ValueError, match=r"another network.*model.base_channels"):
        load_params(tmp_path / "checkpoints", state(size=4).params)
    with pytest.raises(ValueError, match="another network"):
        load_params(tmp_path / "checkpoints", {"other": jnp.zeros(2)})


def test_a_folder_without_a_run_is_no_start_and_is_not_made(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model.init_from.*nowhere"):
        load_params(tmp_path / "nowhere" / "checkpoints", {})
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"model.init_from.*empty"):
        load_params(tmp_path / "empty", {})
