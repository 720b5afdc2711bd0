"""What an audit proves: a lower bound on the privacy loss, from counts at one fixed threshold.

Two worlds are run many times: in one a canary takes part, in the other its contribution is zero.
An attacker who sees what is released says "in" where a statistic of it reaches a threshold. How
often that is right bounds from below what the mechanism gives away; a bound above the stated
epsilon refutes the statement. The threshold follows from the mechanism's numbers, BEFORE any
outcome is seen: a threshold chosen after a look at the outcomes would have to be paid for.

Two bounds, for two claims:

- `any_law`: epsilon >= log((TPR - delta) / FPR) holds for every mechanism, and is weak: with delta
  1e-5 a Gaussian reaches its epsilon only where FPR is about 1e-7, which no 20,000 trials show.
- `gaussian`: a row whose releases are never sampled claims the trade-off curve of two normal laws
  at a distance mu. One point of the curve then bounds mu, mu >= Phi^-1(TPR) - Phi^-1(FPR), and mu
  gives epsilon(delta). It refutes the row; it says nothing of laws that are not normal.

Audits of one run with many canaries (Steinke et al. 2023) are not used: with 1,000 canaries their
bound saturates near 8.5 even without any noise, and at epsilon 8 they miss noise that is too small
by a factor of three. Nor does any audit of this kind see noise that is used twice.

References:
    Jagielski, Ullman, Oprea 2020, "Auditing Differentially Private Machine Learning", section 4,
    for the bound by Clopper and Pearson; Nasr et al. 2021, "Adversary Instantiation", for the
    threat models; Nasr et al. 2023, "Tight Auditing of Differentially Private Machine Learning",
    for the Dirac canary and the bound on mu; Clopper and Pearson 1934.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from dp_accounting import gaussian_mechanism
from scipy import stats


class Rates(NamedTuple):
    """What the attacker reaches, each on its safe side; `confidence_rates` makes them.

    Attributes:
        true_positive: at most the probability of "in" where the canary is in.
        false_positive: at least the probability of "in" where it is out.
    """

    true_positive: float
    false_positive: float


class Law(NamedTuple):
    """What the statistic is expected to follow: normal, of deviation one, of mean 0 when out.

    Attributes:
        shifts: means when the canary is in.
        probs: the probability of each mean, by sampling.
    """

    shifts: tuple[float, ...]
    probs: tuple[float, ...]


Bound = Callable[[Rates, float], float]
"""`bound(rates, delta) -> epsilon >= 0`."""


def drawn_law(noise_multiplier: float, releases: int, sampling_prob: float = 1.0) -> Law:
    """The sum of `releases` coordinates that hold the canary each with probability q, in stddevs.

    Args:
        noise_multiplier: standard deviation of a release over the canary's weight in it.
        releases: how many are summed.
        sampling_prob: q in (0, 1].
    """
    drawn = np.arange(releases + 1)
    probs = stats.binom.pmf(drawn, releases, sampling_prob)
    shifts = drawn / (noise_multiplier * math.sqrt(releases))
    return Law(tuple(shifts[probs > 0].tolist()), tuple(probs[probs > 0].tolist()))


def confidence_rates(
    true_positives: int, in_trials: int, false_positives: int, out_trials: int, level: float
) -> Rates:
    """Clopper and Pearson's bounds on both rates, which hold together.

    Guarantee: both are right with probability at least 1 - `level`, whatever the rates are; each
    has half of it. Divide `level` by the number of audits that are reported together (Bonferroni).

    Raises:
        ValueError: counts that do not fit their trials, or a level outside (0, 1).
    """
    for hits, trials in ((true_positives, in_trials), (false_positives, out_trials)):
        if not 0 <= hits <= trials or trials < 1:
            raise ValueError(f"Expected 0 <= hits <= trials and trials >= 1, got {hits}, {trials}.")
    if not 0 < level < 1:
        raise ValueError(f"Expected 0 < level < 1, got {level=}. 0.05 is 95 % confidence.")
    low, high = 0.0, 1.0
    if true_positives:
        low = stats.beta.ppf(level / 2, true_positives, in_trials - true_positives + 1)
    if false_positives < out_trials:
        high = stats.beta.isf(level / 2, false_positives + 1, out_trials - false_positives)
    return Rates(float(low), float(high))


def any_law(rates: Rates, delta: float) -> float:
    """The epsilon that any (epsilon, delta) mechanism with these rates has at least.

    The event "in" bounds it in one direction, the event "out" in the other.
    """
    ahead = ((rates.true_positive - delta) / rates.false_positive) if rates.false_positive else 0.0
    missed = 1.0 - rates.true_positive
    behind = ((1.0 - rates.false_positive - delta) / missed) if missed else 0.0
    return max(0.0, math.log(max(ahead, behind, 1.0)))


def gaussian(rates: Rates, delta: float) -> float:
    """The epsilon at `delta` of the least mu whose Gaussian trade-off curve allows these rates."""
    mu = stats.norm.ppf(rates.true_positive) - stats.norm.ppf(rates.false_positive)
    if not mu > 0:
        return 0.0
    return float(gaussian_mechanism.get_epsilon_gaussian(1.0 / mu, delta))


def threshold(law: Law, trials: int, delta: float, level: float, bound: Bound) -> float:
    """Where the attacker should say "in", from what is known before anything is run.

    The point of a grid at which the bound is largest if the counts are the expected ones.

    Args:
        law: what the statistic should follow.
        trials: of each world.
        delta: of the bound.
        level: as for `confidence_rates`.
        bound: `gaussian` or `any_law`.
    """
    candidates = np.linspace(0.0, max(law.shifts) + 4.0, 200)
    hits = stats.norm.sf(candidates[:, None] - np.array(law.shifts)) @ np.array(law.probs)
    misses = stats.norm.sf(candidates)

    def expected(hit: float, miss: float) -> float:
        counts = round(trials * hit), trials, round(trials * miss), trials
        return bound(confidence_rates(*counts, level), delta)

    values = [expected(*pair) for pair in zip(hits, misses, strict=True)]
    return float(candidates[int(np.argmax(values))])


def epsilon_bound(
    inside: np.ndarray, outside: np.ndarray, at: float, *, delta: float, level: float, bound: Bound
) -> tuple[float, Rates]:
    """The lower bound on epsilon that two samples of the statistic prove at a fixed threshold.

    Guarantee: above the true epsilon (for `gaussian`: of the claimed kind of law) with probability
    at most `level`, provided that `at` was fixed before the samples were seen.

    Args:
        inside: statistics with the canary.
        outside: statistics without it.
        at: the threshold; "in" is said at or above it.
        delta: of the bound.
        level: as for `confidence_rates`.
        bound: `gaussian` or `any_law`.
    """
    hits, misses = int(np.sum(inside >= at)), int(np.sum(outside >= at))
    rates = confidence_rates(hits, len(inside), misses, len(outside), level)
    return bound(rates, delta), rates
