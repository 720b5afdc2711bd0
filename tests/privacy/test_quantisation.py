import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_dp.privacy import quantisation
from fedjax_dp.privacy.clipping import clipped_grad
from fedjax_dp.privacy.quantisation import integer_l2_sensitivity, quantised_grad, squared_norm
from tests import oracles
from tests.oracles import assert_trees_equal, exact_products, flat, norm  # noqa: F401

LEVELS = 2**20
SLOTS = 5


def linear_loss(params, unit, key):
    """The unit is its own gradient."""
    del key
    return sum(jnp.sum(params[name] * unit[name]) for name in params)


def problem(vectors):
    """Units with given gradients [U, D], spread over two leaves."""
    vectors = jnp.asarray(vectors, jnp.float32)
    units = {"a": vectors[:, :4].reshape(-1, 2, 2), "b": vectors[:, 4:]}
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:]), units)
    return params, units, jax.random.split(jax.random.key(0), len(vectors))


@functools.cache
def compiled(size=1, levels=LEVELS, loop="drawn"):
    return jax.jit(quantised_grad(linear_loss, microbatch_size=size, levels=levels, loop=loop))


def quantised_sum(vectors, num_units=None, clip=1.0, **options):
    num_units = len(vectors) if num_units is None else num_units
    return compiled(**options)(*problem(vectors), num_units, clip)


def random_vectors(count=SLOTS, size=9, seed=0):
    return np.random.default_rng(seed).normal(size=(count, size)).astype(np.float32)


def integer_norm(tree):
    """Exact: the square, in Python's integers."""
    return sum(int(value) ** 2 for leaf in jax.tree.leaves(tree) for value in np.ravel(leaf))


# --- the sum


clipped_one = jax.jit(clipped_grad(linear_loss))


def naive_sum(vectors, num_units, clip, levels):
    """One unit after another; the float32 gradient from `clipped_grad`, then NumPy's integers."""
    total = 0
    for vector in vectors[:num_units]:
        gradient, _ = clipped_one(*problem(vector[None]), 1, clip)
        scaled = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])
        scaled = scaled * np.float32(levels * quantisation._HEADROOM)
        total = total + np.rint(scaled).astype(np.int64)
    return total


PROGRAMS = [(1, "drawn"), (2, "drawn"), (2, "capacity")]


@pytest.mark.parametrize(("size", "loop"), PROGRAMS)
def test_the_sum_equals_the_loop_over_units_exactly(size, loop):
    vectors = random_vectors() * np.array([1e-3, 0.1, 1.0, 50.0, 1.0], np.float32)[:, None]
    found, aux = quantised_sum(vectors, 4, size=size, loop=loop)
    np.testing.assert_array_equal(flat(found), naive_sum(vectors, 4, 1.0, LEVELS))
    assert all(leaf.dtype == jnp.int32 for leaf in jax.tree.leaves(found))
    norms = np.linalg.norm(vectors[:4], axis=1)
    np.testing.assert_allclose(aux.value.norm, norms.sum(), rtol=1e-5)
    assert aux.value.clipped == (norms > 1).sum()
    assert (aux.value.units, aux.value.non_finite) == (4, 0)


@pytest.mark.parametrize("levels", [1, 1000, 2**21])
def test_other_levels(levels):
    vectors = random_vectors()
    found, _ = quantised_sum(vectors, levels=levels)
    np.testing.assert_array_equal(flat(found), naive_sum(vectors, SLOTS, 1.0, levels))
    exact = sum(v / max(1.0, np.linalg.norm(v)) for v in vectors.astype(np.float64))
    assert np.abs(flat(found) / levels - exact).max() < SLOTS * (0.5 / levels + 1e-5)


def test_rounding_is_to_the_nearest_and_ties_to_even():
    levels, halves = 1000, np.array([0.5, 1.5, 2.5, -0.5, -1.5, 0.49, -0.51])
    vector = np.float32(halves / np.float32(levels * quantisation._HEADROOM))
    found, _ = quantised_sum(np.pad(vector[None], ((0, 4), (0, 2))), 1, levels=levels)
    scaled = vector * np.float32(levels * quantisation._HEADROOM)
    np.testing.assert_array_equal(flat(found)[:7], np.rint(scaled))
    np.testing.assert_array_equal(np.rint(halves), [0, 2, 2, 0, -2, 0, -1])


def test_the_clip_may_be_traced_and_differ_per_client():
    params, units, keys = problem(random_vectors())
    clips, counts = jnp.array([0.5, 2.0, 100.0]), jnp.array([5, 0, 3])
    fn = quantised_grad(linear_loss)
    mapped, _ = jax.jit(jax.vmap(fn, (None, None, None, 0, 0)))(params, units, keys, counts, clips)
    for client in range(3):
        alone, _ = quantised_sum(random_vectors(), int(counts[client]), float(clips[client]))
        assert_trees_equal(oracles.take(mapped, client), alone)


# --- padding, empty draws, units that are not finite


@pytest.mark.parametrize(("size", "loop"), PROGRAMS)
def test_padding_adds_exactly_zero(size, loop):
    sums = []
    for garbage in (0.0, 1e30, np.inf, np.nan):
        vectors = random_vectors()
        vectors[3:] = garbage
        sums.append(quantised_sum(vectors, 3, size=size, loop=loop))
    for other in sums[1:]:
        assert_trees_equal(other, sums[0])
    assert norm(sums[0][0]) > 0.1 * LEVELS
    empty, aux = quantised_sum(vectors, 0, size=size, loop=loop)
    for leaf in jax.tree.leaves((empty, aux)):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [1, 2])
def test_a_unit_that_is_not_finite_adds_exactly_zero(bad, size):
    vectors = random_vectors()
    without = vectors.copy()
    vectors[2, 1], without[2] = bad, 0.0
    found, aux = quantised_sum(vectors, size=size)
    assert_trees_equal(found, quantised_sum(without, size=size)[0])
    assert aux.value.non_finite == 1


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-3, 1e16, 3e38])
def test_one_unit_stays_within_the_bound_at_any_scale(scale):
    for seed in range(3):
        vectors = random_vectors(seed=seed)
        vectors = np.float32(scale) * (vectors / np.abs(vectors).max())
        for clip in (1e-30, 1.0, 1e6):
            found, _ = quantised_sum(vectors, 1, clip=clip)
            assert integer_norm(found) <= integer_l2_sensitivity(LEVELS, 9) ** 2


# --- the bound


def test_the_bound_is_rounded_up_to_an_integer():
    for dimension in (*range(1, 300), 10**6, 10**6 + 1, 2**21 - 1, 1_940_000):
        bound = integer_l2_sensitivity(7, dimension) - 7
        assert 4 * bound**2 >= dimension > 4 * (bound - 1) ** 2


def test_a_unit_that_rounds_every_coordinate_up_stays_within_and_comes_near():
    """128 x 128 equal coordinates of 7.507 each, of norm one: all become 8."""
    dimension, levels = 2**14, 961
    vector = np.full((1, dimension), 1 / 128, np.float32)
    found, aux = quantised_sum(vector, levels=levels)
    np.testing.assert_array_equal(flat(found), 8)
    grown, bound = math.sqrt(integer_norm(found)), integer_l2_sensitivity(levels, dimension)
    assert levels + 0.98 * math.sqrt(dimension) / 2 < grown <= bound
    assert aux.value.non_finite == 0


def test_the_worst_unit_of_all_reaches_the_bound(monkeypatch):
    """Norm one exactly, every coordinate a half: 32 x 32 of levels 496 = 31/2 * 32."""
    dimension, levels = 1024, 496
    bound = integer_l2_sensitivity(levels, dimension)
    assert bound == 512
    monkeypatch.setattr(quantisation, "_HEADROOM", 1.0 + 1e-6)  # a half exactly would go to even
    vector = np.full((1, dimension), 1 / 32, np.float32)
    fn = jax.jit(quantised_grad(linear_loss, levels=levels))
    found, aux = fn(*problem(vector), 1, 1.0)
    np.testing.assert_array_equal(flat(found), 16)
    assert integer_norm(found) == bound**2
    assert aux.value.non_finite == 0


@pytest.mark.parametrize("size", [1, 2])
def test_a_unit_beyond_the_bound_adds_exactly_zero(monkeypatch, size):
    """Made possible here by weights above one; the check does not trust the clip before it."""
    vectors = random_vectors()
    vectors[1:] *= 1e-3
    monkeypatch.setattr(quantisation, "_HEADROOM", 1.0 + 1e-4)
    fn = jax.jit(quantised_grad(linear_loss, microbatch_size=size))
    found, aux = fn(*problem(vectors), SLOTS, 1.0)
    vectors[0] = 0.0
    expected, _ = fn(*problem(vectors), SLOTS, 1.0)
    assert_trees_equal(found, expected)
    assert norm(found) > 0
    assert aux.value.non_finite == 1


def test_values_too_large_to_square_do_not_pass(monkeypatch):
    monkeypatch.setattr(quantisation, "_HEADROOM", 2.0**12)  # 2**32 wraps to zero
    fn = jax.jit(quantised_grad(linear_loss))
    vector = np.zeros((1, 9), np.float32)
    vector[0, 0] = 1.0
    found, aux = fn(*problem(vector), 1, 1.0)
    assert integer_norm(found) == 0
    assert aux.value.non_finite == 1


def test_neighbours_differ_by_at_most_the_sensitivity_and_nearly_by_it():
    fn = quantised_grad(linear_loss)
    vectors = 100.0 * random_vectors()
    zeroed, opposite = vectors.copy(), vectors.copy()
    zeroed[1], opposite[1] = 0.0, -vectors[1]
    total = flat(quantised_sum(vectors)[0])
    for relation, neighbour in (
        ("zero_out", quantised_sum(zeroed)[0]),
        ("add_or_remove_one", quantised_sum(np.roll(vectors, -2, 0), SLOTS - 1)[0]),
        ("replace_one", quantised_sum(opposite)[0]),
    ):
        moved = integer_norm(total - flat(neighbour))
        bound = fn.sensitivity(9, relation)
        assert (0.9999 * bound) ** 2 < moved <= bound**2
    with pytest.raises(ValueError, match="'replace'"):
        fn.sensitivity(9, "replace")


# --- the norm of integers


def value_of(limbs):
    assert (np.asarray(limbs) < 2**16).all()
    return sum(int(limb) << (16 * i) for i, limb in enumerate(np.asarray(limbs)))


exact_norm = jax.jit(squared_norm)
LARGEST = 2**22 - 1


@pytest.mark.parametrize("size", [1, 1024, 32_768, 100_003])
@pytest.mark.parametrize("top", [1, 2047, 2048, 2**20, LARGEST])
def test_the_squared_norm_of_integers_is_exact(size, top):
    rng = np.random.default_rng(size)
    sign = rng.choice([-1, 1], size)
    for values in (sign * rng.integers(0, top, size, endpoint=True), sign * top):
        tree = {"a": values[:5].astype(np.int32), "b": values[5:].astype(np.int32)}
        assert value_of(exact_norm(tree)) == sum(int(v) ** 2 for v in values)


def test_the_squared_norm_is_exact_where_every_sum_is_largest():
    """The most elements there may be, all of the largest magnitude, in one leaf."""
    values = np.full(quantisation.MAX_DIMENSION, -LARGEST, np.int32)
    assert value_of(exact_norm(values)) == quantisation.MAX_DIMENSION * LARGEST**2


@pytest.mark.parametrize("bound", [0, 1, 2**16, 2**32 - 1, 2**48 + 2**16, (2**20 + 700) ** 2])
def test_the_comparison_with_the_bound_is_exact(bound):
    def limbs(value):
        return jnp.array([(value >> (16 * i)) & 0xFFFF for i in range(5)], jnp.uint32)

    for value in {0, bound - 1, bound, bound + 1, bound + 2**16, 2**70} - {-1}:
        assert bool(quantisation._at_most(limbs(value), bound)) == (value <= bound)


# --- what is refused


def test_sums_that_could_overflow_are_refused():
    fn = quantised_grad(linear_loss, levels=2**21)
    params, units, keys = problem(random_vectors(1023, size=8))
    total, _ = jax.eval_shape(fn, params, units, keys, 1023, 1.0)
    assert total["a"].dtype == jnp.int32
    with pytest.raises(ValueError, match=r"int32 sum could overflow.*levels"):
        fn(*problem(random_vectors(1024, size=8)), 1, 1.0)


def test_the_largest_sum_that_is_allowed_does_not_overflow():
    slots = (2**31 - 1) // integer_l2_sensitivity(2**21, 5)
    vectors = np.zeros((slots, 5))
    vectors[:, 0] = 1.0
    found, _ = quantised_sum(vectors, levels=2**21, size=64)
    assert flat(found)[0] == slots * round(2**21 * quantisation._HEADROOM)
    assert flat(found)[0] > 0.999 * 2**31


def test_too_many_parameters_are_refused():
    fn = quantised_grad(linear_loss)
    big = {"a": jax.ShapeDtypeStruct((quantisation.MAX_DIMENSION + 1,), jnp.float32)}
    with pytest.raises(ValueError, match="parameters"):
        fn(big, None, jax.random.split(jax.random.key(0), 1), 1, 1.0)


@pytest.mark.parametrize("wrong", [{"levels": 0}, {"levels": 2**21 + 1}, {"microbatch_size": 0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        quantised_grad(linear_loss, **wrong)
