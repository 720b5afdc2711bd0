import functools
import math
from fractions import Fraction

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from scipy import special

from fedjax_dp.privacy import accounting, calibration, renyi
from fedjax_dp.privacy.events import MixtureDpEvent
from tests.privacy.dp_events import DELTA, discrete, gaussian, poisson, truncated

ORDERS = (1.1, 1.5, 2.0, 3.0, 7.5, 20.0)
VARIANCES = (Fraction(1, 4), Fraction(1, 2), Fraction(1), Fraction(4))


def bound(order, variance, shares, sensitivity, dimension=1):
    return renyi.summed_discrete_gaussian_rdp(
        order,
        noise_stddev_squared=variance,
        num_shares=shares,
        l2_sensitivity=sensitivity,
        dimension=dimension,
    )


@functools.cache
def pmf(variance, shares):
    """Of the sum of that many shares, within 34 of its deviations: down to 1e-251.

    A convolution of positive numbers keeps its digits far into the tails.
    """
    reach = math.ceil(35 * math.sqrt(variance))
    values = np.arange(-reach, reach + 1)
    one = np.exp(-(values**2) / (2 * float(variance)))
    total = functools.reduce(np.convolve, [one / one.sum()] * shares)
    middle, reach = len(total) // 2, math.floor(34 * math.sqrt(shares * variance))
    return total[middle - reach : middle + reach + 1]


def divergence(order, p, q):
    return special.logsumexp(order * np.log(p) + (1 - order) * np.log(q)) / (order - 1)


def shifted(p, by):
    """P and Q on common support; cut where either ends, which only lowers the divergence."""
    return (p[by:], p[:-by]) if by else (p, p)


def tau(variance, shares):
    return 10 * sum(
        math.exp(-2 * math.pi**2 * float(variance) * k / (k + 1)) for k in range(1, shares)
    )


# --- the sum


@pytest.mark.parametrize("variance", VARIANCES, ids=str)
@pytest.mark.parametrize("shares", [1, 2, 5])
@pytest.mark.parametrize("by", [1, 3])
def test_the_bound_holds_against_the_divergence_itself(variance, shares, by):
    for order in ORDERS:
        true = divergence(order, *shifted(pmf(variance, shares), by))
        found = bound(order, variance, shares, by)
        assert found >= true * (1 - 1e-12)
        if variance >= 1 and order * by < 25 * math.sqrt(variance):  # within what `pmf` covers
            assert found <= 1.01 * true + 1.1 * tau(variance, shares)  # and is near
    assert 0.9 * bound(2, 2 * variance, shares, by) < divergence(
        2, *shifted(pmf(variance, shares), by)
    )  # the test has power: with twice the noise the bound would not hold


@pytest.mark.parametrize("variance", [Fraction(1, 4), Fraction(3, 10), Fraction(1, 2)], ids=str)
@pytest.mark.parametrize("shares", [2, 3, 6])
def test_a_sum_is_pointwise_as_near_to_one_discrete_gaussian_as_the_proof_says(variance, shares):
    p = pmf(variance, shares)
    reach = len(p) // 2
    values = np.arange(-reach, reach + 1)
    one = np.exp(-(values**2) / (2 * float(shares * variance)))
    middle = np.abs(values) <= 6 * math.sqrt(shares * variance)
    distance = np.abs(np.log(p) - np.log(one / one.sum()))[middle].max()
    assert distance <= 0.5 * tau(variance, shares)
    if shares == 2:
        assert distance > 0.15 * tau(variance, shares)  # and the bound is not idle


def test_coordinates_add_up():
    p = pmf(Fraction(1, 2), 3)
    for move in ((1, 1, 1, 1), (2, 0, 0, 0), (1, 2, 0, 1)):
        for order in ORDERS:
            true = sum(divergence(order, *shifted(p, abs(by))) for by in move)
            l2 = math.sqrt(sum(by**2 for by in move))
            assert bound(order, Fraction(1, 2), 3, l2, dimension=4) >= true * (1 - 1e-12)


def test_one_share_and_large_shares_are_the_continuous_gaussian():
    for variance, shares in ((Fraction(1, 100), 1), (Fraction(10**10), 6)):
        z = math.sqrt(shares * variance)
        for order in ORDERS:
            exact = order / (2 * z**2)
            assert bound(order, variance, shares, 1.0, 2_000_000) == pytest.approx(exact, rel=1e-12)


def test_each_of_the_two_bounds_is_the_smaller_somewhere():
    t = tau(Fraction(1, 2), 2)
    assert bound(2, Fraction(1, 2), 2, 9.0) == pytest.approx(81 + t)
    assert bound(2, Fraction(1, 2), 2, 0.01) == pytest.approx((0.01 + t) ** 2)


def test_several_small_shares_have_no_bound():
    assert bound(2, Fraction(24, 100), 2, 1.0) == math.inf
    assert bound(2, Fraction(24, 100), 1, 1.0) < math.inf


# --- sampling


def sampled(orders, q, **kwargs):
    return renyi.poisson_sampled_rdp(orders, lambda order: bound(order, **kwargs), q)


@pytest.mark.parametrize("variance", VARIANCES[1:], ids=str)
@pytest.mark.parametrize("q", [0.01, 0.3, 0.9])
def test_sampling_is_bounded_in_both_directions(variance, q):
    without, taken = shifted(pmf(variance, 2), 1)
    mixed = (1 - q) * without + q * taken
    orders = [order for order in ORDERS if order <= 7.5]
    found = sampled(orders, q, variance=variance, shares=2, sensitivity=1.0)
    for order, value in zip(orders, found, strict=True):
        forward, backward = divergence(order, mixed, without), divergence(order, without, mixed)
        assert value >= max(forward, backward) * (1 - 1e-9) - 1e-15
        if variance >= 1 and order in (2.0, 3.0):
            assert value <= 1.01 * forward + tau(variance, 2)  # and is near


@pytest.mark.parametrize("q", [1e-3, 0.1, 0.7])
@pytest.mark.parametrize("z", [0.5, 1.0, 5.0])
def test_large_noise_is_the_sampled_gaussian_at_integers_and_above_it_between(q, z):
    orders = (1.5, 2.0, 2.5, 3.0, 7.9, 20.0, 64.0, 256.0)
    variance = Fraction(round(z**2 * 10**10), 4)
    found = sampled(orders, q, variance=variance, shares=4, sensitivity=1e5)
    accountant = RdpAccountant(orders[1:])
    accountant.compose(poisson(q, math.sqrt(4 * variance) / 1e5))
    for order, ours, exact in zip(orders[1:], found[1:], accountant.rdp, strict=True):
        assert ours >= exact * (1 - 1e-9) - 1e-14
        if order.is_integer():
            assert ours == pytest.approx(exact, rel=1e-6, abs=1e-12)
        else:
            assert ours < 1.6 * exact
    assert found[0] == pytest.approx(min(found[1], bound(1.5, variance, 4, 1e5)))


@pytest.mark.parametrize("q", [0.01, 0.3])
def test_symmetry_spares_the_factor_of_three_of_the_general_bound(q):
    """Zhu and Wang's Theorem 5, which needs no involution, written out."""

    def base(order):
        return bound(order, Fraction(10**8), 1, 10**4)

    for a in (2, 3, 8, 20):
        general = (1 - q) ** (a - 1) * (a * q - q + 1)
        general += math.comb(a, 2) * q**2 * (1 - q) ** (a - 2) * math.exp(base(2))
        general += 3 * sum(
            math.comb(a, l) * (1 - q) ** (a - l) * q**l * math.exp((l - 1) * base(l))
            for l in range(3, a + 1)
        )
        (ours,) = renyi.poisson_sampled_rdp([a], base, q)
        general = math.log(general) / (a - 1)
        assert general - math.log(3) / (a - 1) <= ours <= general * (1 + 1e-9)


def test_the_ends_of_sampling():
    kwargs = {"variance": Fraction(1), "shares": 3, "sensitivity": 2.0}
    unsampled = [bound(order, **kwargs) for order in renyi.ORDERS]
    np.testing.assert_array_equal(sampled(renyi.ORDERS, 1.0, **kwargs), unsampled)
    np.testing.assert_array_equal(sampled(renyi.ORDERS, 0.0, **kwargs), 0.0)
    probabilities = (1e-4, 0.01, 0.5, 0.99, 1.0)
    grown = [sampled(renyi.ORDERS, q, **kwargs) for q in probabilities]
    assert (np.diff(grown, axis=0) >= -1e-12).all()


def replaced(orders, q, **kwargs):
    sensitivity = kwargs.pop("sensitivity")
    bounds = (
        functools.partial(bound, sensitivity=times * sensitivity, **kwargs) for times in (1, 2)
    )
    return renyi.replaced_rdp(orders, *bounds, q)


@pytest.mark.parametrize("variance", VARIANCES[1:], ids=str)
@pytest.mark.parametrize("q", [0.01, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("instead", [-2, 0, 1])
def test_replacement_under_the_same_coin_is_bounded(variance, q, instead):
    """A unit that adds 2 adds something else of norm 2 at most, where it is drawn."""
    p = pmf(variance, 2)
    without, with_it, other = (
        p[2 - by : len(p) - 2 - by] for by in (0, 2, instead)
    )  # on common support, which only lowers the divergence
    mixed, changed = ((1 - q) * without + q * taken for taken in (with_it, other))
    orders = [order for order in ORDERS if order <= 7.5]
    found = replaced(orders, q, variance=variance, shares=2, sensitivity=2.0)
    for order, value in zip(orders, found, strict=True):
        true = max(divergence(order, mixed, changed), divergence(order, changed, mixed))
        assert value >= true * (1 - 1e-9) - 1e-15
    # The test has power: the zeroing's bound does not cover the worst replacement.
    if instead == -2:
        zeroed = sampled(orders, q, variance=variance, shares=2, sensitivity=2.0)
        assert zeroed[2] < divergence(2.0, mixed, changed)


def test_the_coin_amplifies_replacement_as_it_should():
    """At small q and large noise R and R' are 2 q / z apart, and P is halfway: a 2 (q / z)**2."""
    kwargs = {"variance": Fraction(10**8), "shares": 4, "sensitivity": 2e3}  # z = 10
    for order, value in zip((4.0, 10.0, 20.0), replaced((4, 10, 20), 0.01, **kwargs), strict=True):
        near = 2 * order * (0.01 / 10) ** 2
        assert near < value < 1.1 * near
    unsampled = [4 * order / (2 * 10**2) for order in (4, 10)]
    np.testing.assert_allclose(replaced((4, 10), 1.0, **kwargs), unsampled, rtol=1e-9)
    for q in (1e-3, 0.2, 0.999):  # never above it
        assert (replaced((4, 10), q, **kwargs) <= np.array(unsampled) * (1 + 1e-9)).all()


def test_a_mixture_is_bounded():
    p, q = shifted(pmf(Fraction(1), 1), 1)
    r, s = shifted(pmf(Fraction(1), 1), 2)
    size = len(r)
    for order in (2.0, 5.0):
        divergences = [np.array([divergence(order, *pair)]) for pair in ((p, q), (r, s))]
        found = renyi.mixed_rdp([order], divergences, (0.8, 0.2))
        seen = (0.8 * p[:size] + 0.2 * r, 0.8 * q[:size] + 0.2 * s)  # the coins are hidden
        assert divergence(order, *seen) <= found[0] <= max(divergences)[0]
    only = renyi.mixed_rdp([2.0], [np.array([3.0]), np.array([math.inf])], (1.0, 0.0))
    assert only == pytest.approx(3.0)


# --- epsilon


@pytest.mark.parametrize("q", [0.05, 1.0])
@pytest.mark.parametrize("rounds", [1, 200])
def test_epsilon_is_a_little_above_that_of_continuous_noise(q, rounds):
    ours = accounting.epsilon(discrete(q, 3.0), rounds, DELTA)
    exact = accounting.epsilon(poisson(q, 3.0), rounds, DELTA)
    renyi_of_it = accounting.rdp_epsilon(poisson(q, 3.0), rounds, DELTA)
    assert exact <= ours < 1.01 * renyi_of_it + 0.01
    assert accounting.rdp_epsilon(discrete(q, 3.0), rounds, DELTA) == ours


def test_epsilon_grows_with_all_that_should_make_it_grow():
    def epsilon(rounds=20, q=0.1, z=1.5, delta=DELTA, **kwargs):
        return accounting.epsilon(discrete(q, z, **kwargs), rounds, delta)

    small = {"sensitivity": 1, "shares": 2}
    for less, more in (
        (epsilon(), epsilon(rounds=21)),
        (epsilon(), epsilon(q=0.11)),
        (epsilon(), epsilon(z=1.45)),
        (epsilon(), epsilon(delta=DELTA / 2)),
        (epsilon(), epsilon(**small)),  # few integer units: the sum is no longer a Gaussian
        (epsilon(dimension=1, **small), epsilon(dimension=2, **small)),
        (epsilon(shares=1, sensitivity=1), epsilon(**small)),
    ):
        assert less < more


def test_relations():
    event = discrete(0.1, 2.0)
    assert accounting.epsilon(event, 9, DELTA, "add_or_remove") == (
        accounting.epsilon(event, 9, DELTA)
    )
    replaced = accounting.epsilon(event, 9, DELTA, "replace_one")
    assert replaced >= accounting.epsilon(poisson(0.1, 2.0), 9, DELTA, "replace_one")
    assert replaced < 0.2 * accounting.epsilon(discrete(1.0, 1.0), 9, DELTA)  # without the coin
    unsampled = accounting.epsilon(discrete(1.0, 2.0), 9, DELTA, "replace_one")
    assert unsampled == accounting.epsilon(discrete(1.0, 1.0), 9, DELTA)


def test_composed_with_continuous_noise():
    both = dp_event.ComposedDpEvent((discrete(0.1, 1.5), gaussian(9.0)))
    found = accounting.epsilon(both, 10, DELTA)
    assert found > accounting.epsilon(discrete(0.1, 1.5), 10, DELTA)
    continuous = dp_event.ComposedDpEvent((poisson(0.1, 1.5), gaussian(9.0)))
    assert accounting.epsilon(continuous, 10, DELTA) <= found
    assert found < 1.05 * accounting.rdp_epsilon(continuous, 10, DELTA)


def test_a_mixture_lies_between_its_events():
    low, high = discrete(0.1, 1.5), discrete(1.0, 0.75)
    values = [
        accounting.epsilon(MixtureDpEvent((low, high), (1 - b, b)), 10, DELTA)
        for b in (0.0, 1e-9, 0.1, 0.5, 1.0)
    ]
    assert values == sorted(values)
    assert values[0] == pytest.approx(accounting.epsilon(low, 10, DELTA), rel=1e-9)
    assert values[-1] == pytest.approx(accounting.epsilon(high, 10, DELTA), rel=1e-9)


def test_rounds_and_noise_of_a_budget():
    budget = accounting.epsilon(discrete(0.1, 1.5), 30, DELTA)
    assert calibration.max_rounds(discrete(0.1, 1.5), budget, DELTA) == 30
    z = calibration.calibrate_noise_multiplier(lambda z: discrete(0.1, z), 30, budget, DELTA)
    assert 1.5 * (1 - 1e-9) <= z <= 1.5 * (1 + 2e-4)


def test_noise_is_found_past_where_shares_are_too_small():
    """Below sigma 1/2 epsilon is infinite: the search steps over it, and does not crawl there."""
    tried = []

    def event(z):
        tried.append(z)
        return discrete(1.0, z, sensitivity=3)

    z = calibration.calibrate_noise_multiplier(event, 1, 1000.0, DELTA)
    assert len(tried) < 40  # a secant through infinity takes 194
    assert math.isfinite(accounting.epsilon(event(z), 1, DELTA))
    assert accounting.epsilon(event(z * (1 - 2e-4)), 1, DELTA) > 1000


def test_nothing_costs_nothing_and_no_noise_costs_everything():
    assert accounting.epsilon(discrete(0.0, 1.0), 5, DELTA) == 0
    assert accounting.epsilon(discrete(0.1, 1.0, sensitivity=0), 5, DELTA) == math.inf
    assert accounting.epsilon(discrete(0.1, 0.0), 5, DELTA) == math.inf
    assert accounting.delta_for(discrete(0.1, 0.0), 5, 1.0) == 1
    for no_noise in (0.0, 1e-4):  # none at all, and shares below the theorem's limit
        half = MixtureDpEvent((discrete(0.1, 1.0), discrete(0.1, no_noise)), (0.5, 0.5))
        assert accounting.epsilon(half, 1, DELTA) == math.inf


def test_what_renyi_does_not_know_is_refused():
    both = dp_event.ComposedDpEvent((discrete(0.1, 1.5), truncated(100, 0.1, 14, 1.5)))
    with pytest.raises(ValueError, match="beside discrete noise"):
        accounting.epsilon(both, 1, DELTA)
