"""Smooth kinks: exact values and first derivatives, and second ones that see a kink."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_dp.models import kinks
from fedjax_dp.models.layers import max_pool_2x2
from fedjax_dp.models.unet import unet

WIDTH = 0.2


def images(shape=(2, 8, 8, 3), seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
    ("plain", "kinked"),
    [
        (nn.relu, functools.partial(kinks.relu, WIDTH)),
        (max_pool_2x2, functools.partial(kinks.max_pool_2x2, WIDTH)),
    ],
)
@pytest.mark.parametrize("is_tied", [False, True])
def test_values_and_first_derivatives_are_those_of_the_plain_layer(plain, kinked, is_tied):
    x = jnp.round(images()) if is_tied else images()  # zeros, and windows with several maxima
    (ours, ours_vjp), (theirs, theirs_vjp) = jax.vjp(kinked, x), jax.vjp(plain, x)
    np.testing.assert_array_equal(ours, theirs)
    cotangent = images(theirs.shape, seed=1)
    np.testing.assert_allclose(ours_vjp(cotangent)[0], theirs_vjp(cotangent)[0], rtol=1e-6)


def test_second_derivative_of_relu_is_that_of_a_smooth_step():
    x = jnp.linspace(-1.0, 1.0, 9)
    second = jax.vmap(jax.grad(jax.grad(lambda v: kinks.relu(WIDTH, v))))(x)
    smooth = jax.vmap(jax.grad(lambda v: jax.nn.sigmoid(v / WIDTH)))(x)
    np.testing.assert_allclose(second, smooth, rtol=1e-5)
    plain = jax.vmap(jax.grad(jax.grad(nn.relu)))(x)
    assert not np.any(plain)  # what an attacker is up against


def test_second_derivative_of_pooling_moves_the_choice_between_pixels():
    weight = images((1, 2, 2, 1), seed=1)

    def routed(x):  # the gradient's part that the first pixel gets, times its weight
        grad = jax.grad(lambda v: kinks.max_pool_2x2(WIDTH, v).sum())(x)
        return (grad * weight).sum()

    x = images((1, 2, 2, 1))
    shares = jax.nn.softmax(x.reshape(4) / WIDTH)
    w = weight.reshape(4)
    expected = shares * (w - shares @ w) / WIDTH
    np.testing.assert_allclose(jax.grad(routed)(x).reshape(4), expected, rtol=1e-4, atol=1e-6)


def test_cotangents_are_routed_by_the_transpose_of_the_choice():
    x, passed = images((1, 4, 4, 2)), images((1, 2, 2, 2), seed=1)

    def routed(passed):
        return jax.vjp(functools.partial(kinks.max_pool_2x2, WIDTH), x)[1](passed)[0]

    there = images((1, 4, 4, 2), seed=2)
    back = jax.vjp(routed, passed)[1](there)[0]
    forth = float(jnp.vdot(routed(passed), there))
    assert forth == pytest.approx(float(jnp.vdot(passed, back)), rel=1e-5)


def test_a_network_with_smooth_kinks_has_the_same_parameters_values_and_gradients():
    shape = {"base_channels": 8, "depth": 2, "conv_variant": "matmul"}
    init, plain = unet(2, **shape)
    init_kinked, kinked = unet(2, **shape, kink_width=WIDTH)
    params = init(jax.random.key(0))
    same = jax.tree.map(np.array_equal, params, init_kinked(jax.random.key(0)))
    assert all(jax.tree.leaves(same))
    tile = images((1, 16, 16, 3))

    def loss(apply, params):
        return jnp.square(apply(params, tile, None)).sum()

    ours, theirs = (jax.grad(functools.partial(loss, apply))(params) for apply in (kinked, plain))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))
