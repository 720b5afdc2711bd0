"""Optimisers by name: the settings of a configuration are what runs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_dp.optimizers import make_optimizer
from tests.oracles import assert_trees_equal

PARAMS = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}
GRADIENT = jax.tree.map(lambda leaf: leaf - 1.5, PARAMS)
NAMES = [
    "adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "adan", "amsgrad",
    "fromage", "lamb", "lars", "lion", "nadam", "novograd", "radam", "rmsprop", "rprop", "sgd",
    "sign_sgd", "sm3", "yogi",
]  # fmt: skip


def steps(optimizer, count=3):
    """Parameters after each of `count` steps with one gradient."""
    params, state, path = PARAMS, optimizer.init(PARAMS), []
    for _ in range(count):
        updates, state = optimizer.update(GRADIENT, state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return path


def test_sgd_with_rate_one_adds_the_gradient_and_nothing_else():
    """FedAvg: the server's parameters become the clients' mean."""
    optimizer = make_optimizer("sgd", 1.0)
    assert_trees_equal(steps(optimizer, 1)[0], jax.tree.map(jnp.subtract, PARAMS, GRADIENT))
    assert jax.tree.leaves(optimizer.init(PARAMS)) == []  # and keeps nothing


def test_momentum_is_momentum_or_b1():
    for mine, theirs in (
        (make_optimizer("sgd", 0.1, 0.9), optax.sgd(0.1, momentum=0.9)),
        (make_optimizer("adam", 0.1, 0.7), optax.adam(0.1, b1=0.7)),
        (make_optimizer("adam", 0.1), optax.adam(0.1, b1=0.0)),
        (make_optimizer("lars", 0.1), optax.lars(0.1, momentum=0.0)),
        (make_optimizer("adagrad", 0.1, 0.9), optax.adagrad(0.1)),  # has neither
    ):
        assert_trees_equal(steps(mine), steps(theirs))
    with pytest.raises(AssertionError):
        assert_trees_equal(
            steps(make_optimizer("sgd", 0.1, 0.8)), steps(optax.sgd(0.1, momentum=0.9))
        )


def test_the_cosine_ends_at_zero():
    path = [PARAMS, *steps(make_optimizer("sgd", 1.0, decay_steps=4), 6)]
    lengths = [
        float(jnp.abs(b["w"] - a["w"]).sum() / jnp.abs(GRADIENT["w"]).sum())
        for a, b in itertools.pairwise(path)
    ]
    expected = [0.5 * (1 + np.cos(np.pi * min(t, 4) / 4)) for t in range(6)]
    np.testing.assert_allclose(lengths, expected, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", NAMES)
def test_optax_optimisers_take_a_step(name, momentum):
    (params,) = steps(make_optimizer(name, 0.1, momentum), 1)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, PARAMS)


@pytest.mark.parametrize(
    "name",
    ["", "adamm", "chain", "clip", "__name__", "lbfgs", "polyak_sgd", "ScaleByZoomLinesearchState"],
)
def test_other_names_are_refused(name):
    """Also what needs more than a gradient: the loss, a line search, a seed."""
    with pytest.raises(ValueError, match=f"optimiser with a learning rate, got '{name}'"):
        make_optimizer(name, 0.1)


@pytest.mark.parametrize(
    ("rate", "momentum"), [(0.0, 0.0), (-1.0, 0.0), (float("nan"), 0.0), (0.1, 1.0), (0.1, -0.1)]
)
def test_numbers_out_of_range_are_refused(rate, momentum):
    with pytest.raises(ValueError, match="learning rate > 0 and 0 <= momentum < 1 for 'adam'"):
        make_optimizer("adam", rate, momentum)
