import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedjax_dp.models.layers import (
    Conv,
    GroupNorm,
    UpConv,
    convolution,
    default_conv_variant,
    max_pool_2x2,
    pixelwise_product,
)
from tests.oracles import assert_trees_close, distance, exact_products  # noqa: F401

VARIANTS = ("xla", "matmul", "canonical")
OURS = ("matmul", "canonical")
DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def reference(images, kernel):
    return lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=DIMENSIONS)


def ours(variant):
    conv = convolution(variant)
    return lambda images, kernel: conv(images, kernel, (1, 1), "SAME", dimension_numbers=DIMENSIONS)


def with_gradients(fn, cotangent, *arguments):
    """Value and the gradients with respect to all arguments, in one program."""

    @jax.jit
    def both(cotangent, *arguments):
        value, pull = jax.vjp(fn, *arguments)
        return value, *pull(cotangent)

    return both(cotangent, *arguments)


# --- convolution


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("images", "kernel"),
    [
        ((2, 7, 6, 3), (3, 3, 3, 4)),
        ((1, 6, 5, 3), (1, 1, 3, 2)),
        ((3, 6, 8, 2), (5, 3, 2, 3)),
        ((2, 1, 1, 4), (3, 3, 4, 5)),  # the bottom of a deep network
        ((2, 2, 3, 2), (7, 5, 2, 3)),  # a kernel larger than the image
    ],
)
def test_convolution_equals_lax_in_value_and_both_gradients(variant, images, kernel):
    arguments = draw(2, *images[:3], kernel[3]), draw(0, *images), draw(1, *kernel)
    expected = with_gradients(reference, *arguments)
    found = with_gradients(ours(variant), *arguments)
    for one, other in zip(found, expected, strict=True):
        assert_trees_close(one, other)


@pytest.mark.parametrize("variant", VARIANTS)
def test_convolution_equals_lax_under_vmap_and_inside_scan(variant):
    images, kernel = draw(0, 4, 1, 6, 6, 3), draw(1, 3, 3, 3, 4)
    cotangents = draw(2, 4, 1, 6, 6, 4)
    expected = [
        with_gradients(reference, cotangent, image, kernel)
        for image, cotangent in zip(images, cotangents, strict=True)
    ]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected)

    def one(image, cotangent):
        return with_gradients(ours(variant), cotangent, image, kernel)

    mapped = jax.jit(jax.vmap(one))(images, cotangents)
    _, scanned = jax.jit(lambda xs: lax.scan(lambda c, x: (c, one(*x)), 0, xs))(
        (images, cotangents)
    )
    for found in (mapped, scanned):
        for left, right in zip(found, expected, strict=True):
            assert_trees_close(left, right)


@pytest.mark.parametrize("variant", OURS)
@pytest.mark.parametrize(
    ("module", "channels"),
    [
        ({"strides": 2}, 4),
        ({"kernel_dilation": 2}, 4),
        ({"input_dilation": 2}, 4),
        ({"feature_group_count": 2}, 4),
        ({"padding": "VALID"}, 4),
        ({"padding": "CIRCULAR"}, 4),
        ({"padding": ((1, 0), (1, 1))}, 4),
        ({"kernel_size": (2, 2)}, 4),
    ],
)
def test_convolution_refuses_what_it_does_not_implement(variant, module, channels):
    settings = {"features": 4, "kernel_size": (3, 3)} | module
    conv = nn.Conv(**settings, conv_general_dilated=convolution(variant))
    with pytest.raises(ValueError, match=r"conv_variant='xla'"):
        jax.eval_shape(conv.init, jax.random.key(0), jnp.zeros((1, 6, 6, channels)))


@pytest.mark.parametrize("variant", OURS)
def test_convolution_refuses_other_dimensions_and_batch_groups(variant):
    conv = convolution(variant)
    with pytest.raises(ValueError, match="got"):
        conv(jnp.zeros((2, 6, 3)), jnp.zeros((3, 3, 4)), (1,), "SAME")
    with pytest.raises(ValueError, match="batch_group_count=2"):
        conv(jnp.zeros((2, 6, 6, 3)), jnp.zeros((3, 3, 3, 4)), (1, 1), "SAME", batch_group_count=2)


def test_convolution_takes_explicit_padding_that_is_same():
    images, kernel = draw(0, 1, 5, 5, 2), draw(1, 3, 3, 2, 2)
    found = convolution("matmul")(images, kernel, (1, 1), [(1, 1), (1, 1)])
    assert_trees_close(found, reference(images, kernel))


def test_unknown_variant_is_refused_and_defaults_are_known():
    with pytest.raises(ValueError, match="'cudnn'"):
        convolution("cudnn")
    assert default_conv_variant("cpu") == "matmul"
    assert default_conv_variant("gpu") == default_conv_variant("tpu") == "xla"


@pytest.mark.parametrize("variant", VARIANTS)
def test_conv_layer_equals_flax(variant):
    x, kernel = draw(0, 2, 6, 6, 3), draw(2, 3, 3, 3, 5)
    mine, theirs = Conv(5, variant=variant), nn.Conv(5, (3, 3), use_bias=False)
    variables = {"params": {"kernel": kernel}}
    renamed = {"params": {"Conv_0": {"kernel": kernel}}}

    cotangent = draw(1, 2, 6, 6, 5)
    found = with_gradients(lambda v: mine.apply(v, x), cotangent, renamed)
    expected = with_gradients(lambda v: theirs.apply(v, x), cotangent, variables)
    for left, right in zip(found, expected, strict=True):
        assert_trees_close(left, right)


# --- weight standardisation


def test_standardised_kernels_have_mean_zero_and_unit_scale():
    layer = Conv(5, standardize=True, variant="matmul")
    points = np.zeros((3, 9, 9, 3), np.float32)
    points[[0, 1, 2], 4, 4, [0, 1, 2]] = 1.0
    variables = jax.jit(layer.init)(jax.random.key(0), points)
    apply = jax.jit(layer.apply)
    # The answer to one point of one channel is that channel's plane of the kernel.
    planes = apply(jax.tree.map(lambda leaf: 3.0 * leaf + 7.0, variables), points)
    sums = planes.sum((0, 1, 2))
    squares = np.square(planes).sum((0, 1, 2))
    np.testing.assert_allclose(sums, 0.0, atol=1e-5)
    np.testing.assert_allclose(squares, 1.0, rtol=1e-2)
    # A shift and a scale of a kernel change nothing, which they would in a plain convolution.
    y = draw(3, 2, 6, 6, 3)
    scaled = jax.tree.map(lambda leaf: 5.0 * leaf - 1.0, variables)
    assert_trees_close(apply(scaled, y), apply(variables, y), rtol=1e-3)
    kernels = [jax.tree.leaves(tree)[0] for tree in (scaled, variables)]
    assert distance(*(reference(y, kernel) for kernel in kernels)) > 1.0


# --- group normalisation


def group_norms(x, groups, epsilon=1e-5):
    """Ours and Flax's with slow variance, sharing random parameters."""
    mine = GroupNorm(groups, epsilon)
    theirs = nn.GroupNorm(groups, epsilon=epsilon, use_fast_variance=False)
    channels = x.shape[-1]
    variables = {"params": {"scale": draw(8, channels), "bias": draw(9, channels)}}
    return (
        lambda x, v=variables: mine.apply(v, x),
        lambda x, v=variables: theirs.apply(v, x),
        variables,
    )


@pytest.mark.parametrize(("channels", "groups"), [(8, 4), (6, 1), (6, 6)])
def test_group_norm_equals_flax_in_value_and_gradients(channels, groups):
    x, cotangent = draw(0, 2, 5, 6, channels), draw(1, 2, 5, 6, channels)
    mine, theirs, variables = group_norms(x, groups)
    found = with_gradients(mine, cotangent, x, variables)
    expected = with_gradients(theirs, cotangent, x, variables)
    for left, right in zip(found, expected, strict=True):
        assert_trees_close(left, right)


def test_group_norm_is_accurate_far_from_zero():
    # On a grid of 1/256, so that adding 10,000 is exact and the true answer does not change.
    x = np.round(draw(0, 2, 16, 16, 8) * 256) / 256
    cotangent = draw(1, 2, 16, 16, 8)
    mine, theirs, _ = group_norms(x, 4)
    expected, gradient = with_gradients(theirs, cotangent, x)
    found, far_gradient = with_gradients(mine, cotangent, np.float32(x + 1e4))
    assert_trees_close(found, expected)
    assert_trees_close(far_gradient, gradient)
    fast = nn.GroupNorm(4).apply({"params": {"scale": draw(8, 8), "bias": draw(9, 8)}}, x + 1e4)
    with pytest.raises(AssertionError):  # E[x^2] - E[x]^2, the obvious way, has lost its digits
        assert_trees_close(fast, expected)


def test_group_norm_of_a_constant_image_is_the_bias_with_finite_gradient():
    x = jnp.full((1, 4, 4, 4), 3.0)
    mine, _, variables = group_norms(x, 2)
    bias = np.broadcast_to(variables["params"]["bias"], x.shape)
    value, gradient = with_gradients(mine, jnp.ones_like(x), x)
    np.testing.assert_allclose(value, bias, rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_group_norm_keeps_the_dtype_and_takes_moments_in_float32():
    x = draw(0, 1, 16, 16, 4)
    mine, theirs, _ = group_norms(x, 2)
    found = jax.jit(mine)(jnp.asarray(x, jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    exact = jax.jit(theirs)(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=0.03)


def test_group_norm_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match=r"channels=6.*self.num_groups=4"):
        GroupNorm(4).init(jax.random.key(0), jnp.zeros((1, 2, 2, 6)))


# --- pooling and upsampling


def test_max_pool_equals_flax_in_value_and_gradient():
    x, cotangent = draw(0, 2, 6, 8, 3), draw(1, 2, 3, 4, 3)
    found = with_gradients(max_pool_2x2, cotangent, x)
    expected = with_gradients(lambda x: nn.max_pool(x, (2, 2), (2, 2)), cotangent, x)
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_array_equal(left, right)


def test_up_conv_equals_the_transposed_convolution():
    x = draw(0, 2, 3, 4, 5)
    mine = UpConv(6)
    theirs = nn.ConvTranspose(6, (2, 2), (2, 2), use_bias=False)
    kernel = draw(2, 5, 4 * 6)

    def transposed(dense):
        # Dense [I, 2, 2, O]: what one pixel becomes. Flax keeps [2, 2, I, O] and turns it round.
        kernel = dense.reshape(5, 2, 2, 6).transpose(1, 2, 0, 3)[::-1, ::-1]
        return {"params": {"kernel": kernel}}

    def own(dense, x):
        return mine.apply({"params": {"Dense_0": {"kernel": dense}}}, x)

    def other(dense, x):
        return theirs.apply(transposed(dense), x)

    cotangent = draw(1, 2, 6, 8, 6)
    found = with_gradients(own, cotangent, kernel, x)
    expected = with_gradients(other, cotangent, kernel, x)
    for left, right in zip(found, expected, strict=True):
        assert_trees_close(left, right)


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 4, 3)])
def test_pixelwise_product_has_the_gradients_of_a_product(shape):
    rng = np.random.default_rng(0)
    pixels = jnp.asarray(rng.normal(size=shape), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 7)), jnp.float32)
    dimensions = (((pixels.ndim - 1,), (0,)), ((), ()))

    def loss(product, pixels, kernel):
        return jnp.sum(jnp.sin(product(pixels, kernel, dimensions)))

    ours, theirs = (
        jax.value_and_grad(loss, (1, 2))(pixelwise_product(variant), pixels, kernel)
        for variant in ("matmul", "xla")
    )
    for found, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_pixelwise_product_refuses_what_it_does_not_compute():
    pixels = jnp.ones((4, 3))
    with pytest.raises(ValueError, match="Expected Dense's product"):
        pixelwise_product("matmul")(pixels, jnp.ones((4, 3)), (((0,), (0,)), ((), ())))
