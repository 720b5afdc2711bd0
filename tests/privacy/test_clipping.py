import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_dp.privacy.clipping import clip_by_norm, clipped_grad, global_norm, summed_grad
from tests import oracles
from tests.oracles import (
    assert_trees_close,
    assert_trees_equal,
    distance,
    exact_products,  # noqa: F401
    norm,
)

SLOTS, REAL, TILES, FEATURES = 5, 4, 3, 6
CLIP = 3.0
LOOPS = ("drawn", "capacity")
SIZES = tuple(range(1, SLOTS + 1))


def regression_loss(params, unit, key):
    """A unit of several tiles, each seen under two jitters made of the unit's own key."""
    jitter = (jax.random.key_data(key) % 97).astype(jnp.float32) / 97  # no draw: quick to compile
    features = jnp.tanh((unit["x"] + jitter[:, None, None]) @ params["hidden"])
    return jnp.mean(jnp.square(features @ params["head"] - unit["y"]))


def regression_problem():
    rng = np.random.default_rng(0)
    params = {"hidden": rng.normal(size=(FEATURES, 4)), "head": rng.normal(size=4)}
    # Scales from well below the clip to far above it.
    scales = np.array([1e-2, 0.3, 1.0, 100.0, 1.0])[:, None]
    units = {
        "x": rng.normal(size=(SLOTS, TILES, FEATURES)),
        "y": scales * rng.normal(size=(SLOTS, TILES)),
    }
    keys = jax.random.split(jax.random.key(3), SLOTS)
    return *oracles.as_float32((params, units)), keys


def linear_loss(params, unit, key):
    """The unit is its own gradient."""
    del key
    return sum(jnp.sum(params[name] * unit[name]) for name in params)


def linear_problem(vectors):
    """Units with given gradients [U, 6], spread over two leaves."""
    vectors = jnp.asarray(vectors, jnp.float32)
    units = {"a": vectors[:, :4].reshape(-1, 2, 2), "b": vectors[:, 4:]}
    params = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(2)}
    return params, units, jax.random.split(jax.random.key(0), len(vectors))


@functools.cache
def compiled(make, loss, size, loop):
    return jax.jit(make(loss, microbatch_size=size, loop=loop))


def clipped_sum(vectors, num_units=None, clip=CLIP, size=1, loop="drawn", make=clipped_grad):
    params, units, keys = linear_problem(vectors)
    num_units = len(vectors) if num_units is None else num_units
    return compiled(make, linear_loss, size, loop)(params, units, keys, num_units, clip)


def random_vectors(count=SLOTS, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 6)).astype(np.float32)


# --- equality with the loop


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("size", SIZES)
def test_clipped_sum_equals_the_loop_over_units(size, loop):
    params, units, keys = regression_problem()
    fn = compiled(clipped_grad, regression_loss, size, loop)
    found, aux = fn(params, units, keys, REAL, CLIP)
    expected = oracles.clipped_sum(regression_loss, params, units, keys, REAL, CLIP)
    assert_trees_close(found, expected)
    gradients = [
        oracles.gradient_of(regression_loss)(params, oracles.take(units, i), keys[i])
        for i in range(REAL)
    ]
    norms = [norm(gradient) for gradient in gradients]
    assert min(norms) < CLIP < max(norms)  # clipped and unclipped units mixed
    np.testing.assert_allclose(aux.value.norm, sum(norms), rtol=1e-5)
    assert aux.value.clipped == sum(n > CLIP for n in norms)
    assert aux.value.units == REAL
    assert aux.value.non_finite == 0


@pytest.mark.parametrize(("size", "loop"), [(1, "drawn"), (2, "drawn"), (3, "capacity")])
def test_sum_without_clipping_equals_the_loop_over_units(size, loop):
    params, units, keys = regression_problem()
    fn = compiled(summed_grad, regression_loss, size, loop)
    found, aux = fn(params, units, keys, REAL, CLIP)
    grad = jax.jit(jax.value_and_grad(regression_loss))
    each = [grad(params, oracles.take(units, i), keys[i]) for i in range(REAL)]
    expected = jax.tree.map(lambda *leaves: sum(leaves), *[gradient for _, gradient in each])
    assert_trees_close(found, expected)
    np.testing.assert_allclose(aux.value.loss, sum(loss for loss, _ in each), rtol=1e-5)


def test_a_microbatch_larger_than_the_slots_is_all_of_them():
    vectors = random_vectors()
    assert_trees_equal(clipped_sum(vectors, size=99)[0], clipped_sum(vectors, size=SLOTS)[0])


def test_clip_and_count_may_differ_per_client_under_vmap():
    params, units, keys = regression_problem()
    clips, counts = jnp.array([0.1, CLIP, 50.0]), jnp.array([4, 0, 2])
    for size in (1, 2):
        fn = clipped_grad(regression_loss, microbatch_size=size)
        mapped, _ = jax.jit(jax.vmap(fn, (None, None, None, 0, 0)))(
            params, units, keys, counts, clips
        )
        for client in range(3):
            limits = int(counts[client]), float(clips[client])
            expected = oracles.clipped_sum(regression_loss, params, units, keys, *limits)
            assert_trees_close(oracles.take(mapped, client), expected)


# --- padding, empty draws, units that are not finite


@pytest.mark.parametrize("make", [clipped_grad, summed_grad])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("size", [1, 2, SLOTS])
def test_what_lies_in_the_padding_changes_no_bit(make, loop, size):
    sums = []
    for garbage in (0.0, 1e30, np.inf, np.nan):
        vectors = random_vectors()
        vectors[3:] = garbage
        sums.append(clipped_sum(vectors, 3, size=size, loop=loop, make=make))
    for other in sums[1:]:
        assert_trees_equal(other, sums[0])
    assert norm(sums[0][0]) > 0.1


@pytest.mark.parametrize("make", [clipped_grad, summed_grad])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("size", [1, 2])
def test_an_empty_draw_is_exactly_zero(make, loop, size):
    found, aux = clipped_sum(np.full((SLOTS, 6), np.nan), 0, size=size, loop=loop, make=make)
    for leaf in jax.tree.leaves((found, aux)):
        np.testing.assert_array_equal(leaf, 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [1, 2, SLOTS])
def test_a_unit_that_is_not_finite_adds_exactly_zero(bad, size):
    vectors = random_vectors()
    without = vectors.copy()
    without[2] = 0.0
    vectors[2, 1] = bad  # one bad element is enough
    found, aux = clipped_sum(vectors, size=size)
    expected, aux_without = clipped_sum(without, size=size)
    assert_trees_equal(found, expected)
    assert aux.value.non_finite == 1
    assert aux.value.units == SLOTS
    np.testing.assert_allclose(aux.value.norm, aux_without.value.norm, rtol=1e-6)


def test_no_unit_is_counted_twice_whatever_the_count_says():
    vectors = random_vectors()
    for size in (1, 2, 3):
        assert_trees_equal(clipped_sum(vectors, 99, size=size), clipped_sum(vectors, size=size))


def test_the_drawn_loop_visits_the_draw_alone():
    visited = []

    def counted(params, unit, key):
        jax.debug.callback(lambda: visited.append(1))
        return linear_loss(params, unit, key)

    params, units, keys = linear_problem(random_vectors())
    for loop, expected in (("drawn", 3), ("capacity", SLOTS)):
        visited.clear()
        result = clipped_grad(counted, loop=loop)(params, units, keys, 3, CLIP)
        jax.block_until_ready(result)
        jax.effects_barrier()
        assert len(visited) == expected


# --- one unit weighs at most one


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    "scale", [0.0, 1e-36, 1e-30, 1e-3, 1.0, 1e14, 1e16, 1e19, 1e30, 8e37, 3e38]
)
@pytest.mark.parametrize("clip", [1e-30, 1e-6, 1.0, 1e6])
def test_one_unit_weighs_at_most_one(scale, clip, size):
    for seed in range(3):
        vectors = random_vectors(2, seed)
        vectors = np.float32(scale) * (vectors / np.abs(vectors).max())
        found, _ = clipped_sum(vectors, 1, clip=clip, size=size)
        weight, true = norm(found), norm(vectors[0])
        assert weight <= 1 + 1e-6
        if scale < 8e37:  # beyond, 1 / norm leaves float32's range, and less is safe
            np.testing.assert_allclose(weight, min(1.0, true / clip), rtol=1e-5, atol=1e-35)


@pytest.mark.parametrize("clip", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("size", [1, 2, SLOTS])
def test_units_at_the_end_of_float32s_range_weigh_at_most_one_each(size, clip):
    """Where the reciprocal of a magnitude is subnormal, and is flushed to zero."""
    vectors = random_vectors()
    vectors = np.float32(3.3e38) * (vectors / np.abs(vectors).max(1, keepdims=True))
    vectors[0] /= 4
    found, _ = clipped_sum(vectors, clip=clip, size=size)
    assert norm(found) <= SLOTS * (1 + 1e-6)


def test_huge_and_tiny_gradients_do_not_pass_the_clip_together():
    """Squares of 1e30 overflow and squares of 1e-30 vanish: naive norms are infinity and zero."""
    vectors = random_vectors()
    vectors[0] *= 1e30
    vectors[1] *= 1e-30
    expected = sum(
        v.astype(np.float64) * min(1 / np.linalg.norm(v.astype(np.float64)), 1 / 1e-31)
        for v in vectors
    )
    found, aux = clipped_sum(vectors, clip=1e-31)
    np.testing.assert_allclose(oracles.flat(found), expected, rtol=1e-5, atol=1e-6)
    assert aux.value.non_finite == 0


def test_sensitivity_is_kept_and_reached():
    fn = clipped_grad(linear_loss)
    vectors = 100.0 * random_vectors()
    zeroed, opposite = vectors.copy(), vectors.copy()
    zeroed[1], opposite[1] = 0.0, -vectors[1]
    total = clipped_sum(vectors)[0]
    for relation, neighbour in (
        ("zero_out", clipped_sum(zeroed)[0]),
        ("add_or_remove_one", clipped_sum(np.delete(vectors, 1, 0))[0]),
        ("replace_one", clipped_sum(opposite)[0]),
    ):
        moved = distance(total, neighbour)
        assert 0.999 * fn.sensitivity(relation) < moved <= fn.sensitivity(relation) * (1 + 1e-5)


def test_an_unknown_relation_has_no_sensitivity():
    with pytest.raises(ValueError, match="'replace'"):
        clipped_grad(linear_loss).sensitivity("replace")


def test_products_of_the_sum_are_never_rounded_to_the_backends_fast_format():
    """With TF32 or bfloat16 products a unit's weight could exceed one by a thousandth."""
    params, units, keys = linear_problem(random_vectors())
    fn = clipped_grad(linear_loss, microbatch_size=2)
    with jax.default_matmul_precision("bfloat16"):
        text = str(jax.make_jaxpr(fn)(params, units, keys, 3, CLIP))
    assert text.count("dot_general[") == len(params)
    assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == len(params)


# --- norms


@pytest.mark.parametrize(
    "scale", [1e-34, 1e-30, 1e-20, 1e-15, 1e-14, 1.0, 1e14, 1e16, 1e19, 1e30, 7e37]
)
def test_global_norm_equals_float64_over_the_whole_range(scale):
    tree = {"a": np.float32(scale) * random_vectors(3), "b": np.float32(scale * 1e-3) * np.ones(4)}
    np.testing.assert_allclose(jax.jit(global_norm)(tree), norm(tree), rtol=1e-6)
    both = jax.tree.map(lambda leaf: np.stack([leaf, 0.5 * leaf]), tree)
    mapped = jax.jit(jax.vmap(global_norm))(both)
    np.testing.assert_allclose(mapped, [norm(tree), 0.5 * norm(tree)], rtol=1e-6)


@pytest.mark.parametrize("value", [0.5, 0.7, 0.77, 0.99])
def test_global_norm_of_a_million_equal_values_is_exact(value):
    """The adversary's choice: rounding errors of a running sum would all have one sign."""
    leaf = np.full(1_179_648, value, np.float32)  # the largest kernel of a base-16 U-Net
    leaf[0] = 1.0
    np.testing.assert_allclose(jax.jit(global_norm)({"a": leaf}), norm(leaf), rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_global_norm_of_a_tree_that_is_not_finite_is_infinite(bad):
    assert np.isposinf(global_norm({"a": np.ones(3), "b": np.array([1.0, bad])}))


def test_global_norm_is_taken_in_float32():
    tree = {"a": jnp.full((4096,), 1.0, jnp.bfloat16)}
    assert global_norm(tree).dtype == jnp.float32
    assert global_norm(tree) == 64.0


@pytest.mark.parametrize("scale", [0.0, 1e-30, 0.1, 1.0, 1e30])
def test_clip_by_norm_bounds_the_norm_and_keeps_the_direction(scale):
    vector = np.float32(scale) * random_vectors(1)[0]
    clipped, before = clip_by_norm({"a": vector}, 2.0)
    np.testing.assert_allclose(before, norm(vector), rtol=1e-6)
    assert norm(clipped) <= 2.0 * (1 + 1e-6)
    factor = min(1.0, 2.0 / norm(vector)) if scale else 1.0
    np.testing.assert_allclose(clipped["a"], vector * factor, rtol=1e-5)


def test_clip_by_norm_of_a_tree_that_is_not_finite_is_zero():
    clipped, before = clip_by_norm({"a": jnp.array([1.0, np.nan]), "b": jnp.ones(2)}, 2.0)
    assert norm(clipped) == 0.0
    assert np.isposinf(before)


# --- what is refused, what differentiates


@pytest.mark.parametrize("make", [clipped_grad, summed_grad])
@pytest.mark.parametrize("wrong", [{"microbatch_size": 0}, {"loop": "static"}])
def test_wrong_loops_are_refused(make, wrong):
    with pytest.raises(ValueError, match="microbatch_size"):
        make(linear_loss, **wrong)


def test_the_capacity_loop_differentiates_with_respect_to_the_units():
    params, units, keys = linear_problem(100.0 * random_vectors())

    def first(units, size):
        fn = clipped_grad(linear_loss, microbatch_size=size, loop="capacity")
        return fn(params, units, keys, 3, CLIP)[0]["b"][0]

    one, other = (jax.jit(jax.grad(first), static_argnums=1)(units, size) for size in (1, SLOTS))
    assert_trees_close(one, other)
    assert norm(oracles.take(one, 0)) > 0
    assert norm(oracles.take(one, slice(3, None))) == 0.0
