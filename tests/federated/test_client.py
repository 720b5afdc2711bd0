import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_dp.federated.client import client_update
from fedjax_dp.models.unet import unet
from fedjax_dp.segmentation.objective import segmentation_loss
from fedjax_dp.typing import TilePool
from tests import oracles
from tests.laws import assert_mean, assert_std, assert_uncorrelated
from tests.oracles import (
    assert_trees_close,
    assert_trees_equal,
    distance,
    exact_products,  # noqa: F401
    keyed_loss,
    linear_loss,
    linear_params,
    make_constants,
    make_keys,
    make_plan,
    make_pool,
    norm,
)

PLACEMENTS = ("none", "dp_sgd", "update")
SGD = optax.sgd(1.0)
# Three steps: units of one to three tiles, an empty draw, a full one.
PLAN = make_plan([[[3, 5, 7], [2]], [], [[1, 4], [6], [0], [2, 3, 4]]], slots=4, tiles=3)


@functools.cache
def compiled(placement, loss=linear_loss, optimizer=SGD, size=1, loop="drawn"):
    update = client_update(loss, optimizer, placement=placement, microbatch_size=size, loop=loop)
    return jax.jit(update)


def run(placement, plan, pool, *, client=0, seed=0, params=None, constants=None, **made):
    """The model delta alone."""
    constants = make_constants(**({"clip": 1.0} | (constants or {})))
    params = linear_params() if params is None else params
    return compiled(placement, **made)(params, make_keys(client, seed), (), constants, plan, pool)[
        0
    ]


# --- equality with the loop


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("size", "loop"), [(1, "drawn"), (3, "drawn"), (4, "capacity")])
def test_client_update_equals_the_naive_loop(placement, size, loop):
    optimizer = optax.adam(0.1)
    constants = make_constants(clip=0.6, stddev=0.05, inverse=0.4)
    pool, keys, params = make_pool(), make_keys(), linear_params()
    update = client_update(
        keyed_loss, optimizer, placement=placement, microbatch_size=size, loop=loop
    )
    delta, state, info = jax.jit(update)(params, keys, (), constants, PLAN, pool)
    expected = oracles.client_update(
        keyed_loss, optimizer, placement, params, keys, constants, PLAN, pool
    )
    assert_trees_close(delta, expected, rtol=1e-4)
    assert state == ()
    assert info.units.value.units == 6
    assert info.is_finite


@pytest.mark.parametrize("placement", ["dp_sgd", "update"])
def test_a_unet_through_the_segmentation_loss_equals_the_naive_loop(placement):
    init, apply = unet(2, base_channels=8, depth=1, conv_variant="matmul")
    shapes, rng = jax.eval_shape(init, jax.random.key(0)), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.float32(0.2 * rng.normal(size=leaf.shape)), shapes)
    loss = segmentation_loss(apply, multiplicity=2)
    images = rng.integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)
    labels = rng.integers(0, 2, (4, 16, 16)).astype(np.uint8)
    pool = TilePool(jnp.asarray(images), jnp.asarray(labels))
    plan = make_plan([[[1, 2], [0, 3]]], slots=3, tiles=2)
    constants = make_constants(clip=0.1, stddev=1e-3, inverse=0.5)
    update = client_update(loss, SGD, placement=placement, microbatch_size=2)
    delta, _, info = jax.jit(update)(params, make_keys(), (), constants, plan, pool)
    expected = oracles.client_update(
        loss, SGD, placement, params, make_keys(), constants, plan, pool
    )
    assert_trees_close(delta, expected, rtol=1e-4)
    assert info.units.value.non_finite == 0


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_vmap_over_clients_equals_the_loop(placement):
    """Clients of unlike clip, noise, divisor and draw share one program."""
    empty = make_plan([[], [], []], slots=4, tiles=3)
    few = make_plan([[[9]], [[8, 9]], []], slots=4, tiles=3)
    plans = (PLAN, few, empty, PLAN)
    constants = (
        make_constants(clip=0.1, stddev=0.3),
        make_constants(clip=5.0, stddev=0.1, inverse=0.25),
        make_constants(stddev=0.2),
        make_constants(active=0.0, weight=0.0, stddev=1.0),
    )
    keys = [make_keys(client) for client in range(4)]
    pool, params = make_pool(), linear_params()
    update = compiled(placement, loss=keyed_loss)
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


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("size", [1, 4])
def test_another_clients_tile_in_the_padding_changes_no_bit(placement, size):
    """Padding points at tile 0, which may be anybody's: were it NaN, nothing may show."""
    plan = make_plan([[[3, 5], [7]], [[4]]], slots=4, tiles=3)
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
        plan = make_plan([[list(unit) for unit in units]], slots=4, tiles=2)
        return oracles.flat(run("dp_sgd", plan, pool, loss=keyed_loss, size=size))

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
        plan = make_plan(steps, slots=2)
        seen += [
            run("none", plan, pool, loss=keyed_loss, client=client, seed=seed)
            for client, seed in ((0, 0), (1, 0), (0, 1))
        ]
    values = {float(oracles.flat(delta).sum()) for delta in seen}
    assert len(values) > len(seen) - 3  # of 40 possible jitters, few coincide
    again = run("none", plan, pool, loss=keyed_loss, seed=1)
    assert_trees_equal(again, seen[-1])


@pytest.mark.parametrize("placement", ["none", "dp_sgd"])
def test_the_divisor_is_the_public_number_not_the_draw(placement):
    pool, once = make_pool(), make_plan([[[3]]], slots=4)
    twice = make_plan([[[3], [3]]], slots=4)
    constants = {"inverse": 0.1}
    single = run(placement, once, pool, constants=constants)
    double = run(placement, twice, pool, constants=constants)
    np.testing.assert_allclose(oracles.flat(double), 2 * oracles.flat(single), rtol=1e-5)


def test_the_placements_guarantee_their_norms():
    pool = make_pool(gains={3: oracles.HUGE})
    plan = make_plan([[[3], [5]], [[4], [6]]], slots=4)
    constants = {"clip": 0.3, "inverse": 1.0}
    assert norm(run("dp_sgd", plan, pool, constants=constants)) <= 4 * 0.3 * (1 + 1e-5)
    update = norm(run("update", make_plan([[[5], [4]]], slots=4), pool, constants=constants))
    np.testing.assert_allclose(update, 0.3, rtol=1e-5)


# --- empty draws, clients that have left, messages that are not finite


def test_an_empty_draw_takes_the_same_path():
    pool, empty = make_pool(), make_plan([[], []], slots=4)
    constants = {"stddev": 0.5, "inverse": 0.5}
    assert norm(run("none", empty, pool)) == 0.0
    for placement in ("dp_sgd", "update"):
        delta = run(placement, empty, pool, constants=constants)
        expected = oracles.client_update(
            linear_loss, SGD, placement, linear_params(), make_keys(),
            make_constants(**constants), empty, pool,
        )  # fmt: skip
        assert norm(delta) > 0.1
        assert_trees_close(delta, expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_client_that_has_left_returns_exactly_zero(placement):
    """Weight decay and noise included."""
    params = jax.tree.map(lambda leaf: leaf + 1.0, linear_params())
    optimizer = optax.adamw(0.1, weight_decay=0.5)
    delta, _, info = compiled(placement, optimizer=optimizer)(
        params, make_keys(), (), make_constants(active=0.0, stddev=3.0), PLAN, make_pool()
    )
    assert norm(delta) == 0.0
    assert info.units.value.units == 0
    assert info.is_finite


def test_a_unit_that_is_not_finite_is_left_out_and_counted():
    pool = make_pool(gains={5: oracles.NAN, 6: oracles.INF})
    plan = make_plan([[[3], [5], [6, 4]]], slots=4, tiles=2)
    clean = make_plan([[[3]]], slots=4, tiles=2)
    constants = make_constants(stddev=0.1)
    delta, _, info = compiled("dp_sgd")(linear_params(), make_keys(), (), constants, plan, pool)
    assert_trees_equal(delta, run("dp_sgd", clean, pool, constants={"stddev": 0.1}))
    assert info.units.value.non_finite == 2
    assert info.is_finite


def test_an_update_that_is_not_finite_becomes_pure_noise():
    pool = make_pool(gains={5: oracles.NAN})
    plan, empty = make_plan([[[3], [5]]], slots=4), make_plan([[]], slots=4)
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


def noises(placement, *, client=0, seed=0, steps=1, step=None):
    """What a client releases without data: noise of `step`, or of all steps together."""
    rate = 1.0 if step is None else lambda count: jnp.where(count == step, 1.0, 0.0)
    params = {"left": jnp.zeros(30_000), "right": jnp.zeros(30_000)}
    update = client_update(lambda p, *_: 0.0 * p["left"][0], optax.sgd(rate), placement=placement)
    plan = make_plan([[]] * steps, slots=2)
    delta, _, _ = jax.jit(update)(
        params, make_keys(client, seed), (), make_constants(stddev=2.0, inverse=0.5), plan,
        make_pool(),
    )  # fmt: skip
    return jax.tree.map(np.asarray, delta)


def test_noise_of_one_step_has_the_stated_std():
    # dp_sgd divides the noised sum by the public number; update adds to what is released.
    for placement, expected in (("dp_sgd", 2.0 * 0.5), ("update", 2.0)):
        for leaf in noises(placement).values():
            assert_std(leaf, expected)
            assert_mean(leaf, 0.0, expected)
            for wrong in (0.95, 1.05):
                with pytest.raises(AssertionError):
                    assert_std(leaf, wrong * expected)


def test_noise_of_several_steps_adds_up_as_independent_noise_does():
    leaf = noises("dp_sgd", steps=4)["left"]
    assert_std(leaf, np.sqrt(4) * 2.0 * 0.5)
    with pytest.raises(AssertionError):  # one draw used in all four steps
        assert_std(leaf, 4 * 2.0 * 0.5)


@pytest.mark.parametrize("placement", ["dp_sgd", "update"])
def test_noise_is_independent_across_clients_rounds_and_leaves(placement):
    here = noises(placement)
    others = [noises(placement, client=1), noises(placement, seed=1)]
    assert_uncorrelated(here["left"], here["right"])
    for other in others:
        for mine in here.values():
            for theirs in other.values():
                assert_uncorrelated(mine, theirs)
    with pytest.raises(AssertionError):
        assert_uncorrelated(here["left"], noises(placement)["left"])


def test_noise_is_independent_across_steps():
    first, second = (noises("dp_sgd", steps=2, step=step) for step in range(2))
    for mine in first.values():
        for theirs in second.values():
            assert_uncorrelated(mine, theirs)
    assert_std(second["left"], 2.0 * 0.5)


# --- types, and what is refused


def test_parameters_keep_their_dtype():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), linear_params())
    for placement in PLACEMENTS:
        delta = run(placement, PLAN, make_pool(), params=params, constants={"stddev": 0.1})
        assert {leaf.dtype for leaf in jax.tree.leaves(delta)} == {jnp.dtype(jnp.bfloat16)}


def test_a_pool_may_lie_on_the_host():
    pool = make_pool()
    host = jax.tree.map(np.asarray, pool)
    arguments = linear_params(), make_keys(), (), make_constants(), PLAN
    update = client_update(linear_loss, SGD, placement="dp_sgd")
    assert distance(update(*arguments, host)[0], update(*arguments, pool)[0]) < 1e-6


def test_an_unknown_placement_is_refused():
    with pytest.raises(ValueError, match="placement='local'"):
        client_update(linear_loss, SGD, placement="local")
