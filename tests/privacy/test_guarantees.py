"""Every row against the exact divergence of the releases that it speaks of, and the design's table.

The releases have one dimension, where every sign pattern of clipped contributions can be tried; the
worst are also composed with themselves and each other. Outputs are told apart only by the cell
they fall into. That is post-processing, so a divergence found here is at most the true one, and a
bound must hold without any tolerance but that of float64 sums and of the accountant's FFT.
"""

import dataclasses
import itertools
import math
from typing import NamedTuple

import attr
import numpy as np
import pytest
from dp_accounting import dp_event
from scipy import special, stats

from fedjax_dp.privacy import accounting, discrete_gaussian, guarantees
from fedjax_dp.privacy.events import DistributedDiscreteGaussianDpEvent, MixtureDpEvent
from fedjax_dp.privacy.mechanism import Mechanism
from fedjax_dp.privacy.overflow import CONVERSION_TAIL

DELTA = 1e-5
EPSILONS = (0.0, 0.1, 0.3, 1.0, 2.0)
FLOAT = 1e-10
GRID = 5e-3
Z, Q, P = 1.2, 0.4, 0.5  # noise, coin of a unit, coin of a client


def gaussian(z):
    return dp_event.GaussianDpEvent(z)


def poisson(q, z):
    return dp_event.PoissonSampledDpEvent(q, gaussian(z))


def mechanism(**overrides):
    settings = {
        "placement": "dp_sgd",
        "unit": "tile",
        "num_units": 40,
        "sampling_prob": 0.2,
        "capacity": 10,
        "local_steps": 3,
        "l2_clip_norm": 0.5,
        "noise_multiplier": 2.0,
    }
    return Mechanism(**settings | overrides)


def tiny(placement, **overrides):
    """A client of so few units that all its draws can be listed."""
    settings = {
        "placement": placement,
        "num_units": 4,
        "sampling_prob": Q,
        "capacity": 4,
        "local_steps": 1,
        "l2_clip_norm": 1.0,
        "noise_multiplier": Z,
    }
    if placement == "distributed":
        settings |= {"num_shares": 4, "max_dropouts": 1}
    if placement == "central":
        settings["cohort_prob"] = P
    return mechanism(**settings | overrides)


def row(m, name):
    return next(g for g in m.guarantees() if g.name == name)


# --- the oracle: laws of releases, and the exact divergence between what can be told apart


class Law(NamedTuple):
    """A mixture of Gaussians: their means, [draws] or [draws, 2], and weights."""

    means: np.ndarray
    weights: np.ndarray


def law(means, weights=(1.0,)):
    return Law(np.asarray(means, float), np.asarray(weights, float))


def masses(mixture, stddev, cells):
    """Probability of each cell; of a plane's, row by row, where `stddev` has two entries."""
    edges = np.concatenate([[-np.inf], np.linspace(-8, 8, cells - 1), [np.inf]])

    def along(means, scale):
        return np.diff(special.ndtr((edges - means[:, None]) / scale), axis=1)

    if np.ndim(stddev) == 0:
        return mixture.weights @ along(mixture.means, stddev)
    first, second = (along(mixture.means[:, i], stddev[i]) for i in range(2))
    return np.einsum("d,di,dj->ij", mixture.weights, first, second).ravel()


def hockey_sticks(p, q):
    """Both directions, [2, EPSILONS]."""
    return np.array(
        [[np.maximum(a - math.exp(e) * b, 0).sum() for e in EPSILONS] for a, b in ((p, q), (q, p))]
    )


def found(pairs, stddev, rounds=1):
    """The worst divergences of `pairs` of laws: of single releases, or of any two after another.

    Only pairs that are worst for some epsilon and direction are composed, with each other, the
    data changing the same way round.
    """
    cells = 1001 if np.ndim(stddev) == 0 else 101
    pairs = list(pairs)
    single = np.array(
        [hockey_sticks(*(masses(side, stddev, cells) for side in pair)) for pair in pairs]
    )
    if rounds == 1:
        return single.max((0, 1))
    worst = sorted(set(single.argmax(0).ravel()))
    coarse = [[masses(side, stddev, 201) for side in pairs[i]] for i in worst]
    return np.max(
        [
            hockey_sticks(*(np.outer(a, b).ravel() for a, b in zip(one, other, strict=True))).max(0)
            for one, other in itertools.combinations_with_replacement(coarse, 2)
        ],
        axis=0,
    )


def deltas(event, rounds=1, relation="zero_out"):
    # The coarser grid is faster; of two releases it adds 3e-5 to a delta, relatively, of one none.
    return np.array([accounting.delta_for(event, rounds, e, relation, grid=GRID) for e in EPSILONS])


def claimed(guarantee, rounds=1):
    return deltas(guarantee.event, rounds, guarantee.accountant_relation)


def assert_bounds(guarantee, pairs, stddev, *, is_attained=False, rounds=(1, 2)):
    """No pair exceeds the claim, one release or two; where attained, none smaller would do."""
    pairs = list(pairs)
    for count in rounds:
        assert np.all(found(pairs, stddev, count) <= claimed(guarantee, count) + FLOAT), count
    if is_attained:
        np.testing.assert_allclose(found(pairs, stddev), claimed(guarantee), rtol=0.01, atol=1e-6)


def assert_violated(event, pairs, stddev, relation="zero_out"):
    """The negative control: at a smaller cost the same pairs are not covered."""
    assert np.any(found(pairs, stddev) > deltas(event, relation=relation) + 1e-3)


# --- draws


def drawn(units, q, capacity):
    """{drawn set: probability} of a Poisson draw of `units` cut uniformly at `capacity`."""
    probs = {}
    for coins in itertools.product((0, 1), repeat=len(units)):
        chosen = [u for u, coin in zip(units, coins, strict=True) if coin]
        weight = q ** len(chosen) * (1 - q) ** (len(units) - len(chosen))
        cuts = list(itertools.combinations(chosen, min(capacity, len(chosen))))
        for cut in cuts:
            probs[frozenset(cut)] = probs.get(frozenset(cut), 0) + weight / len(cuts)
    return probs


def summed(values, draw):
    """The law of a clipped sum: `values` of the units, and the draw."""
    return law([sum(values[u] for u in s) for s in draw], list(draw.values()))


def sums(n, capacity, protected, *, instead=0.0, offset=0.0):
    """Pairs of clipped sums of n units: those of `protected` are 1, or `instead`."""
    draw = drawn(range(n), Q, capacity)
    others = [u for u in range(n) if u not in protected]
    for values in itertools.product((-1.0, 0.0, 1.0), repeat=len(others)):
        rest = dict(zip(others, values, strict=True))
        yield tuple(
            summed(rest | dict.fromkeys(protected, value), draw)._replace(
                means=summed(rest | dict.fromkeys(protected, value), draw).means + offset
            )
            for value in (1.0, instead)
        )


def updates(n, capacity, protected):
    """Pairs of clipped updates: any function of the drawn set, here every sign pattern."""
    draw = drawn(range(n), Q, capacity)
    every = [frozenset(s) for r in range(n + 1) for s in itertools.combinations(range(n), r)]
    for signs in itertools.product((-1.0, 1.0), repeat=len(every)):
        update = dict(zip(every, signs, strict=True))
        yield tuple(
            law([update[s - without] for s in draw], list(draw.values()))
            for without in (frozenset(), protected)
        )


def scaled(pairs, factor):
    for pair in pairs:
        yield tuple(side._replace(means=side.means * factor) for side in pair)


def if_taken(pairs, p, weight):
    """What "central" releases of a client's `pairs`: nothing, unless its coin falls."""
    for pair in pairs:
        yield tuple(
            law(
                np.append(weight * side.means, 0.0),
                np.append(p * side.weights, 1 - p),
            )
            for side in pair
        )


def cohorts(value, instead, p, weight):
    """Pairs of opened sums of "central": a client's update is `value`, or `instead`."""
    coins = list(itertools.product((0, 1), repeat=3))
    weights = [math.prod(p if coin else 1 - p for coin in c) for c in coins]
    for others in itertools.product((-1.0, 0.0, 1.0), repeat=2):
        yield tuple(
            law([np.dot(c, (weight * own, *others)) for c in coins], weights)
            for own in (value, instead)
        )


# --- why one dimension is enough


@pytest.mark.parametrize("angle", [0.5, 1.5, 2.5, math.pi])
def test_no_direction_is_worse_than_the_opposite_one(angle):
    turned = (math.cos(angle), math.sin(angle))
    replaced = (law([(0, 0), (1, 0)], [1 - Q, Q]), law([(0, 0), turned], [1 - Q, Q]))
    assert np.all(
        found([replaced], (Z, Z)) <= deltas(poisson(Q, Z), relation="replace_one") + FLOAT
    )
    group = dp_event.MixtureOfGaussiansDpEvent(Z, (0.0, 1.0, 2.0), (0.36, 0.48, 0.16))
    both = (1 + turned[0], turned[1])
    drawn_two = law([(0, 0), (1, 0), turned, both], [0.36, 0.24, 0.24, 0.16])
    assert np.all(found([(law([(0, 0)]), drawn_two)], (Z, Z)) <= deltas(group) + FLOAT)


# --- placements that clip units


@pytest.mark.parametrize("capacity", [1, 2, 3, 4])
def test_unit_of_dp_sgd(capacity):
    m = tiny("dp_sgd", capacity=capacity)
    pairs = list(sums(4, capacity, {0}))
    assert_bounds(m.headline, pairs, m.noise_stddev, is_attained=capacity == 4)
    # Also where the zeroed unit leaves its slot to another.
    thirds = pairs[:: len(pairs) // 2]
    freed = [
        (first, summed({1: y, 2: y, 3: y}, drawn((1, 2, 3), Q, capacity)))
        for y, (first, _) in zip((-1.0, 0.0, 1.0), thirds, strict=True)
    ]
    assert_bounds(m.headline, freed, m.noise_stddev)
    assert_violated(
        tiny("dp_sgd", capacity=capacity, noise_multiplier=2 * Z).headline.event, pairs, Z
    )


@pytest.mark.parametrize("capacity", [1, 2, 3, 4])
def test_tile_of_a_unit_is_replaced(capacity):
    m = tiny("dp_sgd", unit="patient", tiles_per_unit=2, capacity=capacity)
    tile = row(m, "tile_of_patient")
    pairs = [pair for instead in (-1.0, 0.0) for pair in sums(4, capacity, {0}, instead=instead)]
    assert_bounds(tile, pairs, m.noise_stddev, is_attained=capacity == 4)
    assert_violated(m.headline.event, pairs, Z)  # its unit's zero-out event is not enough


def test_patient_of_tiles():
    m = tiny("dp_sgd", max_units_per_patient=2)
    pairs = list(sums(4, 4, {0, 1}))
    assert_bounds(m.patient_guarantee, pairs, Z, is_attained=True)
    # Two tiles that pull apart, and a patient of fewer tiles than the cap, are covered too.
    assert_bounds(m.patient_guarantee, sums(4, 4, {0}), Z)
    assert_violated(m.headline.event, pairs, Z)


def without(protected, n=4):
    """Pairs under add-or-remove: the protected units come or go, and nothing is ever cut."""
    others = [u for u in range(n) if u not in protected]
    for values in itertools.product((-1.0, 0.0, 1.0), repeat=len(others)):
        rest = dict(zip(others, values, strict=True))
        everyone = rest | dict.fromkeys(protected, 1.0)
        yield summed(everyone, drawn(range(n), Q, n)), summed(rest, drawn(others, Q, n))


@pytest.mark.parametrize("nominal", [2, 4, 100])
def test_add_or_remove_does_not_depend_on_the_nominal_number(nominal):
    m = tiny(
        "dp_sgd",
        relation="add_or_remove",
        num_units=nominal,
        capacity=min(nominal, 4),
        max_units_per_patient=3,
    )
    assert m.headline.event == poisson(Q, Z)
    assert_bounds(m.headline, without({0}), Z, is_attained=True)
    patient = m.patient_guarantee
    assert_bounds(patient, without({0, 1, 2}), Z, is_attained=True)
    assert patient.sensitivity == 3.0
    two = dataclasses.replace(m, max_units_per_patient=2).patient_guarantee
    assert_violated(two.event, without({0, 1, 2}), Z)
    tile = row(dataclasses.replace(m, unit="slide"), "tile_of_slide")
    assert_bounds(tile, sums(4, 4, {0}, instead=-1.0), Z, is_attained=True)


@pytest.mark.parametrize("capacity", [2, 4])
def test_opened_sum_of_distributed(capacity):
    """K = 4, at most one drops out; what other sites put in is known to the adversary."""
    m = tiny("distributed", capacity=capacity, max_units_per_patient=2)
    pairs = list(sums(4, capacity, {0}, offset=0.7))
    share = m.share_stddev(4)
    for contributors in (3, 4):
        assert_bounds(
            row(m, "tile"),
            pairs,
            share * math.sqrt(contributors),
            is_attained=(contributors, capacity) == (3, 4),
        )
    if capacity == 4:
        assert_violated(row(m, "tile").event, pairs, share * math.sqrt(2))  # hence the abort
        patients = list(sums(4, 4, {0, 1}, offset=0.7))
        assert_bounds(row(m, "patient"), patients, Z, is_attained=True)
        assert_bounds(row(m, "patient_against_shares"), patients, share, is_attained=True)
    assert_bounds(row(m, "tile_against_shares"), pairs, share, is_attained=capacity == 4)
    assert_violated(row(m, "tile").event, pairs, share)


def test_shares_re_split_among_fewer_sites_are_no_smaller():
    m = tiny("distributed", num_shares=6, max_dropouts=1)
    spread = [(m.share_stddev(k), m.share_stddev(k) * math.sqrt(k - 1)) for k in range(6, 2, -1)]
    assert min(share for share, _ in spread) == spread[0][0]
    np.testing.assert_allclose([opened for _, opened in spread], Z, rtol=1e-12)


# --- placements that clip updates


@pytest.mark.parametrize("capacity", [1, 2, 3])
@pytest.mark.parametrize("placement", ["update", "central"])
def test_record_of_an_update(placement, capacity):
    m = tiny(placement, num_units=3, capacity=capacity, max_units_per_patient=2)
    p, weight = m.cohort_prob, 0.5 if placement == "central" else 1.0
    m = dataclasses.replace(m, relative_weight=weight)
    for name, protected in (("record_tile", {0}), ("record_patient", {0, 1})):
        pairs = list(if_taken(updates(3, capacity, frozenset(protected)), p, weight))
        is_attained = capacity == 3 and placement == "update"
        assert_bounds(row(m, name), pairs, Z, is_attained=is_attained)
        if placement == "central" and capacity == 1:
            continue  # nearly every draw is cut, and what is claimed then is twice too much
        # One clip norm is not what an update moves by: two are.
        at_one_clip = dataclasses.replace(m, noise_multiplier=2 * Z)
        assert_violated(row(at_one_clip, name).event, pairs, Z)


@pytest.mark.parametrize("placement", ["update", "central"])
def test_record_drawn_in_any_of_two_steps(placement):
    m = tiny(placement, num_units=2, capacity=2, local_steps=2)
    draw = drawn(range(2), Q, 2)
    steps = list(itertools.product(draw, repeat=2))
    weights = [draw[a] * draw[b] for a, b in steps]
    rng = np.random.default_rng(0)
    updates_of_steps = [
        dict(zip(steps, rng.choice([-1.0, 1.0], 16), strict=True)) for _ in range(50)
    ]
    updates_of_steps.append({s: 1.0 if 0 in s[0] | s[1] else -1.0 for s in steps})
    pairs = [
        (law([f[s] for s in steps], weights), law([f[a - {0}, b - {0}] for a, b in steps], weights))
        for f in updates_of_steps
    ]
    pairs = list(if_taken(pairs, m.cohort_prob, 1.0))
    is_attained = placement == "update"
    assert_bounds(row(m, "record_tile"), pairs, Z, is_attained=is_attained)
    one_step = row(dataclasses.replace(m, local_steps=1), "record_tile").event
    if is_attained:
        assert_violated(one_step, pairs, Z)


def test_a_secret_coin_of_the_client_is_not_claimed_to_amplify_records():
    m = tiny("central", num_units=3, capacity=3)
    assert claimed(row(m, "record_tile"))[3] > deltas(poisson(P * Q, Z / 2))[3] * 1.1


@pytest.mark.parametrize("state", [{"is_stateless": False}, {"sampling_prob": 1.0}])
def test_records_without_amplification_are_any_change_of_the_update(state):
    for placement, p in (("update", 1.0), ("central", P)):
        m = tiny(placement, **state)
        pairs = list(if_taken([(law([1.0]), law([-1.0]))], p, 1.0))
        for name in ("record_tile", "record_patient"):
            assert_bounds(row(m, name), pairs, Z, is_attained=p == 1)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_client_of_central(weight):
    m = tiny("central", relative_weight=weight)
    assert m.server_noise_stddev == Z
    pairs = [pair for value in (-1.0, 1.0) for pair in cohorts(value, 0.0, P, weight)]
    assert_bounds(row(m, "client"), pairs, Z, is_attained=True)
    assert_violated(poisson(P / 2, Z / weight), pairs, Z)
    assert_violated(poisson(P, 2 * Z / weight), pairs, Z)
    replaced = [pair for value in (-1.0, 0.0) for pair in cohorts(1.0, value, P, weight)]
    assert_bounds(row(m, "client_replace"), replaced, Z, is_attained=True)
    assert_violated(row(m, "client").event, replaced, Z)


def test_client_of_update():
    m = tiny("update")
    assert_bounds(row(m, "client"), [(law([1.0]), law([0.0]))], Z, is_attained=True)
    replaced = [(law([1.0]), law([-1.0]))]
    assert_bounds(row(m, "client_replace"), replaced, Z, is_attained=True)
    assert_violated(row(m, "client").event, replaced, Z)


def test_average_of_a_fixed_cohort():
    """m = 4: the others' updates are known, each noise of standard deviation Z is divided by 4."""
    m = tiny("update", num_units=3, capacity=3, averaged_over=4)
    stddev = Z * math.sqrt(4) / 4
    pairs = {
        "client": [(law([1.0]), law([0.0]))],
        "client_replace": [(law([1.0]), law([-1.0]))],
        "record_tile": list(updates(3, 3, frozenset({0}))),
    }
    for name, alone in pairs.items():
        averaged = list(scaled(alone, 1 / 4))
        assert_bounds(row(m, f"{name}_in_average"), averaged, stddev, is_attained=True)
        four_times = dataclasses.replace(m, averaged_over=16)  # as if z m, not z sqrt(m)
        assert_violated(row(four_times, f"{name}_in_average").event, averaged, stddev)


# --- the count that adapts the clip norm goes with the sum


def with_count(own, p, weight=1.0):
    """Pairs of (sum, count): the protected one adds own[0], or own[1], if its coin falls."""
    coins = list(itertools.product((0, 1), repeat=2))
    weights = [math.prod(p if coin else 1 - p for coin in c) for c in coins]
    for other in itertools.product((-1.0, 0.0, 1.0), (-0.5, 0.0, 0.5)):
        yield tuple(
            law(
                [
                    c[0] * np.array([weight * one[0], one[1]]) + c[1] * np.array(other)
                    for c in coins
                ],
                weights,
            )
            for one in own
        )


@pytest.mark.parametrize(
    ("placement", "weight"), [("dp_sgd", 1.0), ("central", 1.0), ("central", 0.5)]
)
def test_sum_and_count_together(placement, weight):
    m = tiny(placement, num_units=2, capacity=2, count_noise_stddev=0.8, relative_weight=weight)
    stddevs = (m.sum_noise_multiplier, 0.8)
    assert (m.sum_noise_multiplier**-2 + 1.6**-2) ** -0.5 == pytest.approx(Z)
    coin = Q if placement == "dp_sgd" else P
    there, zero, opposite = (1.0, 0.5), (0.0, 0.0), (-1.0, -0.5)
    pairs = list(with_count((there, zero), coin, weight))
    assert_bounds(m.headline, pairs, stddevs, rounds=(1,))
    # Cells of a plane are coarse: what they hide is below 5 %.
    np.testing.assert_allclose(found(pairs, stddevs), claimed(m.headline), rtol=0.05, atol=1e-4)
    sum_alone = poisson(coin, m.sum_noise_multiplier / weight)
    assert_violated(sum_alone, pairs, stddevs)
    if placement == "central":
        replaced = list(with_count((there, opposite), coin, weight))
        assert_bounds(row(m, "client_replace"), replaced, stddevs, rounds=(1,))
        z = m.headline.event.event.noise_multiplier
        assert z == pytest.approx(((weight / m.sum_noise_multiplier) ** 2 + 1.6**-2) ** -0.5)


def test_a_light_client_pays_for_the_whole_count():
    light, heavy = (
        tiny("central", relative_weight=w, count_noise_stddev=0.8).headline.event.event
        for w in (1e-6, 1.0)
    )
    assert light.noise_multiplier == pytest.approx(1.6)
    assert heavy.noise_multiplier == pytest.approx(Z)


# --- exact integers


DISCRETE = {
    "placement": "distributed",
    "local_steps": 1,
    "num_shares": 3,
    "max_dropouts": 1,
    "noise": "discrete_gaussian",
    "dimension": 1,
    "levels": 4,
}


def summed_noise(variance, shares):
    """Probabilities of the sum of discrete Gaussians over -300 .. 300."""
    support = np.arange(-300, 301)
    one = np.exp(-(support**2) / (2 * variance))
    total = one = one / one.sum()
    for _ in range(shares - 1):
        total = np.convolve(total, one, "same")
    return total


def test_discrete_rows_bound_the_real_integers():
    """Units of integer norm 5: four levels and half a step of rounding, up."""
    m = mechanism(**DISCRETE, num_units=3, capacity=3, sampling_prob=Q, noise_multiplier=1.5)
    assert discrete_gaussian.integer_l2_sensitivity(4, 1) == 5
    for name, shares in (("tile", 2), ("tile", 3), ("tile_against_shares", 1)):
        noise = summed_noise(m.share_variance(3), shares)
        real = []
        for values in itertools.product((-5, 0, 5), repeat=2):
            first, second = (
                sum(
                    weight * np.roll(noise, int(mean))
                    for mean, weight in zip(*summed({0: own, 1: values[0], 2: values[1]},
                                                    drawn(range(3), Q, 3)), strict=True)
                )
                for own in (5, 0)
            )  # fmt: skip
            real.append(hockey_sticks(first, second).max(0))
        real = np.max(real, axis=0)
        assert np.all(real <= claimed(row(m, name)) + FLOAT)
        smaller = dataclasses.replace(m, noise_multiplier=6.0)
        assert np.any(real > claimed(row(smaller, name)) + 1e-3)


def integer_laws(own, others, capacity, noise):
    """The law of the opened sum of three units: one adds `own`, the others `others`."""
    return sum(
        weight * np.roll(noise, int(mean))
        for mean, weight in zip(
            *summed({0: own, 1: others[0], 2: others[1]}, drawn(range(3), Q, capacity)),
            strict=True,
        )
    )


@pytest.mark.parametrize("capacity", [1, 2, 3])
@pytest.mark.parametrize(("name", "shares"), [("", 2), ("", 3), ("_against_shares", 1)])
def test_a_tile_of_a_unit_is_replaced_among_integers(capacity, name, shares):
    """One integer vector of its unit by another, from 5 to -5 at worst; whoever is cut."""
    settings = DISCRETE | {"unit": "patient", "num_units": 3, "sampling_prob": Q}
    m = mechanism(**settings, capacity=capacity, noise_multiplier=3.0)
    tile = row(m, f"tile_of_patient{name}")
    assert (tile.sensitivity, tile.accountant_relation) == (2 * m.l2_clip_norm, "replace_one")
    # Where a draw may be cut the coin is not claimed to amplify, and the unit's row has no bound.
    assert tile.event.sampling_probability == (Q if capacity == 3 else 1.0)
    assert row(m, f"patient{name}").is_valid == (capacity == 3)
    noise = summed_noise(m.share_variance(3), shares)
    pairs = [
        [integer_laws(own, others, capacity, noise) for own in (5, instead)]
        for others in itertools.product((-5, 0, 5), repeat=2)
        for instead in (-5, 0)
    ]
    single = np.max([hockey_sticks(*pair) for pair in pairs], axis=(0, 1))
    assert np.all(single <= claimed(tile) + FLOAT)
    twice = [[np.outer(side, side).ravel() for side in pair] for pair in pairs[-2:]]
    found_twice = np.max([hockey_sticks(*pair) for pair in twice], axis=(0, 1))
    assert np.all(found_twice <= claimed(tile, 2) + FLOAT)
    # Negative controls: what is claimed with less noise, and what covers a zeroing alone.
    quiet = dataclasses.replace(m, noise_multiplier=30.0)
    assert np.any(single > claimed(row(quiet, tile.name)) + 1e-3)
    if capacity == 3:
        assert np.any(single > deltas(tile.event) + 1e-3)


@pytest.mark.parametrize("z", [0.7, 1.0, 1.3])
def test_rounded_shares_hold_what_is_charged_also_when_re_split(z):
    m = mechanism(**DISCRETE | {"num_shares": 6, "levels": 3}, noise_multiplier=z, capacity=40)
    charged = m.headline.event
    assert charged.num_shares == 5
    for sharing in range(6, 2, -1):
        actual = m.share_variance(sharing)
        assert actual >= charged.noise_stddev_squared
        assert (sharing - 1) * actual >= 5 * charged.noise_stddev_squared


def test_discrete_rows_need_a_capacity_that_is_never_exceeded():
    m = mechanism(**DISCRETE, unit="patient", tiles_per_unit=2)
    for name in ("patient", "patient_against_shares"):
        assert not row(m, name).is_valid
    needed = int(m.headline.reason.split()[-1])
    wide = dataclasses.replace(m, capacity=needed)
    assert wide.headline.is_valid
    assert isinstance(wide.headline.event, DistributedDiscreteGaussianDpEvent)
    assert not dataclasses.replace(m, capacity=needed - 1).headline.is_valid
    assert stats.binom.sf(needed - 1, 39, 0.2) <= CONVERSION_TAIL
    private = dataclasses.replace(m, relation="add_or_remove")  # nothing is cut there
    assert private.headline.is_valid
    conversion = row(dataclasses.replace(wide, unit="tile", tiles_per_unit=1), "patient")
    assert not conversion.is_valid


# --- the design's table


SHARES = {"placement": "distributed", "local_steps": 1, "num_shares": 6, "max_dropouts": 2}
CENTRAL = {"placement": "central", "cohort_prob": 0.25, "relative_weight": 0.5, "capacity": 40}
STEP = dp_event.TruncatedSubsampledGaussianDpEvent(40, 0.2, 10, 2.0)
SHARE = dp_event.TruncatedSubsampledGaussianDpEvent(40, 0.2, 10, 1.0)
ONCE = 1 - 0.8**3
CUT = 1 - stats.binom.cdf(9, 39, 0.2) ** 3  # some step of three may be cut for one record


def of_three(event):
    return dp_event.SelfComposedDpEvent(event, 3)


def binomial_group(z, k=2):
    numbers = np.arange(k + 1)
    probs = stats.binom.pmf(numbers, k, 0.2)
    return dp_event.MixtureOfGaussiansDpEvent(
        z, tuple(map(float, numbers)), tuple(map(float, probs))
    )


def if_in_cohort(event):
    return MixtureDpEvent((event, dp_event.NoOpDpEvent()), (0.25, 0.75))


ADD = {"relation": "add_or_remove"}
TABLE = [
    # settings, row, unit, relation, sensitivity, event, relation it is composed under
    ({}, "tile", "tile", "zero_out", 0.5, of_three(STEP), "zero_out"),
    (ADD, "tile", "tile", "add_or_remove", 0.5, of_three(poisson(0.2, 2.0)), "add_or_remove"),
    ({"unit": "patient"}, "tile_of_patient", "tile", "replacement", 1.0, of_three(STEP),
     "replace_one"),
    (ADD | {"unit": "slide"}, "tile_of_slide", "tile", "replacement", 1.0,
     of_three(poisson(0.2, 2.0)), "replace_one"),
    ({"max_units_per_patient": 2, "capacity": 40}, "patient", "patient", "zero_out", 1.0,
     of_three(binomial_group(2.0)), "zero_out"),
    ({"placement": "update"}, "client", "client", "zero_out", 0.5, gaussian(2.0), "zero_out"),
    ({"placement": "update"}, "client_replace", "client", "local DP", 1.0, gaussian(1.0),
     "zero_out"),
    ({"placement": "update", "capacity": 40}, "record_tile", "tile", "zero_out", 1.0,
     poisson(ONCE, 1.0), "zero_out"),
    ({"placement": "update"}, "record_tile", "tile", "zero_out", 1.0,
     MixtureDpEvent((poisson(ONCE, 1.0), gaussian(1.0)), (1 - CUT, CUT)), "zero_out"),
    ({"placement": "update", "averaged_over": 4}, "client_in_average", "client", "zero_out", 0.5,
     gaussian(4.0), "zero_out"),
    ({"placement": "update", "averaged_over": 4}, "client_replace_in_average", "client",
     "replacement", 1.0, gaussian(2.0), "zero_out"),
    ({"placement": "update", "averaged_over": 4, "capacity": 40}, "record_tile_in_average", "tile",
     "zero_out", 1.0, poisson(ONCE, 2.0), "zero_out"),
    (SHARES, "tile", "tile", "zero_out", 0.5, STEP, "zero_out"),
    (SHARES, "tile_against_shares", "tile", "zero_out", 0.5, SHARE, "zero_out"),
    (SHARES | {"max_units_per_patient": 2, "capacity": 40}, "patient_against_shares", "patient",
     "zero_out", 1.0, binomial_group(1.0), "zero_out"),
    (CENTRAL, "client", "client", "zero_out", 0.25, poisson(0.25, 4.0), "zero_out"),
    (CENTRAL, "client_replace", "client", "replacement", 0.5, poisson(0.25, 4.0), "replace_one"),
    (CENTRAL, "record_tile", "tile", "zero_out", 0.5, if_in_cohort(poisson(ONCE, 2.0)), "zero_out"),
    (CENTRAL, "record_patient", "patient", "zero_out", 0.5, if_in_cohort(gaussian(2.0)),
     "zero_out"),
]  # fmt: skip


def assert_same_event(event, expected):
    """Equal, but for the rounding of probabilities and multipliers."""
    assert type(event) is type(expected)
    for name in (field.name for field in attr.fields(type(event))):
        value, other = getattr(event, name), getattr(expected, name)
        if isinstance(value, dp_event.DpEvent):
            assert_same_event(value, other)
        elif isinstance(value, tuple) and isinstance(value[0], dp_event.DpEvent):
            for one, another in zip(value, other, strict=True):
                assert_same_event(one, another)
        else:
            assert value == pytest.approx(other, rel=1e-12), name


@pytest.mark.parametrize(
    ("settings", "name", "unit", "relation", "sensitivity", "event", "composed_under"),
    TABLE,
    ids=[f"{entry[0].get('placement', 'dp_sgd')}-{entry[1]}" for entry in TABLE],
)
def test_table_of_the_design(settings, name, unit, relation, sensitivity, event, composed_under):
    guarantee = row(mechanism(**settings), name)
    assert guarantee.is_valid
    assert (guarantee.unit, guarantee.sensitivity) == (unit, pytest.approx(sensitivity))
    assert relation in guarantee.relation
    assert guarantee.accountant_relation == composed_under
    assert_same_event(guarantee.event, event)
    assert guarantee.assumptions
    assert not guarantee.reason


@pytest.mark.parametrize(
    ("settings", "names", "adversaries"),
    [
        ({}, ["tile", "patient"], [guarantees.SERVER]),
        ({"unit": "patient"}, ["patient", "tile_of_patient"], [guarantees.SERVER]),
        ({"unit": "slide"}, ["slide", "tile_of_slide", "patient"], [guarantees.SERVER]),
        ({"placement": "update"}, ["client", "client_replace", "record_tile", "record_patient"],
         [guarantees.SERVER]),
        (SHARES, ["tile", "patient", "tile_against_shares", "patient_against_shares"],
         [guarantees.SUM, guarantees.SHARES]),
        (CENTRAL, ["client", "client_replace", "record_tile", "record_patient"],
         [guarantees.MODEL]),
        (CENTRAL | {"unit": "patient"}, ["client", "client_replace", "record_patient"],
         [guarantees.MODEL]),
        ({"placement": "update_unclipped"}, ["client", "tile", "patient"], [guarantees.SERVER]),
    ],
)  # fmt: skip
def test_every_row_of_a_placement_and_the_headline_first(settings, names, adversaries):
    m = mechanism(**settings)
    rows = m.guarantees()
    assert [g.name for g in rows] == names
    assert m.headline is rows[0]
    assert list(dict.fromkeys(g.adversary for g in rows)) == adversaries
    assert m.patient_guarantee.unit == "patient"


@pytest.mark.parametrize("placement", ["update", "central"])
def test_the_headline_may_be_the_unit_s(placement):
    client, unit = (mechanism(placement=placement, protects=whom) for whom in ("client", "unit"))
    assert unit.headline == row(client, "record_tile")
    assert sorted(g.name for g in unit.guarantees()) == sorted(g.name for g in client.guarantees())


def test_averages_come_after_what_the_server_sees():
    rows = mechanism(placement="update", averaged_over=4).guarantees()
    assert [g.adversary for g in rows] == [guarantees.SERVER] * 4 + [guarantees.COHORT_AVERAGE] * 4
    assert all(g.name.endswith("_in_average") for g in rows[4:])


@pytest.mark.parametrize(("delta", "colluders"), [(1e-4, 34.0), (1e-5, 31.6)])
def test_colluders_of_the_design_s_six_sites(delta, colluders):
    """Epsilon 8.0 to the sum becomes 34 for who sees shares, or for five sites and the server."""
    six = mechanism(
        placement="distributed",
        local_steps=1,
        num_shares=6,
        num_units=64,
        sampling_prob=0.25,
        capacity=64,
    ).calibrated(200, 8.0, delta)
    assert six.epsilon(200, delta) == pytest.approx(8.0, rel=1e-3)
    shares = row(six, "tile_against_shares")
    assert shares.epsilon(200, delta) == pytest.approx(colluders, rel=0.01)
    assert shares.event.noise_multiplier == six.noise_multiplier / math.sqrt(6)


@pytest.mark.parametrize("unit", ["tile", "slide", "patient"])
def test_unclipped_updates_are_infinite_for_all(unit):
    m = mechanism(placement="update_unclipped", unit=unit, noise_multiplier=1e6)
    assert {g.unit for g in m.guarantees()} == {"client", unit, "patient"}
    for guarantee in m.guarantees():
        assert not guarantee.is_valid
        assert (guarantee.sensitivity, guarantee.event) == (math.inf, None)
        assert guarantee.epsilon(1, 0.5) == math.inf
        assert "not clipped" in guarantee.reason
    assert m.max_rounds(1e9, 0.5) == 0
    with pytest.raises(ValueError, match="Nothing to calibrate"):
        m.calibrated(1, 8.0, DELTA)


@pytest.mark.parametrize(
    ("settings", "name", "reason"),
    [
        ({}, "patient", "max_units_per_patient"),
        ({"max_units_per_patient": 3}, "patient", "raise the capacity to"),
        (SHARES, "patient_against_shares", "max_units_per_patient"),
        ({"placement": "none", "noise_multiplier": 0.0}, "tile", "adds no noise"),
    ],
)
def test_where_no_row_is_valid_it_says_why(settings, name, reason):
    guarantee = row(mechanism(**settings), name)
    assert (guarantee.event, guarantee.sensitivity) == (None, math.inf)
    assert guarantee.epsilon(1, 0.5) == math.inf
    assert reason in guarantee.reason
