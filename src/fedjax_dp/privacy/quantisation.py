"""Per-unit gradients in integers, for noise whose law is exact and for sums modulo a power of two.

Each unit is quantised BEFORE the sum and its integer norm is checked, so the sensitivity of the sum
is a fact about integers: no rounding of the sum, of the norm or of the noise lies outside of it.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32, UInt32

from fedjax_dp.privacy.blocks import SummedGradFn, UnitAux, UnitLoss, in_blocks, unit_sums
from fedjax_dp.privacy.clipping import Relation, normalised_grad
from fedjax_dp.privacy.discrete_gaussian import integer_l2_sensitivity
from fedjax_dp.typing import Params

MAX_LEVELS = 2**21
MAX_DIMENSION = 2**25

_MAGNITUDE = 2**22  # of a quantised coordinate: two limbs of 11 bits
_WIDTH = 2**15  # columns, of at most 1024 squares below 2**22 each: their sums fit uint32
_LIMB, _LIMBS = 16, 5
# What float32 rounding of norm and product may add to a unit's weight is taken off beforehand.
_HEADROOM = 1.0 - 2.0**-18


class QuantisedGrad:
    """A `SummedGradFn` in integers that states its sensitivity. Made by `quantised_grad`.

    Attributes:
        levels: integer units in a gradient of norm one; divide the noised sum by it.
    """

    def __init__(self, fn: SummedGradFn, levels: int):
        self._fn, self.levels = fn, levels

    def __call__(
        self, params: Params, units: Any, keys: Any, num_units: Any, l2_clip_norm: Any
    ) -> tuple[Params, UnitAux]:
        """See `SummedGradFn.__call__`; the sum is int32.

        Raises:
            ValueError: the sum of all slots could leave int32, or there are too many parameters.
        """
        dimension = _dimension(params)
        if dimension > MAX_DIMENSION:
            raise ValueError(
                f"Expected at most {MAX_DIMENSION} parameters, got {dimension}: the check of a "
                "unit's norm holds no more."
            )
        slots, bound = keys.shape[0], integer_l2_sensitivity(self.levels, dimension)
        if slots * bound >= 2**31:
            raise ValueError(
                f"Expected capacity * (levels + sqrt(dimension) / 2) < 2**31, got {slots} * "
                f"{bound}: the int32 sum could overflow. Lower levels or the capacity."
            )
        return self._fn(params, units, keys, num_units, l2_clip_norm)

    def sensitivity(self, dimension: int, relation: Relation = "zero_out") -> int:
        """L2 distance of the sums of two neighbouring data sets, in integer units; exact."""
        if relation not in get_args(Relation):
            raise ValueError(f"Expected relation in {get_args(Relation)}, got {relation!r}.")
        bound = integer_l2_sensitivity(self.levels, dimension)
        return 2 * bound if relation == "replace_one" else bound


def quantised_grad(
    loss_fn: UnitLoss,
    *,
    microbatch_size: int = 1,
    levels: int = 2**20,
    loop: Literal["drawn", "capacity"] = "drawn",
    axis_name: str | None = None,
) -> QuantisedGrad:
    """Per-unit normalised gradients, quantised to integers and then summed.

    Every unit's gradient, normalised as in `clipping.clipped_grad` to a weight of at most one, is
    multiplied by `levels` and rounded to the nearest integers, ties to even.

    Guarantees: the sums of two data sets that differ in one unit's contribution being zero differ
    by an integer vector of norm at most `integer_l2_sensitivity(levels, dimension)` (twice that if
    one unit is replaced by another). This is exact, whatever floating-point arithmetic did before:
    the squared norm of every unit's integers is computed and compared without rounding, and a unit
    that fails adds exactly zero. None does unless float32 norms are off by 3e-6, and then it is
    counted as `non_finite`. Units beyond `num_units`, and units whose gradient is not finite, add
    exactly zero. The order of the sum and `microbatch_size` change no bit of it, given the units'
    gradients.

    Args:
        loss_fn: as in `clipping.clipped_grad`.
        microbatch_size: as in `clipping.clipped_grad`.
        levels: integer units in a gradient of norm one, in [1, 2**21]. Rounding adds at most
            sqrt(dimension) / 2 / levels to the sensitivity.
        loop: as in `clipping.clipped_grad`.
        axis_name: as in `clipping.clipped_grad`.

    Returns:
        The function; its `.sensitivity(dimension, relation)` is in integer units.

    Raises:
        ValueError: for levels or a microbatch size out of range, or an unknown loop.
    """
    if not 1 <= levels <= MAX_LEVELS:
        raise ValueError(f"Expected levels in [1, {MAX_LEVELS}], got {levels=}.")
    normalised = normalised_grad(loss_fn)

    def unit(params: Params, unit: Any, key: Any, clip: Any) -> Any:
        loss, norm, clipped, gradient = normalised(params, unit, key, clip)
        integers, is_within = _quantise(gradient, levels)
        return integers, (loss, norm, clipped, jnp.isfinite(norm) & is_within)

    def block(params: Params, units: Any, keys: Any, is_real: Array, clip: Any) -> Any:
        def masked_sum(leaf: Array) -> Array:
            mask = is_real.reshape(-1, *[1] * (leaf.ndim - 1))
            return jnp.sum(jnp.where(mask, leaf, 0), 0, dtype=jnp.int32)

        if microbatch_size == 1:  # not a vmap over one: that would group the convolutions
            one = unit(params, jax.tree.map(lambda leaf: leaf[0], units), keys[0], clip)
            integers, of_units = jax.tree.map(lambda leaf: leaf[None], one)
        else:
            integers, of_units = jax.vmap(unit, (None, 0, 0, None))(params, units, keys, clip)
        loss, norm, clipped, is_good = of_units
        total = jax.tree.map(masked_sum, integers)
        return total, unit_sums(loss, norm, clipped, is_good, is_real)

    return QuantisedGrad(in_blocks(block, microbatch_size, loop, axis_name), levels)


def squared_norm(tree: Any) -> UInt32[Array, "5"]:
    """Sum of the squares of integers below 2**22 in magnitude, in limbs of 16 bits, lowest first.

    Exact: with v = 2048 a + b, the sums of b b, a b and a a over columns of at most 1024 stay below
    2**32, and the sums of their upper and of their lower halves over 2**15 columns below 2**31.
    """
    parts, rests = [], []
    for leaf in jax.tree.leaves(tree):
        flat, size = leaf.ravel(), leaf.size // _WIDTH * _WIDTH
        if size:
            parts.append(_sums_of_products(flat[:size]))
        rests.append(flat[size:])
    rest = lax.optimization_barrier(jnp.concatenate(rests))  # fused, it is computed thrice
    parts.append(_sums_of_products(jnp.pad(rest, (0, -rest.size % _WIDTH))))
    products = _carry(jnp.sum(jnp.stack(parts), 0, dtype=jnp.uint32))
    limbs = jnp.zeros(_LIMBS, jnp.uint32)
    for product, shift in zip(products, (0, 12, 22), strict=True):  # bb + 2**12 ab + 2**22 aa
        whole, bits = divmod(shift, _LIMB)
        limbs += jnp.pad(product, (whole, 0))[:_LIMBS] << bits
    return _carry(limbs)


def _sums_of_products(flat: Int32[Array, "n"]) -> UInt32[Array, "3 5"]:
    magnitude = jnp.abs(flat.reshape(-1, _WIDTH)).astype(jnp.uint32)
    high, low = magnitude >> 11, magnitude & 2047
    limbs = []
    for product in (low * low, high * low, high * high):
        columns = jnp.sum(product, 0, dtype=jnp.uint32)
        lower = jnp.sum(columns & 0xFFFF, dtype=jnp.uint32)
        upper = jnp.sum(columns >> _LIMB, dtype=jnp.uint32) + (lower >> _LIMB)
        zero = jnp.zeros_like(upper)
        limbs.append(jnp.stack([lower & 0xFFFF, upper & 0xFFFF, upper >> _LIMB, zero, zero]))
    return jnp.stack(limbs)


def _carry(limbs: UInt32[Array, "*rows 5"]) -> UInt32[Array, "*rows 5"]:
    """The same numbers with every limb below 2**16."""
    carried, carry = [], jnp.zeros_like(limbs[..., 0])
    for i in range(_LIMBS):
        carry = limbs[..., i] + carry
        carried.append(carry & 0xFFFF)
        carry = carry >> _LIMB
    return jnp.stack(carried, -1)


def _at_most(limbs: UInt32[Array, "5"], bound: int) -> Bool[Array, ""]:
    is_below, is_equal = jnp.bool_(False), jnp.bool_(True)
    for i in reversed(range(_LIMBS)):
        limb = (bound >> (_LIMB * i)) & 0xFFFF
        is_below |= is_equal & (limbs[i] < limb)
        is_equal &= limbs[i] == limb
    return is_below | is_equal


def _quantise(gradient: Params, levels: int) -> tuple[Params, Bool[Array, ""]]:
    """The integers, and whether they are within the bound; all zero where they are not."""
    scaled = jax.tree.map(lambda leaf: leaf * jnp.float32(levels * _HEADROOM), gradient)
    # Not the negation: NaN must not fit.
    fits = jnp.stack(
        [jnp.all(jnp.abs(leaf) < _MAGNITUDE - 1) for leaf in jax.tree.leaves(scaled)]
    ).all()
    integers = jax.tree.map(
        lambda leaf: jnp.where(fits, jnp.round(leaf), 0.0).astype(jnp.int32), scaled
    )
    bound = integer_l2_sensitivity(levels, _dimension(gradient))
    is_within = fits & _at_most(squared_norm(integers), bound**2)
    return jax.tree.map(lambda leaf: jnp.where(is_within, leaf, 0), integers), is_within


def _dimension(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
