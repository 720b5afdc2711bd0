"""How the server combines model deltas, one at a time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_dp.privacy.noise import add_noise
from fedjax_dp.typing import Params, ServerRelease


class Aggregator(NamedTuple):
    """A streaming reduction over clients, pure functions all.

    The accumulator holds a constant number of parameter copies, whatever the cohort's size.

    Attributes:
        init: `init(params) -> acc`, the accumulator of no client.
        add: `add(acc, model_delta, weight) -> acc`.
        merge: `merge(acc, acc) -> acc`, of two disjoint sets of clients.
        finish: `finish(acc) -> model_delta`; of a sum that the server opens
            `finish(acc, release) -> (model_delta, centred)`, `centred` being the mean of the
            count that adapts the clip norm.
    """

    init: Callable[[Params], Any]
    add: Callable[[Any, Params, Any], Any]
    merge: Callable[[Any, Any], Any]
    finish: Callable[..., Any]


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


class NoisedSum(NamedTuple):
    """Accumulator of `noised_sum`: un-noised, for the trusted server alone."""

    total: Params
    centred: Any


def noised_sum() -> Aggregator:
    """The weighted sum of clipped updates, noised by the server when it is opened.

    A delta is `client.CentralMessage`. Guarantee: `finish` returns (sum of w_k times update +
    sigma N(0, I)) over the release's public divisor; with no client at all, noise alone. The
    sensitivity is the caller's matter: the largest weight must be one.

    References:
        McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models",
        Algorithm 1, estimator f_f.
    """

    def init(params: Params) -> NoisedSum:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        return NoisedSum(zeros, jnp.zeros((), jnp.float32))

    def add(acc: NoisedSum, message: Any, weight: Any) -> NoisedSum:
        update, centred = message
        total = jax.tree.map(lambda sum_, leaf: sum_ + weight * leaf, acc.total, update)
        return NoisedSum(total, acc.centred + centred)

    def merge(left: NoisedSum, right: NoisedSum) -> NoisedSum:
        return jax.tree.map(jnp.add, left, right)

    def finish(acc: NoisedSum, release: ServerRelease) -> tuple[Params, Any]:
        noise_key, count_key = jax.random.split(release.noise_key)
        noised = add_noise(noise_key, acc.total, release.noise_stddev)
        mean = jax.tree.map(lambda leaf: leaf / release.divisor, noised)
        centred = add_noise(count_key, acc.centred, release.count_noise_stddev)
        return mean, centred / release.count_divisor

    return Aggregator(init, add, merge, finish)


def secure_sum(like: Params, step: float, *, has_count: bool = False) -> Aggregator:
    """The modular sum of masked words, opened by taking away what the masks leave in it.

    A delta is uint32 [M], from `share.masked_share` of the same step: the masked words of one
    client's noised sum of clipped, normalised gradients, and of its count where it has one.

    Guarantee: the accumulator is the sum of the words modulo 2**32 and nothing else; `finish` reads
    it as signed integers times `step`. Weights are not used: every drawn unit counts the same.

    Args:
        like: parameters whose shapes the opened vector takes.
        step: value of one integer, in clip norms.
        has_count: whether the last word is the count that adapts the clip norm.
    """
    leaves, treedef = jax.tree.flatten(like)
    size = sum(leaf.size for leaf in leaves)

    def init(params: Params) -> Any:
        del params
        return jnp.zeros(size + has_count, jnp.uint32)

    def add(acc: Any, words: Any, weight: Any) -> Any:
        del weight
        return acc + words

    def merge(left: Any, right: Any) -> Any:
        return left + right

    def finish(acc: Any, release: ServerRelease) -> tuple[Params, Any]:
        opened = jax.lax.bitcast_convert_type(acc - release.unmask, jnp.int32)
        values = opened.astype(jnp.float32) * step
        factor = -release.l2_clip_norm / release.divisor
        parts = jnp.split(values[:size] * factor, np.cumsum([leaf.size for leaf in leaves])[:-1])
        mean = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        centred = values[-1] / release.count_divisor if has_count else jnp.zeros(())
        return jax.tree.unflatten(treedef, mean), centred

    return Aggregator(init, add, merge, finish)
