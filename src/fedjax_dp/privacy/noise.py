"""Gaussian noise in float32 whose tail reaches beyond nine standard deviations."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, UInt32

from fedjax_dp.typing import Params, PRNGKey

NOISE_REACH = 9.5
"""Standard deviations that no draw of `gaussian` exceeds: sqrt(2 log 2**65) = 9.493."""

_BLOCK = 8192
"""Pairs that are drawn together."""


def gaussian(
    key: PRNGKey, shape: tuple[int, ...], *, axis_name: str | None = None
) -> Float32[Array, "..."]:
    """Standard normal draws by Box and Muller (1958), from 96 random bits a pair.

    Guarantees: float32; the radius comes from 64 bits and reaches 9.41 (`jax.random.normal` in
    float32 stops at 5.42, which alone is a measurable leak). Hardened, not proven: the values lie
    on a floating-point grid.

    Args:
        key: typed threefry key, consumed.
        shape: shape of the draws.
        axis_name: mesh axis of an enclosing `shard_map` whose devices hold the same key: each
            draws a part and all get the whole, bit for bit what one alone draws.

    Raises:
        ValueError: for a key that is not a typed threefry key.
    """
    _check(key)
    size = math.prod(shape)
    pairs = -(-size // 2)
    if pairs <= _BLOCK:
        draws = _pairs(key, pairs)
    else:
        # A block stays in a core's cache from its bits to its draws, and only these are kept.
        places = 1 if axis_name is None else lax.axis_size(axis_name)
        place = lax.axis_index(axis_name) if places > 1 else 0
        turns = -(-pairs // (_BLOCK * places))
        draws = lax.map(
            lambda index: _pairs(jax.random.fold_in(key, index), _BLOCK),
            jnp.arange(turns) * places + place,
        )
        if places > 1:
            # A sum with zeros is exact, and on CPU far cheaper than gathering.
            alone = jnp.zeros((turns, places, *draws.shape[1:]), draws.dtype)
            draws = lax.psum(alone.at[:, place].set(draws), axis_name)
    return draws.reshape(-1)[:size].reshape(shape)


def _pairs(key: PRNGKey, pairs: int) -> Float32[Array, "2 pairs"]:
    """Independent pairs of standard normal draws."""
    high, low, angle = jax.random.bits(key, (3, pairs), jnp.uint32)
    # (high + low / 2**32) / 2**32 is uniform on a grid of 2**-64; zero becomes half a grid step.
    uniform = (high.astype(jnp.float32) + low.astype(jnp.float32) * 2.0**-32) * 2.0**-32
    # float32 rounds the topmost 2**-25 of the grid up to one, whose logarithm is a clean zero.
    radius = jnp.sqrt(-2.0 * jnp.log(jnp.clip(uniform, 2.0**-65, 1.0)))
    return radius * jnp.stack(_cosine_and_sine(angle))


def _cosine_and_sine(angle: UInt32[Array, " n"]) -> tuple[Array, Array]:
    """Cosine and sine of `angle / 2**32` turns, within 1.5e-7.

    XLA's own are seven times slower on CPU: they reduce arguments of any size. Here the quadrant is
    the angle's two leading bits after rounding, and the rest, an eighth of a turn to either side,
    is exact. The polynomials are those of Cephes (Moshier 1989, sinf.c).
    """
    quadrant = (angle + jnp.uint32(1 << 29)) >> 30
    rest = lax.bitcast_convert_type(angle - (quadrant << 30), jnp.int32)
    x = rest.astype(jnp.float32) * jnp.float32(2.0 * math.pi * 2.0**-32)
    square = x * x
    sine = x + x * square * (
        -1.6666654611e-1 + square * (8.3321608736e-3 + square * -1.9515295891e-4)
    )
    cosine = (
        1.0
        - 0.5 * square
        + square
        * square
        * (4.166664568298827e-2 + square * (-1.388731625493765e-3 + square * 2.443315711809948e-5))
    )
    is_odd = quadrant & 1 == 1
    first, second = jnp.where(is_odd, sine, cosine), jnp.where(is_odd, cosine, sine)
    return (
        jnp.where((quadrant + 1) & 2 == 2, -first, first),
        jnp.where(quadrant & 2 == 2, -second, second),
    )


def add_noise(
    key: PRNGKey, tree: Params, noise_stddev: Any, *, axis_name: str | None = None
) -> Params:
    """`tree + noise_stddev * N(0, 1)`, independent for every element of every leaf.

    Guarantees: noise is drawn and added in float32 whatever the leaves' dtype, and what is
    returned is float32.

    Args:
        key: typed threefry key, consumed by one draw for all leaves together.
        tree: pytree of floating-point arrays.
        noise_stddev: absolute standard deviation, scalar, may be traced.
        axis_name: see `gaussian`; the devices hold the same tree too.
    """
    _check(key)
    leaves, treedef = jax.tree.flatten(tree)
    # One draw for all leaves: a draw for each makes the program slow to compile.
    draws = gaussian(key, (sum(leaf.size for leaf in leaves),), axis_name=axis_name)
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
