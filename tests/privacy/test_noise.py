import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fedjax_dp.privacy import noise
from fedjax_dp.privacy.noise import add_noise, gaussian
from tests.laws import assert_follows, assert_mean, assert_std, assert_uncorrelated
from tests.oracles import exact_products  # noqa: F401

COUNT = 200_000


@functools.cache
def draws(seed=0, count=COUNT):
    return np.asarray(jax.jit(gaussian, static_argnums=1)(jax.random.key(seed), (count,)))


def blocks():
    """The whole blocks of `draws`, one a row."""
    size = 2 * noise._BLOCK
    return draws()[: COUNT // size * size].reshape(-1, size)


def zeros(dtype=jnp.float32):
    return {"kernel": jnp.zeros((100, 40, 5), dtype), "bias": jnp.zeros((20_001,), dtype)}


# --- the law


def test_std_is_two_sided_per_leaf_and_the_test_has_power():
    noised = jax.jit(add_noise)(jax.random.key(1), zeros(), 2.0)
    for leaf in jax.tree.leaves(noised):
        assert_std(leaf, 2.0)
        assert_mean(leaf, 0.0, 2.0)
        for wrong in (1.9, 2.1):
            with pytest.raises(AssertionError):
                assert_std(leaf, wrong)


def test_draws_are_normal_and_the_test_has_power():
    values = draws()
    assert_follows(values, stats.norm())
    for wrong in (stats.norm(scale=1.03), stats.norm(loc=0.02), stats.t(df=20)):
        with pytest.raises(AssertionError):
            assert_follows(values, wrong)


def test_the_two_draws_of_a_pair_are_independent():
    half = noise._BLOCK  # a block holds the cosines of all its pairs, then their sines
    cosines, sines = np.swapaxes(blocks().reshape(-1, 2, half), 0, 1)
    assert_uncorrelated(cosines, sines)
    assert_uncorrelated(draws()[:-1], draws()[1:])
    # Of a radius of another law, sine and cosine are dependent, and only their squares tell.
    radius, angle = np.random.default_rng(0).uniform(1, 3, half), np.arange(half)
    with pytest.raises(AssertionError, match="squares"):
        assert_uncorrelated(radius * np.cos(angle), radius * np.sin(angle))


def test_the_blocks_of_a_draw_are_independent():
    first, *others = blocks()
    assert len(others) > 10
    for other in others:
        assert_uncorrelated(first, other)
    assert_uncorrelated(blocks()[1:], blocks()[:-1])


def test_cosine_and_sine_of_every_angle():
    ends = np.arange(0, 2**32, 2**29)[:, None] + np.arange(-3, 4)  # where quadrants are left
    angle = np.concatenate([ends.ravel(), np.linspace(0, 2**32 - 1, 1_000_003)]) % 2**32
    found = jax.jit(noise._cosine_and_sine)(angle.astype(np.uint32))
    turns = 2 * np.pi * angle.astype(np.uint32).astype(np.float64) / 2**32
    for values, exact in zip(found, (np.cos(turns), np.sin(turns)), strict=True):
        np.testing.assert_allclose(values, exact, atol=1.5e-7, rtol=0)


def with_bits(monkeypatch, high, low, angle=0):
    """`gaussian` fed chosen random bits: the first half of its draws lies along the angle."""
    words = np.stack(
        [np.broadcast_to(np.asarray(w, np.uint32), np.shape(high)) for w in (high, low, angle)]
    )
    monkeypatch.setattr(noise.jax.random, "bits", lambda *_: jnp.asarray(words))
    return np.asarray(gaussian(jax.random.key(0), (2 * np.size(high),)))[: np.size(high)]


def test_the_tail_reaches_beyond_what_a_float32_normal_can_draw(monkeypatch):
    end = math.sqrt(2) * jax.lax.erf_inv(jnp.nextafter(jnp.float32(1), jnp.float32(0)))
    assert end < 5.43  # where jax.random.normal stops
    high, low = np.array([0, 0, 2**32 - 1]), np.array([0, 1, 2**32 - 1])
    reach = with_bits(monkeypatch, high, low)
    assert reach[0] > reach[1] > 9.4
    assert reach[2] == 0.0
    assert np.isfinite(reach).all()


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_the_far_tail_has_the_right_law(monkeypatch, bits):
    """Given a uniform below 2**-bits, exp(-r**2 / 2) must be uniform below 2**-bits: r > 3 .. 6."""
    rng = np.random.default_rng(bits)
    high = rng.integers(0, 2 ** (32 - bits), 8_000)
    low = rng.integers(0, 2**32, 8_000)
    radius = with_bits(monkeypatch, high, low).astype(np.float64)
    assert radius.min() > math.sqrt(2 * bits * math.log(2)) - 1e-3
    assert_follows(np.exp(-(radius**2) / 2) * 2.0**bits, stats.uniform())


# --- the type


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_noise_is_float32_whatever_the_leaves_are(dtype):
    noised = jax.jit(add_noise)(jax.random.key(1), zeros(dtype), 1.0)
    expected = jax.jit(add_noise)(jax.random.key(1), zeros(), 1.0)
    for leaf, other in zip(jax.tree.leaves(noised), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, other)
        assert len(np.unique(leaf)) > 0.99 * leaf.size  # bfloat16 noise has 128 distinct values


def test_noise_is_added_in_float32():
    value = jnp.asarray([1.0, 256.0], jnp.bfloat16)
    noised = add_noise(jax.random.key(1), {"a": value}, 1e-3)["a"]
    assert noised.dtype == jnp.float32
    assert (noised != value.astype(jnp.float32)).all()


# --- keys


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_other_generators_are_refused(impl):
    key = jax.random.key(0, impl=impl)
    for call in (lambda: gaussian(key, (3,)), lambda: add_noise(key, zeros(), 1.0)):
        with pytest.raises(ValueError, match=r"threefry key, got .*rbg"):
            call()


def test_legacy_keys_are_refused():
    key = jax.random.PRNGKey(0)
    for call in (lambda: gaussian(key, (3,)), lambda: add_noise(key, zeros(), 1.0)):
        with pytest.raises(ValueError, match="typed key, got an array of uint32"):
            call()


def test_noise_depends_on_the_key_alone():
    tree = {"a": jnp.arange(5.0), "b": jnp.ones((2, 2))}
    blank = jax.tree.map(jnp.zeros_like, tree)
    noised, pure = (add_noise(jax.random.key(4), t, 0.5) for t in (tree, blank))
    for name in tree:
        np.testing.assert_allclose(noised[name] - tree[name], pure[name], atol=1e-6)
    again = add_noise(jax.random.key(4), blank, 0.5)
    other = add_noise(jax.random.key(5), blank, 0.5)
    np.testing.assert_array_equal(again["b"], pure["b"])
    assert (np.asarray(other["b"]) != np.asarray(pure["b"])).all()


def test_noise_is_independent_across_keys_and_leaves():
    tree = {"left": jnp.zeros(40_000), "right": jnp.zeros(40_000)}
    keys = jax.random.split(jax.random.key(0), 2)
    noised = jax.jit(jax.vmap(add_noise, (0, None, None)))(keys, tree, 1.0)
    first, second = noised["left"]
    assert_uncorrelated(first, second)
    assert_uncorrelated(first, noised["right"][0])
    assert_uncorrelated(first, noised["right"][1])
    with pytest.raises(AssertionError):
        assert_uncorrelated(first, 0.05 * first + second)


def test_an_axis_of_one_device_changes_neither_draws_nor_their_type():
    """More than a block, as the carry of a loop: what varies over an axis is another type."""
    mesh = jax.make_mesh((1,), ("units",), axis_types=(jax.sharding.AxisType.Auto,))
    spec, size = jax.sharding.PartitionSpec(), 40_000

    def body(key, values):
        def step(values, _):
            return add_noise(key, values, 1.0, axis_name="units"), None

        return jax.lax.scan(step, values, None, 2)[0]

    mapped = jax.shard_map(body, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    key = jax.random.key(5)
    found = jax.jit(mapped)(key, jnp.zeros(size))
    np.testing.assert_array_equal(found, 2 * gaussian(key, (size,)))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3)])
def test_odd_sizes_and_scalars(shape):
    values = gaussian(jax.random.key(2), shape)
    assert values.shape == shape
    assert values.dtype == jnp.float32
    assert (np.asarray(values) != 0).all()


def test_a_stddev_of_zero_adds_nothing():
    noised = add_noise(jax.random.key(1), {"a": jnp.arange(4.0)}, 0.0)
    np.testing.assert_array_equal(noised["a"], np.arange(4.0))
