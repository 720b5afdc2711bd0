"""From DP events to epsilon: privacy loss distributions, composed from one cached event.

Everything here is an upper bound: losses are rounded up on a grid, which is chosen from the events
(`pld.suited_grid`) and costs 0.04 % of epsilon, of a single step up to 0.1 %. It costs more only
where a step loses next to nothing as a rule and much in rare cases, so that no grid of bounded size
spans both: cut batches of q below 0.002 at z from 0.6 to 3, some percent at 0.001 and up to twice
epsilon at 0.0001. Pure Gaussian events are exact (Balle and Wang 2018). Summed discrete Gaussian
noise has no known privacy loss distribution: what contains it is composed by Renyi divergences
(`renyi`), which is looser.

References:
    Google's dp-accounting; Doroshenko et al. 2022, connect the dots; Balle and Wang 2018, improving
    the Gaussian mechanism; arXiv 2508.15089, truncated Poisson batches.
"""

import functools
import importlib.metadata
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from dp_accounting import dp_event, gaussian_mechanism
from dp_accounting.rdp import RdpAccountant, compute_epsilon
from dp_accounting.rdp.rdp_privacy_accountant import compute_delta
from scipy import stats

from fedjax_dp.privacy import pld, renyi
from fedjax_dp.privacy.events import NEIGHBOURS, Parts, Relation, elementary, noise_of

GRID = f"1/{pld.CELLS_PER_DEVIATION} of the standard deviation of a step's privacy loss"
"""In words, which grid is taken where none is given."""

_VERSION = importlib.metadata.version("dp-accounting")
ACCOUNTANT = f"PLD, dp-accounting {_VERSION}, composed by fedjax_dp"
RENYI_ACCOUNTANT = f"RDP, dp-accounting {_VERSION}"

_NO_NOISE = 1e-8  # of a Gaussian: epsilon would be above 5e15, and dp-accounting divides by zero

# Below order 2 the fractional series fails to converge at large sampling probabilities.
_RDP_ORDERS = (*np.arange(2, 11, 0.1), *range(11, 64), 128, 256, 512, 1024)


def epsilon(
    event: dp_event.DpEvent,
    count: int,
    delta: float,
    relation: Relation = "zero_out",
    *,
    grid: float | None = None,
) -> float:
    """The epsilon of `event` repeated `count` times, an upper bound.

    Args:
        event: Gaussian, Poisson-sampled or truncated Gaussian, mixture of Gaussians,
            `MixtureDpEvent`, `DistributedDiscreteGaussianDpEvent`, NoOp, NonPrivate, or a
            (self-)composition of these.
        count: repetitions, >= 0; none cost nothing.
        delta: in (0, 1).
        relation: which datasets are neighbours.
        grid: cell of the privacy loss; smaller is tighter and slower. None: one that suits.

    Returns:
        epsilon >= 0, possibly infinite.

    Raises:
        ValueError: an argument is out of range or the event is not supported.

    Answers are remembered: to ask again, of any of thousands of clients that are alike, costs a few
    microseconds.
    """
    _check(count, delta, relation)
    return _remembered(_epsilon, event)(event, count, delta, relation, grid)


@functools.lru_cache(maxsize=2**16)  # floats: clients that are alike, rounds that come back
def _epsilon(
    event: dp_event.DpEvent, count: int, delta: float, relation: Relation, grid: float | None
) -> float:
    parts = elementary(event, count)
    if parts is None:
        return math.inf
    if not parts:
        return 0.0
    if renyi.is_needed(parts):
        return float(compute_epsilon(renyi.ORDERS, renyi.composed(parts, relation), delta)[0])
    multiplier = _pure_gaussian(parts, relation)
    if multiplier is not None:
        if multiplier < _NO_NOISE:
            return math.inf
        return float(gaussian_mechanism.get_epsilon_gaussian(multiplier, delta))
    return float(max(losses.epsilon(delta) for losses in _composed(parts, relation, grid)))


def epsilon_curve(
    event: dp_event.DpEvent,
    count: int,
    deltas: Sequence[float],
    relation: Relation = "zero_out",
    *,
    grid: float | None = None,
) -> tuple[tuple[float, float], ...]:
    """Pairs (delta, epsilon) of `event` repeated `count` times, for every delta of `deltas`."""
    return tuple((delta, epsilon(event, count, delta, relation, grid=grid)) for delta in deltas)


def delta_for(
    event: dp_event.DpEvent,
    count: int,
    target_epsilon: float,
    relation: Relation = "zero_out",
    *,
    grid: float | None = None,
) -> float:
    """The delta of `event` repeated `count` times at `target_epsilon` >= 0, an upper bound."""
    _check(count, 0.5, relation)
    if not target_epsilon >= 0:
        raise ValueError(f"Expected target_epsilon >= 0, got {target_epsilon=}.")
    parts = elementary(event, count)
    if parts is None:
        return 1.0
    if not parts:
        return 0.0
    if renyi.is_needed(parts):
        divergences = renyi.composed(parts, relation)
        return float(compute_delta(renyi.ORDERS, divergences, target_epsilon)[0])
    multiplier = _pure_gaussian(parts, relation)
    if multiplier is not None:
        if multiplier < _NO_NOISE:
            return 1.0
        upper = stats.norm.cdf(0.5 / multiplier - target_epsilon * multiplier)
        log_lower = stats.norm.logcdf(-0.5 / multiplier - target_epsilon * multiplier)
        return max(0.0, float(upper - math.exp(target_epsilon + log_lower)))
    return float(max(losses.delta(target_epsilon) for losses in _composed(parts, relation, grid)))


def rdp_epsilon(
    event: dp_event.DpEvent, count: int, delta: float, relation: Relation = "zero_out"
) -> float | None:
    """Cross-check by Renyi DP, looser than `epsilon`; None where RDP does not know the event.

    Where only RDP knows the event, this is `epsilon` itself.
    """
    _check(count, delta, relation)
    return _remembered(_rdp_epsilon, event)(event, count, delta, relation)


@functools.lru_cache(maxsize=2**14)
def _rdp_epsilon(
    event: dp_event.DpEvent, count: int, delta: float, relation: Relation
) -> float | None:
    parts = elementary(event, count)
    if parts is None:
        return math.inf
    if renyi.is_needed(parts):
        return epsilon(event, count, delta, relation)
    if any((noise_of(part) or 1.0) < _NO_NOISE for part, _ in parts):
        return math.inf
    accountant = RdpAccountant(_RDP_ORDERS, neighboring_relation=NEIGHBOURS[relation])
    for part, times in parts:
        if not accountant.supports(part):
            return None
        accountant.compose(part, times)
    return float(accountant.get_epsilon(delta)) if parts else 0.0


def grid_for(event: dp_event.DpEvent, relation: Relation = "zero_out") -> float:
    """The cell of the privacy loss that is taken for `event` where none is given."""
    parts = elementary(event, 1)
    return pld.suited_grid(parts, relation) if parts else 0.0


def _remembered(
    cached: "functools._lru_cache_wrapper[Any]", event: dp_event.DpEvent
) -> Callable[..., Any]:
    """`cached`, or what it wraps where `event` holds lists and cannot be a key."""
    try:
        hash(event)
    except TypeError:
        return cached.__wrapped__
    return cached


def _composed(parts: Parts, relation: Relation, grid: float | None) -> tuple[pld.Losses, ...]:
    return pld.composed(parts, relation, pld.suited_grid(parts, relation) if grid is None else grid)


def _pure_gaussian(parts: Parts, relation: Relation) -> float | None:
    """The noise multiplier that all of `parts` together equal, if all are Gaussian."""
    if not all(isinstance(event, dp_event.GaussianDpEvent) for event, _ in parts):
        return None
    distance = 2.0 if relation == "replace_one" else 1.0
    ratios = (distance / event.noise_multiplier for event, _ in parts)
    return 1.0 / math.sqrt(
        sum(times * ratio * ratio for ratio, (_, times) in zip(ratios, parts, strict=True))
    )


def _check(count: int, delta: float, relation: str) -> None:
    if count < 0:
        raise ValueError(f"Expected count >= 0, got {count=}.")
    if not 0 < delta < 1:
        raise ValueError(f"Expected 0 < delta < 1, got {delta=}.")
    if relation not in NEIGHBOURS:
        raise ValueError(f"Expected relation in {sorted(NEIGHBOURS)}, got {relation=}.")
