"""The loop over a step's units: blocks of gradients, added up over the real units alone."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from fedjax_dp.hoisting import hoisted
from fedjax_dp.typing import NonPrivate, Params, PRNGKey
from fedjax_dp.varying import vary_like

UnitLoss = Callable[[Params, Any, PRNGKey], Array]
"""`loss_fn(params, unit, key) -> scalar`: the loss of ONE unit of privacy."""


class UnitSums(NamedTuple):
    """Un-noised sums over the real units of a step; divide by `units` for means."""

    units: Float[Array, ""]
    loss: Float[Array, ""]
    norm: Float[Array, ""]
    clipped: Float[Array, ""]
    non_finite: Float[Array, ""]


UnitAux = NonPrivate[UnitSums]


class SummedGradFn(Protocol):
    """What `clipped_grad`, `summed_grad` and `quantised_grad` return."""

    def __call__(
        self, params: Params, units: Any, keys: Any, num_units: Any, l2_clip_norm: Any
    ) -> tuple[Params, UnitAux]:
        """Sums the gradients of the first `num_units` units.

        Args:
            params: where the gradient is taken.
            units: pytree whose leaves have a leading axis U; real units first.
            keys: typed keys [U], one a unit.
            num_units: int32 scalar, how many of the U slots hold real units.
            l2_clip_norm: positive scalar, may be traced.

        Returns:
            The sum, float32 (int32 from `quantised_grad`) and shaped as the parameters, and
            un-noised statistics.
        """
        ...


def unit_sums(loss: Array, norm: Array, clipped: Array, finite: Array, is_real: Array) -> UnitSums:
    """Sums [B] -> scalar over the real units; loss, norm and clipped over the finite ones."""

    def total(values: Array, where: Array) -> Array:
        return jnp.sum(jnp.where(where, values.astype(jnp.float32), 0.0))

    return UnitSums(
        units=total(jnp.ones_like(loss), is_real),
        loss=total(loss, is_real & finite),
        norm=total(norm, is_real & finite),
        clipped=total(clipped, is_real & finite),
        non_finite=total(jnp.ones_like(loss), is_real & ~finite),
    )


def _added_up(tree: Any, axis_name: str | None) -> Any:
    """The sum over a mesh axis of leaves of one type, as one message: devices meet once."""
    flat, unflatten = ravel_pytree(tree)
    return unflatten(lax.psum(flat, axis_name))


def in_blocks(
    block: Callable[..., Any], microbatch_size: int, loop: str, axis_name: str | None = None
) -> SummedGradFn:
    """Adds up `block` over as many units as were drawn, `microbatch_size` at a time.

    Args:
        block: `(params, units [B], keys [B], is_real [B], l2_clip_norm) -> (sum, UnitSums)`; units
            that are not real must add exactly zero. Sums may be integers.
        microbatch_size: B, at most the number of slots.
        loop: "drawn" visits only the blocks that hold real units; "capacity" visits all slots in
            a `scan` of static length, for code that differentiates through training.
        axis_name: mesh axis of an enclosing `shard_map` whose devices share the blocks; only what
            they have summed is added up over it.

    Raises:
        ValueError: for a microbatch size below one or an unknown loop.
    """
    if microbatch_size < 1 or loop not in ("drawn", "capacity"):
        raise ValueError(
            "Expected microbatch_size >= 1 and loop 'drawn' or 'capacity', got "
            f"{microbatch_size=}, {loop=}."
        )

    def fn(
        params: Params, units: Any, keys: Any, num_units: Any, l2_clip_norm: Any
    ) -> tuple[Params, UnitAux]:
        slots = keys.shape[0]
        size = min(microbatch_size, slots)
        num_units = jnp.minimum(num_units, slots)
        units = jax.tree.map(jnp.asarray, units)
        place, places = jnp.int32(0), 1 if axis_name is None else lax.axis_size(axis_name)
        if places > 1:
            # Without this cast the gradient with respect to parameters that all devices have alike
            # is summed over them BEFORE it is clipped, silently.
            params = lax.pcast(params, axis_name, to="varying")
            place = lax.axis_index(axis_name)

        def at(index: Any) -> Any:
            slot = index * size + jnp.arange(size)
            is_real = slot < num_units
            # A padded slot repeats slot 0: masked out, its own tile, which may be anybody's, could
            # still spoil the gradient of a sum, for 0 x NaN is NaN.
            slot = jnp.where(is_real, slot, 0)
            some, some_keys = jax.tree.map(lambda leaf: leaf[slot], (units, keys))
            return block(params, some, some_keys, is_real, l2_clip_norm)

        added, shapes = hoisted(at, place)

        def visit(turn: Any, carry: Any) -> Any:
            return jax.tree.map(jnp.add, carry, added(turn * places + place))

        zero = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        zero = vary_like(zero, (params, units, num_units, l2_clip_norm))
        if loop == "drawn":
            blocks = (num_units + size - 1) // size
            total = lax.fori_loop(0, (blocks - place + places - 1) // places, visit, zero)
        else:
            turns = jnp.arange(-(-slots // (size * places)))
            total, _ = lax.scan(lambda carry, turn: (visit(turn, carry), None), zero, turns)
        if places > 1:
            total = tuple(_added_up(part, axis_name) for part in total)
        summed, sums = total
        return summed, NonPrivate(sums)

    return fn
