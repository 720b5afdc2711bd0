"""The one place where a client axis exists: blocks of clients, over the devices of a mesh.

A mesh has two axes. Along `clients` every device, or group of devices, has clients of its own;
along `units` the devices of a group share the units of each of its clients.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fedjax_dp.federated.aggregators import Aggregator
from fedjax_dp.federated.client import ClientInfo, ClientUpdate
from fedjax_dp.typing import (
    ClientConstants,
    ClientKeys,
    ClientPlan,
    ClientPools,
    Params,
    TilePool,
)
from fedjax_dp.varying import vary_like

CLIENTS = "clients"
UNITS = "units"


class CohortChunk(NamedTuple):
    """Clients visited by one call: every leaf has a leading axis C, see `num_slots`.

    Slots without a client carry `is_active` and `weight` zero.
    """

    keys: ClientKeys
    client_state: Any
    constants: ClientConstants
    plan: ClientPlan


class PackedChunk(NamedTuple):
    """A chunk whose clients bring their own tiles, where the pool of all does not fit a device."""

    cohort: CohortChunk  # its plans are indices into the client's own pool
    pools: ClientPools


AnyChunk: TypeAlias = CohortChunk | PackedChunk


def client_mesh(
    num_devices: int = 0, *, num_clients: int | None = None, devices_per_client: int = 1
) -> Mesh:
    """A mesh of the axes `clients` and `units` over the first devices of every process.

    Args:
        num_devices: of each process; 0 = all, but none that would never have a client.
        num_clients: of the federation; None = as many as there are devices.
        devices_per_client: size of the axis `units`; such a group never spans two processes.

    Raises:
        ValueError: if a process has fewer devices, or no whole groups of them.
    """
    processes = jax.process_count()
    of_each = [jax.local_devices(process_index=process) for process in range(processes)]
    fewest = min(map(len, of_each))
    if num_devices < 0 or num_devices > fewest:
        raise ValueError(
            f"Expected execution.devices between 0 (all) and {fewest}, got {num_devices}."
        )
    groups, rest = divmod(num_devices or fewest, max(devices_per_client, 1))
    if devices_per_client < 1 or groups < 1 or (num_devices and rest):
        raise ValueError(
            f"Expected execution.devices={num_devices or fewest} to be groups of "
            f"execution.devices_per_client={devices_per_client}. Change one of them."
        )
    if num_clients is not None and not num_devices:
        groups = min(groups, -(-num_clients // processes))
    chosen = [devices[: groups * devices_per_client] for devices in of_each]
    return _mesh(np.array(chosen).reshape(-1, devices_per_client))


def _mesh(devices: np.ndarray) -> Mesh:
    return Mesh(devices, (CLIENTS, UNITS), axis_types=(AxisType.Auto, AxisType.Auto))


def local_mesh(mesh: Mesh) -> Mesh:
    """The part of `mesh` that this process can reach; `mesh` itself where that is all of it."""
    return _mesh(np.array(mesh.local_devices).reshape(-1, mesh.shape[UNITS]))


def num_slots(mesh: Mesh, clients_per_block: int) -> int:
    """C of a chunk: clients that are visited by one call."""
    return mesh.shape[CLIENTS] * clients_per_block


def local_slots(mesh: Mesh, clients_per_block: int) -> tuple[int, ...]:
    """The slots of a chunk that the devices of this process visit."""
    here = jax.process_index()
    return tuple(
        index * clients_per_block + slot
        for index, device in enumerate(mesh.devices[:, 0])
        if device.process_index == here
        for slot in range(clients_per_block)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Where parameters, accumulators and the pool live: whole, on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_client(mesh: Mesh) -> NamedSharding:
    """Where the leaves of a `CohortChunk` live: a client's with the devices that visit it."""
    return NamedSharding(mesh, PartitionSpec(CLIENTS))


def by_device(mesh: Mesh) -> NamedSharding:
    """A leading axis over all devices, whichever client they work for."""
    return NamedSharding(mesh, PartitionSpec((CLIENTS, UNITS)))


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Puts arrays of the host on the devices of `sharding`, also where processes share them.

    Every process calls it with the same values. Unlike `jax.device_put` it does not compare them
    between processes, which would be a collective for every leaf.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def one(leaf: Any) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return typed_keys(jax.tree.map(one, raw_keys(tree)), tree)


def fetch(tree: Any, mesh: Mesh) -> Any:
    """Replicated arrays, as the devices of `local_mesh(mesh)` hold them."""
    if all(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(tree)):
        return tree
    here = jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)
    return jax.device_put(here, replicated(local_mesh(mesh)))


def raw_keys(tree: Any) -> Any:
    """The tree with its typed keys as uint32 [..., 2], which can leave a process."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)


def typed_keys(tree: Any, like: Any) -> Any:
    """The reverse of `raw_keys`; `like` tells which leaves were keys."""
    wrap = functools.partial(jax.random.wrap_key_data, impl="threefry2x32")
    return jax.tree.map(lambda leaf, old: wrap(leaf) if _is_key(old) else leaf, tree, like)


def _is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed keys."""
    return jnp.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key)


def visit_clients(
    client_update: ClientUpdate,
    aggregator: Aggregator,
    *,
    clients_per_block: int = 1,
    mesh: Mesh | None = None,
) -> Callable[[Any, Params, CohortChunk, TilePool | ClientPools], tuple[Any, Any, ClientInfo]]:
    """Maps `client_update` over a chunk of clients and adds their deltas to the accumulator.

    Guarantees: each client's delta is what `client_update` alone returns, up to rounding, whatever
    the block size and the number of devices; no collective touches a gradient before it is clipped.

    Args:
        client_update: the update of ONE client.
        aggregator: adds deltas, weighted by `constants.weight`.
        clients_per_block: clients mapped together by `vmap` on a device; 1 runs one after another.
        mesh: of `client_mesh`; by default all devices, each with clients of its own. Where its
            axis `units` is longer than one, `client_update` was made with `axis_name=UNITS`.

    Returns:
        `visit(acc, params, chunk, pool) -> (acc, client_state, info)`, where the chunk holds
        `num_slots(mesh, clients_per_block)` clients, and any other number is a ValueError. The pool
        is one of all clients, or `ClientPools`, of which each device gets its own clients'.
    """
    if clients_per_block < 1:
        raise ValueError(f"Expected execution.clients_per_block >= 1, got {clients_per_block}.")
    mesh = client_mesh() if mesh is None else mesh

    def on_device(params: Params, chunk: CohortChunk, pool: TilePool | ClientPools) -> Any:
        # Without this cast the gradient with respect to replicated parameters is summed over the
        # devices' clients BEFORE it is clipped, silently.
        params = lax.pcast(params, CLIENTS, to="varying")

        def one(chunk: CohortChunk, pool: TilePool | ClientPools) -> Any:
            return client_update(params, *chunk, TilePool(*pool))

        if clients_per_block == 1:
            # A vmap of one would turn the data-dependent loop into a masked one.
            first = jax.tree.map(lambda leaf: leaf[0], chunk)
            own = jax.tree.map(lambda leaf: leaf[0], pool) if _is_own(pool) else pool
            results = jax.tree.map(lambda leaf: leaf[None], one(first, own))
        else:
            results = jax.vmap(one, (0, 0 if _is_own(pool) else None))(chunk, pool)
        model_delta, client_state, info = results
        acc = vary_like(aggregator.init(params), params)
        for index in range(clients_per_block):
            delta, weight = jax.tree.map(
                lambda leaf, index=index: leaf[index], (model_delta, chunk.constants.weight)
            )
            acc = aggregator.add(acc, delta, weight)
        return jax.tree.map(lambda leaf: leaf[None], acc), client_state, info

    def visit(
        acc: Any, params: Params, chunk: CohortChunk, pool: TilePool | ClientPools
    ) -> tuple[Any, Any, ClientInfo]:
        slots, expected = chunk.constants.weight.shape[0], num_slots(mesh, clients_per_block)
        if slots != expected:  # clients beyond a block would be left out, silently
            raise ValueError(
                f"Expected a chunk of groups x clients_per_block = {expected} slots, got {slots}. "
                "Pass None to stack_chunk for slots without a client."
            )
        pool_spec = PartitionSpec(CLIENTS) if _is_own(pool) else PartitionSpec()
        per_device = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec(CLIENTS), pool_spec),
            out_specs=PartitionSpec(CLIENTS),
        )
        accs, client_state, info = per_device(params, chunk, pool)
        for index in range(mesh.shape[CLIENTS]):
            acc = aggregator.merge(acc, jax.tree.map(lambda leaf, i=index: leaf[i], accs))
        return acc, client_state, info

    return visit


def _is_own(pool: TilePool | ClientPools) -> bool:
    """Whether every client has a pool of its own."""
    return isinstance(pool, ClientPools)


def stack_chunk(slots: Sequence[CohortChunk | None]) -> CohortChunk:
    """Stacks single clients to a chunk, on the host.

    Args:
        slots: one a slot, without the client axis and with raw key data uint32 [2] as keys; None
            is an empty slot, which copies a client's shapes and is inactive. At least one client.

    Returns:
        The chunk; its keys are typed threefry keys [C].
    """
    example = next(slot for slot in slots if slot is not None)
    nobody = example._replace(
        constants=example.constants._replace(weight=np.float32(0), is_active=np.float32(0)),
        plan=example.plan._replace(num_units=np.zeros_like(example.plan.num_units)),
    )
    filled = [nobody if slot is None else slot for slot in slots]
    keys, *others = (
        jax.tree.map(lambda *leaves: np.stack(leaves), *parts)
        for parts in zip(*filled, strict=True)
    )
    return CohortChunk(keys._replace(**_typed(keys)), *others)


def _typed(keys: ClientKeys) -> dict[str, Any]:
    """The keys among a client's randomness, typed; masks and integers stay what they are."""
    wrap = functools.partial(jax.random.wrap_key_data, impl="threefry2x32")
    return {"noise": wrap(keys.noise), "augmentation": wrap(keys.augmentation)}
