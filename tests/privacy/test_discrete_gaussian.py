import decimal
import functools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from fedjax_dp.privacy import discrete_gaussian
from fedjax_dp.privacy.discrete_gaussian import sample
from tests.laws import assert_follows, assert_mean, assert_std, assert_uncorrelated

SMALL = (Fraction(9, 100), 1, 25)
LARGE = 90_000_000_000
COUNT = 200_000


def generator(seed=0):
    return np.random.Generator(np.random.Philox(key=seed))


@functools.cache
def draws(variance, count=COUNT, seed=0):
    return sample(generator(seed), variance, count)


@pytest.fixture
def all_exact(monkeypatch):
    """No float comparison is trusted: exact arithmetic decides every coin."""
    monkeypatch.setattr(discrete_gaussian, "_MARGIN", 2.0)


def pmf(variance):
    """Probabilities of -reach .. reach; what is beyond is below 1e-17."""
    reach = math.ceil(9 * math.sqrt(variance)) + 1
    values = np.arange(-reach, reach + 1)
    weights = np.exp(-(values**2) / (2 * float(variance)))
    return values, weights / weights.sum()


def assert_probabilities(found, values, probs, *, level=1e-6):
    """Pearson's chi-square, of values expected at least ten times and of all others together."""
    expected = probs * len(found)
    counts = np.array([np.count_nonzero(found == value) for value in values])
    often = expected >= 10
    observed = np.append(counts[often], len(found) - counts[often].sum())
    expected = np.append(expected[often], len(found) - expected[often].sum())
    if expected[-1] < 10:
        observed = np.append(observed[1:-1], observed[0] + observed[-1])
        expected = np.append(expected[1:-1], expected[0] + expected[-1])
    statistic = np.sum((observed - expected) ** 2 / expected)
    p_value = stats.chi2.sf(statistic, len(expected) - 1)
    assert p_value > level, f"{statistic=}, {p_value=}"


# --- the law


@pytest.mark.parametrize("variance", SMALL, ids=str)
def test_draws_have_the_exact_probabilities_and_the_test_has_power(variance):
    assert_probabilities(draws(variance), *pmf(variance))
    for wrong in (0.95, 1.05):
        with pytest.raises(AssertionError):
            assert_probabilities(draws(variance), *pmf(variance * Fraction(wrong)))
    with pytest.raises(AssertionError):
        assert_probabilities(draws(variance) + (draws(variance) == 1), *pmf(variance))


@pytest.mark.parametrize("variance", [LARGE, 2**48])
def test_with_a_large_stddev_they_look_normal(variance):
    stddev = math.sqrt(variance)
    assert_std(draws(variance), stddev)
    assert_mean(draws(variance), 0.0, stddev)
    assert_follows(draws(variance), stats.norm(scale=stddev))
    with pytest.raises(AssertionError):
        assert_follows(draws(variance), stats.norm(scale=1.05 * stddev))


def test_low_digits_of_a_large_stddev_are_uniform():
    assert_probabilities(draws(LARGE) % 16, np.arange(16), np.full(16, 1 / 16))


def test_draws_are_independent():
    for variance in (1, LARGE):
        assert_uncorrelated(draws(variance)[:-1], draws(variance)[1:])
        assert_uncorrelated(draws(variance), draws(variance, seed=1))


def test_a_sum_of_shares_has_nearly_the_law_of_one_draw():
    shares = sample(generator(2), 1, (4, COUNT))
    assert_probabilities(shares.sum(0), *pmf(4))  # within 3e-4 of it, see `renyi`
    with pytest.raises(AssertionError):
        assert_probabilities(shares[:3].sum(0), *pmf(4))


# --- the same algorithm, one coin after another, in fractions


def naive_coin(rng, x):
    """Algorithm 1: exp(-x) as the alternating series of Bernoulli(x / k)."""
    while x > 1:
        if not naive_coin(rng, Fraction(1)):
            return False
        x -= 1
    k = 1
    while rng.integers(0, k * x.denominator) < x.numerator:
        k += 1
    return k % 2 == 1


def naive_laplace(rng, t):
    while True:
        remainder = int(rng.integers(0, t))
        if not naive_coin(rng, Fraction(remainder, t)):
            continue
        runs = 0
        while naive_coin(rng, Fraction(1)):
            runs += 1
        magnitude, is_negative = remainder + t * runs, rng.integers(0, 2)
        if magnitude or not is_negative:
            return -magnitude if is_negative else magnitude


def naive(rng, variance, count):
    t = math.isqrt(math.floor(variance)) + 1
    found = []
    while len(found) < count:
        value = naive_laplace(rng, t)
        if naive_coin(rng, (abs(value) - Fraction(variance) / t) ** 2 / (2 * Fraction(variance))):
            found.append(value)
    return np.array(found)


@pytest.mark.parametrize("variance", [Fraction(1, 2), 6], ids=str)
def test_the_naive_twin_has_the_same_law(variance):
    slow, fast = naive(generator(), variance, 4000), draws(variance, 4000)
    assert_probabilities(slow, *pmf(variance))
    assert_probabilities(fast, *pmf(variance))
    values = np.arange(-2, 3)
    table = [[np.count_nonzero(some == value) for value in values] for some in (slow, fast)]
    assert stats.chi2_contingency(table).pvalue > 1e-6


# --- the comparison that decides


@pytest.mark.usefixtures("all_exact")
@pytest.mark.parametrize("variance", [Fraction(1, 2), 25], ids=str)
def test_exact_arithmetic_alone_gives_the_same_law(variance):
    assert_probabilities(sample(generator(), variance, 4000), *pmf(variance))


@pytest.mark.usefixtures("all_exact")
def test_exact_arithmetic_alone_with_a_large_stddev():
    found = sample(generator(), LARGE + Fraction(1, 3), 2000)
    assert_follows(found, stats.norm(scale=math.sqrt(LARGE)))


def test_exact_arithmetic_and_floats_decide_alike(monkeypatch):
    """The same first bits, with and without trust in floats: where none is ambiguous, all agree."""
    bits = generator(3).random(3000)
    x = np.linspace(0.0, 38.0, 3000)

    class Replayed:
        def random(self, size):
            return bits[:size] * np.exp(-x[:size]) * 2.0

        def integers(self, *args, **kwargs):
            return generator(4).integers(*args, **kwargs)

    def coins():
        return discrete_gaussian._exp_coins(Replayed(), x, lambda i: Fraction(x[i]))

    fast = coins()
    with monkeypatch.context() as patch:
        patch.setattr(discrete_gaussian, "_MARGIN", 2.0)
        np.testing.assert_array_equal(coins(), fast)
    assert 0.4 < fast.mean() < 0.6
    with monkeypatch.context() as patch:
        patch.setattr(discrete_gaussian, "_exp", lambda x: np.exp(-x) * (1 + 1e-3))
        assert (coins() != fast).any()  # the test has power


def digits_of_exp(x, bits):
    """The first `bits` binary digits of exp(-x), as an integer."""
    context = decimal.Context(prec=200)
    power = context.exp(context.divide(decimal.Decimal(-x.numerator), x.denominator))
    return math.floor(Fraction(power) * 2**bits)


@pytest.mark.parametrize("x", [Fraction(1, 3), Fraction(1), Fraction(10**40 + 1, 10**39)], ids=str)
@pytest.mark.parametrize("words", [1, 3])
def test_a_tie_is_resolved_by_as_many_bits_as_it_takes(x, words):
    """Fed the digits of exp(-x) themselves, only the last one moved."""
    bits = 53 + 64 * words
    digits = digits_of_exp(x, bits)
    for moved, is_below in ((-1, True), (1, False)):
        value = digits + moved
        fed = [(value >> (64 * word)) % 2**64 for word in reversed(range(words))]

        class Fed:
            def integers(self, *_, fed=fed, **__):
                return np.uint64(fed.pop(0))

        lazy = discrete_gaussian._LazyUniform((value >> (64 * words)) / 2**53, Fed())
        assert lazy.is_below_exp(x) is is_below
        assert fed == []


def test_the_exponential_is_as_accurate_as_is_claimed():
    rng = generator()
    x = np.concatenate(
        [np.arange(0, 40, 1 / 32), rng.uniform(0, 40, 3000), rng.uniform(0, 1, 3000)]
    )
    context = decimal.Context(prec=40)
    exact = [Fraction(context.exp(-decimal.Decimal(value))) for value in x]
    found = discrete_gaussian._exp(x)
    error = max(abs(Fraction(f) / e - 1) for f, e in zip(found, exact, strict=True))
    assert error < Fraction(1, 2**50)
    beyond = discrete_gaussian._exp(np.array([40.0, 1e9]))
    assert (beyond == discrete_gaussian._table()[-1]).all()


@pytest.mark.parametrize(
    "variance",
    [Fraction(1, 2**40), Fraction(9, 100), 10**6 + Fraction(1, 7), LARGE, 2**48],
    ids=str,
)
def test_exponents_are_as_accurate_as_is_claimed(monkeypatch, variance):
    worst = []

    def coins(rng, x, exact):
        errors = [abs(Fraction(x[i]) - exact(i)) for i in range(len(x)) if exact(i) < 40]
        worst.append(max(errors))
        return np.ones(len(x), bool)

    monkeypatch.setattr(discrete_gaussian, "_exp_coins", coins)
    discrete_gaussian._candidates(generator(), Fraction(variance), 2000)
    assert len(worst) == 2
    assert max(worst) < Fraction(1, 2**45)


def test_runs_are_geometric(monkeypatch):
    values = np.arange(40)
    probs = np.exp(-values) * (1 - math.exp(-1))
    assert_probabilities(discrete_gaussian._exp_runs(generator(), COUNT), values, probs)
    with pytest.raises(AssertionError):
        assert_probabilities(1 + discrete_gaussian._exp_runs(generator(), COUNT), values, probs)
    fast = discrete_gaussian._exp_runs(generator(), 2000)
    monkeypatch.setattr(discrete_gaussian, "_MARGIN", 2.0)
    np.testing.assert_array_equal(discrete_gaussian._exp_runs(generator(), 2000), fast)


# --- shapes, seeds, limits


@pytest.mark.parametrize("size", [0, 1, 7, (), (2, 3), 3 * discrete_gaussian._CHUNK + 5])
def test_shapes_and_types(size):
    found = sample(generator(), 25, size)
    assert found.dtype == np.int64
    assert found.shape == np.empty(size, np.int8).shape


def test_draws_depend_on_the_generator_alone():
    np.testing.assert_array_equal(draws(25), sample(generator(), 25, COUNT))
    assert (draws(25) != draws(25, seed=1)).mean() > 0.8


def test_a_tiny_stddev_draws_zeros():
    assert not sample(generator(), discrete_gaussian.MIN_STDDEV_SQUARED, 1000).any()


@pytest.mark.parametrize("variance", [0, -1, 2**48 + 1, Fraction(1, 2**41)])
def test_variances_out_of_range_are_refused(variance):
    with pytest.raises(ValueError, match="stddev_squared in"):
        sample(generator(), variance, 1)


def test_a_float_is_refused():
    with pytest.raises(ValueError, match="Fraction"):
        sample(generator(), 1.5, 1)
