"""One battery for every aggregator: what streaming over clients must not change."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_dp.federated.aggregators import weighted_mean
from tests import oracles
from tests.oracles import assert_trees_close, assert_trees_equal, exact_products, norm  # noqa: F401

AGGREGATORS = {"weighted_mean": weighted_mean()}
WEIGHTS = (3.0, 1.0, 0.0, 40.0)


@pytest.fixture(params=AGGREGATORS, ids=AGGREGATORS)
def aggregator(request):
    return AGGREGATORS[request.param]


def deltas(count=4, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [
        {
            "a": jnp.asarray(rng.normal(size=(3, 2)), dtype),
            "b": jnp.asarray(rng.normal(size=5), dtype),
        }
        for _ in range(count)
    ]


PARAMS = jax.tree.map(jnp.zeros_like, deltas(1)[0])


def accumulate(aggregator, pairs):
    return functools.reduce(
        lambda acc, pair: aggregator.add(acc, *pair), pairs, aggregator.init(PARAMS)
    )


def finish(aggregator, pairs):
    return aggregator.finish(accumulate(aggregator, pairs))


def pairs():
    return list(zip(deltas(), WEIGHTS, strict=True))


def test_order_does_not_matter(aggregator):
    expected = finish(aggregator, pairs())
    for order in itertools.permutations(pairs()):
        assert_trees_close(finish(aggregator, order), expected)


@pytest.mark.parametrize("split", range(5))
def test_merging_two_sets_is_adding_all(aggregator, split):
    left, right = pairs()[:split], pairs()[split:]
    merged = aggregator.merge(accumulate(aggregator, left), accumulate(aggregator, right))
    assert_trees_close(aggregator.finish(merged), finish(aggregator, pairs()))


def test_an_empty_accumulator_merges_as_nothing(aggregator):
    acc = accumulate(aggregator, pairs())
    assert_trees_equal(aggregator.merge(acc, aggregator.init(PARAMS)), acc)


def test_weight_zero_is_absence(aggregator):
    present = [pair for pair in pairs() if pair[1] > 0]
    assert len(present) < len(WEIGHTS)
    assert_trees_equal(finish(aggregator, pairs()), finish(aggregator, present))


def test_only_the_ratio_of_weights_matters(aggregator):
    scaled = [(delta, 8 * weight) for delta, weight in pairs()]
    assert_trees_close(finish(aggregator, scaled), finish(aggregator, pairs()))


@pytest.mark.parametrize("weights", [(), (0.0,), (0.0, 0.0)])
def test_nobody_is_zero_not_nan(aggregator, weights):
    found = finish(aggregator, list(zip(deltas(len(weights)), weights, strict=True)))
    assert norm(found) == 0.0


def test_equal_deltas_give_that_delta(aggregator):
    delta = deltas(1)[0]
    assert_trees_close(finish(aggregator, [(delta, w) for w in WEIGHTS]), delta)


def test_accumulators_are_constant_in_size_and_float32(aggregator):
    def shapes(acc):
        return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(acc)]

    acc = accumulate(aggregator, pairs())
    assert shapes(acc) == shapes(aggregator.init(PARAMS))
    half = accumulate(aggregator, list(zip(deltas(4, jnp.bfloat16), WEIGHTS, strict=True)))
    assert {dtype for _, dtype in shapes(half)} == {jnp.dtype(jnp.float32)}


def test_functions_compile(aggregator):
    added = jax.jit(aggregator.add)(aggregator.init(PARAMS), deltas(1)[0], jnp.float32(2.0))
    assert_trees_close(jax.jit(aggregator.finish)(added), deltas(1)[0])


def test_weighted_mean_is_the_weighted_mean():
    found = finish(weighted_mean(), pairs())
    expected = oracles.weighted_mean(deltas(), WEIGHTS)
    np.testing.assert_allclose(oracles.flat(found), expected, rtol=1e-5, atol=1e-7)
