"""Federated averaging (McMahan et al. 2017) with any server optimiser (Reddi et al. 2021)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from fedjax_dp.federated import cohort
from fedjax_dp.federated.aggregators import Aggregator, weighted_mean
from fedjax_dp.federated.algorithms.base import FederatedAlgorithm, ServerState
from fedjax_dp.federated.client import ClientUpdate
from fedjax_dp.typing import Params


def fed_avg(
    client_update: ClientUpdate,
    server_optimizer: optax.GradientTransformation,
    *,
    aggregator: Aggregator | None = None,
    ema_decay: float = 0.0,
    clients_per_block: int = 1,
    mesh: Mesh | None = None,
) -> FederatedAlgorithm:
    """FedAvg: average the clients' deltas, and let the server's optimiser take the step.

    The negative mean delta is the server optimiser's gradient: `optax.sgd(1.0)` is FedAvg,
    `optax.adam` is FedAdam. Privacy is wholly the client update's; what happens here is
    post-processing.

    Args:
        client_update: the update of one client, private or not.
        server_optimizer: optax optimiser over the parameters.
        aggregator: `weighted_mean()` by default.
        ema_decay: decay of the parameters' moving average in [0, 1); 0 keeps none. The decay of
            round t is min(ema_decay, (1 + t) / (10 + t)), so a short run is not held at its start.
        clients_per_block: see `cohort.visit_clients`.
        mesh: see `cohort.visit_clients`.

    Returns:
        The algorithm; none of its functions is jitted yet.

    Raises:
        ValueError: for a decay outside [0, 1).

    References:
        McMahan et al. 2017, Algorithm 1; Reddi et al. 2021, "Adaptive Federated Optimization",
        Algorithm 1 (FedOpt).
    """
    if not 0.0 <= ema_decay < 1.0:
        raise ValueError(f"Expected 0 <= federation.ema_decay < 1, got {ema_decay=}.")
    combine = weighted_mean() if aggregator is None else aggregator
    visit_clients = cohort.visit_clients(
        client_update, combine, clients_per_block=clients_per_block, mesh=mesh
    )

    def init(params: Params) -> ServerState:
        # A copy: donating one buffer under two names is an error.
        averaged = jax.tree.map(jnp.copy, params)
        return ServerState(
            params, server_optimizer.init(params), averaged, jnp.zeros((), jnp.int32)
        )

    def begin(state: ServerState) -> Any:
        return combine.init(state.params)

    def visit(acc: Any, state: ServerState, chunk: Any, pool: Any) -> Any:
        return visit_clients(acc, state.params, chunk, pool)

    def finish(state: ServerState, acc: Any) -> ServerState:
        mean_delta = combine.finish(acc)
        gradient = jax.tree.map(lambda leaf: -leaf, mean_delta)
        updates, optimizer_state = server_optimizer.update(
            gradient, state.optimizer_state, state.params
        )
        params = optax.apply_updates(state.params, updates)
        step = state.round.astype(jnp.float32)
        decay = jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))
        averaged = jax.tree.map(
            lambda old, new: decay * old + (1.0 - decay) * new, state.averaged_params, params
        )
        return ServerState(params, optimizer_state, averaged, state.round + 1)

    return FederatedAlgorithm(init, begin, visit, finish)
