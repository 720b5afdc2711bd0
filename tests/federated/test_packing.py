"""Contract of packed tiles: what is visited is what the plan names, bit for bit, and no other's."""

import functools

import jax
import numpy as np
import optax
import pytest

from fedjax_dp.data.tiles import TileArrays
from fedjax_dp.federated.aggregators import weighted_mean
from fedjax_dp.federated.client import client_update
from fedjax_dp.federated.cohort import PackedChunk, client_mesh, stack_chunk, visit_clients
from fedjax_dp.federated.packing import Packing, filled, pack, pool_capacity, without_pixels
from fedjax_dp.typing import ClientPools, TilePool
from tests import oracles
from tests.oracles import (
    assert_trees_equal,
    exact_products,  # noqa: F401
    flat,
    keyed_loss,
    linear_params,
    make_client,
    make_plan,
    make_pool,
    norm,
)

# Clients of unlike tiles, the numbers not in order; one draws nothing at all.
PLANS = (
    make_plan([[5, 3, 7], [2]], [], [[5], [6, 2], [3]]),
    make_plan([[11, 9], [10]], [[9]]),
    make_plan(),
)
CAPACITY = 6
CASES = (("none", 1), ("dp_sgd", 1), ("dp_sgd", 2), ("update", 2))
CONSTANTS = ({"clip": 0.5, "stddev": 0.1}, {"weight": 2.0, "inverse": 0.25}, {})
CLIENTS = tuple(
    make_client(plan, index, **constants)
    for index, (plan, constants) in enumerate(zip(PLANS, CONSTANTS, strict=True))
)


class Recorded(TileArrays):
    """A source that remembers what was read."""

    def __init__(self, images, labels):
        super().__init__(images, labels)
        self.read = []

    def images(self, index):
        self.read.append(index.tolist())
        return super().images(index)


def source(pool=None, kind=TileArrays):
    return kind(*map(np.asarray, (make_pool() if pool is None else pool)[:2]))


def packing(num_slots, **changes):
    return Packing(
        **{"source": source(), "capacity": CAPACITY, "slots": range(num_slots)} | changes
    )


@functools.cache
def compiled(placement, block):
    update = client_update(keyed_loss, optax.sgd(1.0), placement=placement, microbatch_size=2)
    visit = visit_clients(update, weighted_mean(), clients_per_block=block, mesh=client_mesh(1))
    return jax.jit(visit)


def visited(placement, block, pool, *, pack_with=None, spoil=lambda pools: pools):
    """What all clients add up to: from one pool of all, or from their own."""
    params = linear_params()
    acc = weighted_mean().init(params)
    for start in range(0, len(CLIENTS), block):
        slots = [*CLIENTS[start : start + block]]
        chunk = stack_chunk([*slots, *[None] * (block - len(slots))])
        if pack_with is None:
            acc, _, _ = compiled(placement, block)(acc, params, chunk, pool)
        else:
            packed = pack(chunk, pack_with)
            pools = spoil(packed.pools)
            acc, _, _ = compiled(placement, block)(acc, params, packed.cohort, pools)
    return acc


# --- what a chunk carries


def test_each_client_has_the_tiles_its_plan_names_once_and_padding_is_its_own():
    pool = make_pool()
    packed = pack(stack_chunk([*CLIENTS, None]), packing(4))
    assert packed.pools.tile_id.tolist() == [
        [2, 3, 5, 6, 7, -1], [9, 10, 11, -1, -1, -1], [-1] * 6, [-1] * 6,
    ]  # fmt: skip
    for slot, plan in enumerate(PLANS):
        own, pools = oracles.take(packed.cohort.plan, slot), oracles.take(packed.pools, slot)
        assert_trees_equal(own._replace(tile_index=()), plan._replace(tile_index=()))
        for step, units in enumerate(plan.num_units):
            for unit, tiles in enumerate(plan.num_tiles[step]):
                mine = own.tile_index[step, unit]
                named = plan.tile_index[step, unit, :tiles] if unit < units else []
                real = mine[: len(named)]
                assert pools.tile_id[real].tolist() == list(named)
                assert_trees_equal(pools.images[real], pool.images[np.array(named, int)])
                assert_trees_equal(pools.labels[real], pool.labels[np.array(named, int)])
                assert not mine[len(named) :].any()
    assert not packed.pools.images[packed.pools.tile_id < 0].any()


def test_a_client_that_has_left_has_no_tiles():
    left = make_client(PLANS[0], active=0.0)
    assert (pack(stack_chunk([left]), packing(1)).pools.tile_id == -1).all()


def test_no_packing_leaves_the_chunk():
    chunk = stack_chunk(CLIENTS[:1])
    assert pack(chunk, None) is filled(chunk, None) is without_pixels(chunk) is chunk


def test_capacity_is_what_a_plan_can_name_and_no_more_than_a_client_has():
    assert pool_capacity([50, 100], 2, 4, 3) == 24
    assert pool_capacity([7, 10], 2, 4, 3) == 10
    assert pool_capacity([0], 2, 4, 3) == 1  # an array needs a place for padding to point to
    with pytest.raises(ValueError, match="at most 4 tiles of a client, got 5"):
        pack(stack_chunk(CLIENTS[:1]), packing(1, capacity=4))


def test_another_process_reads_its_own_clients_tiles_from_the_numbers():
    recorded = source(kind=Recorded)
    whole = pack(stack_chunk(CLIENTS), packing(3))
    told = without_pixels(whole)
    assert sum(np.asarray(leaf).nbytes for leaf in told.pools) == 3 * CAPACITY * 4
    theirs = filled(told, packing(3, source=recorded, slots=[1]))
    assert recorded.read == [[9, 10, 11]]
    assert_trees_equal(*(oracles.take(chunk.pools, 1) for chunk in (theirs, whole)))
    assert not theirs.pools.images[[0, 2]].any()


def test_a_map_of_a_file_is_a_source(tmp_path):
    pool = make_pool()
    arrays = []
    for name, part in zip(("images", "labels"), pool, strict=False):
        np.asarray(part).tofile(tmp_path / name)
        arrays.append(np.memmap(tmp_path / name, np.uint8, mode="r", shape=part.shape))
    mapped = TileArrays(*arrays)
    assert (len(mapped), mapped.tile_size) == (12, 4)
    chunk = stack_chunk(CLIENTS)
    pools = [pack(chunk, packing(3, source=s)).pools for s in (mapped, source())]
    assert_trees_equal(*pools)


# --- what the clients make of it


@pytest.mark.parametrize(("placement", "block"), CASES)
def test_packed_and_resident_are_bit_identical(placement, block):
    pool = make_pool()
    resident = visited(placement, block, pool)
    packed = visited(placement, block, pool, pack_with=packing(block))
    assert norm(resident) > 0.1
    assert_trees_equal(packed, resident)


def test_augmentation_follows_the_tile_and_not_its_place():
    """Without the tiles' own numbers the keyed loss shows another augmentation."""
    pool = make_pool()
    renumbered = visited(
        "none", 1, pool, pack_with=packing(1),
        spoil=lambda pools: pools._replace(tile_id=np.tile(np.arange(CAPACITY), (1, 1))),
    )  # fmt: skip
    assert oracles.distance(renumbered, visited("none", 1, pool)) > 1e-3


@pytest.mark.parametrize(("placement", "block"), CASES)
def test_what_lies_in_empty_places_reaches_no_gradient(placement, block):
    """Not as NaN either, which a mask alone would let through."""
    pool, clean = make_pool(), visited(placement, block, make_pool(), pack_with=packing(block))

    def spoil(pools):
        empty = pools.tile_id < 0
        images, labels = pools.images.copy(), pools.labels.copy()
        images[empty], labels[empty] = 255, oracles.NAN
        return pools._replace(images=images, labels=labels)

    spoiled = visited(placement, block, pool, pack_with=packing(block), spoil=spoil)
    assert_trees_equal(spoiled, clean)
    assert np.isfinite(flat(spoiled)).all()

    def spoil_all(pools):
        return spoil(pools._replace(tile_id=np.full_like(pools.tile_id, -1)))

    with pytest.raises(AssertionError):  # the test has power: those are not the empty places
        assert_trees_equal(
            visited(placement, block, pool, pack_with=packing(block), spoil=spoil_all), clean
        )


def test_clients_read_nothing_but_their_own_pool():
    """A client alone and beside others: its neighbours' tiles are nowhere it could reach."""
    packed = pack(stack_chunk(CLIENTS), packing(3))
    assert isinstance(packed, PackedChunk)
    assert isinstance(packed.pools, ClientPools)
    update = client_update(keyed_loss, optax.sgd(1.0), placement="dp_sgd")
    for slot in range(3):
        own = TilePool(*oracles.take(packed.pools, slot))
        keys, state, constants, plan = (oracles.take(p, slot) for p in packed.cohort)
        delta, _, _ = jax.jit(update)(linear_params(), keys, state, constants, plan, own)
        whole = oracles.take(stack_chunk(CLIENTS).plan, slot)
        expected, _, _ = jax.jit(update)(
            linear_params(), keys, state, constants, whole, make_pool()
        )
        assert_trees_equal(delta, expected)
