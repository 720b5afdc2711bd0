"""What a federated algorithm is: pure functions that stream over blocks of clients."""

from collections.abc import Callable
from typing import Any, NamedTuple

from fedjax_dp.federated.client import ClientInfo
from fedjax_dp.federated.cohort import CohortChunk
from fedjax_dp.typing import Params, TilePool


class ServerState(NamedTuple):
    """What the server keeps between rounds."""

    params: Params
    optimizer_state: Any
    averaged_params: Params  # exponential moving average of `params`; equal to it without one
    round: Any  # int32 scalar, rounds finished


class FederatedAlgorithm(NamedTuple):
    """Pure functions, each compiled once for a whole run.

    Attributes:
        init: `init(params) -> ServerState`.
        begin: `begin(state) -> acc`, an empty accumulator.
        visit: `visit(acc, state, chunk, pool) -> (acc, client_state, info)`, any number of times.
        finish: `finish(state, acc) -> state`, the server's step.
    """

    init: Callable[[Params], ServerState]
    begin: Callable[[ServerState], Any]
    visit: Callable[[Any, ServerState, CohortChunk, TilePool], tuple[Any, Any, ClientInfo]]
    finish: Callable[[ServerState, Any], ServerState]
