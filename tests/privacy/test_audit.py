import math

import numpy as np
import pytest
from dp_accounting import dp_event
from scipy import stats

from fedjax_dp.privacy import accounting
from fedjax_dp.privacy.audit import (
    Rates,
    any_law,
    confidence_rates,
    drawn_law,
    epsilon_bound,
    gaussian,
    threshold,
)

DELTA, TRIALS, LEVEL = 1e-5, 20_000, 0.05
THEORY, MU = 4.377178, 1.0  # of sigma 10 in 100 steps


def audited(mu, *, trials=TRIALS, bound=gaussian, level=LEVEL, seed=0, at=None):
    """The bound for two normal worlds at distance `mu`, by the threshold for `MU`."""
    rng = np.random.default_rng(seed)
    at = threshold(drawn_law(1 / MU, 1), trials, DELTA, level, bound) if at is None else at
    inside, outside = rng.normal(mu, 1, trials), rng.normal(0, 1, trials)
    return epsilon_bound(inside, outside, at, delta=DELTA, level=level, bound=bound)[0]


# --- the confidence


@pytest.mark.parametrize("rate", [0.002, 0.3, 0.98])
def test_both_rates_hold_together_as_often_as_is_said(rate):
    level, runs, trials = 0.1, 4000, 300
    rng = np.random.default_rng(0)
    wrong = 0
    for hits, misses in rng.binomial(trials, rate, (runs, 2)):
        rates = confidence_rates(hits, trials, misses, trials, level)
        wrong += rates.true_positive > rate or rates.false_positive < rate
    assert wrong / runs < level + 5 * math.sqrt(level * (1 - level) / runs)


def test_the_bounds_are_those_of_the_binomial_tail():
    rates = confidence_rates(17, 200, 3, 250, LEVEL)
    assert stats.binom.sf(16, 200, rates.true_positive) == pytest.approx(LEVEL / 2)
    assert stats.binom.cdf(3, 250, rates.false_positive) == pytest.approx(LEVEL / 2)


def test_counts_at_the_ends():
    assert confidence_rates(0, 9, 9, 9, LEVEL) == Rates(0.0, 1.0)
    assert confidence_rates(9, 9, 0, 9, LEVEL).true_positive == pytest.approx(0.025 ** (1 / 9))
    for bound in (gaussian, any_law):
        assert bound(Rates(0.0, 1.0), DELTA) == 0.0


@pytest.mark.parametrize("counts", [(-1, 5, 0, 5), (6, 5, 0, 5), (0, 0, 0, 5)])
def test_counts_that_do_not_fit_are_refused(counts):
    with pytest.raises(ValueError, match="0 <= hits <= trials"):
        confidence_rates(*counts, LEVEL)
    with pytest.raises(ValueError, match="0 < level < 1, got level=1"):
        confidence_rates(1, 2, 1, 2, 1)


# --- what it proves


@pytest.mark.parametrize("bound", [gaussian, any_law])
def test_a_sound_mechanism_is_hardly_ever_accused(bound):
    level, runs, trials = 0.2, 400, 500
    at = threshold(drawn_law(1 / MU, 1), trials, DELTA, level, bound)
    accused = [
        audited(MU, trials=trials, bound=bound, level=level, seed=seed, at=at) > THEORY
        for seed in range(runs)
    ]
    assert np.mean(accused) < level + 5 * math.sqrt(level / runs)


def test_sound_noise_reaches_the_power_floor_and_does_not_exceed_the_theory():
    found = [audited(MU, seed=seed, level=LEVEL / 12) for seed in range(5)]
    assert min(found) >= 0.8 * THEORY
    assert max(found) <= THEORY


def test_noise_too_small_by_a_quarter_is_seen():
    for seed in range(5):
        assert audited(1.25 * MU, seed=seed, level=LEVEL / 12) > 1.05 * THEORY
    assert audited(2 * MU, trials=1000) > 1.5 * THEORY


def test_few_trials_prove_little():
    assert audited(MU, trials=100, level=LEVEL / 12) < 0.8 * THEORY


@pytest.mark.parametrize("bound", [gaussian, any_law])
def test_worlds_that_are_alike_prove_nothing(bound):
    """jax-privacy 2.0's estimate finds 3.6 here."""
    found = [audited(0.0, bound=bound, seed=seed, level=1e-4) for seed in range(20)]
    assert found == [0.0] * 20


def test_certain_rates_give_the_true_epsilon():
    """Without a doubt about the rates, the bound of any law is what some event has."""
    epsilon, at = 1.7, 2.0
    rates = Rates(float(stats.norm.sf(at - MU)), float(stats.norm.sf(at)))
    assert gaussian(rates, DELTA) == pytest.approx(THEORY, rel=1e-6)
    assert any_law(rates, DELTA) == pytest.approx(
        math.log((rates.true_positive - DELTA) / rates.false_positive)
    )
    coin = math.exp(epsilon) / (1 + math.exp(epsilon))  # randomised response, either direction
    assert any_law(Rates(coin, 1 - coin), 0.0) == pytest.approx(epsilon)
    behind = Rates(1 - 0.01 / math.e**2, 1 - 0.01)
    assert any_law(behind, 0.0) == pytest.approx(2.0)


# --- sampling, and the threshold


def test_the_law_of_a_sampled_canary():
    law = drawn_law(2.0, 4, 0.25)
    np.testing.assert_allclose(law.probs, stats.binom.pmf(range(5), 4, 0.25))
    np.testing.assert_allclose(law.shifts, np.arange(5) / (2.0 * 2.0))
    assert drawn_law(2.0, 4).shifts == (1.0,)


def test_a_sampled_mechanism_is_bounded_for_any_law():
    z, releases, q = 1.4, 4, 0.5
    event = dp_event.PoissonSampledDpEvent(q, dp_event.GaussianDpEvent(z))
    theory = accounting.epsilon(event, releases, DELTA)
    law, rng = drawn_law(z, releases, q), np.random.default_rng(0)
    at = threshold(law, TRIALS, DELTA, LEVEL, any_law)
    inside = rng.normal(rng.choice(law.shifts, TRIALS, p=law.probs), 1)
    outside = rng.normal(0, 1, TRIALS)
    settings = {"delta": DELTA, "level": LEVEL, "bound": any_law}
    assert 1.0 < epsilon_bound(inside, outside, at, **settings)[0] <= theory


@pytest.mark.parametrize("bound", [gaussian, any_law])
def test_another_threshold_is_expected_to_prove_less(bound):
    at = threshold(drawn_law(1 / MU, 1), TRIALS, DELTA, LEVEL, bound)
    best = np.mean([audited(MU, bound=bound, seed=seed) for seed in range(10)])
    for other in (at - 1.5, at + 1.5):
        assert np.mean([audited(MU, bound=bound, seed=s, at=other) for s in range(10)]) < best
