"""The one place where a client axis exists: blocks of clients, over the devices of a mesh."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fedjax_dp.federated.aggregators import Aggregator
from fedjax_dp.federated.client import ClientInfo, ClientUpdate
from fedjax_dp.typing import ClientConstants, ClientKeys, ClientPlan, Params, TilePool
from fedjax_dp.varying import vary_like

AXIS = "clients"


class CohortChunk(NamedTuple):
    """Clients visited by one call: every leaf has a leading axis C = devices x block.

    Slots without a client carry `is_active` and `weight` zero.
    """

    keys: ClientKeys
    client_state: Any
    constants: ClientConstants
    plan: ClientPlan


def client_mesh(num_devices: int = 0) -> Mesh:
    """A mesh of one axis, `clients`, over the first `num_devices` local devices (0 = all).

    Raises:
        ValueError: if there are fewer devices.
    """
    devices = jax.devices()
    if num_devices < 0 or num_devices > len(devices):
        raise ValueError(
            f"Expected execution.devices between 0 (all) and {len(devices)}, got {num_devices}."
        )
    chosen = np.array(devices[: num_devices or len(devices)])
    return Mesh(chosen, (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Where parameters, accumulators and the pool live: whole, on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_client(mesh: Mesh) -> NamedSharding:
    """Where the leaves of a `CohortChunk` live: the leading axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def visit_clients(
    client_update: ClientUpdate,
    aggregator: Aggregator,
    *,
    clients_per_block: int = 1,
    mesh: Mesh | None = None,
) -> Callable[[Any, Params, CohortChunk, TilePool], tuple[Any, Any, ClientInfo]]:
    """Maps `client_update` over a chunk of clients and adds their deltas to the accumulator.

    Guarantees: each client's delta is what `client_update` alone returns, up to rounding, whatever
    the block size and the number of devices; no collective touches a gradient before it is clipped.

    Args:
        client_update: the update of ONE client.
        aggregator: adds deltas, weighted by `constants.weight`.
        clients_per_block: clients mapped together by `vmap` on a device; 1 runs one after another.
        mesh: devices of the axis `clients`; by default all.

    Returns:
        `visit(acc, params, chunk, pool) -> (acc, client_state, info)`, where the chunk holds
        `mesh.size * clients_per_block` clients, and any other number is a ValueError.
    """
    if clients_per_block < 1:
        raise ValueError(f"Expected execution.clients_per_block >= 1, got {clients_per_block}.")
    mesh = client_mesh() if mesh is None else mesh

    def on_device(params: Params, chunk: CohortChunk, pool: TilePool) -> Any:
        # Without this cast the gradient with respect to replicated parameters is summed over the
        # devices' clients BEFORE it is clipped, silently.
        params = lax.pcast(params, AXIS, to="varying")

        def one(keys: Any, client_state: Any, constants: Any, plan: Any) -> Any:
            return client_update(params, keys, client_state, constants, plan, pool)

        if clients_per_block == 1:
            # A vmap of one would turn the data-dependent loop into a masked one.
            first = jax.tree.map(lambda leaf: leaf[0], chunk)
            results = jax.tree.map(lambda leaf: leaf[None], one(*first))
        else:
            results = jax.vmap(one)(*chunk)
        model_delta, client_state, info = results
        acc = vary_like(aggregator.init(params), params)
        for index in range(clients_per_block):
            delta, weight = jax.tree.map(
                lambda leaf, index=index: leaf[index], (model_delta, chunk.constants.weight)
            )
            acc = aggregator.add(acc, delta, weight)
        return jax.tree.map(lambda leaf: leaf[None], acc), client_state, info

    per_device = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(AXIS), PartitionSpec()),
        out_specs=PartitionSpec(AXIS),
    )

    def visit(acc: Any, params: Params, chunk: CohortChunk, pool: TilePool) -> Any:
        slots, expected = chunk.constants.weight.shape[0], mesh.size * clients_per_block
        if slots != expected:  # clients beyond a block would be left out, silently
            raise ValueError(
                f"Expected a chunk of devices x clients_per_block = {expected} slots, got {slots}. "
                "Pass None to stack_chunk for slots without a client."
            )
        accs, client_state, info = per_device(params, chunk, pool)
        for index in range(mesh.size):
            acc = aggregator.merge(acc, jax.tree.map(lambda leaf, i=index: leaf[i], accs))
        return acc, client_state, info

    return visit


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
