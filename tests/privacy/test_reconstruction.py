"""The bound on naming a record among candidates."""

import numpy as np
import pytest
from dp_accounting import dp_event
from scipy import stats

from fedjax_dp.privacy.reconstruction import identification_bound


@pytest.mark.parametrize("noise", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("candidates", [2, 16, 1000])
def test_gaussian_messages_have_a_closed_form(noise, candidates):
    # By Neyman and Pearson: the largest power at level 1/N.
    expected = stats.norm.cdf(stats.norm.ppf(1 / candidates) + 1 / noise)
    bound = identification_bound(dp_event.GaussianDpEvent(noise), 1, candidates)
    assert bound == pytest.approx(expected, rel=1e-3)
    assert bound >= expected * (1 - 1e-9)


def test_several_messages_add_up():
    four = identification_bound(dp_event.GaussianDpEvent(2.0), 4, 32)
    assert four == pytest.approx(
        identification_bound(dp_event.GaussianDpEvent(1.0), 1, 32), rel=1e-3
    )


def test_limits():
    assert identification_bound(dp_event.GaussianDpEvent(1e6), 1, 50) == pytest.approx(
        0.02, rel=1e-3
    )
    assert identification_bound(dp_event.GaussianDpEvent(1e-3), 1, 50) == pytest.approx(1.0)
    assert identification_bound(dp_event.NonPrivateDpEvent(), 1, 50) == 1.0
    assert identification_bound(dp_event.GaussianDpEvent(1.0), 1, 1) == 1.0
    with pytest.raises(ValueError, match="num_candidates"):
        identification_bound(dp_event.GaussianDpEvent(1.0), 1, 0)


def test_the_best_attacker_stays_below_and_comes_near():
    """Candidates of orthogonal messages of norm one are what is hardest to hide."""
    rng = np.random.default_rng(0)
    count, trials = 16, 20_000
    for noise in (0.5, 1.0):
        seen = noise * rng.normal(size=(trials, count))
        seen[:, 0] += 1
        rate = (seen.argmax(1) == 0).mean()
        bound = identification_bound(dp_event.GaussianDpEvent(noise), 1, count)
        assert rate < bound + 4 * np.sqrt(bound / trials)
        assert rate > 0.6 * bound
