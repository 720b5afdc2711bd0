import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_dp.federated.algorithms.fed_avg import fed_avg
from fedjax_dp.federated.client import ClientInfo
from fedjax_dp.federated.cohort import client_mesh, stack_chunk
from fedjax_dp.privacy import clipping
from fedjax_dp.typing import NonPrivate
from tests import oracles
from tests.oracles import (
    assert_trees_close,
    assert_trees_equal,
    exact_products,  # noqa: F401
    linear_params,
    make_client,
    make_plan,
    make_pool,
)


def constant_update(params, keys, client_state, constants, plan, pool):
    """A client that always sends its clip norm: what the server makes of it is the question."""
    del keys, plan, pool
    value = constants.l2_clip_norm
    sums = NonPrivate(clipping.UnitSums(*[value] * 5))
    delta = jax.tree.map(lambda leaf: jnp.full_like(leaf, value), params)
    return delta, client_state, ClientInfo(sums, NonPrivate(value), jnp.isfinite(value))


def make_algorithm(server=None, **settings):
    server = optax.sgd(1.0) if server is None else server
    return fed_avg(constant_update, server, mesh=client_mesh(1), **settings)


def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.float32(rng.normal(size=leaf.shape)), linear_params())


def with_delta(algorithm, state, delta):
    """The server's step after one client that sent `delta`."""
    acc = algorithm.begin(state)
    return algorithm.finish(state, acc._replace(total=delta, weight=jnp.float32(1.0)))


def fill(value):
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, value), linear_params())


def test_sgd_of_rate_one_takes_the_weighted_average():
    algorithm = make_algorithm()
    state = algorithm.init(params())
    visit = jax.jit(algorithm.visit)
    acc, weights, clips = algorithm.begin(state), (3.0, 1.0, 0.5), (0.7, -2.0, 5.0)
    for weight, clip in zip(weights, clips, strict=True):
        chunk = stack_chunk([make_client(make_plan(), weight=weight, clip=clip)])
        acc, client_state, info = visit(acc, state, chunk, make_pool())
        assert client_state == ()
        assert info.is_finite.all()
    after = algorithm.finish(state, acc)
    moved = oracles.flat(after.params) - oracles.flat(state.params)
    expected = oracles.weighted_mean([fill(clip) for clip in clips], weights)
    np.testing.assert_allclose(moved, expected, rtol=1e-5)
    assert after.round == 1


def test_any_server_optimiser_takes_the_negative_mean_as_gradient():
    optimizer = optax.adam(0.1)
    algorithm = make_algorithm(optimizer)
    state, expected = algorithm.init(params()), params()
    optimizer_state = optimizer.init(expected)
    for value in (0.5, -2.0, 1.0):
        state = with_delta(algorithm, state, fill(value))
        updates, optimizer_state = optimizer.update(fill(-value), optimizer_state, expected)
        expected = optax.apply_updates(expected, updates)
        assert_trees_close(state.params, expected)


def test_the_moving_average_follows_its_formula():
    """decay_t = min(ema_decay, (1 + t) / (10 + t)), so the first rounds soon forget the start."""
    algorithm = make_algorithm(ema_decay=0.3)
    state = algorithm.init(fill(0.0))
    average, value = 0.0, 0.0
    for step in range(6):
        state = with_delta(algorithm, state, fill(1.0))
        value += 1.0
        decay = min(0.3, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * value
        assert_trees_close(state.params, fill(value))
        assert_trees_close(state.averaged_params, fill(average))
    assert (1 + 5) / (10 + 5) > 0.3 > 1 / 10  # both sides of the minimum were met


def test_without_a_decay_the_average_is_the_parameters():
    algorithm = make_algorithm()
    state = with_delta(algorithm, algorithm.init(params()), fill(0.25))
    assert_trees_equal(state.averaged_params, state.params)


def test_a_round_of_nobody_leaves_the_parameters():
    algorithm = make_algorithm()
    state = algorithm.init(params())
    after = algorithm.finish(state, algorithm.begin(state))
    assert_trees_equal(after.params, state.params)
    assert after.round == 1


def test_a_fresh_state_can_be_donated():
    """Its average must not be the parameters' own buffer."""
    algorithm = make_algorithm()
    state = algorithm.init(params())
    after = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
    assert after.round == 1


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_a_decay_outside_zero_to_one_is_refused(decay):
    with pytest.raises(ValueError, match=f"ema_decay={decay}"):
        make_algorithm(ema_decay=decay)
