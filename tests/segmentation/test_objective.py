import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_dp.data.tiles import IGNORE_INDEX
from fedjax_dp.segmentation.augment import augment
from fedjax_dp.segmentation.losses import soft_dice_cross_entropy
from fedjax_dp.segmentation.objective import segmentation_loss
from tests.oracles import assert_trees_close, assert_trees_equal, exact_products, norm  # noqa: F401

TILES, SIDE, CLASSES = 3, 8, 3
PLAIN = {"flips": False, "rotate": False, "hed_jitter": 0.0}


def apply(params, images, key):
    """A classifier of pixels that looks at a neighbour, so that flips and turns show."""
    del key
    beside = jnp.roll(images, 1, axis=2)
    return images @ params["here"] + beside @ params["beside"]


def problem(seed=0, tiles=TILES):
    rng = np.random.default_rng(seed)
    params = {name: jnp.float32(rng.normal(size=(3, CLASSES))) for name in ("here", "beside")}
    images = rng.integers(0, 256, (tiles, SIDE, SIDE, 3)).astype(np.uint8)
    labels = rng.integers(0, CLASSES, (tiles, SIDE, SIDE)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.1] = IGNORE_INDEX
    return (
        params,
        jnp.asarray(images),
        jnp.asarray(labels),
        jax.random.split(jax.random.key(7), tiles),
    )


@jax.jit
def one_view(params, key, image, labels):
    """The loss of one tile under one augmentation."""
    image, truth = augment(key, image.astype(jnp.float32) / 255, labels)
    return soft_dice_cross_entropy(apply(params, image[None], None)[0], truth)


def naive_loss(params, images, labels, num_tiles, keys, multiplicity):
    """Tile by tile and view by view."""
    total = 0.0
    for tile in range(num_tiles):
        views_key, _ = jax.random.split(keys[tile])
        for index in range(multiplicity):
            key = jax.random.fold_in(views_key, index)
            total += one_view(params, key, images[tile], labels[tile]) / multiplicity
    return total / num_tiles


@functools.cache
def compiled(multiplicity):
    return jax.jit(segmentation_loss(apply, multiplicity=multiplicity))


@pytest.mark.parametrize("num_tiles", [1, TILES])
@pytest.mark.parametrize("multiplicity", [1, 3])
def test_a_units_loss_equals_the_mean_over_its_tiles_and_views(num_tiles, multiplicity):
    params, images, labels, keys = problem()
    found = compiled(multiplicity)(params, images, labels, num_tiles, keys)
    expected = naive_loss(params, images, labels, num_tiles, keys, multiplicity)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_without_augmentation_it_is_the_loss_of_the_tiles():
    params, images, labels, keys = problem()
    loss = jax.jit(segmentation_loss(apply, dice_weight=0.3, **PLAIN))
    logits = apply(params, images / 255.0, None)
    expected = [
        soft_dice_cross_entropy(logits[i], labels[i], dice_weight=0.3) for i in range(TILES)
    ]
    np.testing.assert_allclose(
        loss(params, images, labels, TILES, keys), np.mean(expected), rtol=1e-5
    )


@functools.cache
def gradient():
    loss = segmentation_loss(apply, multiplicity=2, hed_jitter=0.0)
    return jax.jit(jax.value_and_grad(loss))


def test_padding_tiles_change_no_bit_of_loss_and_gradient():
    grad = gradient()
    params, images, labels, keys = problem()
    _, other_images, other_labels, _ = problem(1)
    expected = grad(params, images, labels, 1, keys)
    swapped = images.at[1:].set(other_images[1:]), labels.at[1:].set(other_labels[1:])
    assert_trees_equal(grad(params, *swapped, 1, keys), expected)
    rekeyed = keys.at[1:].set(jax.random.split(jax.random.key(9), TILES - 1))
    assert_trees_equal(grad(params, images, labels, 1, rekeyed), expected)
    with pytest.raises(AssertionError):
        assert_trees_equal(grad(params, *swapped, 2, keys), grad(params, images, labels, 2, keys))


def test_no_tiles_and_nothing_but_ignored_pixels_are_exactly_zero():
    grad = gradient()
    params, images, labels, keys = problem()
    blank = jnp.full_like(labels, IGNORE_INDEX)
    for found in (grad(params, images, labels, 0, keys), grad(params, images, blank, 2, keys)):
        assert norm(found) == 0.0


def test_units_mapped_together_do_not_see_each_other():
    """The same under vmap as alone, and no derivative crosses from one unit to another."""
    problems = [problem(seed) for seed in range(3)]
    params = problems[0][0]
    units = [jnp.stack(leaves) for leaves in zip(*(p[1:] for p in problems), strict=True)]
    counts = (3, 1, 2)
    mapped = jax.jit(jax.vmap(gradient(), (None, 0, 0, 0, 0)))(
        params, *units[:2], jnp.array(counts), units[2]
    )
    for unit, count in enumerate(counts):
        images, labels, keys = (leaf[unit] for leaf in units)
        alone = gradient()(params, images, labels, count, keys)
        assert_trees_close(jax.tree.map(lambda leaf, i=unit: leaf[i], mapped), alone)


def test_multiplicity_averages_views_of_one_tile():
    """More views estimate the same mean: their spread over keys shrinks."""
    count = 256
    params, images, labels, _ = problem(tiles=1)
    keys = jax.random.split(jax.random.key(3), (count, 1))

    def spread(multiplicity):
        loss = segmentation_loss(apply, multiplicity=multiplicity, hed_jitter=0.0)
        fn = jax.jit(jax.vmap(loss, (None, None, None, None, 0)))
        return np.std(fn(params, images, labels, 1, keys))

    # The logarithm of a standard deviation of n values has a standard error 1 / sqrt(2 (n - 1)).
    ratio = np.log(spread(1) / spread(4))
    assert abs(ratio - np.log(2)) < 5 / np.sqrt(count - 1)


def test_a_multiplicity_below_one_is_refused():
    with pytest.raises(ValueError, match="multiplicity=0"):
        segmentation_loss(apply, multiplicity=0)
