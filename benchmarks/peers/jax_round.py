"""A whole private round of ours: the cohort's visit, the server's step, and the host's part.

python -m benchmarks.peers.round --only=private
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.peers.jax_steps import from_flat, loss_of, our_network, to_flat
from benchmarks.peers.problem import Flat, Problem
from fedjax_dp.federated.algorithms.fed_avg import fed_avg
from fedjax_dp.federated.client import client_update
from fedjax_dp.federated.cohort import (
    UNITS,
    CohortChunk,
    by_client,
    client_mesh,
    num_slots,
    replicated,
    stack_chunk,
)
from fedjax_dp.typing import ClientConstants, ClientKeys, ClientPlan, TilePool


class OurRound:
    """All clients, `devices` at a time; `benchmarks.peers.worker.Peer`."""

    def __init__(
        self,
        problem: Problem,
        *,
        devices: int = 1,
        devices_per_client: int = 1,
        microbatch_size: int = 1,
    ):
        """Compiles, and puts parameters and tiles on the devices.

        Args:
            problem: whose sizes have clients, steps and batch.
            devices: XLA devices, over which clients are spread.
            devices_per_client: of these, that share the units of a client.
            microbatch_size: of `client_update`.
        """
        self._sizes = problem.sizes
        self._mesh = client_mesh(devices, devices_per_client=devices_per_client)
        self._slots = num_slots(self._mesh, 1)
        update = client_update(
            loss_of(our_network(problem)),
            optax.sgd(problem.sizes.learning_rate),
            placement="dp_sgd",
            microbatch_size=microbatch_size,
            axis_name=UNITS,
        )
        algorithm = fed_avg(update, optax.sgd(1.0), mesh=self._mesh)
        everywhere = replicated(self._mesh)
        self._state, self._pool = jax.device_put(
            (
                algorithm.init(from_flat(problem.weights)),
                TilePool(jnp.asarray(problem.images), jnp.asarray(problem.labels)),
            ),
            everywhere,
        )
        self._begin = jax.jit(algorithm.begin, out_shardings=everywhere)
        self._finish = jax.jit(algorithm.finish)
        self._round_index = 0
        start = time.perf_counter()
        acc, chunk = self._begin(self._state), self._chunk(0, 0.0)
        visit = jax.jit(algorithm.visit, donate_argnums=0, out_shardings=(everywhere, None, None))
        self._visit = visit.lower(acc, self._state, chunk, self._pool).compile()
        analysis = self._visit.memory_analysis()
        self._temp_bytes = int(getattr(analysis, "temp_size_in_bytes", 0))
        self._compile_seconds = time.perf_counter() - start

    def _client(self, index: int, noise_multiplier: float) -> CohortChunk:
        sizes = self._sizes
        drawn = np.arange(sizes.steps * sizes.batch, dtype=np.int32)
        drawn = (drawn + index * len(drawn)).reshape(sizes.steps, sizes.batch, 1)
        rng = np.random.default_rng((self._round_index, index))
        keys = rng.integers(0, 2**32, (2, 2), dtype=np.uint32)
        clip = sizes.l2_clip_norm
        numbers = (1.0, clip, noise_multiplier * clip, 1.0 / sizes.batch, 1.0)
        return CohortChunk(
            ClientKeys(keys[0], keys[1]),
            (),
            ClientConstants(*(np.float32(number) for number in numbers)),
            ClientPlan(
                np.concatenate([drawn, drawn], 1),  # capacity above the draw, as in a real round
                np.full(sizes.steps, sizes.batch, np.int32),
                np.ones((sizes.steps, 2 * sizes.batch), np.int32),
            ),
        )

    def _chunk(self, first: int, noise_multiplier: float) -> CohortChunk:
        members = range(first, min(first + self._slots, self._sizes.clients))
        slots: list[Any] = [self._client(index, noise_multiplier) for index in members]
        slots += [None] * (self._slots - len(slots))
        return jax.device_put(stack_chunk(slots), by_client(self._mesh))

    def _round(self, noise_multiplier: float) -> Any:
        acc = self._begin(self._state)
        for first in range(0, self._sizes.clients, self._slots):
            chunk = self._chunk(first, noise_multiplier)
            acc, _, _ = self._visit(acc, self._state, chunk, self._pool)
        self._round_index += 1
        return jax.block_until_ready(self._finish(self._state, acc))

    def step(self) -> None:
        """One timed round."""
        self._round(self._sizes.noise_multiplier)

    def summed(self) -> Flat:
        """The clients' mean model delta, without noise."""
        before, after = to_flat(self._state.params), to_flat(self._round(0.0).params)
        return {name: after[name] - before[name] for name in before}

    def info(self) -> dict[str, Any]:
        """Compile time and temporary bytes of the visit, by its own analysis."""
        return {
            "program_compile_seconds": self._compile_seconds,
            "program_temp_bytes": self._temp_bytes,
            "devices": dict(self._mesh.shape),
        }


def make(problem: Problem, **options: Any) -> OurRound:
    """See `OurRound`."""
    return OurRound(problem, **options)
