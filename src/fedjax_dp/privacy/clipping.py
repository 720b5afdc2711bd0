"""Per-unit clipping: the sum of unit gradients of which each weighs at most one."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from fedjax_dp.privacy.blocks import (
    SummedGradFn,
    UnitAux,
    UnitLoss,
    UnitSums,
    in_blocks,
    unit_sums,
)
from fedjax_dp.typing import Params, PRNGKey

Relation = Literal["zero_out", "add_or_remove_one", "replace_one"]


class ClippedGrad:
    """A `SummedGradFn` that states its sensitivity. Made by `clipped_grad`."""

    def __init__(self, fn: SummedGradFn):
        self._fn = fn

    def __call__(
        self, params: Params, units: Any, keys: Any, num_units: Any, l2_clip_norm: Any
    ) -> tuple[Params, UnitAux]:
        """See `SummedGradFn.__call__`."""
        return self._fn(params, units, keys, num_units, l2_clip_norm)

    def sensitivity(self, relation: Relation = "zero_out") -> float:
        """L2 distance of the sums of two neighbouring data sets, in units of the clip norm."""
        if relation not in get_args(Relation):
            raise ValueError(f"Expected relation in {get_args(Relation)}, got {relation!r}.")
        return 2.0 if relation == "replace_one" else 1.0


def global_norm(tree: Any) -> Float[Array, ""]:
    """L2 norm of all leaves together, in float32; infinity where an element is not finite.

    A gradient whose square overflows would otherwise have norm infinity, and one whose square
    underflows norm zero, and either would pass its clip unseen. So large and small leaves are
    scaled before squaring: by a constant, for a division by the largest magnitude may be compiled
    to a product with its reciprocal, which above 2**126 is subnormal and flushed to zero.
    """
    leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(tree)]
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in leaves]))
    is_large, is_small = largest > 2.0**50, largest < 2.0**-50
    scale = jnp.where(is_large, 2.0**-100, jnp.where(is_small, 2.0**100, 1.0))
    inverse = jnp.where(is_large, 2.0**100, jnp.where(is_small, 2.0**-100, 1.0))
    squares = [jnp.sum(jnp.square(leaf * scale)) for leaf in leaves]
    return jnp.where(jnp.isfinite(largest), inverse * jnp.sqrt(sum(squares)), jnp.inf)


def clip_by_norm(tree: Params, l2_clip_norm: Any) -> tuple[Params, Float[Array, ""]]:
    """`tree * min(1, clip / norm)`, and the norm; a non-finite tree becomes exactly zero.

    Guarantee: the L2 norm of what is returned is at most `l2_clip_norm`, up to float32 rounding.
    """
    norm = global_norm(tree)
    factor = jnp.minimum(1.0, l2_clip_norm / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
    return _scale_or_zero(tree, factor, norm), norm


def _scale_or_zero(tree: Params, factor: Array, norm: Array) -> Params:
    finite = jnp.isfinite(norm)
    return jax.tree.map(
        lambda leaf: jnp.where(finite, leaf.astype(jnp.float32) * factor, 0.0), tree
    )


def normalised_grad(loss_fn: UnitLoss) -> Callable[..., tuple[Array, Array, Array, Params]]:
    """`(params, unit, key, clip) -> (loss, norm, norm > clip, g * min(1 / norm, 1 / clip))`.

    Guarantee: the last has norm at most one, up to float32 rounding; zero where g is not finite.
    """

    def unit(params: Params, unit: Any, key: PRNGKey, l2_clip_norm: Any) -> Any:
        loss, gradient = jax.value_and_grad(loss_fn)(params, unit, key)
        norm = global_norm(gradient)
        tiny = jnp.finfo(jnp.float32).tiny
        factor = jnp.minimum(1.0 / jnp.maximum(norm, tiny), 1.0 / l2_clip_norm)
        return loss, norm, norm > l2_clip_norm, _scale_or_zero(gradient, factor, norm)

    return unit


def clipped_grad(
    loss_fn: UnitLoss,
    *,
    microbatch_size: int = 1,
    loop: Literal["drawn", "capacity"] = "drawn",
    axis_name: str | None = None,
) -> ClippedGrad:
    """Per-unit normalised gradients, summed.

    Every unit's gradient g enters the sum as `g * min(1 / norm(g), 1 / l2_clip_norm)`, so that one
    unit weighs at most one whatever the clip norm is, traced, adaptive or different per client;
    multiply the clip norm back after the noise.

    Guarantees: the sums of two data sets that differ in one unit's contribution being zero differ
    by at most 1 in L2 norm (2 if one unit is replaced by another). Units beyond `num_units`, and
    units whose gradient is not finite, add exactly zero. Rounding of the sum is outside this
    statement.

    Args:
        loss_fn: the loss of one unit; the mean over its tiles and augmentations is taken inside,
            so that what is clipped is the unit's gradient.
        microbatch_size: units whose gradients are computed at once: 1 is a loop over units, U a
            `vmap` over all. Never changes the result beyond rounding.
        loop: "drawn" visits only the blocks that hold real units; "capacity" visits all slots in
            a `scan` of static length, for code that differentiates through training.
        axis_name: mesh axis of an enclosing `shard_map` whose devices, given the same arguments,
            share the units; each gets the whole sum. Every unit is clipped by itself before.

    Returns:
        The function; its `.sensitivity(relation)` is in units of the clip norm.

    Raises:
        ValueError: for a microbatch size below one or an unknown loop.

    References:
        Abadi et al. 2016, "Deep Learning with Differential Privacy", Algorithm 1; De et al. 2022,
        "Unlocking High-Accuracy Differentially Private Image Classification through Scale",
        section 5.1, for the normalised form.
    """
    unit = normalised_grad(loss_fn)

    def block(params: Params, units: Any, keys: Any, is_real: Array, clip: Any) -> Any:
        if microbatch_size == 1:
            one = jax.tree.map(lambda leaf: leaf[0], units)
            loss, norm, clipped, gradient = unit(params, one, keys[0], clip)
            total = jax.tree.map(lambda leaf: jnp.where(is_real[0], leaf, 0.0), gradient)
            finite = jnp.isfinite(norm)
            return total, unit_sums(loss[None], norm[None], clipped[None], finite[None], is_real)
        loss, norm, clipped, gradients = jax.vmap(unit, (None, 0, 0, None))(
            params, units, keys, clip
        )
        # In full precision: an accelerator's fast products round a unit's weight above one.
        total = jax.tree.map(
            lambda leaf: jnp.tensordot(
                is_real.astype(leaf.dtype), leaf, 1, precision=lax.Precision.HIGHEST
            ),
            gradients,
        )
        return total, unit_sums(loss, norm, clipped, jnp.isfinite(norm), is_real)

    return ClippedGrad(in_blocks(block, microbatch_size, loop, axis_name))


def summed_grad(
    loss_fn: UnitLoss,
    *,
    microbatch_size: int = 1,
    loop: Literal["drawn", "capacity"] = "drawn",
    axis_name: str | None = None,
) -> SummedGradFn:
    """The same sum without clipping, for training whose units need no bound of their own.

    Guarantee: none. Units beyond `num_units` add exactly zero. The gradient of a microbatch is
    taken at once, `l2_clip_norm` is ignored, and norms are not computed.

    Args:
        loss_fn: as in `clipped_grad`.
        microbatch_size: as in `clipped_grad`.
        loop: as in `clipped_grad`.
        axis_name: as in `clipped_grad`.
    """

    def block(params: Params, units: Any, keys: Any, is_real: Array, clip: Any) -> Any:
        del clip

        def total_loss(params: Params) -> tuple[Array, Array]:
            losses = jax.vmap(loss_fn, (None, 0, 0))(params, units, keys)
            return jnp.sum(jnp.where(is_real, losses, 0.0)), losses

        gradient, losses = jax.grad(total_loss, has_aux=True)(params)
        gradient = jax.tree.map(lambda leaf: jnp.where(is_real.any(), leaf, 0.0), gradient)
        zero = jnp.zeros_like(losses)
        return gradient, unit_sums(losses, zero, zero, jnp.isfinite(losses), is_real)

    return in_blocks(block, microbatch_size, loop, axis_name)


__all__ = [
    "ClippedGrad",
    "Relation",
    "SummedGradFn",
    "UnitAux",
    "UnitLoss",
    "UnitSums",
    "clip_by_norm",
    "clipped_grad",
    "global_norm",
    "normalised_grad",
    "summed_grad",
]
