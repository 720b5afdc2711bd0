"""Exact draws of the discrete Gaussian, for noise that is added to integers.

Floating-point noise leaks through the values it cannot take; this one is an integer, and its law
is exactly the one that `renyi` accounts for, as far as the generator's bits are random.

References:
    Canonne, Kamath and Steinke 2020, "The Discrete Gaussian for Differential Privacy", arXiv
    2004.00010: Algorithm 1 (Bernoulli of exp(-x)), 2 (discrete Laplace), 3 (discrete Gaussian).
"""

import decimal
import functools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

MIN_STDDEV_SQUARED, MAX_STDDEV_SQUARED = Fraction(1, 2**40), Fraction(2**48)

_CHUNK = 1 << 16  # candidates at once: what fits a cache is also bounded memory
_MARGIN = 2.0**-43  # of a float comparison; within it the exact one decides
_CUT = 40  # exp(-40) < 2**-57: a larger exponent may stand as 40
_STEPS = 32  # table entries per unit of the exponent
_TAYLOR = [(-1) ** k / math.factorial(k) for k in range(8, -1, -1)]


def integer_l2_sensitivity(levels: int, dimension: int) -> int:
    """Norm that a quantised unit cannot exceed: levels + sqrt(dimension) / 2, rounded up.

    A gradient of norm at most one times `levels`, every coordinate moved by at most 1/2.
    """
    root = math.isqrt(dimension)
    half = (root + 1) // 2 if root**2 == dimension else root // 2 + 1
    return levels + half


def sample(
    rng: np.random.Generator, stddev_squared: int | Fraction, size: int | tuple[int, ...]
) -> np.ndarray:
    """Independent draws y with probability proportional to exp(-y**2 / (2 stddev_squared)).

    Guarantee: exact. Algorithm 3 draws Y from a discrete Laplace law and accepts it with a
    probability exp(-x), x rational, and Algorithm 2 makes Y itself of integers below a bound and of
    such coins. NumPy draws the integers without bias. A coin is the comparison of exp(-x) with a
    uniform u of infinitely many bits, of which the first 53 are drawn. exp(-x) is evaluated in
    float64 by a table and a polynomial, so by sums and products alone, whose rounding is known:

    - x = U/t < 1 is off by 2**-53. x = (|Y| - sigma**2/t)**2 / (2 sigma**2), sigma**2/t < sigma
      rounded once, is off by less than 210 * 2**-53 < 2**-45 where it is below 40; beyond, both
      the true and the computed exp(-x) lie below 2**-57;
    - exp(-x) of the computed x is off by a relative 2**-50: half an ulp of the table, half an ulp
      of the product, less than two of the polynomial, whose remainder is below 2**-63;
    - u is off by less than 2**-53.

    Together that is below 2**-44. Where u and exp(-x) differ by more than `_MARGIN` = 2**-43 the
    comparison is therefore that of the exact numbers; elsewhere, with probability 2**-42, further
    bits of u are drawn and compared with exp(-x) to as many digits, until they differ.

    Not constant in time: the duration of a draw must not be released.

    Args:
        rng: the noise's own generator; nobody else's draws may come from it.
        stddev_squared: sigma**2, in [2**-40, 2**48]. The variance is a little less: by a
            thousandth at sigma 0.75, by nothing that float64 shows from sigma 1.5 on.
        size: number or shape of the draws.

    Returns:
        int64 of that shape.

    Raises:
        ValueError: for a sigma**2 that is not rational or out of range.
    """
    variance = _checked(stddev_squared)
    count = math.prod(size) if isinstance(size, tuple) else size
    draws = np.empty(count, np.int64)
    filled = 0
    while filled < count:
        # 2.1 candidates a draw are needed on average.
        some = _candidates(rng, variance, min(_CHUNK, 3 * (count - filled) + 16))[: count - filled]
        draws[filled : filled + len(some)] = some
        filled += len(some)
    return draws.reshape(size)


def _candidates(rng: np.random.Generator, variance: Fraction, count: int) -> np.ndarray:
    """What Algorithm 3 accepts of the `count` first integers of Algorithm 2."""
    t = math.isqrt(math.floor(variance)) + 1
    magnitude, is_negative = _laplace(rng, t, count)
    centre, inverse = variance / t, 1 / (2 * variance)
    away = magnitude - float(centre)
    accepted = _exp_coins(
        rng,
        away * away * float(inverse),
        lambda i: (int(magnitude[i]) - centre) ** 2 * inverse,
    )
    return np.where(is_negative, -magnitude, magnitude)[accepted]


def _laplace(rng: np.random.Generator, t: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 2 for scale t: magnitude and sign of discrete Laplace draws, at most `count`."""
    bits = rng.integers(0, 2 * t, count)  # the remainder U below t, and the sign
    remainder, is_negative = bits >> 1, (bits & 1).astype(bool)
    accepted = _exp_coins(rng, remainder / t, lambda i: Fraction(int(remainder[i]), t))
    remainder, is_negative = remainder[accepted], is_negative[accepted]
    magnitude = remainder + t * _exp_runs(rng, len(remainder))
    is_kept = ~(is_negative & (magnitude == 0))  # zero has one sign
    return magnitude[is_kept], is_negative[is_kept]


def _exp_coins(
    rng: np.random.Generator, x: np.ndarray, exact: Callable[[int], Fraction]
) -> np.ndarray:
    """Coins of probability exp(-x): `x` within 2**-45, and `exact(i)` the rational x of coin i."""
    uniform = rng.random(x.size)
    ahead = _exp(x) - uniform
    is_below = ahead >= _MARGIN
    for i in np.flatnonzero(np.abs(ahead) < _MARGIN):
        is_below[i] = _LazyUniform(uniform[i], rng).is_below_exp(exact(int(i)))
    return is_below


def _exp_runs(rng: np.random.Generator, count: int) -> np.ndarray:
    """Lengths of runs of successes of probability exp(-1): P(length >= k) = exp(-k), inverted."""
    uniform = rng.random(count)
    powers = _table()[_STEPS::_STEPS][::-1]  # exp(-40) .. exp(-1)
    runs = _CUT - np.searchsorted(powers, uniform + _MARGIN)
    most = _CUT - np.searchsorted(powers, uniform - _MARGIN)
    for i in np.flatnonzero(runs != most):
        lazy, runs[i] = _LazyUniform(uniform[i], rng), 0
        while lazy.is_below_exp(Fraction(int(runs[i]) + 1)):
            runs[i] += 1
    return runs


def _exp(x: np.ndarray) -> np.ndarray:
    """exp(-x) of x >= 0, within 2**-50 of itself up to x = 40, and exp(-40) beyond."""
    x = np.minimum(x, _CUT)
    index = (x * _STEPS).astype(np.int64)
    rest = x - index / _STEPS  # exact: Sterbenz
    value = np.full_like(rest, _TAYLOR[0])
    for coefficient in _TAYLOR[1:]:
        value *= rest
        value += coefficient
    value *= _table()[index]
    return value


@functools.cache
def _table() -> np.ndarray:
    """exp(-k / 32) for k = 0 .. 1280, each rounded once."""
    context = decimal.Context(prec=40)
    exact = (context.exp(decimal.Decimal(-k) / _STEPS) for k in range(_CUT * _STEPS + 1))
    return np.array([float(value) for value in exact])


class _LazyUniform:
    """A uniform number in [0, 1) of which ever more bits are drawn while they are asked for."""

    def __init__(self, first: float, rng: np.random.Generator):
        self._bits, self._value, self._rng = 53, int(first * 2**53), rng

    def is_below_exp(self, x: Fraction) -> bool:
        """Whether it is below exp(-x), x >= 0; ends with probability one."""
        while True:
            # A quotient and an exponential, each rounded once: off by 2 units of the last digit,
            # for x exp(-x) < 1.
            digits = self._bits // 3 + 5
            context = decimal.Context(prec=digits, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX)
            exponent = context.divide(decimal.Decimal(-x.numerator), decimal.Decimal(x.denominator))
            power, error = Fraction(context.exp(exponent)), Fraction(20, 10**digits)
            low = Fraction(self._value, 2**self._bits)
            if low + Fraction(1, 2**self._bits) <= power - error:
                return True
            if low >= power + error:
                return False
            more = int(self._rng.integers(0, 2**64, dtype=np.uint64))
            self._bits, self._value = self._bits + 64, (self._value << 64) | more


def _checked(stddev_squared: int | Fraction) -> Fraction:
    if not isinstance(stddev_squared, (int, Fraction)):
        raise ValueError(
            f"Expected an int or a Fraction, got {stddev_squared=}. A float has an exact value, "
            "Fraction(value), but is rarely the number that was meant."
        )
    if not MIN_STDDEV_SQUARED <= stddev_squared <= MAX_STDDEV_SQUARED:
        raise ValueError(
            f"Expected stddev_squared in [2**-40, 2**48], got {float(stddev_squared):g}. Change "
            "the number of levels that gradients are quantised to."
        )
    return Fraction(stddev_squared)
