"""Checks that need two devices; a script, for XLA reads the number of devices only once.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m tests.federated.two_devices

prints a JSON object: check -> what failed, "" if nothing did.
"""

import functools
import json
import sys
import traceback
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_dp.assembly.pools import resident_pool
from fedjax_dp.data.tiles import TileArrays
from fedjax_dp.federated import cohort
from fedjax_dp.federated.aggregators import secure_sum, weighted_mean
from fedjax_dp.federated.client import ClientInfo, client_update
from fedjax_dp.federated.packing import Packing, pack
from fedjax_dp.federated.share import masked_share
from fedjax_dp.privacy import blocks, clipping, noise
from fedjax_dp.typing import NonPrivate
from tests import oracles
from tests.laws import assert_std, assert_uncorrelated
from tests.oracles import (
    assert_trees_close,
    assert_trees_equal,
    distance,
    keyed_loss,
    linear_params,
    make_client,
    make_plan,
    make_pool,
    norm,
    take,
)

CLIP = 0.4
PLANS = (
    make_plan([[3, 5], [2]], [], [[1, 4]]),
    make_plan([[6]], [[7], [8, 9], [10]]),
    make_plan(),
    make_plan([[11, 0, 1]], [[2]], [[3]]),
)
AGGREGATOR = weighted_mean()


def make_chunk(count, **constants):
    constants = {"clip": CLIP, "stddev": 0.01} | constants
    return cohort.stack_chunk([make_client(PLANS[i], i, **constants) for i in range(count)])


@functools.cache
def visit(update, block):
    visiting = cohort.visit_clients(update, AGGREGATOR, clients_per_block=block)
    return jax.jit(
        lambda params, chunk, pool: visiting(AGGREGATOR.init(params), params, chunk, pool)
    )


def each_delta(update, block, chunk, pool, params=None):
    """Every client's delta alone: all the weight is given to one client after the other."""
    params = linear_params() if params is None else params
    deltas = []
    for client in range(chunk.constants.weight.shape[0]):
        weight = np.zeros(chunk.constants.weight.shape, np.float32)
        weight[client] = 1.0
        weighted = chunk._replace(constants=chunk.constants._replace(weight=weight))
        acc, _, _ = visit(update, block)(params, weighted, pool)
        deltas.append(AGGREGATOR.finish(acc))
    return deltas


jitted = functools.cache(jax.jit)


def alone(update, chunk, client, pool):
    keys, state, constants, plan = (take(part, client) for part in chunk)
    return jitted(update)(linear_params(), keys, state, constants, plan, pool)[0]


@functools.cache
def real_update(placement="dp_sgd"):
    return client_update(keyed_loss, optax.sgd(1.0), placement=placement)


def direct_update(params, keys, client_state, constants, plan, pool):
    """A client update that takes its gradient at the server's very parameters, and clips it."""
    del keys

    def loss(params):
        tile = plan.tile_index[0, 0]
        return keyed_loss(params, pool.images[tile], pool.labels[tile], 1, tile_keys())

    def tile_keys():
        return jax.random.split(jax.random.key(0), plan.tile_index.shape[2])

    gradient = jax.grad(loss)(params)
    clipped, before = clipping.clip_by_norm(gradient, constants.l2_clip_norm)
    sums = clipping.UnitSums(*[before] * 5)
    info = ClientInfo(NonPrivate(sums), NonPrivate(before), jnp.isfinite(before))
    return clipped, client_state, info


def assert_equals_loop(update, block):
    chunk, pool = make_chunk(2 * block), make_pool()
    for client, delta in enumerate(each_delta(update, block, chunk, pool)):
        assert_trees_close(delta, alone(update, chunk, client, pool))


def two_devices_are_there():
    assert jax.device_count() == 2


def each_delta_equals_the_loop_block_1():
    assert_equals_loop(real_update(), 1)


def each_delta_equals_the_loop_block_2():
    assert_equals_loop(real_update(), 2)


def a_gradient_at_the_servers_parameters_is_clipped_alone():
    assert_equals_loop(direct_update, 1)


def without_pcast_gradients_are_summed_before_they_are_clipped():
    """The negative control: the same check must fail once the cast is gone."""
    before = cohort.lax.pcast
    cohort.lax.pcast = lambda tree, *_, **__: tree
    visit.cache_clear()
    try:
        assert_equals_loop(direct_update, 1)
    except AssertionError:
        return
    finally:
        cohort.lax.pcast = before
        visit.cache_clear()
    raise AssertionError("the check passed without the cast")


def one_unit_moves_its_client_by_the_clip_and_no_other():
    chunk = make_chunk(2)
    # Of client 0, the unit of tile 2 is alone in no plan of the first two clients.
    first, second = (
        each_delta(real_update(), 1, chunk, pool)
        for pool in (make_pool(), make_pool(gains={2: oracles.NAN}))
    )
    moved = distance(first[0], second[0])
    assert 0.99 * CLIP <= moved <= CLIP * (1 + 1e-5), moved
    assert distance(first[1], second[1]) == 0.0


def noise_is_independent_across_devices():
    params = {"weight": jnp.zeros(30_000)}
    update = client_update(lambda p, *_: 0.0 * p["weight"][0], optax.sgd(1.0), placement="dp_sgd")
    chunk = cohort.stack_chunk([make_client(make_plan(), i, stddev=1.0) for i in range(4)])
    deltas = [np.asarray(d["weight"]) for d in each_delta(update, 2, chunk, make_pool(), params)]
    for i in range(4):
        assert_std(deltas[i], np.sqrt(3))  # three steps
        for j in range(i):
            assert_uncorrelated(deltas[i], deltas[j])


def an_empty_slot_on_the_second_device_adds_nothing():
    pool, params = make_pool(), linear_params()
    client = make_client(PLANS[0], 0, clip=CLIP, stddev=0.01)
    acc, _, info = visit(real_update(), 1)(params, cohort.stack_chunk([client, None]), pool)
    chunk = cohort.stack_chunk([client, client])
    assert_trees_close(AGGREGATOR.finish(acc), alone(real_update(), chunk, 0, pool))
    assert float(acc.weight) == 1.0
    np.testing.assert_array_equal(info.units.value.units, [3.0, 0.0])
    assert norm(acc.total) > 0


def masked_words_of_two_devices_sum_to_the_plain_ones():
    """Modulo 2**32 across the devices too, and an empty slot adds no word."""
    masks = np.random.default_rng(0).integers(0, 2**32, (3, 51), np.uint32)
    plans = [plan._replace(tile_index=plan.tile_index[:1]) for plan in PLANS[:3]]
    step, params, pool = 2.0**-20, linear_params(), make_pool()
    update = masked_share(keyed_loss, step=step)
    slots = [make_client(plan, i, clip=CLIP, stddev=0.01) for i, plan in enumerate(plans)]
    slots = [
        slot._replace(keys=slot.keys._replace(mask=mask))
        for slot, mask in zip(slots, masks, strict=True)
    ]
    aggregator = secure_sum(params, step)
    visiting = jax.jit(cohort.visit_clients(update, aggregator, clients_per_block=2))
    acc, _, info = visiting(
        aggregator.init(params), params, cohort.stack_chunk([*slots, None]), pool
    )
    messages = [
        jitted(update)(params, *take(cohort.stack_chunk([slot]), 0), pool)[0] for slot in slots
    ]
    off = np.asarray(acc - sum(messages)).view(np.int32)
    assert np.abs(off).max() <= 3 * 2  # a block may round its float32 sums otherwise
    plain = np.asarray(acc - masks.sum(0, dtype=np.uint32)).view(np.int32)
    assert 2**16 < np.abs(plain).max() < 2**24
    np.testing.assert_array_equal(info.units.value.units, [2, 1, 0, 0])


def packed_tiles_lie_with_their_clients_and_change_no_bit():
    chunk, pool = make_chunk(4), make_pool()
    source = TileArrays(*map(np.asarray, pool[:2]))
    packed = pack(chunk, Packing(source, capacity=5, slots=range(4)))
    there = cohort.place(packed, cohort.by_client(cohort.client_mesh()))
    assert [s.data.shape for s in there.pools.images.addressable_shards] == [(2, 5, 4, 4, 3)] * 2
    visiting, params = visit(real_update(), 2), linear_params()
    resident, _, _ = visiting(params, chunk, pool)
    own, _, info = visiting(params, there.cohort, there.pools)
    assert_trees_equal(own, resident)
    assert norm(own.total) > 0
    np.testing.assert_array_equal(info.units.value.units, [3, 4, 0, 3])


def a_resident_pool_is_one_copy_for_both():
    """Wherever the table's arrays begin."""
    images, labels = (np.asarray(leaf) for leaf in make_pool()[:2])
    for offset in range(0, 64, 16):
        shifted = np.empty(images.nbytes + 128, np.uint8)
        start = -shifted.ctypes.data % 64 + offset
        moved = shifted[start : start + images.nbytes].reshape(images.shape)
        moved[...] = images
        table = types.SimpleNamespace(images=moved, labels=labels)
        pool = resident_pool(table, cohort.client_mesh())
        for found, expected in zip(pool[:2], (images, labels), strict=True):
            np.testing.assert_array_equal(found, expected)
            first, second = (s.data.unsafe_buffer_pointer() for s in found.addressable_shards)
            assert first == second
        assert (first == labels.ctypes.data) == (labels.ctypes.data % 64 == 0)


# --- two devices that share the units of a client


@functools.cache
def shared(update, placement_of_sum=None):
    """One client at a time, its units on both devices."""
    mesh = cohort.client_mesh(devices_per_client=2)
    aggregator = placement_of_sum or AGGREGATOR
    visiting = cohort.visit_clients(update, aggregator, mesh=mesh)
    return jax.jit(
        lambda params, chunk, pool: visiting(aggregator.init(params), params, chunk, pool)
    )


def shared_update(placement="dp_sgd", **settings):
    return client_update(
        keyed_loss, optax.sgd(1.0), placement=placement, axis_name=cohort.UNITS, **settings
    )


def assert_shared_equals_alone(placement, **settings):
    pool, params = make_pool(), linear_params()
    sharing, lonely = shared(shared_update(placement, **settings)), real_update(placement)
    for client in range(len(PLANS)):  # of three units, of one, of none
        chunk = make_chunk(client + 1)
        one = jax.tree.map(lambda leaf, client=client: leaf[client : client + 1], chunk)
        acc, _, info = sharing(params, one, pool)
        assert_trees_close(AGGREGATOR.finish(acc), alone(lonely, chunk, client, pool))
        assert float(info.units.value.units[0]) == float(PLANS[client].num_units.sum())


def shared_units_equal_the_loop_dp_sgd():
    assert_shared_equals_alone("dp_sgd")
    assert_shared_equals_alone("dp_sgd", microbatch_size=2)
    assert_shared_equals_alone("dp_sgd", loop="capacity")
    assert_shared_equals_alone("dp_sgd", is_adaptive=True)


def shared_units_equal_the_loop_without_privacy():
    assert_shared_equals_alone("none")
    assert_shared_equals_alone("none", microbatch_size=2)


def shared_units_equal_the_loop_update():
    assert_shared_equals_alone("update")


def without_pcast_units_are_not_shared():
    """The negative control: without it JAX refuses the loop, or the sums differ."""
    before = blocks.lax.pcast
    blocks.lax.pcast = lambda tree, axis, **settings: (
        tree if axis == cohort.UNITS else before(tree, axis, **settings)
    )
    shared.cache_clear()
    try:
        assert_shared_equals_alone("dp_sgd")
    except (AssertionError, TypeError):
        return
    finally:
        blocks.lax.pcast = before
        shared.cache_clear()
    raise AssertionError("the check passed without the cast")


def one_shared_unit_moves_its_client_by_the_clip():
    chunk, params = make_chunk(1), linear_params()
    update = shared(shared_update())
    first, second = (
        AGGREGATOR.finish(update(params, chunk, pool)[0])
        for pool in (make_pool(), make_pool(gains={2: oracles.NAN}))
    )
    moved = distance(first, second)
    assert 0.99 * CLIP <= moved <= CLIP * (1 + 1e-5), moved


def shared_units_of_a_share_give_the_same_words():
    """Integers bit for bit; of floats, whose sum is taken in another order, the last places."""
    step, params, pool = 2.0**-20, linear_params(), make_pool()
    aggregator = secure_sum(params, step)
    slot = make_client(
        PLANS[0]._replace(tile_index=PLANS[0].tile_index[:1]), 0, clip=CLIP, stddev=0.01
    )
    words = np.random.default_rng(0).integers(0, 2**32, (2, 51), np.uint32)
    keys = slot.keys._replace(mask=words[0], integer_noise=words[1].view(np.int32))
    chunk = cohort.stack_chunk([slot._replace(keys=keys)])
    for levels, tolerance in ((2**20, 0), (None, 3)):
        settings = {"step": 1 / levels if levels else step, "levels": levels}
        together = masked_share(keyed_loss, **settings, axis_name=cohort.UNITS)
        acc, _, info = shared(together, aggregator)(params, chunk, pool)
        plain = jitted(masked_share(keyed_loss, **settings))(params, *take(chunk, 0), pool)[0]
        assert np.abs(np.asarray(acc - plain).view(np.int32)).max() <= tolerance
        assert float(info.units.value.units[0]) == 2.0


def shared_noise_is_what_one_device_draws():
    """Bit for bit, of more and of less than a block, and each device draws half of the blocks."""
    mesh, whole = cohort.client_mesh(devices_per_client=2), jax.sharding.PartitionSpec()
    for size in (5, 2 * noise._BLOCK, 2 * noise._BLOCK + 1, 100_001):
        tree = {"a": jnp.ones(size - 2), "b": jnp.zeros(2)}
        key = jax.random.key(size)
        together = jax.jit(
            jax.shard_map(
                lambda key, tree: noise.add_noise(key, tree, 0.5, axis_name=cohort.UNITS),
                mesh=mesh,
                in_specs=(whole, whole),
                out_specs=whole,
            )
        )
        assert_trees_equal(together(key, tree), jax.jit(noise.add_noise)(key, tree, 0.5))
    drawn = -(-size // (2 * noise._BLOCK))
    text = together.lower(key, tree).as_text()
    assert f"tensor<{-(-drawn // 2)}x2x{noise._BLOCK}xf32>" in text
    assert f"tensor<{drawn}x2x{noise._BLOCK}xf32>" not in text


CHECKS = (
    two_devices_are_there,
    each_delta_equals_the_loop_block_1,
    each_delta_equals_the_loop_block_2,
    a_gradient_at_the_servers_parameters_is_clipped_alone,
    without_pcast_gradients_are_summed_before_they_are_clipped,
    one_unit_moves_its_client_by_the_clip_and_no_other,
    noise_is_independent_across_devices,
    an_empty_slot_on_the_second_device_adds_nothing,
    masked_words_of_two_devices_sum_to_the_plain_ones,
    packed_tiles_lie_with_their_clients_and_change_no_bit,
    a_resident_pool_is_one_copy_for_both,
    shared_units_equal_the_loop_dp_sgd,
    shared_units_equal_the_loop_without_privacy,
    shared_units_equal_the_loop_update,
    without_pcast_units_are_not_shared,
    one_shared_unit_moves_its_client_by_the_clip,
    shared_units_of_a_share_give_the_same_words,
    shared_noise_is_what_one_device_draws,
)


def main():
    jax.config.update("jax_default_matmul_precision", "highest")
    results = {}
    for check in CHECKS:
        try:
            check()
            results[check.__name__] = ""
        except Exception:
            results[check.__name__] = traceback.format_exc(limit=-3)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
