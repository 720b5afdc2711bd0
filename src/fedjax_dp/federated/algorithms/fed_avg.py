"""Federated averaging (McMahan et al. 2017) with any server optimiser (Reddi et al. 2021)."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from fedjax_dp.federated import cohort
from fedjax_dp.federated.aggregators import Aggregator, weighted_mean
from fedjax_dp.federated.algorithms.base import (
    FederatedAlgorithm,
    ServerState,
    at_scale,
    server_step,
)
from fedjax_dp.federated.client import ClientUpdate
from fedjax_dp.privacy.adaptive_clipping import AdaptiveClipping, adapt
from fedjax_dp.typing import ServerRelease


class _Adapting(NamedTuple):
    """Accumulator of clients that adapt their clip norms, each by its own noised count."""

    deltas: Any
    centred: Any  # float32 [sites], noised means of (b - 1/2)
    visited: Any  # float32 [sites], 1 where the site took part


def fed_avg(
    client_update: ClientUpdate,
    server_optimizer: optax.GradientTransformation,
    *,
    aggregator: Aggregator | None = None,
    ema_decay: float = 0.0,
    clients_per_block: int = 1,
    mesh: Mesh | None = None,
    adaptive: AdaptiveClipping | None = None,
    num_sites: int = 1,
) -> FederatedAlgorithm:
    """FedAvg: average the clients' deltas, and let the server's optimiser take the step.

    The negative mean delta is the server optimiser's gradient: `optax.sgd(1.0)` is FedAvg,
    `optax.adam` is FedAdam. Privacy is wholly the client update's; what happens here is
    post-processing, the adaptation of clip norms by the counts that clients noised included.

    Args:
        client_update: the update of one client, private or not.
        server_optimizer: optax optimiser over the parameters.
        aggregator: `weighted_mean()` by default.
        ema_decay: see `base.server_step`.
        clients_per_block: see `cohort.visit_clients`.
        mesh: see `cohort.visit_clients`.
        adaptive: how each site's clip norm moves; None keeps it. Needs a client update that was
            made with `is_adaptive`.
        num_sites: clients of the run, for `adaptive`.

    Returns:
        The algorithm; none of its functions is jitted yet.

    References:
        McMahan et al. 2017, Algorithm 1; Reddi et al. 2021, "Adaptive Federated Optimization",
        Algorithm 1 (FedOpt).
    """
    combine = weighted_mean() if aggregator is None else aggregator
    ones = jnp.ones(num_sites, jnp.float32)
    server = server_step(server_optimizer, ema_decay, () if adaptive is None else ones)
    visit_clients = cohort.visit_clients(
        client_update, combine, clients_per_block=clients_per_block, mesh=mesh
    )

    def begin(state: ServerState) -> Any:
        deltas = combine.init(state.params)
        return deltas if adaptive is None else _Adapting(deltas, 0.0 * ones, 0.0 * ones)

    def visit(acc: Any, state: ServerState, chunk: Any, pool: Any) -> Any:
        if adaptive is None:
            return visit_clients(acc, state.params, chunk, pool)
        chunk = at_scale(chunk, state.clip_scale)
        deltas, client_state, info = visit_clients(acc.deltas, state.params, chunk, pool)
        site, is_active = chunk.constants.site, chunk.constants.is_active
        centred = acc.centred.at[site].add(is_active * info.centred_count)
        visited = acc.visited.at[site].add(is_active)
        return _Adapting(deltas, centred, visited), client_state, info

    def finish(state: ServerState, acc: Any, release: ServerRelease | None = None) -> ServerState:
        del release
        if adaptive is None:
            return server.apply(state, combine.finish(acc), state.clip_scale)
        moved = adapt(state.clip_scale, acc.centred, adaptive)
        scale = jnp.where(acc.visited > 0, moved, state.clip_scale)
        return server.apply(state, combine.finish(acc.deltas), scale)

    return FederatedAlgorithm(server.init, begin, visit, finish)
