"""A clip norm that follows a quantile: what it costs, what one unit moves, where it goes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_dp.federated.aggregators import noised_sum, secure_sum
from fedjax_dp.federated.algorithms.fed_avg import fed_avg
from fedjax_dp.federated.algorithms.opened_sum import opened_sum
from fedjax_dp.federated.client import client_update
from fedjax_dp.federated.cohort import client_mesh, stack_chunk
from fedjax_dp.federated.rounds import client_constants
from fedjax_dp.federated.share import masked_share
from fedjax_dp.privacy.adaptive_clipping import adapt, adaptive_clipping, centred_count
from fedjax_dp.privacy.budgets import COUNT_SHARE, make_mechanisms
from fedjax_dp.privacy.fixed_point import fixed_point
from fedjax_dp.privacy.mechanism import Mechanism
from fedjax_dp.typing import ServerRelease, TilePool
from tests import oracles
from tests.laws import assert_std, assert_uncorrelated
from tests.oracles import (
    GRAY,
    NAN,
    TINY,
    exact_products,  # noqa: F401
    linear_loss,
    linear_params,
    make_client,
    make_constants,
    make_keys,
    make_plan,
    make_pool,
)

SGD = optax.sgd(1.0)

# --- the rule


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 0.2), "0 < privacy.clip_quantile < 1, got target_quantile=0.0"),
        ((1.0, 0.2), "target_quantile=1.0"),
        ((0.5, 0.0), "privacy.clip_learning_rate > 0, got learning_rate=0.0"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        adaptive_clipping(*arguments)


def test_the_count_is_centred():
    """Of 7 units 2 are not finite and 3 are clipped: 2 x 1/2 - 3 x 1/2."""
    assert centred_count(7.0, 3.0, 2.0) == -0.5
    assert centred_count(0.0, 0.0, 0.0) == 0.0
    assert centred_count(5.0, 0.0, 5.0) == 0.0


def test_the_clip_norm_moves_by_the_logarithm_of_what_is_amiss():
    settings = adaptive_clipping(0.7, 0.3)
    for fraction in (0.0, 0.2, 0.7, 1.0):
        moved = float(adapt(2.0, fraction - 0.5, settings))
        assert moved == pytest.approx(2.0 * math.exp(-0.3 * (fraction - 0.7)), rel=1e-6)
    assert float(adapt(2.0, 0.2, settings)) == pytest.approx(2.0)  # at the quantile it stays
    assert adapt(jnp.ones(3), 0.0, settings).shape == (3,)


@pytest.mark.parametrize("centred", [1e6, -1e6])
def test_one_bad_draw_does_not_lose_the_clip_norm(centred):
    assert 0.99e-6 <= float(adapt(1.0, centred, adaptive_clipping())) <= 1.01e6


# --- what the count costs

Z, COUNT_NOISE, CLIP = 1.0, 0.7, 0.5
SETTINGS = {
    "unit": "slide", "num_units": 8, "sampling_prob": 0.5, "capacity": 8, "local_steps": 1,
    "l2_clip_norm": CLIP, "noise_multiplier": Z, "count_noise_stddev": COUNT_NOISE,
}  # fmt: skip
K, D = 4, 1
ALONE = Mechanism(placement="dp_sgd", **SETTINGS)
SHARED = Mechanism(placement="distributed", num_shares=K, max_dropouts=D, **SETTINGS)
TRUSTED = Mechanism(placement="central", cohort_prob=0.5, **SETTINGS)


def together(sum_multiplier, count_stddev):
    """Multiplier of one Gaussian release that a unit moves by (1, 1/2), each in its own noise."""
    return (sum_multiplier**-2 + (2 * count_stddev) ** -2) ** -0.5


def test_sum_and_count_together_have_the_accounted_multiplier():
    """1 / z^2 = 1 / z_sum^2 + 1 / (2 sigma_b)^2, of each placement's own numbers."""
    assert together(ALONE.noise_stddev / CLIP, ALONE.count_share_stddev(1)) == pytest.approx(Z)
    fewest = math.sqrt(K - D)
    share, count = SHARED.share_stddev(K), SHARED.count_share_stddev(K)
    assert together(share * fewest / CLIP, count * fewest) == pytest.approx(Z)
    left = math.sqrt(K - 1 - D)  # after one has left, the shares are larger
    share, count = SHARED.share_stddev(K - 1), SHARED.count_share_stddev(K - 1)
    assert together(share * left / CLIP, count * left) == pytest.approx(Z)
    server = TRUSTED.server_noise_stddev / CLIP
    assert together(server, TRUSTED.count_noise_stddev) == pytest.approx(Z)
    assert TRUSTED.count_share_stddev(1) == 0.0
    assert together(Z, COUNT_NOISE) < 0.85 * Z  # what forgetting the count would cost


def test_the_event_is_that_of_the_whole_release():
    fixed = Mechanism(placement="dp_sgd", **SETTINGS | {"count_noise_stddev": None})
    assert ALONE.headline.event == fixed.headline.event
    assert ALONE.noise_stddev > 1.3 * fixed.noise_stddev


def test_a_light_client_pays_for_its_whole_count():
    """Its update weighs less in the sum, its bit does not: z_k is below z / w."""
    light = Mechanism(placement="central", relative_weight=0.25, **SETTINGS)
    event = light.guarantees()[0].event
    while hasattr(event, "event"):
        event = event.event
    expected = together(light.sum_noise_multiplier / 0.25, COUNT_NOISE)
    assert event.noise_multiplier == pytest.approx(expected)
    assert expected < Z / 0.25


def no_loss(params, *_):
    return 0.0 * params["w"][0]


DRAWS = 20_000


@functools.cache
def releases_alone(steps):
    """Noise that the real client adds to sum and count, without data."""
    update = client_update(no_loss, SGD, placement="dp_sgd", is_adaptive=True)
    constants = client_constants(ALONE, 1.0)
    plan = make_plan(shape=(steps, 2, 1))

    @jax.jit
    @jax.vmap
    def release(key):
        keys = make_keys()._replace(noise=key)
        delta, _, info = update({"w": jnp.zeros(2)}, keys, (), constants, plan, make_pool())
        return delta["w"], info.centred_count

    delta, count = release(jax.random.split(jax.random.key(0), DRAWS))
    batch = ALONE.expected_batch_size
    return np.asarray(delta) * batch / CLIP, np.asarray(count) * batch


def assert_joint(sums, counts, multiplier):
    """The released pair has `multiplier`; each std is off by 1 / sqrt(2 n), five times over."""
    found = together(np.sqrt(np.mean(np.square(sums))), np.sqrt(np.mean(np.square(counts))))
    tolerance = 5 / math.sqrt(2 * (min(np.size(sums), np.size(counts)) - 1))
    assert abs(found / multiplier - 1) < tolerance, (found, multiplier)


def test_the_real_client_releases_sum_and_count_with_the_accounted_multiplier():
    sums, counts = releases_alone(1)
    assert_std(sums, ALONE.sum_noise_multiplier)
    assert_std(counts, COUNT_NOISE)
    assert_joint(sums, counts, Z)
    for wrong in (0.93, 1.07):
        with pytest.raises(AssertionError):
            assert_joint(wrong * sums, wrong * counts, Z)
    with pytest.raises(AssertionError):  # the noise of a run whose clip norm is fixed
        assert_joint(sums * Z / ALONE.sum_noise_multiplier, counts, Z)


def test_every_step_has_a_count_of_its_own_noise():
    """Reported as their mean, and independent of the sums, whose keys they must not share."""
    sums, counts = releases_alone(3)
    assert_std(counts, COUNT_NOISE / math.sqrt(3))
    assert_std(sums, math.sqrt(3) * ALONE.sum_noise_multiplier)
    for column in (0, 1):
        assert_uncorrelated(sums[:, column], counts)
        assert_uncorrelated(releases_alone(1)[0][:, column], releases_alone(1)[1])


@functools.cache
def shares():
    """Noise of DRAWS shares of sum [2] and count, decoded."""
    code = fixed_point(60.0, K)
    update = masked_share(no_loss, step=code.step, is_adaptive=True)
    constants = client_constants(SHARED, 1.0, num_sharing=K)
    plan = make_plan(shape=(1, 2, 1))

    @jax.jit
    @jax.vmap
    def message(key):
        keys = make_keys()._replace(noise=key, mask=jnp.zeros(3, jnp.uint32))
        return update({"w": jnp.zeros(2)}, keys, (), constants, plan, make_pool())[0]

    return code.decode(np.asarray(message(jax.random.split(jax.random.key(1), DRAWS))))


@pytest.mark.parametrize("contributors", [K - D, K])
def test_opened_shares_have_at_least_the_accounted_multiplier(contributors):
    """Exactly it when as many have dropped out as may, sqrt(h / (K - d)) times as much else."""
    count = DRAWS // contributors
    sums = shares()[: count * contributors].reshape(contributors, count, 3).sum(0)
    factor = math.sqrt(contributors / (K - D))
    assert_std(sums[:, :2], factor * SHARED.sum_noise_multiplier)
    assert_std(sums[:, 2], factor * COUNT_NOISE)
    assert_joint(sums[:, :2], sums[:, 2], factor * Z)
    assert_uncorrelated(sums[:, 0], sums[:, 2])
    with pytest.raises(AssertionError):
        assert_joint(sums[:, :2], sums[:, 2], 1.1 * factor * Z)


# --- what is refused


def mechanisms(units, batch, **changes):
    settings = {
        "placement": "dp_sgd", "unit": "slide", "expected_batch_size": batch, "local_steps": 1,
        "rounds": 10, "l2_clip_norm": 1.0, "noise_multiplier": 1.0, "is_adaptive": True,
    }  # fmt: skip
    return make_mechanisms(units, **settings | changes).mechanisms


def test_the_counts_noise_is_a_twentieth_of_what_is_counted():
    alone = mechanisms({"a": 100, "b": 50}, 30.0)
    for m in alone.values():
        assert m.count_noise_stddev == pytest.approx(COUNT_SHARE * 30)
    shared = mechanisms({"a": 100, "b": 20}, 30.0, placement="distributed")
    for m in shared.values():
        assert m.count_noise_stddev == pytest.approx(COUNT_SHARE * 50)
    sites = {f"site {i}": 10 for i in range(40)}
    central = mechanisms(sites, 4.0, placement="central", cohort_prob=0.5)
    for m in central.values():
        assert m.count_noise_stddev == pytest.approx(COUNT_SHARE * 20)


@pytest.mark.parametrize(
    ("units", "batch", "changes"),
    [
        ({"large": 100, "few": 9}, 30.0, {}),  # draws all its 9, and 0.9 < z
        ({"few": 4, "b": 5}, 30.0, {"placement": "distributed"}),
        (dict.fromkeys("abcde", 100), 30.0, {"placement": "central"}),  # five silos
    ],
    ids=["dp_sgd", "distributed", "central"],
)
def test_too_few_units_are_refused_with_the_reason(units, batch, changes):
    site = "few" if "few" in units else "a"
    with pytest.raises(
        ValueError, match=rf"^{site}: .*needs noise_multiplier < 2 count.*more unit"
    ):
        mechanisms(units, batch, **changes)
    mechanisms(units, batch, **changes, noise_multiplier=0.3)  # less noise can be had


# --- what one unit moves, through the real client


@functools.cache
def counting():
    return jax.jit(client_update(linear_loss, SGD, placement="dp_sgd", is_adaptive=True))


def released_count(*units, pool=None, inverse=1.0, noise_stddev=0.0, clip=CLIP):
    plan = make_plan([list(unit) for unit in units], shape=(1, 4, 3))
    constants = make_constants(clip=clip, inverse=inverse, stddev=0.1)
    constants = constants._replace(count_noise_stddev=np.float32(noise_stddev))
    pool = make_pool(gains={6: TINY}) if pool is None else pool
    arguments = linear_params(), make_keys(), (), constants, plan, pool
    return float(counting()(*arguments)[2].centred_count)


def test_one_unit_moves_the_count_by_half():
    """Out of it or into it: a unit below the clip norm by +1/2, one above it by -1/2."""
    without = released_count((5,), (7, 8))
    assert released_count((5,), (6,), (7, 8)) - without == 0.5
    assert released_count((5,), (3, 4), (7, 8)) - without == -0.5
    assert without == -1.0
    noised = [released_count(*units, noise_stddev=0.3) for units in (((5,), (6,)), ((5,),))]
    assert noised[0] - noised[1] == pytest.approx(0.5, abs=1e-6)
    assert noised[1] != -0.5


def test_a_unit_that_is_not_finite_or_not_real_moves_it_by_exactly_nothing():
    pool = make_pool(gains={3: NAN, 0: NAN})
    clean = released_count((5,), (7, 8), noise_stddev=0.3)
    assert released_count((5,), (3,), (7, 8), pool=pool, noise_stddev=0.3) == clean
    assert released_count((5,), (7, 8), pool=pool, noise_stddev=0.3) == clean  # tile 0 pads
    assert released_count(noise_stddev=0.0) == 0.0


def test_the_count_is_divided_by_the_public_number():
    for units in ([(6,)], [(6,), (6, 6)], [(6,), (6,), (6,)]):
        assert released_count(*units, inverse=0.125) == len(units) * 0.5 * 0.125


def test_a_norm_at_the_clip_norm_is_within():
    """Zero is, and so is the very clip norm: b = 1 where the norm is at most C."""
    pool = make_pool(gray=[1])
    assert released_count((1,), pool=pool) == 0.5
    grad = oracles.gradient_of(linear_loss)(
        linear_params(), pool.images[2:3], pool.labels[2:3], 1, None
    )
    size = oracles.norm(grad)
    assert released_count((2,), pool=pool, clip=size * (1 + 1e-5)) == 0.5
    assert released_count((2,), pool=pool, clip=size * (1 - 1e-5)) == -0.5


# --- where it goes: the real algorithms, on units of known norms

UNITS, ROUNDS, FIRST = 40, 70, 0.5
VALUES = np.round(np.geomspace(4, 120, UNITS)).astype(int)
NORMS = VALUES / 64 * math.sqrt(51)


def known_pool():
    images = np.zeros((UNITS, 4, 4, 3), np.uint8) + np.uint8(GRAY)
    images += VALUES.astype(np.uint8)[:, None, None, None]
    return TilePool(jnp.asarray(images), jnp.zeros((UNITS, 4, 4), jnp.uint8))


def plan_of(tiles, slots):
    return make_plan([[int(tile)] for tile in tiles], shape=(1, slots, 1))


def follow(made, slots, block, release=ServerRelease):
    """Clip norms by site after each round; new keys in every round."""
    state, pool, found = made.init(linear_params()), known_pool(), []
    visit, finish = jax.jit(made.visit), jax.jit(made.finish)
    for index in range(ROUNDS):
        acc = made.begin(state)
        for start in range(0, len(slots), block):
            chunk = [
                slot._replace(
                    keys=slot.keys._replace(noise=np.array([index, start + i], np.uint32))
                )
                for i, slot in enumerate(slots[start : start + block])
            ]
            acc, _, _ = visit(acc, state, stack_chunk(chunk), pool)
        state = finish(state, acc, release(jax.random.key(index)))
        found.append(np.asarray(state.clip_scale) * FIRST)
    return np.stack(found)


def slot_of(tiles, slots, site, *, batch, count_stddev):
    client = make_client(
        plan_of(tiles, slots), site, clip=FIRST, stddev=0.1 * FIRST, inverse=1 / batch
    )
    constants = client.constants._replace(
        site=np.int32(site), count_noise_stddev=np.float32(count_stddev)
    )
    return client._replace(constants=constants)


def assert_at_quantile(clips, norms, quantile):
    """The mean of the last rounds lies between the quantiles a tenth below and above."""
    low, high = np.quantile(norms, [quantile - 0.1, quantile + 0.1])
    found = np.exp(np.log(clips[-20:]).mean())
    assert low <= found <= high, (low, found, high)


@pytest.mark.parametrize("quantile", [0.3, 0.8])
def test_each_site_follows_its_own_quantile(quantile):
    """ "dp_sgd": two hospitals of unlike norms, and a third that sits out and does not move."""
    half = UNITS // 2
    update = client_update(linear_loss, SGD, placement="dp_sgd", is_adaptive=True)
    made = fed_avg(
        update, SGD, mesh=client_mesh(1), adaptive=adaptive_clipping(quantile), num_sites=3
    )
    common = {"batch": half, "count_stddev": COUNT_SHARE * half}
    slots = [
        slot_of(range(half), half, 0, **common),
        slot_of(range(half, UNITS), half, 2, **common),
    ]
    clips = follow(made, slots, 1)
    assert_at_quantile(clips[:, 0], NORMS[:half], quantile)
    assert_at_quantile(clips[:, 2], NORMS[half:], quantile)
    np.testing.assert_array_equal(clips[:, 1], FIRST)
    assert np.log(clips[-20:, 0]).std() > 0.003  # noised
    with pytest.raises(AssertionError):
        assert_at_quantile(clips[:, 0], NORMS[half:], quantile)


def test_shares_follow_the_quantile_of_all_units():
    half, quantile = UNITS // 2, 0.5
    code = fixed_point(60.0, 2)
    share = masked_share(linear_loss, step=code.step, is_adaptive=True)
    opened = secure_sum(linear_params(), code.step, has_count=True)
    made = opened_sum(
        share, SGD, opened, mesh=client_mesh(1), adaptive=adaptive_clipping(quantile), num_sites=2
    )
    masks = np.random.default_rng(0).integers(0, 2**32, (2, 52), np.uint32)
    common = {"batch": half, "count_stddev": COUNT_SHARE * UNITS / math.sqrt(2)}
    slots = [
        slot._replace(keys=slot.keys._replace(mask=mask))
        for slot, mask in zip(
            (
                slot_of(range(half), half, 0, **common),
                slot_of(range(half, UNITS), half, 1, **common),
            ),
            masks,
            strict=True,
        )
    ]

    def release(key):
        del key
        return ServerRelease(
            divisor=np.float32(UNITS), l2_clip_norm=np.float32(FIRST),
            count_divisor=np.float32(UNITS), unmask=masks[0] + masks[1],
        )  # fmt: skip

    clips = follow(made, slots, 1, release)
    np.testing.assert_array_equal(clips[:, 0], clips[:, 1])
    assert_at_quantile(clips[:, 0], NORMS, quantile)
    assert np.log(clips[-20:, 0]).std() > 0.003


def test_a_trusted_server_follows_the_quantile_of_the_clients_updates():
    clients, quantile = 20, 0.5
    update = client_update(linear_loss, SGD, placement="central")
    made = opened_sum(
        update, SGD, noised_sum(), clients_per_block=clients, mesh=client_mesh(1),
        adaptive=adaptive_clipping(quantile), num_sites=clients,
    )  # fmt: skip
    slots = [
        slot_of([2 * i], 1, i, batch=1, count_stddev=0.0) for i in range(clients)
    ]  # update of client i: the gradient of its one tile

    def release(key):
        return ServerRelease(
            divisor=np.float32(clients), l2_clip_norm=np.float32(FIRST), noise_key=key,
            noise_stddev=np.float32(0.1 * FIRST), count_divisor=np.float32(clients),
            count_noise_stddev=np.float32(COUNT_SHARE * clients),
        )  # fmt: skip

    clips = follow(made, slots, clients, release)
    assert_at_quantile(clips[:, 0], NORMS[::2], quantile)
    assert np.log(clips[-20:, 0]).std() > 0.003
    with pytest.raises(AssertionError):
        assert_at_quantile(clips[:, 0], NORMS[::2], 0.8)
