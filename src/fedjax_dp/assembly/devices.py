"""Which devices work on which clients, and how many of them on one client together."""

import jax
from jax.sharding import Mesh

from fedjax_dp.assembly.sites import Sites
from fedjax_dp.config import ExecutionConfig
from fedjax_dp.federated import cohort

_CPU_TILES = 8
"""Tiles of a step that a core must get for its share of the sum to be worth bringing together."""


def make_mesh(execution: ExecutionConfig, sites: Sites) -> Mesh:
    """The mesh of a run; no private number steers it, for batches are expected sizes.

    Args:
        execution: its `devices` and `devices_per_client`; 0 = chosen here.
        sites: from `make_sites`.

    Raises:
        ValueError: see `cohort.client_mesh`.
    """
    clients = len(sites.sites)
    units = min(site.mechanism.expected_batch_size for site in sites.sites)
    together = execution.devices_per_client or devices_per_client(
        execution.devices or jax.local_device_count(),
        -(-clients // jax.process_count()),
        units=units,
        tiles=units * sites.sites[0].mechanism.tiles_per_unit,
        is_cpu=jax.default_backend() == "cpu",
    )
    return cohort.client_mesh(execution.devices, num_clients=clients, devices_per_client=together)


def devices_per_client(
    devices: int, clients: int, *, units: float, tiles: float, is_cpu: bool
) -> int:
    """How many devices share the units of a client.

    Devices with clients of their own wait for the one whose clients drew most; devices that share
    units wait for each other by a unit at most, once a step. On CPU that is cheap. An accelerator
    wants many units at once, so there it is done only with devices that would have no client.

    Args:
        devices: of a process.
        clients: of a process.
        units: that a client draws in a step, on average.
        tiles: the same in tiles.
        is_cpu: whether the devices are cores of one processor.

    Returns:
        A divisor of `devices`.
    """

    def is_worth_it(together: int) -> bool:
        spare = clients * together <= devices
        return together <= units and (spare or (is_cpu and _CPU_TILES * together <= tiles))

    divisors = [d for d in range(1, devices + 1) if devices % d == 0]
    return max([d for d in divisors if is_worth_it(d)], default=1)
