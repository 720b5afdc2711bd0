"""From a table of tiles to clients, and from clients to a round: for notebooks and own programs.

`training.run` does the same from a configuration, and charges, resumes and reports besides.
"""

import warnings
from collections.abc import Sequence
from typing import Any

from fedjax_dp.data.tiles import TileTable
from fedjax_dp.data.units import unit_index
from fedjax_dp.federated.cohort import CohortChunk, stack_chunk
from fedjax_dp.federated.rounds import Site, client_input
from fedjax_dp.privacy.budgets import make_mechanisms
from fedjax_dp.privacy.secrets import Secrets
from fedjax_dp.typing import TilePool


def protect(table: TileTable, *, unit: str, **settings: Any) -> tuple[tuple[Site, ...], TilePool]:
    """The sites of a table, each with the mechanism that protects its units, and their pool.

    What a user should know before trusting a mechanism (delta not below 1/n, a site that draws all
    its units in every step) comes as a `UserWarning`.

    Args:
        table: training tiles, no two of which share pixels; its sites become the clients.
        unit: "tile", "slide" or "patient".
        **settings: the other arguments of `privacy.budgets.make_mechanisms`.

    Returns:
        The sites, weighted by their number of units, and the pool that their indices refer to.

    Raises:
        ValueError: a setting is out of range, or unit = patient where a patient is unknown.

    Example:
        >>> clients, pool = protect(
        ...     table, unit="patient", placement="dp_sgd", expected_batch_size=16,
        ...     local_steps=1, rounds=20, l2_clip_norm=1.0, target_epsilon=8.0,
        ... )
        >>> client_update = client.client_update(loss_fn, optax.sgd(1.0), placement="dp_sgd")
        >>> deltas, _, info = jax.vmap(client_update, in_axes=(None, 0, 0, 0, 0, None))(
        ...     params, *draw(clients), pool
        ... )
    """
    owned = {site: unit_index(table, site, unit).tiles for site in table.sites}
    made = make_mechanisms(
        {site: len(units) for site, units in owned.items()},
        unit=unit,  # type: ignore[arg-type]
        **settings,
    )
    for warning in made.warnings:
        warnings.warn(warning, stacklevel=2)
    sites = tuple(
        Site(name=name, unit_tiles=owned[name], mechanism=mechanism, weight=float(len(owned[name])))
        for name, mechanism in made.mechanisms.items()
    )
    return sites, TilePool(table.images, table.labels)


def draw(
    sites: Sequence[Site], secrets: Secrets | None = None, round_index: int = 0
) -> CohortChunk:
    """One round of `sites`, drawn and stacked: what `jax.vmap(client_update)` maps over.

    Charges nothing: count the rounds that you release, and ask `Mechanism.epsilon` for their price.

    Args:
        sites: the clients, all with the same local steps and tiles per unit.
        secrets: of these sites; fresh ones from the operating system where None.
        round_index: a new number for each round drawn with the same secrets.

    Returns:
        Keys, client state, constants and plan with a leading client axis, in the order of `sites`.
    """
    if secrets is None:
        secrets = Secrets.generate([site.name for site in sites])
    num_slots = max(site.mechanism.capacity for site in sites)
    return stack_chunk(
        [client_input(site, secrets, round_index, num_slots=num_slots) for site in sites]
    )
