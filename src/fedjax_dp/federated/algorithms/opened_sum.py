"""The server opens one noised sum a round: central and distributed differential privacy."""

from typing import Any

import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from fedjax_dp.federated import cohort
from fedjax_dp.federated.aggregators import Aggregator
from fedjax_dp.federated.algorithms.base import (
    FederatedAlgorithm,
    ServerState,
    at_scale,
    release_at_scale,
    server_step,
)
from fedjax_dp.federated.client import ClientUpdate
from fedjax_dp.privacy.adaptive_clipping import AdaptiveClipping, adapt
from fedjax_dp.typing import ServerRelease


def opened_sum(
    client_update: ClientUpdate,
    server_optimizer: optax.GradientTransformation,
    aggregator: Aggregator,
    *,
    ema_decay: float = 0.0,
    clients_per_block: int = 1,
    mesh: Mesh | None = None,
    adaptive: AdaptiveClipping | None = None,
    num_sites: int = 1,
) -> FederatedAlgorithm:
    """Sum what the clients send, open the sum, divide by a public number, take the server's step.

    Guarantee: the parameters depend on the clients through the opened sum alone. With
    `aggregators.noised_sum` the server, who is trusted, adds the noise when it opens (DP-FedAvg);
    with `aggregators.secure_sum` the accumulator holds masked words, and the noise is the clients'.
    A round without clients takes the same path.

    Args:
        client_update: of placement "central", or `share.masked_share`.
        server_optimizer: optax optimiser over the parameters.
        aggregator: its `finish(acc, release)` returns the mean delta and the mean of the count that
            adapts the clip norm.
        ema_decay: see `base.server_step`.
        clients_per_block: see `cohort.visit_clients`.
        mesh: see `cohort.visit_clients`.
        adaptive: how the common clip norm moves; None keeps it.
        num_sites: clients of the run.

    Returns:
        The algorithm. Its `finish` needs a release.

    References:
        McMahan, Ramage, Talwar, Zhang 2018, "Learning Differentially Private Recurrent Language
        Models", Algorithm 1 with the fixed-divisor estimator; Kairouz, Liu, Steinke 2021, "The
        Distributed Discrete Gaussian Mechanism for Federated Learning with Secure Aggregation",
        Algorithms 1 and 2; Andrew et al. 2021, Algorithm 1, for the clip norm.
    """
    ones = jnp.ones(num_sites, jnp.float32)
    server = server_step(server_optimizer, ema_decay, () if adaptive is None else ones)
    visit_clients = cohort.visit_clients(
        client_update, aggregator, clients_per_block=clients_per_block, mesh=mesh
    )

    def begin(state: ServerState) -> Any:
        return aggregator.init(state.params)

    def visit(acc: Any, state: ServerState, chunk: Any, pool: Any) -> Any:
        if adaptive is not None:
            chunk = at_scale(chunk, state.clip_scale)
        return visit_clients(acc, state.params, chunk, pool)

    def finish(state: ServerState, acc: Any, release: ServerRelease) -> ServerState:
        if adaptive is None:
            mean_delta, _ = aggregator.finish(acc, release)
            return server.apply(state, mean_delta, state.clip_scale)
        # One clip norm for all: every entry of the scale is the same.
        release = release_at_scale(release, state.clip_scale[0])
        mean_delta, centred = aggregator.finish(acc, release)
        return server.apply(state, mean_delta, adapt(state.clip_scale, centred, adaptive))

    return FederatedAlgorithm(server.init, begin, visit, finish)
