import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_dp.federated.client import client_update
from fedjax_dp.segmentation.objective import segmentation_loss
from fedjax_dp.typing import TilePool
from tests import oracles
from tests.laws import assert_mean, assert_std, assert_uncorrelated
from tests.oracles import (
    assert_trees_close,
    assert_trees_equal,
    exact_products,  # noqa: F401
    keyed_loss,
    linear_params,
    make_constants,
    make_keys,
    make_plan,
    make_pool,
    norm,
)

PLACEMENTS = ("none", "dp_sgd", "update")
SGD, ADAMW = optax.sgd(1.0), optax.adamw(0.1, weight_decay=0.01)
# Three steps: units of one to three tiles, an empty draw, a full one.
PLAN = make_plan([[3, 5, 7], [2]], [], [[1, 4], [6], [0], [2, 3, 4]])


@functools.cache
def compiled(placement, optimizer=SGD, size=1, loop="drawn", loss=keyed_loss):
    update = client_update(loss, optimizer, placement=placement, microbatch_size=size, loop=loop)
    return jax.jit(update)


def run(placement, plan, pool, *, client=0, seed=0, constants=None, size=1):
    """The model delta alone."""
    constants = make_constants(**({"clip": 1.0} | (constants or {})))
    keys = make_keys(client, seed)
    return compiled(placement, size=size)(linear_params(), keys, (), constants, plan, pool)[0]


# --- equality with the loop


@pytest.mark.parametrize(
    ("placement", "size", "loop"),
    [
        ("none", 3, "drawn"),
        ("dp_sgd", 1, "drawn"),
        ("dp_sgd", 3, "drawn"),
        ("dp_sgd", 4, "capacity"),
        ("update", 3, "drawn"),
    ],
)
def test_client_update_equals_the_naive_loop(placement, size, loop):
    constants = make_constants(clip=0.6, stddev=0.05, inverse=0.4)
    pool, keys, params = make_pool(), make_keys(), linear_params()
    update = compiled(placement, ADAMW, size, loop)
    delta, state, info = update(params, keys, (), constants, PLAN, pool)
    expected = oracles.client_update(
        keyed_loss, ADAMW, placement, params, keys, constants, PLAN, pool
    )
    assert_trees_close(delta, expected, rtol=1e-4)
    assert state == ()
    assert info.units.value.units == 6
    assert info.is_finite


def test_a_network_through_the_segmentation_loss_equals_the_naive_loop():
    """Units of several tiles, each under several augmentations."""
    params, apply = oracles.tiny_network()
    loss = segmentation_loss(apply, multiplicity=2, hed_jitter=0.0)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    labels = rng.integers(0, 2, (5, 8, 8)).astype(np.uint8)
    pool = TilePool(jnp.asarray(images), jnp.asarray(labels))
    plan = make_plan([[1, 2], [0, 3], [4, 1]], shape=(1, 4, 2))
    constants = make_constants(clip=0.1, stddev=1e-3, inverse=0.5)
    update = compiled("dp_sgd", loss=loss)
    delta, _, info = update(params, make_keys(), (), constants, plan, pool)
    expected = oracles.client_update(
        loss, SGD, "dp_sgd", params, make_keys(), constants, plan, pool
    )
    assert_trees_close(delta, expected, rtol=1e-4)
    assert info.units.value.non_finite == 0


def test_vmap_over_clients_equals_the_loop():
    """Clients of unlike clip, noise, divisor and draw share one program."""
    plans = (PLAN, make_plan([[9]], [[8, 9]]), make_plan(), PLAN)
    constants = (
        make_constants(clip=0.1, stddev=0.3),
        make_constants(clip=5.0, stddev=0.1, inverse=0.25),
        make_constants(stddev=0.2),
        make_constants(active=0.0, weight=0.0, stddev=1.0),
    )
    keys = [make_keys(client) for client in range(4)]
    pool, params = make_pool(), linear_params()
    update = compiled("dp_sgd", ADAMW, 3)
    mapped, _, info = jax.jit(jax.vmap(update, (None, 0, 0, 0, 0, None)))(
        params, oracles.stack(keys), (), oracles.stack(constants), oracles.stack(plans), pool
    )
    for client in range(4):
        alone, _, alone_info = update(
            params, keys[client], (), constants[client], plans[client], pool
        )
        assert_trees_close(oracles.take(mapped, client), alone)
        assert info.units.value.units[client] == alone_info.units.value.units


# --- what the plan may and may not change


@pytest.mark.parametrize(
    ("placement", "size"),
    [("none", 1), ("none", 4), ("dp_sgd", 1), ("dp_sgd", 4), ("update", 1)],
)
def test_another_clients_tile_in_the_padding_changes_no_bit(placement, size):
    """Padding points at tile 0, which may be anybody's: were it NaN, nothing may show."""
    plan = make_plan([[3, 5], [7]], [[4]])
    deltas = [
        run(placement, plan, pool, size=size, constants={"stddev": 0.1})
        for pool in (make_pool(), make_pool(gains={0: oracles.NAN}), make_pool(gray=[0]))
    ]
    for other in deltas[1:]:
        assert_trees_equal(other, deltas[0])
    assert np.isfinite(oracles.flat(deltas[0])).all()


@pytest.mark.parametrize("size", [1, 4])
def test_a_units_contribution_depends_neither_on_its_slot_nor_on_the_other_units(size):
    """Its augmentation above all: otherwise one patient would decide how another is seen."""
    pool = make_pool()

    def total(*units):
        plan = make_plan([list(unit) for unit in units])
        return oracles.flat(run("dp_sgd", plan, pool, size=size))

    one, two, three = (3, 5), (7,), (2, 1)
    np.testing.assert_allclose(total(one, two, three), total(three, one, two), atol=1e-6)
    alone = total(one)
    np.testing.assert_allclose(total(one, two) - total(two), alone, atol=1e-6)
    np.testing.assert_allclose(total(three, two, one) - total(three, two), alone, atol=1e-6)


def test_augmentation_is_new_in_every_step_client_and_round():
    """A step's randomness must not come back: the keyed loss shows which keys it was given."""
    pool, seen = make_pool(), []
    for step in range(3):
        steps = [[], [], []]
        steps[step] = [[3]]
        plan = make_plan(*steps)
        seen += [
            run("none", plan, pool, client=client, seed=seed)
            for client, seed in ((0, 0), (1, 0), (0, 1))
        ]
    values = {float(oracles.flat(delta).sum()) for delta in seen}
    assert len(values) > len(seen) - 3  # of 40 possible jitters, few coincide
    again = run("none", plan, pool, seed=1)
    assert_trees_equal(again, seen[-1])


@pytest.mark.parametrize("placement", ["none", "dp_sgd"])
def test_the_divisor_is_the_public_number_not_the_draw(placement):
    pool, once, twice = make_pool(), make_plan([[3]]), make_plan([[3], [3]])
    constants = {"inverse": 0.1}
    single = run(placement, once, pool, constants=constants)
    double = run(placement, twice, pool, constants=constants)
    np.testing.assert_allclose(oracles.flat(double), 2 * oracles.flat(single), rtol=1e-5)


def test_the_placements_guarantee_their_norms():
    pool = make_pool(gains={3: oracles.HUGE})
    plan = make_plan([[3], [5]], [[4], [6]])
    constants = {"clip": 0.3, "inverse": 1.0}
    assert norm(run("dp_sgd", plan, pool, constants=constants)) <= 4 * 0.3 * (1 + 1e-5)
    update = norm(run("update", make_plan([[5], [4]]), pool, constants=constants))
    np.testing.assert_allclose(update, 0.3, rtol=1e-5)


# --- empty draws, clients that have left, messages that are not finite


def test_an_empty_draw_takes_the_same_path():
    pool, empty = make_pool(), make_plan()
    constants = {"stddev": 0.5, "inverse": 0.5}
    assert norm(run("none", empty, pool)) == 0.0
    for placement in ("dp_sgd", "update"):
        delta = run(placement, empty, pool, constants=constants)
        expected = oracles.client_update(
            keyed_loss, SGD, placement, linear_params(), make_keys(),
            make_constants(**constants), empty, pool,
        )  # fmt: skip
        assert norm(delta) > 0.1
        assert_trees_close(delta, expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_client_that_has_left_returns_exactly_zero(placement):
    """Weight decay and noise included."""
    params = jax.tree.map(lambda leaf: leaf + 1.0, linear_params())
    delta, _, info = compiled(placement, ADAMW, 3)(
        params, make_keys(), (), make_constants(active=0.0, stddev=3.0), PLAN, make_pool()
    )
    assert norm(delta) == 0.0
    assert info.units.value.units == 0
    assert info.is_finite


def test_a_unit_that_is_not_finite_is_left_out_and_counted():
    pool = make_pool(gains={5: oracles.NAN, 6: oracles.INF})
    plan, clean = make_plan([[3], [5], [6, 4]]), make_plan([[3]])
    constants = make_constants(stddev=0.1)
    delta, _, info = compiled("dp_sgd")(linear_params(), make_keys(), (), constants, plan, pool)
    assert_trees_equal(delta, run("dp_sgd", clean, pool, constants={"stddev": 0.1}))
    assert info.units.value.non_finite == 2
    assert info.is_finite


def test_an_update_that_is_not_finite_becomes_pure_noise():
    pool = make_pool(gains={5: oracles.NAN})
    plan, empty = make_plan([[3], [5]]), make_plan()
    constants = {"stddev": 0.1}
    assert_trees_equal(
        run("update", plan, pool, constants=constants),
        run("update", empty, pool, constants=constants),
    )


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_message_that_is_not_finite_says_so(placement):
    params = jax.tree.map(lambda leaf: leaf.at[..., 0].set(np.nan), linear_params())
    stddev = np.nan if placement == "update" else 0.0  # its clip lets no other NaN through
    _, _, info = compiled(placement)(
        params, make_keys(), (), make_constants(stddev=stddev), PLAN, make_pool()
    )
    assert not info.is_finite


# --- noise, isolated by empty draws

STEPS = 4


def _chosen_steps():
    """An optimiser whose rate in step s is the parameter `rates[s]`: one program for all steps."""

    def update(gradient, count, params):
        rate = params["rates"][count]
        updates = {name: rate * leaf for name, leaf in gradient.items()}
        return updates | {"rates": jnp.zeros_like(params["rates"])}, count + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


CHOSEN_STEPS = _chosen_steps()


def no_loss(params, *_):
    return 0.0 * params["left"][0]


def noises(placement, *, client=0, seed=0, steps=(0,)):
    """What a client releases without data: the noise of `steps`."""
    params = {
        "left": jnp.zeros(30_000),
        "rates": jnp.zeros(STEPS).at[jnp.array(steps)].set(1.0),
        "right": jnp.zeros(30_000),
    }
    delta, _, _ = compiled(placement, CHOSEN_STEPS, loss=no_loss)(
        params,
        make_keys(client, seed),
        (),
        make_constants(stddev=2.0, inverse=0.5),
        make_plan(shape=(STEPS, 2, 1)),
        make_pool(),
    )
    return {name: np.asarray(delta[name]) for name in ("left", "right")}


@pytest.mark.parametrize(("placement", "expected"), [("dp_sgd", 2.0 * 0.5), ("update", 2.0)])
def test_noise_has_the_stated_std(placement, expected):
    """dp_sgd divides the noised sum by the public number; update adds to what is released."""
    for leaf in noises(placement).values():
        assert_std(leaf, expected)
        assert_mean(leaf, 0.0, expected)
        for wrong in (0.95, 1.05):
            with pytest.raises(AssertionError):
                assert_std(leaf, wrong * expected)


@pytest.mark.parametrize("placement", ["dp_sgd", "update"])
def test_noise_is_independent_across_clients_rounds_and_leaves(placement):
    here = noises(placement)
    assert_uncorrelated(here["left"], here["right"])
    for other in (noises(placement, client=1), noises(placement, seed=1)):
        for mine in here.values():
            for theirs in other.values():
                assert_uncorrelated(mine, theirs)
    with pytest.raises(AssertionError):
        assert_uncorrelated(here["left"], noises(placement)["left"])


def test_noise_is_independent_across_steps():
    each = [noises("dp_sgd", steps=(step,)) for step in range(STEPS)]
    for first, second in itertools.combinations(each, 2):
        for mine in first.values():
            for theirs in second.values():
                assert_uncorrelated(mine, theirs)
    for noise in each:
        assert_std(noise["left"], 2.0 * 0.5)
    together = noises("dp_sgd", steps=range(STEPS))["left"]
    assert_std(together, np.sqrt(STEPS) * 2.0 * 0.5)
    with pytest.raises(AssertionError):  # what one draw used in every step would give
        assert_std(together, STEPS * 2.0 * 0.5)


# --- types, and what is refused


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_parameters_keep_their_dtype(placement):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), linear_params())
    arguments = params, make_keys(), (), make_constants(stddev=0.1), PLAN, make_pool()
    delta, _, _ = jax.eval_shape(compiled(placement), *arguments)
    assert {leaf.dtype for leaf in jax.tree.leaves(delta)} == {jnp.dtype(jnp.bfloat16)}


def test_a_pool_may_lie_on_the_host():
    """As one does in a notebook: NumPy cannot be indexed by what a loop traces."""
    host = jax.tree.map(np.asarray, make_pool())
    update = client_update(keyed_loss, SGD, placement="dp_sgd")
    arguments = linear_params(), make_keys(), (), make_constants(), PLAN
    delta, _, _ = jax.eval_shape(lambda *given: update(*given, host), *arguments)
    assert jax.tree.structure(delta) == jax.tree.structure(linear_params())


def test_an_unknown_placement_is_refused():
    with pytest.raises(ValueError, match="placement='local'"):
        client_update(keyed_loss, SGD, placement="local")
