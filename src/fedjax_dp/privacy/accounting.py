"""From DP events to epsilon: privacy loss distributions, composed from one cached event.

Everything here is an upper bound: losses are rounded up on a grid (`DEFAULT_GRID` 1e-3, which costs
0.04 % of epsilon against 1e-4 at a sixteenth of the time), and events whose losses would not fit
`_MAX_CELLS` cells get a coarser grid, which is looser and never wrong. Pure Gaussian events are
exact (Balle and Wang 2018).

References:
    Google's dp-accounting; Doroshenko et al. 2022, connect the dots; Balle and Wang 2018, improving
    the Gaussian mechanism; arXiv 2508.15089, truncated Poisson batches.
"""

import functools
import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import attr
import dp_accounting
import numpy as np
from dp_accounting import dp_event, gaussian_mechanism
from dp_accounting.pld import privacy_loss_distribution as pld_lib
from dp_accounting.rdp import RdpAccountant
from scipy import stats

Relation = Literal["zero_out", "replace_one", "add_or_remove"]

DEFAULT_GRID = 1e-3
ACCOUNTANT = f"PLD, dp-accounting {importlib.metadata.version('dp-accounting')}"

_COARSE_GRID = 1e-2
_MAX_CELLS = 400_000
_MAX_MIXTURE_CELLS = 40_000  # a cell of a mixture of Gaussians costs 25 us, a bisection each
_NEGLIGIBLE = 1e-290  # below it scipy's tail ratios underflow; a composition itself adds 1e-15
# Below order 2 the fractional series fails to converge at large sampling probabilities.
_RDP_ORDERS = (*np.arange(2, 11, 0.1), *range(11, 64), 128, 256, 512, 1024)
_RELATIONS = {
    "zero_out": dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
    "replace_one": dp_accounting.NeighboringRelation.REPLACE_ONE,
    "add_or_remove": dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
}


@attr.s(frozen=True, slots=True, auto_attribs=True)
class MixtureDpEvent(dp_event.DpEvent):
    """One of several events, chosen by coins that do not depend on the protected unit.

    Neighbours share the coins, and revealing the coins only helps the adversary, so the
    hockey-stick divergence is at most the mean of the events' (joint convexity).

    Attributes:
        events: the events.
        probs: the probability of each; they sum to one.
    """

    events: tuple[dp_event.DpEvent, ...]
    probs: tuple[float, ...]


def epsilon(
    event: dp_event.DpEvent,
    count: int,
    delta: float,
    relation: Relation = "zero_out",
    *,
    grid: float = DEFAULT_GRID,
) -> float:
    """The epsilon of `event` repeated `count` times, an upper bound.

    Args:
        event: Gaussian, Poisson-sampled or truncated Gaussian, mixture of Gaussians,
            `MixtureDpEvent`, NoOp, NonPrivate, or a (self-)composition of these.
        count: repetitions, >= 0; none cost nothing.
        delta: in (0, 1).
        relation: which datasets are neighbours.
        grid: cell of the privacy loss; smaller is tighter and slower.

    Returns:
        epsilon >= 0, possibly infinite.

    Raises:
        ValueError: an argument is out of range or the event is not supported.
    """
    _check(count, delta, relation)
    parts = _parts(event, count)
    if parts is None:
        return math.inf
    if not parts:
        return 0.0
    multiplier = _pure_gaussian(parts, relation)
    if multiplier is not None:
        return float(gaussian_mechanism.get_epsilon_gaussian(multiplier, delta))
    return float(_composed_pld(parts, relation, grid).get_epsilon_for_delta(delta))


def epsilon_curve(
    event: dp_event.DpEvent,
    count: int,
    deltas: Sequence[float],
    relation: Relation = "zero_out",
    *,
    grid: float = DEFAULT_GRID,
) -> tuple[tuple[float, float], ...]:
    """Pairs (delta, epsilon) of `event` repeated `count` times, for every delta of `deltas`."""
    return tuple((delta, epsilon(event, count, delta, relation, grid=grid)) for delta in deltas)


def delta_for(
    event: dp_event.DpEvent,
    count: int,
    target_epsilon: float,
    relation: Relation = "zero_out",
    *,
    grid: float = DEFAULT_GRID,
) -> float:
    """The delta of `event` repeated `count` times at `target_epsilon` >= 0, an upper bound."""
    _check(count, 0.5, relation)
    if not target_epsilon >= 0:
        raise ValueError(f"Expected target_epsilon >= 0, got {target_epsilon=}.")
    parts = _parts(event, count)
    if parts is None:
        return 1.0
    if not parts:
        return 0.0
    multiplier = _pure_gaussian(parts, relation)
    if multiplier is not None:
        upper = stats.norm.cdf(0.5 / multiplier - target_epsilon * multiplier)
        log_lower = stats.norm.logcdf(-0.5 / multiplier - target_epsilon * multiplier)
        return max(0.0, float(upper - math.exp(target_epsilon + log_lower)))
    return float(_composed_pld(parts, relation, grid).get_delta_for_epsilon(target_epsilon))


def rdp_epsilon(
    event: dp_event.DpEvent, count: int, delta: float, relation: Relation = "zero_out"
) -> float | None:
    """Cross-check by Renyi DP, looser than `epsilon`; None where RDP does not know the event."""
    _check(count, delta, relation)
    parts = _parts(event, count)
    if parts is None:
        return math.inf
    accountant = RdpAccountant(_RDP_ORDERS, neighboring_relation=_RELATIONS[relation])
    for part, times in parts:
        if not accountant.supports(part):
            return None
        accountant.compose(part, times)
    return float(accountant.get_epsilon(delta)) if parts else 0.0


def without_truncation(event: dp_event.DpEvent) -> dp_event.DpEvent:
    """`event` with unlimited capacity: for the Renyi cross-check, which knows no truncation."""
    if isinstance(event, dp_event.SelfComposedDpEvent):
        return dp_event.SelfComposedDpEvent(without_truncation(event.event), event.count)
    if isinstance(event, dp_event.TruncatedSubsampledGaussianDpEvent):
        gaussian = dp_event.GaussianDpEvent(event.noise_multiplier)
        return dp_event.PoissonSampledDpEvent(event.sampling_probability, gaussian)
    return event


def max_rounds(
    event: dp_event.DpEvent,
    target_epsilon: float,
    delta: float,
    relation: Relation = "zero_out",
    *,
    limit: int = 1_000_000,
    grid: float = DEFAULT_GRID,
) -> int:
    """The most repetitions of `event` within the budget: this many stay, one more exceeds.

    Args:
        event: what one round is charged.
        target_epsilon: the budget, >= 0.
        delta: in (0, 1).
        relation: which datasets are neighbours.
        limit: the answer is at most this.
        grid: cell of the privacy loss.

    Returns:
        A number of rounds in [0, limit].
    """
    if not target_epsilon >= 0:
        raise ValueError(f"Expected target_epsilon >= 0, got {target_epsilon=}.")

    def fits(rounds: int) -> bool:
        return epsilon(event, rounds, delta, relation, grid=grid) <= target_epsilon

    low, high = 0, 1
    while high < limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def calibrate_noise_multiplier(
    make_event: Callable[[float], dp_event.DpEvent],
    count: int,
    target_epsilon: float,
    target_delta: float,
    relation: Relation = "zero_out",
    *,
    rtol: float = 1e-4,
    grid: float = DEFAULT_GRID,
    cache_dir: str | os.PathLike[str] | None = None,
) -> float:
    """The smallest noise multiplier, up to `rtol` upwards, whose epsilon stays within the target.

    Guarantees:
        `epsilon(make_event(z), count, target_delta) <= target_epsilon` was evaluated for the
        returned z, also for one read from the cache.

    Args:
        make_event: noise multiplier -> event, whose epsilon falls with the multiplier.
        count: repetitions, >= 1.
        target_epsilon: > 0 and finite.
        target_delta: in (0, 1).
        relation: which datasets are neighbours.
        rtol: how far above the smallest possible multiplier the answer may lie.
        grid: cell of the privacy loss.
        cache_dir: where answers are kept between runs; nowhere if None.

    Returns:
        The multiplier, in [0.01, 1e6].

    Raises:
        ValueError: an argument is out of range, or no multiplier up to 1e6 meets the target.
    """
    if not 0 < target_epsilon < math.inf:
        raise ValueError(f"Expected a finite target_epsilon > 0, got {target_epsilon=}.")
    if count < 1:
        raise ValueError(f"Expected count >= 1, got {count=}.")

    def fits_by(cell: float) -> Callable[[float], float]:
        # log of epsilon over target: <= 0 meets the target, and it is smooth for the secant.
        @functools.cache
        def excess(z: float) -> float:
            value = epsilon(make_event(z), count, target_delta, relation, grid=cell)
            return math.log(max(value, 1e-12)) - math.log(target_epsilon)

        return excess

    fine = fits_by(grid)
    path = None
    if cache_dir is not None:
        arguments = [
            ACCOUNTANT, count, target_epsilon, target_delta, relation, rtol, grid,
            event_to_json(make_event(1.0)), event_to_json(make_event(2.0)),
        ]  # fmt: skip
        name = hashlib.sha256(json.dumps(arguments).encode()).hexdigest()[:32]
        path = Path(cache_dir) / f"noise-{name}.json"
        if path.exists():
            z = float(json.loads(path.read_text()))
            if fine(z) <= 0:
                return z
    coarse = fits_by(max(grid, _COARSE_GRID))
    low, high = _bracket(coarse, start=1.0, factor=2.0)
    if high > 0.01:
        _, near = _close_in(coarse, low, high, rtol=1e-2)
        low, high = _bracket(fine, start=near, factor=1.02)
        if high > 0.01:
            _, high = _close_in(fine, low, high, rtol=rtol)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(high))
        os.replace(partial, path)
    return high


def event_to_json(event: dp_event.DpEvent) -> dict[str, Any]:
    """A JSON-serialisable description of `event`; `event_from_json` rebuilds it."""

    def encode(value: Any) -> Any:
        if isinstance(value, dp_event.DpEvent):
            return event_to_json(value)
        if isinstance(value, (tuple, list)):
            return [encode(item) for item in value]
        return value

    fields = {f.name: encode(getattr(event, f.name)) for f in attr.fields(type(event))}
    return {"kind": type(event).__name__, **fields}


def event_from_json(value: dict[str, Any]) -> dp_event.DpEvent:
    """Rebuilds what `event_to_json` described."""

    def decode(item: Any) -> Any:
        if isinstance(item, dict):
            return event_from_json(item)
        return tuple(decode(i) for i in item) if isinstance(item, list) else item

    name = value["kind"]
    kind = MixtureDpEvent if name == "MixtureDpEvent" else getattr(dp_event, name, None)
    if not (isinstance(kind, type) and issubclass(kind, dp_event.DpEvent)):
        raise ValueError(f"Unknown DP event {name!r}.")
    return kind(**{key: decode(item) for key, item in value.items() if key != "kind"})


_Parts = tuple[tuple[dp_event.DpEvent, int], ...]


def _parts(event: dp_event.DpEvent, count: int) -> _Parts | None:
    """The elementary events of `event` x `count` with their repetitions; None if not private."""
    event = _simplify(event)
    if count == 0 or isinstance(event, dp_event.NoOpDpEvent):
        return ()
    if isinstance(event, dp_event.NonPrivateDpEvent):
        return None
    if isinstance(event, dp_event.SelfComposedDpEvent):
        return _parts(event.event, event.count * count)
    if isinstance(event, dp_event.ComposedDpEvent):
        parts: _Parts = ()
        for child in event.events:
            more = _parts(child, count)
            if more is None:
                return None
            parts += more
        return parts
    return ((event, count),)


def _simplify(event: dp_event.DpEvent) -> dp_event.DpEvent:
    """An event of exactly the same privacy loss, in the form that is cheapest to compose."""
    if isinstance(event, dp_event.TruncatedSubsampledGaussianDpEvent):
        n, q, capacity = (
            event.dataset_size,
            event.sampling_probability,
            event.truncated_batch_size,
        )
        if n > 0 and capacity > 0 and stats.binom.sf(capacity - 1, n - 1, q) < _NEGLIGIBLE:
            event = dp_event.PoissonSampledDpEvent(
                q, dp_event.GaussianDpEvent(event.noise_multiplier)
            )
        elif n == 0 or capacity == 0 or q == 0:
            return dp_event.NoOpDpEvent()
    if isinstance(event, dp_event.PoissonSampledDpEvent):
        if event.sampling_probability == 0:
            return dp_event.NoOpDpEvent()
        if event.sampling_probability == 1:
            event = event.event
    if _noise_of(event) == 0:
        return dp_event.NonPrivateDpEvent()
    return event


def _noise_of(event: dp_event.DpEvent) -> float | None:
    if isinstance(event, dp_event.PoissonSampledDpEvent):
        return _noise_of(event.event)
    if isinstance(event, dp_event.MixtureOfGaussiansDpEvent):
        return event.standard_deviation
    return getattr(event, "noise_multiplier", None)


def _pure_gaussian(parts: _Parts, relation: Relation) -> float | None:
    """The noise multiplier that all of `parts` together equal, if all are Gaussian."""
    if not all(isinstance(event, dp_event.GaussianDpEvent) for event, _ in parts):
        return None
    information = sum(times / event.noise_multiplier**2 for event, times in parts)
    distance = 2.0 if relation == "replace_one" else 1.0
    return 1.0 / (distance * math.sqrt(information))


@functools.lru_cache(maxsize=32)
def _composed_pld(
    parts: _Parts, relation: Relation, grid: float
) -> pld_lib.PrivacyLossDistribution:
    grid = max([grid, *(_coarsest(event, relation, grid) for event, _ in parts)])
    total = None
    for event, times in parts:
        composed = _base_pld(event, relation, grid).self_compose(times)
        total = composed if total is None else total.compose(composed)
    return total


@functools.lru_cache(maxsize=32)
def _base_pld(
    event: dp_event.DpEvent, relation: Relation, grid: float
) -> pld_lib.PrivacyLossDistribution:
    """The privacy loss distribution of one elementary event, both directions."""
    settings = {"value_discretization_interval": grid, "pessimistic_estimate": True}
    neighbours = _RELATIONS[relation]
    if isinstance(event, dp_event.GaussianDpEvent):
        return pld_lib.from_gaussian_mechanism(
            event.noise_multiplier, neighboring_relation=neighbours, **settings
        )
    if isinstance(event, dp_event.PoissonSampledDpEvent) and isinstance(
        event.event, dp_event.GaussianDpEvent
    ):
        return pld_lib.from_gaussian_mechanism(
            event.event.noise_multiplier,
            sampling_prob=event.sampling_probability,
            neighboring_relation=neighbours,
            **settings,
        )
    if isinstance(event, dp_event.TruncatedSubsampledGaussianDpEvent):
        return pld_lib.from_truncated_subsampled_gaussian_mechanism(
            dataset_size=event.dataset_size,
            sampling_probability=event.sampling_probability,
            truncated_batch_size=event.truncated_batch_size,
            noise_multiplier=event.noise_multiplier,
            value_discretization_interval=grid,
            neighboring_relation=neighbours,
        )
    if isinstance(event, dp_event.MixtureOfGaussiansDpEvent) and relation != "replace_one":
        return pld_lib.from_mixture_gaussian_mechanism(
            event.standard_deviation, event.sensitivities, event.sampling_probs, **settings
        )
    if isinstance(event, MixtureDpEvent):
        total, weight = None, 0.0
        for child, prob in zip(event.events, event.probs, strict=True):
            if prob == 0:
                continue
            pld = _base_pld(_simplify(child), relation, grid)
            weight += prob
            total = pld if total is None else pld.compute_mixture(total, prob / weight)
        return total
    raise ValueError(f"No accounting of {event} under {relation=}.")


def _coarsest(event: dp_event.DpEvent, relation: Relation, grid: float) -> float:
    """The cell at which the losses of `event` fill `_MAX_CELLS` cells."""
    if isinstance(event, MixtureDpEvent):
        return max(_coarsest(_simplify(child), relation, grid) for child in event.events)
    noise = _noise_of(event)
    if not noise:
        return grid
    distance = 2.0 if relation == "replace_one" else 1.0
    cells = _MAX_CELLS
    if isinstance(event, dp_event.TruncatedSubsampledGaussianDpEvent):
        distance = 4.0  # an overflow may replace, at half the multiplier
    if isinstance(event, dp_event.MixtureOfGaussiansDpEvent):
        distance, cells = max(event.sensitivities), _MAX_MIXTURE_CELLS
    ratio = distance / noise
    return (ratio**2 + 20 * ratio) / cells


def _bracket(excess: Callable[[float], float], start: float, factor: float) -> tuple[float, float]:
    """(low, high) around the root: high meets the target, low does not (or is the floor)."""
    low = high = start
    if excess(start) <= 0:
        while excess(low) <= 0:
            high = low
            if low <= 0.01:
                return low, high
            low, factor = max(low / factor, 0.01), factor**1.5
    else:
        while excess(high) > 0:
            low = high
            if high >= 1e6:
                raise ValueError(
                    "No noise multiplier up to 1e6 meets the target. Use fewer rounds, a smaller "
                    "sampling probability or a larger target_epsilon."
                )
            high, factor = min(high * factor, 1e6), factor**1.5
    return low, high


def _close_in(
    excess: Callable[[float], float], low: float, high: float, rtol: float
) -> tuple[float, float]:
    """Shrinks a bracket to a ratio of 1 + rtol by the Illinois secant in log coordinates."""
    a, b = math.log(low), math.log(high)
    fa, fb = excess(low), excess(high)
    margin = math.log1p(rtol)
    side = 0
    while b - a > margin:
        x = b - fb * (b - a) / (fb - fa) if fa > 0 >= fb and fa > fb else 0.5 * (a + b)
        # Land a little above the root, so that both ends of the bracket move.
        x = min(max(x + 0.4 * margin, a + 0.4 * margin), b - 0.4 * margin)
        fx = excess(math.exp(x))
        if fx > 0:
            a, fa = x, fx
            fb = 0.5 * fb if side == 1 else fb
            side = 1
        else:
            b, fb = x, fx
            high = math.exp(x)
            fa = 0.5 * fa if side == -1 else fa
            side = -1
    return math.exp(a), high


def _check(count: int, delta: float, relation: str) -> None:
    if count < 0:
        raise ValueError(f"Expected count >= 0, got {count=}.")
    if not 0 < delta < 1:
        raise ValueError(f"Expected 0 < delta < 1, got {delta=}.")
    if relation not in _RELATIONS:
        raise ValueError(f"Expected relation in {sorted(_RELATIONS)}, got {relation=}.")
