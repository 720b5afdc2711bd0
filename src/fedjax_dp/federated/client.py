"""What ONE client does in one round: local steps, clipping and noise at its placement."""

import functools
from typing import Any, Literal, NamedTuple, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from fedjax_dp.privacy import adaptive_clipping, clipping, noise
from fedjax_dp.typing import ClientConstants, ClientKeys, ClientPlan, NonPrivate, Params, TilePool
from fedjax_dp.varying import vary_like

Placement = Literal["none", "dp_sgd", "update", "central", "update_unclipped"]
"""Placements of local steps; the share of "distributed" is `share.masked_share`'s."""


class ClientInfo(NamedTuple):
    """What a client reports beside its model delta."""

    units: NonPrivate[clipping.UnitSums]  # summed over the round's steps, un-noised
    update_norm: NonPrivate[Any]  # L2 norm of the update before its clip and noise
    is_finite: Any  # whether the released delta is finite: a function of what is released
    centred_count: Any = np.float32(0)  # noised mean of (b - 1/2), for adaptive clipping; released


class CentralMessage(NamedTuple):
    """What a client of "central" hands to the trusted server: clipped, un-noised."""

    update: Params
    centred_count: Any  # 1/2 where the update was within its clip norm, else -1/2


class ClientUpdate(Protocol):
    """One client's round, a pure function; map it with `jax.vmap` over a leading client axis."""

    def __call__(
        self,
        params: Params,
        keys: ClientKeys,
        client_state: Any,
        constants: ClientConstants,
        plan: ClientPlan,
        pool: TilePool,
    ) -> tuple[Params, Any, ClientInfo]:
        """Trains from the server's parameters and returns what leaves the client.

        Args:
            params: the server's parameters.
            keys: this client's and round's keys, one a purpose.
            client_state: `()` unless the algorithm keeps one.
            constants: the client's public numbers.
            plan: indices of the tiles drawn.
            pool: the tiles.

        Returns:
            `(model_delta, client_state, info)`.
        """
        ...


class UnitTiles(NamedTuple):
    """One unit of privacy, as indices: what a unit loss receives."""

    tile_index: Any  # int32 [T]
    num_tiles: Any  # int32 []


def client_update(
    loss_fn: Any,
    client_optimizer: optax.GradientTransformation,
    *,
    placement: Placement,
    microbatch_size: int = 1,
    loop: Literal["drawn", "capacity"] = "drawn",
    is_adaptive: bool = False,
    axis_name: str | None = None,
) -> ClientUpdate:
    """Makes the update of one client.

    Guarantees, with C the clip norm and sigma the noise's standard deviation of the constants:
    "dp_sgd": every local step uses only (sum of clipped unit gradients + sigma N(0, I)) divided by
    a public number, the sum of sensitivity C. "update": what is returned is the model update
    clipped to C plus sigma N(0, I). "central": what is returned is a `CentralMessage`, clipped to C
    and not noised. "none", "update_unclipped": nothing. An empty draw takes the same path. A
    client with `is_active` zero makes no step and returns exactly zero, noise included.

    Args:
        loss_fn: `loss_fn(params, images [T, H, W, 3] uint8, labels [T, H, W], num_tiles, key)`,
            the mean loss over the first `num_tiles` tiles of ONE unit; `key` is a typed key [T],
            one a tile, which does not depend on the other units drawn.
        client_optimizer: optax optimiser, started anew each round.
        placement: where noise enters.
        microbatch_size: units computed at once; never changes the result beyond rounding.
        loop: see `clipping.clipped_grad`.
        is_adaptive: for "dp_sgd", whether every step also releases a noised count of the units
            below the clip norm (`ClientInfo.centred_count` is its mean over the steps).
        axis_name: see `clipping.clipped_grad`.

    References:
        McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized
        Data", Algorithm 1 (ClientUpdate); Abadi et al. 2016, Algorithm 1; Pan et al. 2024,
        "FedDP", arXiv 2411.04509, for the noise on the update.
    """
    if placement not in get_args(Placement):
        raise ValueError(
            f"Expected placement in {get_args(Placement)}, got {placement=}. Set "
            "privacy.placement to one of them; for distributed use share.masked_share."
        )

    add_noise = functools.partial(noise.add_noise, axis_name=axis_name)

    def update(
        params: Params,
        keys: ClientKeys,
        client_state: Any,
        constants: ClientConstants,
        plan: ClientPlan,
        pool: TilePool,
    ) -> tuple[Params, Any, ClientInfo]:
        unit_loss = pooled_loss(loss_fn, pool)
        steps = plan.num_units.shape[0]
        make = clipping.clipped_grad if placement == "dp_sgd" else clipping.summed_grad
        grad_fn = make(unit_loss, microbatch_size=microbatch_size, loop=loop, axis_name=axis_name)

        def step(carry: Any, inputs: Any) -> Any:
            local, optimizer_state = carry
            index, tile_index, num_units, num_tiles = inputs
            num_units = jnp.where(constants.is_active > 0, num_units, 0)
            # One key for all units of a step: tiles fold their own index into it.
            step_key = jax.random.fold_in(keys.augmentation, index)
            unit_keys = jnp.broadcast_to(step_key, tile_index.shape[:1])
            summed, aux = grad_fn(
                local,
                UnitTiles(tile_index, num_tiles),
                unit_keys,
                num_units,
                constants.l2_clip_norm,
            )
            centred = jnp.zeros(())
            if placement == "dp_sgd":
                summed = jax.tree.map(lambda leaf: leaf * constants.l2_clip_norm, summed)
                noise_key = jax.random.fold_in(keys.noise, index)
                summed = add_noise(noise_key, summed, constants.noise_stddev)
                if is_adaptive:
                    centred = noised_count(keys, steps + index, aux, constants)
            gradient = jax.tree.map(
                lambda leaf, like: (leaf * constants.inverse_expected_batch_size).astype(
                    like.dtype
                ),
                summed,
                local,
            )
            updates, optimizer_state = client_optimizer.update(gradient, optimizer_state, local)
            return (optax.apply_updates(local, updates), optimizer_state), (aux, centred)

        start = vary_like((params, client_optimizer.init(params)), (params, constants, plan))
        inputs = (jnp.arange(steps), plan.tile_index, plan.num_units, plan.num_tiles)
        (local, _), (aux, centred) = lax.scan(step, start, inputs)
        model_delta = jax.tree.map(jnp.subtract, local, params)
        update_norm = clipping.global_norm(model_delta)
        if placement in ("update", "central"):
            model_delta, _ = clipping.clip_by_norm(model_delta, constants.l2_clip_norm)
        if placement in ("update", "update_unclipped"):
            model_delta = add_noise(keys.noise, model_delta, constants.noise_stddev)
        model_delta = jax.tree.map(
            lambda leaf, like: jnp.where(constants.is_active > 0, leaf, 0).astype(like.dtype),
            model_delta,
            params,
        )
        is_finite = jnp.stack(
            [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(model_delta)]
        ).all()
        info = ClientInfo(
            units=jax.tree.map(lambda leaf: leaf.sum(0), aux),
            update_norm=NonPrivate(update_norm),
            is_finite=is_finite,
            centred_count=centred.mean(),
        )
        if placement == "central":
            is_within = jnp.isfinite(update_norm) & (update_norm <= constants.l2_clip_norm)
            centred_bit = jnp.where(constants.is_active > 0, jnp.where(is_within, 0.5, -0.5), 0.0)
            return CentralMessage(model_delta, centred_bit), client_state, info
        return model_delta, client_state, info

    return update


def pooled_loss(loss_fn: Any, pool: TilePool) -> clipping.UnitLoss:
    """`loss_fn` of ONE unit that is given by the indices of its tiles in `pool`."""
    pool = jax.tree.map(jnp.asarray, pool)

    def unit_loss(params: Params, unit: UnitTiles, key: Any) -> Any:
        # Padding repeats the unit's own first tile: index 0 of the pool is somebody else's, and
        # where it gives NaN, masking it out would leave 0 x NaN in this unit's gradient.
        is_padding = jnp.arange(unit.tile_index.shape[0]) >= unit.num_tiles
        tile_index = jnp.where(is_padding, unit.tile_index[0], unit.tile_index)
        # A tile is augmented alike wherever in a pool it lies.
        tile_id = tile_index if isinstance(pool.tile_id, tuple) else pool.tile_id[tile_index]
        tile_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, tile_id)
        images, labels = pool.images[tile_index], pool.labels[tile_index]
        return loss_fn(params, images, labels, unit.num_tiles, tile_keys)

    return unit_loss


def noised_count(keys: ClientKeys, index: Any, aux: Any, constants: ClientConstants) -> Any:
    """The noised mean of (b - 1/2) over the units of a step; see `adaptive_clipping`."""
    sums = aux.value
    centred = adaptive_clipping.centred_count(sums.units, sums.clipped, sums.non_finite)
    # Index `steps + step`: no step's noise on its sum has it.
    count_key = jax.random.fold_in(keys.noise, index)
    noised = noise.add_noise(count_key, centred, constants.count_noise_stddev)
    return noised * constants.inverse_expected_batch_size
