"""Tiles that no device holds whole: of each client of a chunk, those that its plan names.

The host packs them while the devices are at work on the chunk before. A client's tiles are its own
alone, so a pool for each client holds no tile twice, and a device gets only its own clients'.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedjax_dp.data.tiles import TileSource
from fedjax_dp.federated.cohort import AnyChunk, CohortChunk, PackedChunk
from fedjax_dp.typing import ClientPools


class Packing(NamedTuple):
    """How the tiles of a chunk are packed.

    Attributes:
        source: all training tiles.
        capacity: N of `ClientPools`, see `pool_capacity`.
        slots: of a chunk, those whose tiles this process needs; see `cohort.local_slots`.
    """

    source: TileSource
    capacity: int
    slots: Sequence[int]


def pool_capacity(
    client_tiles: Sequence[int], local_steps: int, num_slots: int, tiles_per_unit: int
) -> int:
    """The most tiles that one client's plan can name, at least 1.

    Args:
        client_tiles: number of tiles of each client.
        local_steps: S of the plans.
        num_slots: U of the plans.
        tiles_per_unit: T of the plans.
    """
    return max(1, min(local_steps * num_slots * tiles_per_unit, max(client_tiles)))


def empty_pools(num_clients: int, capacity: int, tile_size: int) -> ClientPools:
    """Pools without tiles; memory is taken when they are written."""
    shape = (num_clients, capacity, tile_size, tile_size)
    return ClientPools(
        images=np.zeros((*shape, 3), np.uint8),
        labels=np.zeros(shape, np.uint8),
        tile_id=np.full(shape[:2], -1, np.int32),
    )


def pack(chunk: CohortChunk, packing: Packing | None) -> AnyChunk:
    """The chunk with its own tiles, and plans that are indices into them.

    Guarantees: what is visited is bit for bit what the plan names, and each tile keeps its number
    for augmentation. Padding of a plan becomes index 0 of the client's own pool. A slot without a
    client has no tiles.

    Args:
        chunk: of the host, its plans indices into the source.
        packing: the source, and the pools' static size; None leaves the chunk as it is.

    Raises:
        ValueError: a plan names more tiles than a pool has room for.
    """
    if packing is None:
        return chunk
    index, num_units, num_tiles = (np.asarray(leaf) for leaf in chunk.plan)
    slots, _, units, tiles = index.shape
    is_real = (np.arange(units) < num_units[..., None])[..., None]
    is_real = is_real & (np.arange(tiles) < num_tiles[..., None])
    is_real &= np.asarray(chunk.constants.is_active).reshape(slots, 1, 1, 1) > 0
    tile_id = np.full((slots, packing.capacity), -1, np.int32)
    own_index = np.zeros_like(index)
    for slot in range(slots):
        named, place = np.unique(index[slot][is_real[slot]], return_inverse=True)
        if len(named) > packing.capacity:
            raise ValueError(
                f"Expected at most {packing.capacity} tiles of a client, got {len(named)}. Size "
                "the pool by pool_capacity."
            )
        tile_id[slot, : len(named)] = named
        own_index[slot][is_real[slot]] = place
    named_chunk = PackedChunk(
        chunk._replace(plan=chunk.plan._replace(tile_index=own_index)),
        ClientPools((), (), tile_id),
    )
    return filled(named_chunk, packing)


def without_pixels(chunk: AnyChunk) -> AnyChunk:
    """The chunk as it is told to another process, which reads its own clients' tiles itself."""
    if isinstance(chunk, PackedChunk):
        return chunk._replace(pools=chunk.pools._replace(images=(), labels=()))
    return chunk


def filled(chunk: AnyChunk, packing: Packing | None) -> AnyChunk:
    """The reverse of `without_pixels`, for the slots that this process needs."""
    if packing is None or not isinstance(chunk, PackedChunk):
        return chunk
    tile_id = np.asarray(chunk.pools.tile_id)
    # New arrays for every chunk: the devices may still read those of the one before.
    pools = empty_pools(len(tile_id), packing.capacity, packing.source.tile_size)
    for slot in packing.slots:
        named = tile_id[slot][tile_id[slot] >= 0]
        if len(named):
            pools.images[slot, : len(named)] = packing.source.images(named)
            pools.labels[slot, : len(named)] = packing.source.labels(named)
    return chunk._replace(pools=pools._replace(tile_id=tile_id))
