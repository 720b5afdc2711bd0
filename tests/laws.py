"""Laws of large numbers as assertions, each with a tolerance that is derived, not guessed.

With z = 5 an assertion about sound randomness fails once in 1.7 million seeds; seeds are fixed.
"""

import math

import numpy as np
from scipy import stats


def assert_std(values, stddev, *, z=5.0):
    """Normal `values` of mean zero have standard deviation `stddev`, neither less nor more.

    The relative standard error of n normal values' root mean square is 1 / sqrt(2 (n - 1)).
    """
    values = np.asarray(values, np.float64).ravel()
    found = math.sqrt(np.mean(values**2))
    tolerance = z / math.sqrt(2 * (values.size - 1))
    assert abs(found / stddev - 1) < tolerance, f"std {found}, not {stddev} +- {tolerance:.2%}"


def assert_mean(values, mean, stddev, *, z=5.0):
    """The mean of n values is within z stddev / sqrt(n)."""
    values = np.asarray(values, np.float64).ravel()
    tolerance = z * stddev / math.sqrt(values.size)
    assert abs(values.mean() - mean) < tolerance, f"mean {values.mean()}, not {mean}"


def assert_uncorrelated(left, right, *, z=5.0):
    """The correlation of n independent pairs has standard deviation 1 / sqrt(n).

    Also of their squares: two variables that share a radius have correlation 0 all the same.
    """
    left, right = (np.asarray(x, np.float64).ravel() for x in (left, right))
    for name, a, b in (("values", left, right), ("squares", left**2, right**2)):
        correlation = np.corrcoef(a, b)[0, 1]
        assert abs(correlation) < z / math.sqrt(left.size), f"{name} correlate: {correlation:.4f}"


def assert_follows(values, distribution, *, level=1e-6):
    """Kolmogorov and Smirnov: `values` follow the continuous `distribution` of `scipy.stats`."""
    values = np.asarray(values, np.float64).ravel()
    statistic, p_value = stats.kstest(values, distribution.cdf)
    assert p_value > level, f"{statistic=}, {p_value=}"
