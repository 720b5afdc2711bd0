"""DP events: our own beside those of dp-accounting, their parts, and their description in JSON."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal

import attr
import dp_accounting
from dp_accounting import dp_event
from scipy import stats

Relation = Literal["zero_out", "replace_one", "add_or_remove"]

NEIGHBOURS = {
    "zero_out": dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
    "replace_one": dp_accounting.NeighboringRelation.REPLACE_ONE,
    "add_or_remove": dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
}

_NEGLIGIBLE = 1e-290  # below it scipy's tail ratios underflow; a composition itself adds 1e-15


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


def _in(condition: Callable[[Any], bool], expected: str) -> Callable[[Any, Any, Any], None]:
    def check(event: Any, attribute: Any, value: Any) -> None:
        if not condition(value):
            raise ValueError(f"Expected {attribute.name} {expected}, got {value}.")

    return check


@attr.s(frozen=True, slots=True)
class DistributedDiscreteGaussianDpEvent(dp_event.DpEvent):
    """The sum of Poisson-sampled integer vectors and of several parties' discrete Gaussian noise.

    Every unit adds an integer vector of bounded norm with probability `sampling_probability`, and
    every coordinate of the sum carries `num_shares` independent discrete Gaussians. A capacity that
    a draw may exceed is not part of this event: mix it, by the probability that it matters, with
    the event of what then happens.

    Attributes:
        sampling_probability: q in [0, 1].
        noise_stddev_squared: of ONE share, in squares of the integers' unit; rational, kept exact.
        num_shares: how many the adversary sees summed and knows none of, >= 1.
        l2_sensitivity: norm of one unit's vector, in units of the integers.
        dimension: coordinates.
    """

    sampling_probability: float = attr.ib(validator=_in(lambda q: 0 <= q <= 1, "in [0, 1]"))
    noise_stddev_squared: Fraction = attr.ib(
        converter=Fraction, validator=_in(lambda v: v >= 0, ">= 0")
    )
    num_shares: int = attr.ib(validator=_in(lambda n: n >= 1, ">= 1"))
    l2_sensitivity: float = attr.ib(validator=_in(lambda d: 0 <= d < math.inf, ">= 0 and finite"))
    dimension: int = attr.ib(validator=_in(lambda d: d >= 1, ">= 1"))


_OURS = {kind.__name__: kind for kind in (MixtureDpEvent, DistributedDiscreteGaussianDpEvent)}


def without_truncation(event: dp_event.DpEvent) -> dp_event.DpEvent:
    """`event` with unlimited capacity: for the Renyi cross-check, which knows no truncation."""
    if isinstance(event, dp_event.SelfComposedDpEvent):
        return dp_event.SelfComposedDpEvent(without_truncation(event.event), event.count)
    if isinstance(event, dp_event.TruncatedSubsampledGaussianDpEvent):
        gaussian = dp_event.GaussianDpEvent(event.noise_multiplier)
        return dp_event.PoissonSampledDpEvent(event.sampling_probability, gaussian)
    return event


def event_to_json(event: dp_event.DpEvent) -> dict[str, Any]:
    """A JSON-serialisable description of `event`; `event_from_json` rebuilds it."""

    def encode(value: Any) -> Any:
        if isinstance(value, dp_event.DpEvent):
            return event_to_json(value)
        if isinstance(value, (tuple, list)):
            return [encode(item) for item in value]
        return str(value) if isinstance(value, Fraction) else value

    fields = {f.name: encode(getattr(event, f.name)) for f in attr.fields(type(event))}
    return {"kind": type(event).__name__, **fields}


def event_from_json(value: dict[str, Any]) -> dp_event.DpEvent:
    """Rebuilds what `event_to_json` described."""

    def decode(item: Any) -> Any:
        if isinstance(item, dict):
            return event_from_json(item)
        return tuple(decode(i) for i in item) if isinstance(item, list) else item

    name = value["kind"]
    kind = _OURS.get(name, getattr(dp_event, name, None))
    if not (isinstance(kind, type) and issubclass(kind, dp_event.DpEvent)):
        raise ValueError(f"Unknown DP event {name!r}.")
    return kind(**{key: decode(item) for key, item in value.items() if key != "kind"})


Parts = tuple[tuple[dp_event.DpEvent, int], ...]
"""Elementary events and their repetitions."""


def elementary(event: dp_event.DpEvent, count: int) -> Parts | None:
    """The parts of `event` repeated `count` times; None if it is not private."""
    event = simplify(event)
    if count == 0 or isinstance(event, dp_event.NoOpDpEvent):
        return ()
    if isinstance(event, dp_event.NonPrivateDpEvent):
        return None
    if isinstance(event, dp_event.SelfComposedDpEvent):
        return elementary(event.event, event.count * count)
    if isinstance(event, dp_event.ComposedDpEvent):
        parts: Parts = ()
        for child in event.events:
            more = elementary(child, count)
            if more is None:
                return None
            parts += more
        return parts
    return ((event, count),)


def simplify(event: dp_event.DpEvent) -> dp_event.DpEvent:
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
    if noise_of(event) == 0:
        return dp_event.NonPrivateDpEvent()
    return event


def noise_of(event: dp_event.DpEvent) -> float | None:
    """The noise of one elementary event, of its own scale; None where it has no such number."""
    if isinstance(event, DistributedDiscreteGaussianDpEvent):
        return float(event.noise_stddev_squared)
    if isinstance(event, dp_event.PoissonSampledDpEvent):
        return noise_of(event.event)
    if isinstance(event, dp_event.MixtureOfGaussiansDpEvent):
        return event.standard_deviation
    return getattr(event, "noise_multiplier", None)
