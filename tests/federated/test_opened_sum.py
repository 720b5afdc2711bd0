"""One noised sum a round, by a trusted server or out of shares: against plain NumPy."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_dp.federated.aggregators import noised_sum, secure_sum
from fedjax_dp.federated.algorithms.base import at_scale, release_at_scale, server_step
from fedjax_dp.federated.algorithms.opened_sum import opened_sum
from fedjax_dp.federated.client import CentralMessage, client_update
from fedjax_dp.federated.cohort import client_mesh, stack_chunk
from fedjax_dp.federated.rounds import client_constants
from fedjax_dp.privacy import noise
from fedjax_dp.privacy.adaptive_clipping import adaptive_clipping
from fedjax_dp.privacy.mechanism import Mechanism
from fedjax_dp.typing import ServerRelease
from tests import oracles
from tests.laws import assert_mean, assert_std, assert_uncorrelated
from tests.oracles import (
    NAN,
    assert_trees_close,
    assert_trees_equal,
    distance,
    exact_products,  # noqa: F401
    flat,
    keyed_loss,
    linear_params,
    make_client,
    make_plan,
    make_pool,
    norm,
    take,
)

CLIP = 0.3
SGD = optax.sgd(0.5)
UPDATE = client_update(keyed_loss, SGD, placement="central")
# Weights in units of the largest; the third draws nothing, the fourth is within its clip norm.
CLIENTS = (
    make_client(make_plan([[3, 5], [2]], [], [[1, 4]]), 0, weight=1.0, clip=CLIP),
    make_client(make_plan([[6]], [[7], [8, 9], [10]]), 1, weight=0.25, clip=CLIP),
    make_client(make_plan(), 2, weight=0.5, clip=CLIP),
    make_client(make_plan([[11, 0, 1]], [[2]], [[3]]), 3, weight=0.5, clip=50.0),
)
POOL = make_pool()


def release(seed=0, **changes):
    settings = {"divisor": 1.75, "l2_clip_norm": CLIP, "noise_stddev": 0.2, "count_divisor": 3.0}
    floats = {name: np.float32(value) for name, value in (settings | changes).items()}
    return ServerRelease(noise_key=jax.random.key(seed), **floats)


@functools.cache
def algorithm(block=2, adaptive=None, num_sites=1):
    made = opened_sum(
        UPDATE,
        optax.sgd(1.0),
        noised_sum(),
        clients_per_block=block,
        mesh=client_mesh(1),
        adaptive=adaptive,
        num_sites=num_sites,
    )
    return made._replace(visit=jax.jit(made.visit), finish=jax.jit(made.finish))


def summed(slots, state, made, block=2, pool=POOL):
    acc, infos = made.begin(state), []
    slots = [*slots, *[None] * (-len(slots) % block)]
    for start in range(0, len(slots), block):
        acc, client_state, info = made.visit(
            acc, state, stack_chunk(slots[start : start + block]), pool
        )
        assert client_state == ()
        infos.append(info)
    return acc, infos


def mean_of(slots, opened=None, block=2, pool=POOL):
    """What one round moves the parameters by: the mean delta, through the whole algorithm."""
    made = algorithm(block)
    state = made.init(linear_params())
    acc, _ = summed(slots, state, made, block, pool)
    after = made.finish(state, acc, release() if opened is None else opened)
    assert after.round == 1
    assert after.clip_scale == ()
    return after.params


@functools.cache
def raw_update(index):
    """One client's local training without clip or noise, by the naive loop."""
    client = CLIENTS[index]
    keys, _, constants, plan = (take(part, 0) for part in stack_chunk([client]))
    return oracles.client_update(
        keyed_loss, SGD, "none", linear_params(), keys, constants, plan, POOL
    )


def clipped_update(index):
    delta, clip = flat(raw_update(index)), float(CLIENTS[index].constants.l2_clip_norm)
    size = np.linalg.norm(delta)
    return delta * min(1.0, clip / size) if size else delta


def naive_mean(indices, opened):
    """Sum of weighted clipped updates, plus noise of the same key, over the public divisor."""
    total = sum(
        (float(CLIENTS[i].constants.weight) * clipped_update(i) for i in indices),
        start=np.zeros(51),
    )
    key, _ = jax.random.split(opened.noise_key)
    drawn = float(opened.noise_stddev) * np.asarray(noise.gaussian(key, (51,)), np.float64)
    return (total + drawn) / float(opened.divisor)


# --- central: the naive loop


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1, 3), (2,)])
def test_a_round_is_the_noised_sum_over_the_public_divisor(indices, block):
    """Whoever was drawn, the divisor is the release's."""
    found = flat(mean_of([CLIENTS[i] for i in indices], block=block))
    np.testing.assert_allclose(found, naive_mean(indices, release()), atol=1e-5)
    sizes = [norm(raw_update(i)) for i in range(4)]
    assert sizes[0] > 2 * CLIP  # clipped
    assert sizes[2] == 0
    assert 0.1 < sizes[3] < 50.0


@pytest.mark.parametrize("change", [{"divisor": 1.8}, {"noise_stddev": 0.21}, {"seed": 1}])
def test_the_loop_would_notice_another_release(change):
    found = flat(mean_of(CLIENTS, release(**change)))
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(found, naive_mean(range(4), release()), atol=1e-5)


def test_an_empty_cohort_releases_noise_alone():
    """By the same path: it must not be told from a round of clients that did not move."""
    made = algorithm()
    state = made.init(linear_params())
    nobody = made.finish(state, made.begin(state), release())
    np.testing.assert_allclose(flat(nobody.params), naive_mean((), release()), atol=1e-6)
    assert norm(nobody.params) > 0.1
    idle = mean_of([CLIENTS[2]])
    assert_trees_equal(nobody.params, idle)


def test_clients_that_have_left_send_exactly_zero():
    left = make_client(make_plan([[1]]), 9, weight=0.0, active=0.0, clip=CLIP)
    assert_trees_equal(mean_of([left, left]), mean_of([CLIENTS[2]]))
    keys, _, constants, plan = (take(part, 0) for part in stack_chunk([left]))
    message, _, _ = jax.jit(UPDATE)(linear_params(), keys, (), constants, plan, POOL)
    assert isinstance(message, CentralMessage)
    assert norm(message) == 0.0


def test_the_weight_in_the_sum_is_the_mechanisms():
    """Not the site's: its sensitivity is accounted with the mechanism's."""
    settings = {
        "placement": "central", "unit": "slide", "num_units": 8, "sampling_prob": 0.5,
        "capacity": 8, "local_steps": 3, "l2_clip_norm": CLIP, "noise_multiplier": 2.0,
        "cohort_prob": 0.25, "relative_weight": 0.5,
    }  # fmt: skip
    mechanism = Mechanism(**settings)
    constants = client_constants(mechanism, weight=40.0)
    assert constants.weight == np.float32(0.5)
    assert constants.noise_stddev == 0.0
    assert constants.count_noise_stddev == 0.0
    assert mechanism.sensitivity == pytest.approx(0.5 * CLIP)
    other = dataclasses.replace(mechanism, placement="update", cohort_prob=1.0, relative_weight=1.0)
    assert client_constants(other, weight=40.0).weight == np.float32(40.0)


# --- central: one client moves the sum by its weight times S


@pytest.mark.parametrize(("index", "gain"), [(0, 0), (1, 0)])
def test_one_client_moves_the_sum_by_its_weight_times_the_clip_norm(index, gain):
    others = [CLIENTS[i] for i in (0, 1, 3) if i != index]
    pool = make_pool(gains={6: gain, 3: gain})
    opened = release(divisor=1.0)
    moved = distance(
        mean_of([CLIENTS[index], *others], opened, pool=pool),
        mean_of([None, *others], opened, pool=pool),
    )
    bound = CLIP * float(CLIENTS[index].constants.weight)
    assert 0.99 * bound <= moved <= bound * (1 + 1e-5)


def test_an_update_that_is_not_finite_adds_nothing():
    pool = make_pool(gains={6: NAN})
    assert_trees_close(
        mean_of([CLIENTS[1], CLIENTS[0]], pool=pool), mean_of([None, CLIENTS[0]], pool=pool)
    )


@functools.cache
def message_of(index, gain=0):
    keys, _, constants, plan = (take(part, 0) for part in stack_chunk([CLIENTS[index]]))
    pool = make_pool(gains={6: gain})
    return jax.jit(UPDATE)(linear_params(), keys, (), constants, plan, pool)[0]


def test_a_clients_count_is_half_in_or_half_out():
    """Zeroing the client moves the count by 1/2, replacing it by 1."""
    assert [float(message_of(i).centred_count) for i in range(4)] == [-0.5, -0.5, 0.5, 0.5]
    assert float(message_of(1, NAN).centred_count) == -0.5


# --- central: the law of the noise

WIDE = {"left": jnp.zeros(30_000), "right": jnp.zeros(30_000)}


@functools.cache
def wide(seed, **settings):
    made = noised_sum()
    mean, centred = made.finish(made.init(WIDE), release(seed, **settings))
    return {name: np.asarray(leaf) for name, leaf in mean.items()}, float(centred)


def test_noise_has_the_stated_std_over_the_divisor():
    mean, _ = wide(0)
    for leaf in mean.values():
        assert_std(leaf, 0.2 / 1.75)
        assert_mean(leaf, 0.0, 0.2 / 1.75)
        for wrong in (0.95, 1.05):
            with pytest.raises(AssertionError):
                assert_std(leaf, wrong * 0.2 / 1.75)


def test_noise_is_independent_across_rounds_and_leaves():
    assert_uncorrelated(wide(0)[0]["left"], wide(0)[0]["right"])
    for mine, theirs in itertools.product(wide(0)[0].values(), wide(1)[0].values()):
        assert_uncorrelated(mine, theirs)


def test_the_count_has_noise_of_its_own():
    made = noised_sum()
    small = {"w": jnp.zeros(1)}
    acc = made.init(small)._replace(centred=jnp.float32(6.0))

    @jax.jit
    @jax.vmap
    def finish(key):
        opened = release(count_noise_stddev=0.7)._replace(noise_key=key)
        mean, centred = made.finish(acc, opened)
        return mean["w"][0], centred

    values, counts = finish(jax.random.split(jax.random.key(0), 20_000))
    assert_std(np.asarray(counts) - 6.0 / 3.0, 0.7 / 3.0)
    assert_uncorrelated(values, counts)
    with pytest.raises(AssertionError):
        assert_std(np.asarray(counts) - 6.0 / 3.0, 0.75 / 3.0)


# --- both sums are sums


def central_messages():
    rng = np.random.default_rng(0)
    return [
        (CentralMessage({"w": jnp.asarray(rng.normal(size=5), jnp.float32)}, jnp.float32(0.5)), w)
        for w in (1.0, 0.25, 0.5)
    ]


def word_messages():
    rng = np.random.default_rng(0)
    return [(jnp.asarray(rng.integers(0, 2**32, 5, np.uint32)), w) for w in (1.0, 0.25, 0.5)]


@pytest.mark.parametrize(
    ("aggregator", "messages"),
    [(noised_sum(), central_messages()), (secure_sum({"w": jnp.zeros(5)}, 0.5), word_messages())],
    ids=["noised_sum", "secure_sum"],
)
def test_neither_order_nor_grouping_matters(aggregator, messages):
    like = {"w": jnp.zeros(5)}

    def add_all(pairs):
        return functools.reduce(
            lambda acc, pair: aggregator.add(acc, *pair), pairs, aggregator.init(like)
        )

    expected = add_all(messages)
    for order in itertools.permutations(messages):
        assert_trees_close(add_all(order), expected)
    for split in range(4):
        assert_trees_close(
            aggregator.merge(add_all(messages[:split]), add_all(messages[split:])), expected
        )
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (expected, aggregator.init(like)))
    assert shapes[0] == shapes[1]


def test_a_secure_sum_is_opened_as_signed_integers_in_the_shapes_of_the_parameters():
    """Modulo 2**32, negated (gradients are no delta), times the clip norm, over a number."""
    like = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(1)}
    aggregator = secure_sum(like, 0.25, has_count=True)
    words = np.array([4, -8, 2**31 - 64, -(2**31), 1, -6], np.int64).astype(np.uint32)
    mask = np.full(6, 2**32 - 3, np.uint32)
    acc = aggregator.add(aggregator.init(like), jnp.asarray(words + mask), 7.0)
    opened = ServerRelease(np.float32(2), np.float32(3), count_divisor=np.float32(5), unmask=mask)
    mean, centred = aggregator.finish(acc, opened)
    expected = -0.25 * 3 / 2 * np.array([[4.0, -8.0], [2.0**31 - 64, -(2.0**31)]])
    np.testing.assert_allclose(mean["a"], expected, rtol=1e-7)
    np.testing.assert_allclose(mean["b"], [-0.375])
    assert centred == -6 * 0.25 / 5
    assert secure_sum(like, 0.25).init(like).shape == (5,)


# --- the server's step, and clip norms that move


def test_every_site_has_its_scale_and_noise_in_proportion():
    slots = [make_client(make_plan(), i, clip=2.0, stddev=3.0) for i in range(3)]
    slots = [
        slot._replace(
            constants=slot.constants._replace(
                site=np.int32(site), count_noise_stddev=np.float32(0.7)
            )
        )
        for slot, site in zip(slots, (2, 0, 1), strict=True)
    ]
    scaled = at_scale(stack_chunk(slots), jnp.array([1.0, 10.0, 0.5])).constants
    np.testing.assert_allclose(scaled.l2_clip_norm, [1.0, 2.0, 20.0])
    np.testing.assert_allclose(scaled.noise_stddev, [1.5, 3.0, 30.0])
    np.testing.assert_allclose(scaled.count_noise_stddev, 0.7)  # of a count, not of clip norms


def test_a_release_is_scaled_with_its_noise():
    scaled = release_at_scale(release(count_noise_stddev=0.7), jnp.float32(0.5))
    assert scaled.l2_clip_norm == np.float32(CLIP) / 2
    assert scaled.noise_stddev == np.float32(0.1)
    assert (scaled.divisor, scaled.count_divisor) == (np.float32(1.75), 3.0)
    assert scaled.count_noise_stddev == np.float32(0.7)


def test_the_common_clip_norm_follows_the_count():
    """Two of four updates are within: at the median it stays, above it the clip norm falls."""
    for quantile, direction in ((0.5, 0), (0.4, -1), (0.6, 1)):
        made = algorithm(2, adaptive_clipping(quantile, 0.2), 4)
        state = made.init(linear_params())
        np.testing.assert_array_equal(state.clip_scale, np.ones(4))
        acc, _ = summed(CLIENTS, state, made)
        assert acc.centred == 0.0
        after = made.finish(state, acc, release(count_divisor=4.0))
        expected = np.exp(-0.2 * (0.5 - quantile))
        np.testing.assert_allclose(after.clip_scale, np.full(4, expected), rtol=1e-6)
        assert np.sign(float(after.clip_scale[0]) - 1.0) == direction


def test_clip_norm_and_noise_of_a_round_are_at_the_scale_before_it():
    made = algorithm(2, adaptive_clipping(), 4)
    state = made.init(linear_params())._replace(clip_scale=jnp.full(4, 0.25))
    acc, _ = summed(CLIENTS[:1], state, made)
    assert norm(acc.total) == pytest.approx(0.25 * CLIP, rel=1e-5)
    empty = made.finish(state, made.begin(state), release())
    np.testing.assert_allclose(
        flat(empty.params), 0.25 * naive_mean((), release()), rtol=1e-5, atol=1e-7
    )


def test_without_adaptation_there_is_no_scale():
    assert server_step(optax.sgd(1.0), 0.0).init(linear_params()).clip_scale == ()
