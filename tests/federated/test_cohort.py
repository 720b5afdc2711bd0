import functools

import jax
import numpy as np
import optax
import pytest

from fedjax_dp.federated import cohort
from fedjax_dp.federated.aggregators import weighted_mean
from fedjax_dp.federated.client import client_update
from fedjax_dp.federated.cohort import client_mesh, stack_chunk, visit_clients
from tests import oracles
from tests.oracles import (
    assert_trees_close,
    assert_trees_equal,
    exact_products,  # noqa: F401
    keyed_loss,
    linear_params,
    make_client,
    make_plan,
    make_pool,
    norm,
    take,
)

AGGREGATOR = weighted_mean()
UPDATE = client_update(keyed_loss, optax.sgd(0.5), placement="dp_sgd")
# Unlike draws, an empty one among them, unlike clips, noises, divisors and weights.
CLIENTS = (
    make_client(make_plan([[3, 5], [2]], [], [[1, 4]]), 0, weight=3.0, clip=0.2, stddev=0.1),
    make_client(make_plan([[6]], [[7], [8, 9], [10]]), 1, weight=1.0, clip=9.0, stddev=0.01),
    make_client(make_plan(), 2, weight=2.0, clip=1.0, stddev=0.5, inverse=0.1),
    make_client(make_plan([[11, 0, 1]], [[2]], [[3]]), 3, weight=0.5, clip=0.4, stddev=0.2),
)
POOL = make_pool()
LEFT = make_client(make_plan([[1]]), 9, weight=0.0, active=0.0, stddev=1.0)


@functools.cache
def compiled(block):
    return jax.jit(visit_clients(UPDATE, AGGREGATOR, clients_per_block=block, mesh=client_mesh(1)))


def visit(slots, block, params=None):
    """Streams over the slots, block by block: the accumulator, and what each call reported."""
    params = linear_params() if params is None else params
    acc, infos = AGGREGATOR.init(params), []
    for start in range(0, len(slots), block):
        chunk = stack_chunk(slots[start : start + block])
        acc, state, info = compiled(block)(acc, params, chunk, POOL)
        assert state == ()
        infos.append(info)
    return acc, infos


@functools.cache
def alone():
    """Deltas of the clients, one call of `client_update` after the other."""
    update = jax.jit(UPDATE)
    deltas = []
    for client in CLIENTS:
        keys, state, constants, plan = (take(part, 0) for part in stack_chunk([client]))
        deltas.append(update(linear_params(), keys, state, constants, plan, POOL)[0])
    return deltas


def expected_mean(indices=range(4)):
    weights = [CLIENTS[i].constants.weight for i in indices]
    return oracles.weighted_mean([alone()[i] for i in indices], weights)


@pytest.mark.parametrize("block", [1, 2, 4])
def test_blocks_equal_the_loop_over_clients(block):
    acc, infos = visit(CLIENTS, block)
    found = oracles.flat(AGGREGATOR.finish(acc))
    np.testing.assert_allclose(found, expected_mean(), rtol=1e-5, atol=1e-5 * norm(alone()[0]))
    units = np.concatenate([info.units.value.units for info in infos])
    np.testing.assert_array_equal(units, [3, 4, 0, 3])
    assert np.concatenate([info.is_finite for info in infos]).all()


@pytest.mark.parametrize("block", [2, 4])
def test_empty_slots_contribute_exactly_nothing(block):
    """Neither an empty slot nor a client that has left, whatever noise it would have drawn."""
    for nobody in (None, LEFT):
        acc, infos = visit([CLIENTS[0], nobody, CLIENTS[3], nobody], block)
        np.testing.assert_allclose(acc.weight, 3.5)
        expected = expected_mean([0, 3])
        np.testing.assert_allclose(
            oracles.flat(AGGREGATOR.finish(acc)), expected, rtol=1e-5, atol=1e-6
        )
        assert np.concatenate([info.units.value.units for info in infos])[1] == 0
    first, _ = visit([CLIENTS[0], None], 2)
    second, _ = visit([CLIENTS[0], LEFT], 2)
    assert_trees_equal(first, second)


@pytest.mark.parametrize("block", [1, 2])
def test_a_chunk_of_nobody_is_exactly_zero(block):
    acc, _ = visit([LEFT] * 2, block)
    assert norm(acc) == 0.0


def test_the_same_client_in_another_slot_sends_the_same():
    """Order and padding change nobody's randomness."""
    first, _ = visit([CLIENTS[0], None], 2)
    second, _ = visit([None, CLIENTS[0]], 2)
    assert_trees_close(first, second)


def test_a_chunk_of_another_size_is_refused():
    """A block of one would otherwise leave the other clients out, silently."""
    for block, slots in ((1, 2), (2, 4), (2, 1)):
        chunk = stack_chunk(CLIENTS[:slots])
        params = linear_params()
        with pytest.raises(ValueError, match=f"{block} slots, got {slots}"):
            compiled(block)(AGGREGATOR.init(params), params, chunk, POOL)


def test_a_block_of_nobody_and_absent_devices_are_refused():
    with pytest.raises(ValueError, match="clients_per_block >= 1, got 0"):
        visit_clients(UPDATE, AGGREGATOR, clients_per_block=0)
    for count in (-1, 1000):
        with pytest.raises(ValueError, match=f"got {count}"):
            client_mesh(count)


def test_meshes_have_two_axes_over_the_first_devices():
    assert client_mesh(1).axis_names == (cohort.CLIENTS, cohort.UNITS)
    assert client_mesh().size == jax.device_count()


def test_no_device_is_left_without_a_client():
    assert client_mesh(num_clients=1).size == 1
    assert client_mesh(num_clients=10_000).size == jax.device_count()
    assert client_mesh(1, num_clients=10_000).size == 1


def test_stacked_chunks_hold_typed_threefry_keys():
    chunk = stack_chunk([CLIENTS[0], None])
    for key in (chunk.keys.noise, chunk.keys.augmentation):
        assert jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
        assert str(jax.random.key_impl(key)) == "threefry2x32"
        assert key.shape == (2,)
    np.testing.assert_array_equal(chunk.constants.is_active, [1.0, 0.0])
    np.testing.assert_array_equal(chunk.constants.weight, [3.0, 0.0])
    np.testing.assert_array_equal(chunk.plan.num_units[1], 0)
