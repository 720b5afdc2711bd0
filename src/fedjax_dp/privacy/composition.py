"""Epsilon of unlike events together, and which of two events loses more."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import attr
from dp_accounting import dp_event

from fedjax_dp.privacy import accounting
from fedjax_dp.privacy.events import Relation, elementary

_MORE_IS_NOISIER = ("noise_multiplier", "standard_deviation", "num_shares")


class Charge(NamedTuple):
    """What one run costs one unit.

    Attributes:
        event: of one round.
        rounds: how many.
        relation: the relation that the event is to be composed under.
    """

    event: dp_event.DpEvent
    rounds: int
    relation: Relation


def composed_epsilon(charges: Iterable[Charge], delta: float) -> float:
    """Epsilon at `delta` of all of `charges` together, for a unit that is zeroed in all of them.

    Add-or-remove events are of placements that cut no draw, where a unit that adds zero and one
    that is absent give the same: their pair is the zero-out pair of the same event.

    Events of one relation are composed as one. Zero-out and replace-one events have no common
    relation, so the least of these bounds is taken, each of which holds:

    * all under replace-one. It bounds every two contributions of a unit, that of zero among them,
      so it bounds the zero-out pair of the same event. That of a Gaussian is the replace-one pair
      of one with twice the multiplier, exactly;
    * each relation by itself with a share of delta, and the epsilons added (basic composition);
    * where the accountant cannot compose some events, each kind by itself in the same way.

    Raises:
        ValueError: an event that the accountant does not know.
    """
    counts: dict[tuple[dp_event.DpEvent, Relation], int] = {}
    for event, rounds, relation in charges:
        key = (event, "zero_out" if relation == "add_or_remove" else relation)
        counts[key] = counts.get(key, 0) + rounds
    if not counts:
        return 0.0
    merged = [Charge(event, rounds, relation) for (event, relation), rounds in counts.items()]
    groups: dict[Relation, list[Charge]] = {}
    for charge in merged:
        groups.setdefault(charge.relation, []).append(charge)
    common: Relation = "replace_one" if "replace_one" in groups else "zero_out"
    bounds = _bounds([(common, [_under(common, charge) for charge in merged])], delta)
    if len(groups) > 1:
        bounds += _bounds(list(groups.items()), delta)
    return min(bounds or _bounds([(c.relation, [c]) for c in merged], delta, must=True))


def _under(relation: Relation, charge: Charge) -> Charge:
    """`charge` under a relation that is no weaker: the same event; of a Gaussian the same pair."""
    if relation == charge.relation or not isinstance(charge.event, dp_event.GaussianDpEvent):
        return charge._replace(relation=relation)
    gaussian = dp_event.GaussianDpEvent(2 * charge.event.noise_multiplier)
    return Charge(gaussian, charge.rounds, relation)


def _bounds(
    groups: Sequence[tuple[Relation, Sequence[Charge]]],
    delta: float,
    *,
    must: bool = False,
) -> list[float]:
    """Sums of the groups' epsilons for some ways to share delta; none where one is not known."""
    size = len(groups)
    shares = [[1 / size] * size]
    if size > 1:
        shares += [[0.9 if i == j else 0.1 / (size - 1) for i in range(size)] for j in range(size)]
    found = []
    for share in shares:
        total = 0.0
        for (relation, charges), part in zip(groups, share, strict=True):
            event = dp_event.ComposedDpEvent(
                [dp_event.SelfComposedDpEvent(c.event, c.rounds) for c in charges]
            )
            try:
                total += accounting.epsilon(event, 1, delta * part, relation)
            except ValueError:  # not accountable together, or not under this relation
                if must:
                    raise
                return []
        found.append(total)
    return found


def strongest(charges: Sequence[Charge]) -> list[Charge]:
    """Those of `charges` that together lose no less than each; only one where that is evident.

    Evident is: the same event with less noise, for adding what is missing is post-processing; and
    with a larger probability of Poisson sampling, for the pair of a smaller one is a mixture of
    the pair of the larger and of two equal worlds (joint convexity). Both loses no less in any
    composition. Where it is not evident, all that are in question are returned: an adversary who
    sees all of their outputs loses nothing against one who sees one.
    """
    kept: list[Charge] = []
    for charge in charges:
        if any(_loses_no_less(other, charge) for other in kept):
            continue
        kept = [other for other in kept if not _loses_no_less(charge, other)] + [charge]
    return kept


def _loses_no_less(one: Charge, other: Charge) -> bool:
    if one.relation != other.relation:
        return False
    mine, theirs = (elementary(charge.event, charge.rounds) for charge in (one, other))
    if mine is None or theirs is None:
        return mine is None  # not private at all
    return len(mine) == len(theirs) and all(
        count >= their_count and _is_less_noisy(event, their_event)
        for (event, count), (their_event, their_count) in zip(mine, theirs, strict=True)
    )


def _is_less_noisy(one: object, other: object) -> bool:
    """Whether two events, or parts of events, are the same but for no more noise in `one`."""
    if isinstance(one, dp_event.PoissonSampledDpEvent):
        return (
            isinstance(other, dp_event.PoissonSampledDpEvent)
            and one.sampling_probability >= other.sampling_probability
            and _is_less_noisy(one.event, other.event)
        )
    if isinstance(one, dp_event.DpEvent):
        return type(one) is type(other) and all(
            getattr(one, field.name) <= getattr(other, field.name)
            if field.name in _MORE_IS_NOISIER
            else _is_less_noisy(getattr(one, field.name), getattr(other, field.name))
            for field in attr.fields(type(one))  # type: ignore[arg-type]
        )
    if isinstance(one, list | tuple):
        return (
            isinstance(other, list | tuple)
            and len(one) == len(other)
            and all(map(_is_less_noisy, one, other))
        )
    return one == other
