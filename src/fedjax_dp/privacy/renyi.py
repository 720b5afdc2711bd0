"""Renyi divergence of summed discrete Gaussian noise, and what Poisson sampling takes off it.

The noise is `discrete_gaussian.sample` of n parties, added to an integer vector: an exact mechanism
whose bounds here are theorems up to float64 rounding. They are upper bounds, not the divergence
itself; with sigma in the thousands they equal those of continuous noise to the last digit.
"""

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
from dp_accounting import dp_event, rdp
from scipy import special

from fedjax_dp.privacy import events
from fedjax_dp.privacy.events import NEIGHBOURS, Parts, Relation

ORDERS = tuple(
    float(order)
    for order in (
        *(1.0 + 0.1 * k for k in range(1, 100)),
        *range(11, 64),
        *(64 * 2 ** (k / 8) for k in range(33)),
    )
)
"""Orders at which events are bounded, in [1.1, 1024]."""

MIN_STDDEV_SQUARED = Fraction(1, 4)
"""Of one share, where there are several: below it the theorem says nothing."""


def summed_discrete_gaussian_rdp(
    order: float,
    *,
    noise_stddev_squared: Fraction,
    num_shares: int,
    l2_sensitivity: float,
    dimension: int,
) -> float:
    """Bound for an integer vector to every coordinate of which n discrete Gaussians are added.

    With D the sensitivity, s = sqrt(n) sigma and tau = 10 sum_{k<n} exp(-2 pi**2 sigma**2 k/(k+1)),

        D_a <= min(a D**2 / (2 s**2) + tau d, a/2 (D / s + tau sqrt(d))**2).

    This is Proposition 14 of Kairouz, Liu and Steinke 2021, "The Distributed Discrete Gaussian
    Mechanism for Federated Learning with Secure Aggregation", arXiv 2102.06387, as the authors'
    published accountant computes it. (As 1/2 epsilon**2 concentrated DP the first bound would need
    2 tau d in epsilon**2, for a near 1.) Nothing rests on the citation: one coordinate moved by D:

    1. The sum's law p is nearly N, that of ONE discrete Gaussian of s**2. For shares of variances v
       and w the probability of x is, up to a constant, exp(-x**2 / 2(v+w)) times a theta function,
       1 + 2 sum_k exp(-2 pi**2 r k**2) cos(2 pi k u), r = vw/(v+w), u linear in x (Poisson's
       summation). For r >= 1/8 its logarithm varies by at most 5 exp(-2 pi**2 r), and so does
       log(p / N), which takes both signs, as both sum to one. Share by share, |log(p / N)| <= tau/2
       if sigma >= 1/2.
    2. So the privacy loss log(p(x) / p(x-D)) is L + U, where L = (D**2 - 2 D x) / (2 s**2) is that
       of N, and |U| <= tau. A discrete Gaussian is subgaussian: E exp(t x) is
       exp(t**2 sigma**2 / 2) times a theta function over its peak. Under p, of mean zero, therefore
       E L = D**2 / (2 s**2) and E exp(t L) <= exp((t + t**2) D**2 / (2 s**2)) for every real t.
    3. First bound: exp((a-1)(L+U)) <= exp((a-1) tau) exp((a-1) L), and t = a-1.
    4. Second bound: by the inequalities of Hoelder and Hoeffding L+U is subgaussian around its mean
       with parameter D/s + tau. As E exp(-(L+U)) = 1, the mean is at most half its square.

    Coordinates are independent: the bounds add, the second by Cauchy and Schwarz.

    Args:
        order: a > 1.
        noise_stddev_squared: sigma**2 of ONE share, in squares of the integers' unit.
        num_shares: n >= 1.
        l2_sensitivity: D, in units of the integers.
        dimension: d.

    Returns:
        The bound; infinite where several shares have sigma < 1/2.
    """
    if num_shares > 1 and noise_stddev_squared < MIN_STDDEV_SQUARED:
        return math.inf
    variance = float(noise_stddev_squared)
    k = np.arange(1, num_shares)
    tau = 10.0 * float(np.sum(np.exp(-2.0 * math.pi**2 * variance * k / (k + 1))))
    ratio = l2_sensitivity / math.sqrt(num_shares * variance)
    return min(
        0.5 * order * ratio**2 + tau * dimension,
        0.5 * order * (ratio + tau * math.sqrt(dimension)) ** 2,
    )


def poisson_sampled_rdp(
    orders: Sequence[float], bound: Callable[[float], float], sampling_probability: float
) -> np.ndarray:
    """Bound on the Renyi divergence, either way, of a unit that takes part with probability q.

    Let P be the law of the output without the unit and Q with it, D_a(Q || P) <= bound(a) for every
    a, and let an involution swap them: additive noise of a symmetric law has one, the reflection
    that swaps the two means. Given the others' coins (which quasi-convexity then averages away),
    the pair is R = (1-q) P + q Q against P, and for an integer a >= 2 the binomial theorem gives

        exp((a-1) D_a(R || P)) = sum_l C(a, l) (1-q)**(a-l) q**l exp((l-1) D_l(Q || P)).

    This is Theorem 6 of Zhu and Wang 2019, "Poisson Subsampled Renyi Differential Privacy"; the
    factor 3 of their Theorem 5, for arbitrary mechanisms, serves the other direction, and is not
    needed here: D_a(P || R) <= D_a(R || P), as Mironov, Talwar and Zhang 2019 prove in "Renyi
    Differential Privacy of the Sampled Gaussian Mechanism". For discrete laws: pair x with its
    mirror image, r = Q(x)/P(x) >= 1, h(t) = t**a - t**(1-a); to show is h(1+u) + r h(1-u/r) >= 0,
    u = q(r-1). h(1/t) = -h(t)/t, h is concave below 1, and 1-u/r >= 1/(1+u): its secant to 1 from
    there has at most the slope of that from 1/(1+u), which is h(1+u)/u.

    For a between integers (a-1) D_a is convex in a, and zero at 1: Hoelder's inequality.

    Args:
        orders: each > 1.
        bound: order -> bound of the unsampled mechanism.
        sampling_probability: q in [0, 1].

    Returns:
        The bounds; never above `bound`, and `bound` itself for q = 1.
    """
    unsampled = np.array([bound(order) for order in orders])
    if sampling_probability == 1 or not np.isfinite(unsampled).all():
        return unsampled
    if sampling_probability == 0:
        return np.zeros(len(orders))
    q = sampling_probability
    moments = [0.0, 0.0, *((l - 1) * bound(l) for l in range(2, math.ceil(max(orders)) + 1))]
    logs = {1: 0.0}  # (a-1) D_a(R || P) at the integers that are asked for
    for a in {end for order in orders for end in (math.floor(order), math.ceil(order))} - {1}:
        l = np.arange(a + 1)
        log_comb = special.gammaln(a + 1) - special.gammaln(l + 1) - special.gammaln(a - l + 1)
        terms = log_comb + (a - l) * math.log1p(-q) + l * math.log(q) + moments[: a + 1]
        logs[a] = max(0.0, float(special.logsumexp(terms)))
    sampled = []
    for order in orders:
        low, part = math.floor(order), order - math.floor(order)
        log = (1 - part) * logs[low] + part * logs[math.ceil(order)]
        sampled.append(log / (order - 1))
    return np.minimum(sampled, unsampled)


def replaced_rdp(
    orders: Sequence[float],
    bound: Callable[[float], float],
    doubled: Callable[[float], float],
    sampling_probability: float,
) -> np.ndarray:
    """Bound where the unit that takes part with probability q contributes something else instead.

    Let P be the law without the unit, Q and Q' with either of its contributions, under the same
    coin: R = (1-q) P + q Q against R' = (1-q) P + q Q'. Two bounds, of which the smaller holds:

    1. Telling the coin only helps, so D_a(R || R') <= D_a(Q || Q') (quasi-convexity), and Q' lies
       up to twice as far from Q as from P. No amplification, but nothing is asked of the rest
       either: where the coins also decide whom a full batch leaves out, they do so in both worlds.
    2. By way of P, at which the unit is zeroed. With the inequality of Cauchy and Schwarz

           E_R' (R/R')**a = E_P (R/P)**a (P/R')**(a-1)
                         <= (E_P (R/P)**(2a))**(1/2) (E_P (P/R')**(2a-2))**(1/2),

       hence D_a(R || R') <= (a - 1/2) / (a - 1) D_2a(R || P) + D_(2a-1)(P || R') (Mironov 2017,
       "Renyi Differential Privacy", Corollary 4), and `poisson_sampled_rdp` bounds both. For small
       q this is near the truth, whose worst case is a P halfway between Q and Q'.

    Args:
        orders: each > 1.
        bound: order -> bound of the unsampled mechanism, one contribution against none.
        doubled: the same at twice the sensitivity.
        sampling_probability: q in [0, 1].

    Returns:
        The bounds; `doubled` itself for q = 1.
    """
    order = np.asarray(orders)
    unsampled = np.array([doubled(a) for a in orders])
    if sampling_probability == 1:
        return unsampled
    there = poisson_sampled_rdp(tuple(2 * order), bound, sampling_probability)
    back = poisson_sampled_rdp(tuple(2 * order - 1), bound, sampling_probability)
    return np.minimum(unsampled, (order - 0.5) / (order - 1) * there + back)


def mixed_rdp(
    orders: Sequence[float], divergences: Sequence[np.ndarray], probs: Sequence[float]
) -> np.ndarray:
    """Bound for one of several mechanisms, chosen by coins that neighbours share.

    exp((a-1) D_a) is jointly convex in the pair, so the mean of the mechanisms' bounds it.
    """
    powers = np.asarray(orders) - 1
    exponents = powers * np.array(divergences)
    return special.logsumexp(exponents, axis=0, b=np.array(probs)[:, None]) / powers


def is_needed(parts: Parts) -> bool:
    """Whether discrete noise is among the parts, so that no privacy loss distribution is known."""

    def is_discrete(event: dp_event.DpEvent) -> bool:
        if isinstance(event, events.MixtureDpEvent):
            return any(map(is_discrete, event.events))
        return isinstance(event, events.DistributedDiscreteGaussianDpEvent)

    return any(is_discrete(event) for event, _ in parts)


def composed(parts: Parts, relation: Relation) -> np.ndarray:
    """Bounds of the Renyi divergences of all parts together at `ORDERS`.

    Raises:
        ValueError: for an event whose divergences are not known.
    """
    return np.sum([times * _base_rdp(event, relation) for event, times in parts], axis=0)


@functools.lru_cache(maxsize=4096)  # of 1.4 KB
def _base_rdp(event: dp_event.DpEvent, relation: Relation) -> np.ndarray:
    """Bounds of the Renyi divergences of one elementary event at `ORDERS`."""
    if isinstance(event, events.DistributedDiscreteGaussianDpEvent):
        bound, doubled = (
            functools.partial(
                summed_discrete_gaussian_rdp,
                noise_stddev_squared=event.noise_stddev_squared,
                num_shares=event.num_shares,
                l2_sensitivity=times * event.l2_sensitivity,
                dimension=event.dimension,
            )
            for times in (1, 2)
        )
        if relation == "replace_one":
            return replaced_rdp(ORDERS, bound, doubled, event.sampling_probability)
        return poisson_sampled_rdp(ORDERS, bound, event.sampling_probability)
    if isinstance(event, events.MixtureDpEvent):
        children = [_base_rdp(events.simplify(child), relation) for child in event.events]
        return mixed_rdp(ORDERS, children, event.probs)
    if isinstance(event, dp_event.NoOpDpEvent):
        return np.zeros(len(ORDERS))
    if isinstance(event, dp_event.NonPrivateDpEvent):
        return np.full(len(ORDERS), math.inf)
    # Divergences grow with the order, and the series for fractional ones may fail to converge.
    orders = np.ceil(ORDERS)
    accountant = rdp.RdpAccountant(orders, neighboring_relation=NEIGHBOURS[relation])
    if not accountant.supports(event):
        raise ValueError(f"No accounting of {event} beside discrete noise under {relation=}.")
    accountant.compose(event)
    return accountant.rdp
