"""How the server combines model deltas, one at a time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_dp.typing import Params


class Aggregator(NamedTuple):
    """A streaming reduction over clients, pure functions all.

    The accumulator holds a constant number of parameter copies, whatever the cohort's size.

    Attributes:
        init: `init(params) -> acc`, the accumulator of no client.
        add: `add(acc, model_delta, weight) -> acc`.
        merge: `merge(acc, acc) -> acc`, of two disjoint sets of clients.
        finish: `finish(acc) -> model_delta`.
    """

    init: Callable[[Params], Any]
    add: Callable[[Any, Params, Any], Any]
    merge: Callable[[Any, Any], Any]
    finish: Callable[[Any], Params]


class WeightedSum(NamedTuple):
    """Accumulator of `weighted_mean`."""

    total: Params
    weight: Any


def weighted_mean() -> Aggregator:
    """The mean of the clients' deltas with public weights, in float32.

    Guarantee: post-processing of what the clients sent. The divisor is the sum of the weights,
    which must be public (for instance each site's public number of units). The mean of no client,
    or of weights that are all zero, is zero.

    References:
        McMahan et al. 2017, Algorithm 1, the server's line of the average.
    """

    def init(params: Params) -> WeightedSum:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        return WeightedSum(zeros, jnp.zeros((), jnp.float32))

    def add(acc: WeightedSum, model_delta: Params, weight: Any) -> WeightedSum:
        total = jax.tree.map(lambda sum_, leaf: sum_ + weight * leaf, acc.total, model_delta)
        return WeightedSum(total, acc.weight + weight)

    def merge(left: WeightedSum, right: WeightedSum) -> WeightedSum:
        return jax.tree.map(jnp.add, left, right)

    def finish(acc: WeightedSum) -> Params:
        divisor = jnp.where(acc.weight > 0, acc.weight, 1.0)
        return jax.tree.map(lambda leaf: leaf / divisor, acc.total)

    return Aggregator(init, add, merge, finish)
