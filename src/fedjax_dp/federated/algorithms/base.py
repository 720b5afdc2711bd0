"""What a federated algorithm is: pure functions that stream over blocks of clients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_dp.federated.client import ClientInfo
from fedjax_dp.federated.cohort import CohortChunk
from fedjax_dp.typing import ClientConstants, ClientPools, Params, ServerRelease, TilePool


class ServerState(NamedTuple):
    """What the server keeps between rounds."""

    params: Params
    optimizer_state: Any
    averaged_params: Params  # exponential moving average of `params`; equal to it without one
    round: Any  # int32 scalar, rounds finished
    clip_scale: Any = ()  # float32 [sites], clip norms over the first; () where they are fixed


class FederatedAlgorithm(NamedTuple):
    """Pure functions, each compiled once for a whole run.

    Attributes:
        init: `init(params) -> ServerState`.
        begin: `begin(state) -> acc`, an empty accumulator.
        visit: `visit(acc, state, chunk, pool) -> (acc, client_state, info)`, any number of times;
            of pools see `cohort.visit_clients`.
        finish: `finish(state, acc, release) -> state`, the server's step; `release` is what it
            needs to open the sum, the default where it needs nothing.
    """

    init: Callable[[Params], ServerState]
    begin: Callable[[ServerState], Any]
    visit: Callable[
        [Any, ServerState, CohortChunk, TilePool | ClientPools], tuple[Any, Any, ClientInfo]
    ]
    finish: Callable[..., ServerState]


class ServerStep(NamedTuple):
    """What all algorithms do with a mean delta.

    Attributes:
        init: `init(params) -> ServerState`.
        apply: `apply(state, mean_delta, clip_scale) -> ServerState`.
    """

    init: Callable[[Params], ServerState]
    apply: Callable[[ServerState, Params, Any], ServerState]


def server_step(
    optimizer: optax.GradientTransformation, ema_decay: float, clip_scale: Any = ()
) -> ServerStep:
    """The server's optimiser on the negative mean delta, and the moving average of its parameters.

    Args:
        optimizer: optax optimiser over the parameters.
        ema_decay: decay of the parameters' moving average in [0, 1); 0 keeps none. The decay of
            round t is min(ema_decay, (1 + t) / (10 + t)), so a short run is not held at its start.
        clip_scale: the first `ServerState.clip_scale`.

    Raises:
        ValueError: for a decay outside [0, 1).

    References:
        Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 1 (FedOpt).
    """
    if not 0.0 <= ema_decay < 1.0:
        raise ValueError(f"Expected 0 <= federation.ema_decay < 1, got {ema_decay=}.")

    def init(params: Params) -> ServerState:
        # Copies: donating one buffer under two names is an error.
        averaged = jax.tree.map(jnp.copy, params)
        scale = jax.tree.map(jnp.array, clip_scale)
        return ServerState(
            params, optimizer.init(params), averaged, jnp.zeros((), jnp.int32), scale
        )

    def apply(state: ServerState, mean_delta: Params, clip_scale: Any) -> ServerState:
        gradient = jax.tree.map(lambda leaf: -leaf, mean_delta)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer_state, state.params)
        params = optax.apply_updates(state.params, updates)
        step = state.round.astype(jnp.float32)
        decay = jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))
        averaged = jax.tree.map(
            lambda old, new: decay * old + (1.0 - decay) * new, state.averaged_params, params
        )
        return ServerState(params, optimizer_state, averaged, state.round + 1, clip_scale)

    return ServerStep(init, apply)


def at_scale(chunk: CohortChunk, clip_scale: Any) -> CohortChunk:
    """The chunk with the clients' present clip norms, and noise in proportion."""
    scale = clip_scale[chunk.constants.site]
    constants = chunk.constants
    scaled: ClientConstants = constants._replace(
        l2_clip_norm=constants.l2_clip_norm * scale, noise_stddev=constants.noise_stddev * scale
    )
    return chunk._replace(constants=scaled)


def release_at_scale(release: ServerRelease, scale: Any) -> ServerRelease:
    """The release with the present clip norm, and noise in proportion."""
    return release._replace(
        l2_clip_norm=release.l2_clip_norm * scale, noise_stddev=release.noise_stddev * scale
    )
