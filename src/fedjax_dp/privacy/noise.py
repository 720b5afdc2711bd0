"""Gaussian noise in float32 whose tail reaches beyond nine standard deviations."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from fedjax_dp.typing import Params, PRNGKey

NOISE_REACH = 9.5
"""Standard deviations that no draw of `gaussian` exceeds: sqrt(2 log 2**65) = 9.493."""


def gaussian(key: PRNGKey, shape: tuple[int, ...]) -> Float32[Array, "..."]:
    """Standard normal draws by Box and Muller (1958), from 96 random bits a pair.

    Guarantees: float32; the radius comes from 64 bits and reaches 9.41 (`jax.random.normal` in
    float32 stops at 5.42, which alone is a measurable leak). Hardened, not proven: the values lie
    on a floating-point grid.

    Args:
        key: typed threefry key, consumed.
        shape: shape of the draws.

    Raises:
        ValueError: for a key that is not a typed threefry key.
    """
    _check(key)
    size = 1
    for extent in shape:
        size *= extent
    pairs = -(-size // 2)
    high, low, angle = jax.random.bits(key, (3, pairs), jnp.uint32).astype(jnp.float32)
    # (high + low / 2**32) / 2**32 is uniform on a grid of 2**-64; zero becomes half a grid step.
    uniform = (high + low * 2.0**-32) * 2.0**-32
    # float32 rounds the topmost 2**-25 of the grid up to one, whose logarithm is a clean zero.
    radius = jnp.sqrt(-2.0 * jnp.log(jnp.clip(uniform, 2.0**-65, 1.0)))
    turn = angle * jnp.float32(2.0 * jnp.pi * 2.0**-32)
    draws = jnp.concatenate([radius * jnp.cos(turn), radius * jnp.sin(turn)])
    return draws[:size].reshape(shape)


def add_noise(key: PRNGKey, tree: Params, noise_stddev: Any) -> Params:
    """`tree + noise_stddev * N(0, 1)`, independent for every element of every leaf.

    Guarantees: noise is drawn and added in float32 whatever the leaves' dtype, and what is
    returned is float32.

    Args:
        key: typed threefry key, consumed by one draw for all leaves together.
        tree: pytree of floating-point arrays.
        noise_stddev: absolute standard deviation, scalar, may be traced.
    """
    _check(key)
    leaves, treedef = jax.tree.flatten(tree)
    # One draw for all leaves: a draw for each makes the program slow to compile.
    draws = gaussian(key, (sum(leaf.size for leaf in leaves),))
    ends = list(itertools.accumulate(leaf.size for leaf in leaves))
    noised = [
        leaf.astype(jnp.float32) + noise_stddev * draws[end - leaf.size : end].reshape(leaf.shape)
        for leaf, end in zip(leaves, ends, strict=True)
    ]
    return jax.tree.unflatten(treedef, noised)


def _check(key: Any) -> None:
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"Expected a typed key, got an array of {key.dtype}. Use jax.random.key or "
            "jax.random.wrap_key_data."
        )
    if "threefry" not in str(jax.random.key_impl(key)):
        raise ValueError(
            f"Expected a threefry key, got {jax.random.key_impl(key)}: other generators are not "
            "counter-based the same way on every backend. Use impl='threefry2x32'."
        )
