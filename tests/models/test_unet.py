import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_dp.models.unet import UNet, multiply_adds, unet
from tests.oracles import assert_trees_close, exact_products  # noqa: F401

TINY = {"base_channels": 8, "depth": 1}


def draw(seed, *shape):
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


def random_params(init):
    """Shaped as `init` would; drawn in NumPy, which needs no compilation."""
    rng = np.random.default_rng(7)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), shapes
    )


def assert_units_are_isolated(apply, params, images):
    """Logits of tile 0 take nothing from the tiles beside it, neither values nor derivatives."""

    def first_tile(images):
        logits = apply(params, images, jax.random.key(0))[0]
        return jnp.sum(jnp.sin(logits)), logits

    both = jax.jit(jax.value_and_grad(first_tile, has_aux=True))
    others = np.concatenate([images[:1], draw(99, *images[1:].shape)])
    ((_, logits), gradient), ((_, again), _) = both(images), both(others)
    np.testing.assert_array_equal(logits, again)
    assert np.abs(gradient[0]).max() > 0
    np.testing.assert_array_equal(gradient[1:], 0.0)


@pytest.mark.parametrize("standardize", [False, True])
def test_a_tile_does_not_see_the_other_tiles_of_its_batch(standardize):
    init, apply = unet(2, **TINY, standardize=standardize, conv_variant="matmul")
    assert_units_are_isolated(apply, random_params(init), draw(0, 3, 16, 16, 3))


def test_the_isolation_test_has_power():
    init, apply = unet(2, **TINY)

    def batch_normed(params, images, key):
        return apply(params, images - images.mean(0), key)

    with pytest.raises(AssertionError):
        assert_units_are_isolated(batch_normed, random_params(init), draw(0, 3, 16, 16, 3))


def test_logits_are_float32_of_the_image_size_and_depth_doubles_channels():
    init, apply = unet(3, base_channels=8, depth=2)
    params = jax.eval_shape(init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    logits = jax.eval_shape(apply, params, draw(0, 2, 16, 8, 3), jax.random.key(0))
    assert logits.shape == (2, 16, 8, 3)
    assert logits.dtype == jnp.float32
    widths = {leaf.shape[-1] for leaf in jax.tree.leaves(params) if leaf.ndim == 4}
    assert widths == {8, 16, 32}


def test_conv_variants_are_one_network():
    images = draw(0, 2, 16, 16, 3)
    results = []
    for variant in ("xla", "matmul"):
        init, apply = unet(2, **TINY, conv_variant=variant)
        params = random_params(init)

        def loss(params, apply=apply):
            return jnp.sum(jnp.sin(apply(params, images, jax.random.key(0))))

        results.append(jax.jit(jax.grad(loss))(params))
    assert_trees_close(*results, rtol=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [{"num_classes": 1}, {"depth": 0}, {"base_channels": 12}, {"base_channels": 0}],
)
def test_numbers_that_make_no_network_are_refused(wrong):
    settings = {"num_classes": 2, "base_channels": 8} | wrong
    with pytest.raises(ValueError, match="base_channels a multiple of num_groups"):
        unet(settings.pop("num_classes"), **settings)


def test_a_tile_that_does_not_divide_is_refused():
    init, apply = unet(2, base_channels=8, depth=2)
    with pytest.raises(ValueError, match=r"divisible by 2\*\*depth = 4, got 16 x 18"):
        jax.eval_shape(apply, random_params(init), jnp.zeros((1, 16, 18, 3)), jax.random.key(0))


def test_the_start_has_the_moments_of_flax_own():
    init, _ = unet(2, base_channels=32, depth=1)
    ours = init(jax.random.key(0))
    theirs = jax.jit(UNet(2, 32, 1).init)(jax.random.key(1), jnp.zeros((1, 2, 2, 3)))["params"]
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, mine), flax in zip(
        jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        if path[-1].key == "kernel":
            # Each standard deviation is of n draws; the difference is of both.
            tolerance = 5 * float(flax.std()) / np.sqrt(mine.size)
            assert abs(float(mine.std() - flax.std())) < tolerance, path
            assert abs(float(mine.mean())) < tolerance, path
            assert np.abs(mine).max() <= 2.001 * np.sqrt(flax.shape[-1] / flax.size) / 0.8796
        else:
            np.testing.assert_array_equal(mine, flax)


def test_multiply_adds_are_those_of_the_convolutions():
    for base_channels, depth, side in ((8, 1, 32), (16, 4, 128)):
        init, apply = unet(2, base_channels=base_channels, depth=depth)
        params = jax.eval_shape(init, jax.random.key(0))
        tile = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        traced = jax.jit(lambda p, x, apply=apply: apply(p, x, None)).lower(params, tile)
        counted = multiply_adds(side, 2, base_channels=base_channels, depth=depth)
        # XLA leaves out products with padding and counts sums and norms too.
        assert traced.cost_analysis()["flops"] == pytest.approx(2 * counted, rel=0.1)
