"""Naive Python-loop twins of the device core, and the smallest problems to compare them on."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_dp.federated.cohort import CohortChunk
from fedjax_dp.models.layers import Conv, GroupNorm, UpConv, max_pool_2x2
from fedjax_dp.privacy import noise
from fedjax_dp.typing import ClientConstants, ClientKeys, ClientPlan, TilePool

GRAY = 128
"""A tile of this value alone gives a gradient of exactly zero under `linear_loss`."""

GAINS = np.array([1.0, 1e30, 1e-30, np.nan, np.inf], np.float32)
"""`linear_loss` multiplies a tile's gradient by `GAINS[label of its first pixel]`."""

HUGE, TINY, NAN, INF = 1, 2, 3, 4


@pytest.fixture(autouse=True)
def exact_products():
    """Products in full precision on every backend, in a module that imports this fixture."""
    with jax.default_matmul_precision("highest"):
        yield


# --- trees


def take(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def flat(tree):
    """All leaves as one float64 vector."""
    leaves = [np.asarray(leaf).astype(np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves)


def norm(tree):
    return float(np.linalg.norm(flat(tree)))


def distance(left, right):
    return float(np.linalg.norm(flat(left) - flat(right)))


def assert_trees_equal(left, right):
    """Bit for bit."""
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), left, right
    )


def assert_trees_close(left, right, rtol=1e-5):
    """Up to `rtol` of the whole tree's norm, which a small element must not escape by its size."""
    scale = max(norm(left), norm(right), 1e-30)
    assert distance(left, right) <= rtol * scale, (distance(left, right), scale)


# --- the loops


@functools.cache
def gradient_of(loss_fn):
    return jax.jit(jax.grad(loss_fn))


add_noise = jax.jit(noise.add_noise)


def clipped(gradient, clip):
    """One unit's contribution in float64: g * min(1 / norm, 1 / clip); zero if not finite."""
    leaves = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), gradient)
    if not np.isfinite(flat(leaves)).all():
        return jax.tree.map(np.zeros_like, leaves)
    size = norm(leaves)
    return jax.tree.map(lambda leaf: leaf * min(1 / size if size else 0.0, 1 / clip), leaves)


def clipped_sum(loss_fn, params, units, keys, num_units, clip):
    """The sum of the clipped gradients of the first `num_units` units, one by one."""
    grad = gradient_of(loss_fn)
    total = jax.tree.map(lambda leaf: np.zeros(leaf.shape), params)
    for index in range(num_units):
        added = clipped(grad(params, take(units, index), keys[index]), clip)
        total = jax.tree.map(np.add, total, added)
    return total


def client_update(loss_fn, optimizer, placement, params, keys, constants, plan, pool):
    """One client's round: steps, units and tiles in Python loops; returns the model delta.

    Padding is never touched: of each unit only its real tiles go into the loss.
    """

    def unit_gradient(params, step, slot):
        real = int(plan.num_tiles[step, slot])
        tiles = np.asarray(plan.tile_index[step, slot, :real])
        step_key = jax.random.fold_in(keys.augmentation, step)
        tile_keys = jnp.stack([jax.random.fold_in(step_key, int(tile)) for tile in tiles])
        images, labels = pool.images[tiles], pool.labels[tiles]
        return gradient(params, images, labels, real, tile_keys)

    gradient = gradient_of(loss_fn)
    if not constants.is_active:
        return jax.tree.map(jnp.zeros_like, params)
    local, state = params, optimizer.init(params)
    for step in range(len(plan.num_units)):
        total = jax.tree.map(lambda leaf: np.zeros(leaf.shape), params)
        for slot in range(int(plan.num_units[step])):
            one = unit_gradient(local, step, slot)
            if placement == "dp_sgd":
                clip = float(constants.l2_clip_norm)
                one = jax.tree.map(lambda leaf, c=clip: leaf * c, clipped(one, clip))
            total = jax.tree.map(lambda a, b: a + np.asarray(b, np.float64), total, one)
        if placement == "dp_sgd":
            key = jax.random.fold_in(keys.noise, step)
            total = add_noise(key, as_float32(total), constants.noise_stddev)
        mean = jax.tree.map(
            lambda leaf: np.asarray(leaf) * constants.inverse_expected_batch_size, total
        )
        updates, state = optimizer.update(as_float32(mean), state, local)
        local = optax.apply_updates(local, updates)
    delta = jax.tree.map(jnp.subtract, local, params)
    if placement == "update":
        clip = float(constants.l2_clip_norm)
        delta = jax.tree.map(lambda leaf: leaf * clip, clipped(delta, clip))
        delta = add_noise(keys.noise, as_float32(delta), constants.noise_stddev)
    return delta


def weighted_mean(deltas, weights):
    total = sum(weight * flat(delta) for delta, weight in zip(deltas, weights, strict=True))
    return total / sum(weights)


def as_float32(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


# --- the smallest problems


def linear_params(size=4):
    """Parameters at zero, two leaves; under `linear_loss` a unit's gradient is its content."""
    return {"bias": jnp.zeros((3,)), "weight": jnp.zeros((size, size, 3))}


def linear_loss(params, images, labels, num_tiles, keys):
    """The gradient of a tile is its content, times its gain; of a unit, its tiles' mean."""
    del keys
    content = (images.astype(jnp.float32) - GRAY) / 64
    gain = jnp.asarray(GAINS)[labels[:, 0, 0].astype(jnp.int32)]
    along = jnp.tensordot(content, params["weight"], 3) + content.mean((1, 2)) @ params["bias"]
    is_padding = jnp.arange(len(images)) >= num_tiles
    return jnp.where(is_padding, 0.0, gain * along).sum() / jnp.maximum(num_tiles, 1)


def keyed_loss(params, images, labels, num_tiles, keys):
    """`linear_loss` of tiles moved by their own keys, and curved in the parameters."""
    jitter = jax.random.key_data(keys)[:, 0] % 40  # no draw: quick to compile
    moved = images.astype(jnp.int32) + jitter[:, None, None, None].astype(jnp.int32)
    size = sum(jnp.sum(jnp.square(leaf + 1.0)) for leaf in jax.tree.leaves(params))
    return linear_loss(params, moved, labels, num_tiles, None) * (1.0 + 0.01 * size)


class TinyNetwork(nn.Module):
    """The U-Net's kinds of layers, few enough to compile in a moment."""

    @nn.compact
    def __call__(self, images):
        x = nn.relu(GroupNorm(2)(Conv(4, variant="matmul")(2.0 * images - 1.0)))
        return nn.Dense(2)(jnp.concatenate([x, UpConv(2)(max_pool_2x2(x))], -1))


def tiny_network(seed=0):
    """`(params, apply)` of it."""
    module, rng = TinyNetwork(), np.random.default_rng(seed)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
    params = jax.tree.map(lambda leaf: jnp.float32(0.3 * rng.normal(size=leaf.shape)), shapes)
    return params, lambda params, images, key: module.apply(params, images)


def make_pool(num_tiles=12, size=4, seed=0, gray=(), gains=None):
    """Random tiles; those in `gray` have zero gradient, `gains` maps tiles to indices of GAINS."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num_tiles, size, size, 3)).astype(np.uint8)
    labels = np.zeros((num_tiles, size, size), np.uint8)
    images[list(gray)] = GRAY
    for tile, gain in (gains or {}).items():
        labels[tile] = gain
    return TilePool(jnp.asarray(images), jnp.asarray(labels))


def make_plan(*steps, shape=(3, 4, 3)):
    """A plan from lists: `steps[s][u]` is the list of tiles of unit u in step s.

    Of one shape [S, U, T], so that most tests share a program; steps that are not given are empty.
    """
    plan = ClientPlan(
        np.zeros(shape, np.int32), np.zeros(shape[:1], np.int32), np.zeros(shape[:2], np.int32)
    )
    for step, units in enumerate(steps):
        plan.num_units[step] = len(units)
        for slot, unit in enumerate(units):
            plan.tile_index[step, slot, : len(unit)] = unit
            plan.num_tiles[step, slot] = len(unit)
    return plan


def make_constants(weight=1.0, clip=1.0, stddev=0.0, inverse=1.0, active=1.0):
    values = (weight, clip, stddev, inverse, active)
    return ClientConstants(*(np.float32(value) for value in values))


def key_data(client=0, seed=0):
    """Raw key data, as the host derives it."""
    return ClientKeys(
        np.array([seed, 2 * client], np.uint32), np.array([seed, 2 * client + 1], np.uint32)
    )


def make_keys(client=0, seed=0):
    return jax.tree.map(jax.random.wrap_key_data, key_data(client, seed))


def make_client(plan, client=0, **constants):
    """One slot of `cohort.stack_chunk`."""
    return CohortChunk(key_data(client), (), make_constants(**constants), plan)
