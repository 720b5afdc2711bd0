"""What ONE client sends under secure aggregation: a noised sum, as masked words."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from fedjax_dp.federated.client import ClientInfo, ClientUpdate, UnitTiles, pooled_loss
from fedjax_dp.privacy import adaptive_clipping, clipping, noise, quantisation
from fedjax_dp.typing import ClientConstants, ClientKeys, ClientPlan, NonPrivate, Params, TilePool


def masked_share(
    loss_fn: Any,
    *,
    step: float,
    levels: int | None = None,
    microbatch_size: int = 1,
    loop: Literal["drawn", "capacity"] = "drawn",
    is_adaptive: bool = False,
    axis_name: str | None = None,
) -> ClientUpdate:
    """Makes the message of one client of placement "distributed": one step, no local training.

    Guarantees: what is returned is uint32 [M], the words of (sum of the units' normalised clipped
    gradients + the client's share of the noise) plus the client's mask, modulo 2**32. Each unit
    weighs at most one (`levels` and the rounding, on the discrete path). A client with `is_active`
    zero, and one that dropped out, returns exactly zero. Without its mask a message is private
    only as far as the share's own noise goes.

    Args:
        loss_fn: see `client.client_update`.
        step: value of one integer, in clip norms (`secure_aggregation.FixedPoint.step`); on the
            discrete path 1 / levels. A number that leaves the word comes back modulo 2**32: what
            is opened is still the noised sum, read modulo 2**32, and as private. Clamping would
            take a share's noise away.
        levels: integer steps of a clip norm: the discrete path, whose units are quantised before
            they are summed and whose noise is `ClientKeys.integer_noise`; None for float noise.
        microbatch_size: units computed at once; never changes the result beyond rounding.
        loop: see `clipping.clipped_grad`.
        is_adaptive: whether the last word is the noised count of units below the clip norm.
        axis_name: see `clipping.clipped_grad`.

    Raises:
        ValueError: an adaptive clip norm on the discrete path.
    """
    if levels is not None and is_adaptive:
        raise ValueError(
            "Expected a fixed clip norm on the discrete path, got is_adaptive=True. Use "
            "privacy.noise=gaussian, or no adaptive clipping."
        )

    blocks: dict[str, Any] = {
        "microbatch_size": microbatch_size,
        "loop": loop,
        "axis_name": axis_name,
    }

    def update(
        params: Params,
        keys: ClientKeys,
        client_state: Any,
        constants: ClientConstants,
        plan: ClientPlan,
        pool: TilePool,
    ) -> tuple[Any, Any, ClientInfo]:
        unit_loss = pooled_loss(loss_fn, pool)
        is_active = constants.is_active > 0
        units = UnitTiles(plan.tile_index[0], plan.num_tiles[0])
        step_key = jax.random.fold_in(keys.augmentation, 0)
        unit_keys = jnp.broadcast_to(step_key, units.num_tiles.shape)
        num_units = jnp.where(is_active, plan.num_units[0], 0)
        arguments = (params, units, unit_keys, num_units, constants.l2_clip_norm)
        if levels is None:
            grad_fn = clipping.clipped_grad(unit_loss, **blocks)
            summed, aux = grad_fn(*arguments)
            values = _flat(summed)
            # In clip norms, so that the encoding does not depend on the clip norm.
            stddev = constants.noise_stddev / constants.l2_clip_norm
            noise_key = jax.random.fold_in(keys.noise, 0)
            values = noise.add_noise(noise_key, values, stddev, axis_name=axis_name)
            if is_adaptive:
                values = jnp.append(values, _noised_count(keys, aux, constants))
            is_finite = jnp.isfinite(values).all()
            words = _encode(values, step)
        else:
            quantised = quantisation.quantised_grad(unit_loss, levels=levels, **blocks)
            summed, aux = quantised(*arguments)
            words = _flat(summed) + keys.integer_noise
            is_finite = jnp.ones((), bool)
        message = lax.bitcast_convert_type(words, jnp.uint32) + keys.mask
        info = ClientInfo(
            units=aux,
            update_norm=NonPrivate(jnp.zeros(())),
            is_finite=is_finite,
        )
        return jnp.where(is_active, message, jnp.uint32(0)), client_state, info

    return update


def _flat(tree: Any) -> Array:
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


def _encode(values: Float32[Array, "M"], step: float) -> Int32[Array, "M"]:
    """Integers of `FixedPoint.encode`, bit for bit, and modulo 2**32 where they leave the word.

    The step is a power of two, so the quotient is exact. So is the remainder: it is smaller than
    what it is the remainder of, and a multiple of its last place.
    """
    rounded = jnp.round(jnp.nan_to_num(values / step))
    rest = rounded - 2.0**32 * jnp.round(rounded * 2.0**-32)
    # The conversion of 2**31 itself is undefined.
    return jnp.where(rest >= 2.0**31, rest - 2.0**32, rest).astype(jnp.int32)


def _noised_count(keys: ClientKeys, aux: Any, constants: ClientConstants) -> Any:
    """The noised sum of (b - 1/2), not divided: the server divides what it opens."""
    sums = aux.value
    centred = adaptive_clipping.centred_count(sums.units, sums.clipped, sums.non_finite)
    return noise.add_noise(jax.random.fold_in(keys.noise, 1), centred, constants.count_noise_stddev)
