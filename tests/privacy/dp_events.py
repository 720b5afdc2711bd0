"""Events that several tests account for."""

from fractions import Fraction

import numpy as np
from dp_accounting import dp_event
from scipy import stats

from fedjax_dp.privacy.events import DistributedDiscreteGaussianDpEvent, MixtureDpEvent

DELTA = 1e-5


def gaussian(z):
    return dp_event.GaussianDpEvent(z)


def poisson(q, z):
    return dp_event.PoissonSampledDpEvent(q, gaussian(z))


def truncated(n, q, capacity, z):
    return dp_event.TruncatedSubsampledGaussianDpEvent(n, q, capacity, z)


def group(k, q, z):
    numbers = np.arange(k + 1)
    probs = stats.binom.pmf(numbers, k, q)
    return dp_event.MixtureOfGaussiansDpEvent(
        z, tuple(map(float, numbers)), tuple(map(float, probs))
    )


def discrete(q, z, *, shares=4, sensitivity=1000, dimension=50):
    """Shares that sum to noise multiplier z, of a sensitivity of so many integer units."""
    share = Fraction(z * sensitivity) ** 2 / shares
    return DistributedDiscreteGaussianDpEvent(q, share, shares, sensitivity, dimension)


EVENTS = [
    gaussian(3.0),
    poisson(0.1, 1.5),
    truncated(100, 0.1, 14, 1.5),
    MixtureDpEvent((poisson(0.1, 1.5), gaussian(1.5)), (0.9, 0.1)),
    dp_event.ComposedDpEvent((gaussian(9.0), poisson(0.1, 1.5))),
    discrete(0.1, 1.5),
    MixtureDpEvent((discrete(0.1, 1.5), discrete(1.0, 0.75)), (0.9, 0.1)),
]
