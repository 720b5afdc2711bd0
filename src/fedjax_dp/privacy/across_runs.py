"""What all runs on the same data cost together, if everything of all of them is released."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from fedjax_dp.data.sources import SiteSource
from fedjax_dp.privacy.composition import Charge, composed_epsilon, strongest
from fedjax_dp.privacy.mechanism import Guarantee, mechanism_from_descriptor
from fedjax_dp.privacy.run_records import Plan, Run

UNITS = ("tile", "slide", "patient", "client")

ASSUMPTIONS = (
    "each run draws its noise from secrets of its own",
    "no run's noise, sampling or number of rounds was chosen by what an earlier one released: that "
    "would need a privacy filter",
    "every run on the data is in the register, and none is on only a part of a site's images",
)

_ZEROED = ("zero_out", "add_or_remove")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Total:
    """What one unit loses by all runs together.

    Attributes:
        unit: "tile", "slide", "patient" or "client" (all that the site trains on).
        epsilon: against the strongest adversary of each run; infinite where a run has no valid
            guarantee of the unit.
        adversaries: who they are.
        headline_epsilon: against the first adversary that each run names for the unit.
        headline_adversaries: who they are.
        runs: names of the runs composed.
        unprotected: names of those without a valid guarantee against their strongest adversary.
        reason: why they have none; "" where all have one.
        epsilon_of_others: of all runs but the unprotected: what holds while nothing of those is
            released.
        not_private_seeds: names of runs whose noise follows from an integer seed. It is counted as
            if it were secret; against whoever knows the seed there is no guarantee.
    """

    unit: str
    epsilon: float
    adversaries: tuple[str, ...]
    headline_epsilon: float
    headline_adversaries: tuple[str, ...]
    runs: tuple[str, ...]
    unprotected: tuple[str, ...]
    reason: str
    epsilon_of_others: float
    not_private_seeds: tuple[str, ...]


def epsilon_if_all_released(
    runs: Iterable[Run], fingerprint: str, delta: float
) -> dict[str, Total]:
    """What each unit of one site's data loses by all of `runs`.

    The two worlds: the unit contributes to every run, or to none. Given what came before, a run's
    pair of outputs is dominated by the pair of its event, so that of all runs is dominated by the
    product of those pairs (Zhu et al. 2022, Theorem 10), and composing the events computes it.

    Which rows count. One that holds when the unit is zeroed; one for any change of the client's
    data covers every unit in it, and a whole site in a pool of sites. The zeroing of a pool does
    not cover that of one of its sites, whose absence moves the update twice as far. Where a client
    is a patient, its zeroing is that of the patient. Where many are, a unit lies in one of them,
    and the strongest counts; but for all of a site at once, in one sum, nothing is proven. Of
    several rows against one adversary the smallest counts, for all of them hold.

    Which units are the same in all runs. Images are, by the fingerprint. Tiles only where all runs
    cut the same, and patients only where all know the same images to be one patient's: else only
    rows for any change of the client's data count.

    Args:
        runs: of `Register.runs(fingerprint)`; others are left out.
        fingerprint: of the site's data.
        delta: of each total, in (0, 1).

    Returns:
        unit -> what it loses, for every unit of `UNITS`. Rounds count as planned until a run ends.

    Raises:
        ValueError: delta is out of range, or the mechanism of a run cannot be rebuilt.
    """
    if not 0 < delta < 1:
        raise ValueError(f"Expected 0 < delta < 1, got {delta=}.")
    parts = _parts(runs, fingerprint)
    return {unit: _total(unit, parts, delta) for unit in UNITS}


def to_json(runs: Sequence[Run], sources: Iterable[SiteSource], delta: float) -> dict[str, Any]:
    """The part of a privacy statement on all runs of a register, site by site.

    No fingerprint is in it, for that is a function of private data.

    Args:
        runs: all of the register.
        sources: of the sites to tell about.
        delta: of each total, in (0, 1).

    Returns:
        A dict of JSON types; an infinite epsilon is the string "infinity".
    """
    sites = {}
    for source in sources:
        parts = _parts(runs, source.fingerprint)
        sites[source.site] = {
            "runs": [
                {
                    "name": part.run.name,
                    "run_id": part.run.run_id,
                    "experiment": part.run.experiment,
                    "seed": part.run.seed,
                    "placement": part.plans[0].mechanism["placement"],
                    "clients": len(part.plans),
                    "rounds": max(plan.rounds for plan in part.plans),
                    "rounds_are": "charged" if part.run.has_ended else "planned",
                }
                for part in parts
            ],
            "same_site_other_data": list(other_data(runs, source)),
            "epsilon_if_all_released": {unit: _plain(_total(unit, parts, delta)) for unit in UNITS},
        }
    return {"target_delta": delta, "assumptions": list(ASSUMPTIONS), "sites": sites}


def other_data(runs: Iterable[Run], source: SiteSource) -> tuple[str, ...]:
    """Runs of a site of the same name whose data have another fingerprint, and are not counted."""
    return tuple(
        dict.fromkeys(
            run.name
            for run in runs
            for plan in run.plans.values()
            for other in plan.holding.sources
            if other.site == source.site and other.fingerprint != source.fingerprint
        )
    )


class _Part(NamedTuple):
    """What one run has on the data.

    Attributes:
        run: the run.
        plans: of its clients that hold the data, or some of them, and are charged for it.
        patients: which of the images are known to be one patient's.
    """

    run: Run
    plans: tuple[Plan, ...]
    patients: str

    @property
    def reason(self) -> str:
        """Why nothing is proven for the data in this run, whatever its mechanisms; else ""."""
        if len(self.plans) > 1 and not all(plan.holding.is_patient for plan in self.plans):
            return "several clients hold the data, and not each of them one patient's"
        return ""


def _parts(runs: Iterable[Run], fingerprint: str) -> list[_Part]:
    """The runs that train on the data and are, or were, charged for it."""
    parts = []
    for run in runs:
        plans = [p for p in run.plans.values() if p.rounds and fingerprint in p.fingerprints]
        if plans:
            sources = {s for p in plans for s in p.holding.sources if s.fingerprint == fingerprint}
            patients = ",".join(sorted({source.patients for source in sources}))
            parts.append(_Part(run, tuple(plans), patients))
    return parts


def _total(unit: str, parts: Sequence[_Part], delta: float) -> Total:
    """What `unit` loses by all of `parts`."""
    unlike = _unlike(unit, parts)
    charges: list[Charge] = []
    headline: list[Charge] = []
    has_headline = True
    adversaries: list[str] = []
    first_adversaries: list[str] = []
    unprotected: dict[str, list[str]] = {}  # reason -> runs
    for part in parts:
        found = _by_adversary(unit, part, unlike, delta)
        adversaries += found
        first_adversaries += list(found)[:1]
        first = next(iter(found.values()), _Found([], "no row"))
        has_headline &= not first.reason
        headline += strongest(first.charges)
        reason = next((one.reason for one in found.values() if one.reason), "")
        if not found:
            reason = f"placement {part.plans[0].mechanism['placement']} protects no {unit}"
        if reason:
            unprotected.setdefault(reason, []).append(part.run.name)
        else:
            charges += strongest([c for one in found.values() for c in one.charges])
    of_others = composed_epsilon(charges, delta)
    return Total(
        unit=unit,
        epsilon=math.inf if unprotected else of_others,
        adversaries=_unique(adversaries),
        headline_epsilon=composed_epsilon(headline, delta) if has_headline else math.inf,
        headline_adversaries=_unique(first_adversaries),
        runs=tuple(part.run.name for part in parts),
        unprotected=_unique(name for names in unprotected.values() for name in names),
        reason="; ".join(f"{', '.join(_unique(n))}: {why}" for why, n in unprotected.items()),
        epsilon_of_others=of_others,
        not_private_seeds=_unique(part.run.name for part in parts if part.run.seed >= 0),
    )


class _Found(NamedTuple):
    """The best rows against one adversary, of each client of a run; or why one has none."""

    charges: list[Charge]
    reason: str


def _by_adversary(unit: str, part: _Part, unlike: str, delta: float) -> dict[str, _Found]:
    """Adversary -> what holds for `unit` against them in one run; the headline's comes first.

    Where each client is a patient, a unit lies in one of them: the strongest charge covers it.
    """
    found: dict[str, _Found] = {}
    for plan in _distinct(part.plans):
        # Stable: the rows of the unit come first, and are else in their own order.
        rows = sorted(_guarantees(part.run, plan), key=lambda row: row.unit != unit)
        for adversary in _unique(row.adversary for row in rows):
            mine = [row for row in rows if row.adversary == adversary]
            valid = [row for row in mine if row.is_valid and _covers(row, unit, plan, unlike)]
            named = [row for row in mine if row.unit == unit]
            before = found.get(adversary, _Found([], part.reason))
            charges, reason = before.charges, before.reason
            if valid:
                charges = [*charges, _best(valid, plan.rounds, delta)]
            elif named:
                reason = reason or named[0].reason or unlike or _other_change(named[0], plan)
            else:
                continue
            found[adversary] = _Found(charges, reason)
    return found


def _distinct(plans: Iterable[Plan]) -> Iterable[Plan]:
    """The plans without repetition: a thousand patients have few mechanisms."""
    return {
        (repr(p.mechanism), p.rounds, p.holding.is_whole, p.holding.is_patient): p for p in plans
    }.values()


def _guarantees(run: Run, plan: Plan) -> tuple[Guarantee, ...]:
    try:
        return mechanism_from_descriptor(plan.mechanism).guarantees()
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"A mechanism of run {run.name!r} cannot be rebuilt ({error}). Use the version of this "
            "program that the run was made with."
        ) from error


def _best(valid: Sequence[Guarantee], rounds: int, delta: float) -> Charge:
    """The row that costs least; all of them hold."""
    best = valid[0]
    if len(valid) > 1:
        best = min(valid, key=lambda row: row.epsilon(rounds, delta))
    assert best.event is not None  # it is valid
    return Charge(best.event, rounds, best.accountant_relation)


def _other_change(row: Guarantee, plan: Plan) -> str:
    """Why a valid row of the unit does not cover its zeroing."""
    if not row.relation.startswith(_ZEROED):
        return f"its guarantee is for {row.relation or 'no change of data'}, not for zeroing"
    if plan.holding.is_whole:
        return "zeroing a pool of sites is not zeroing one of them"
    return "its clients hold less than a site, and nothing is proven for all of them at once"


def _covers(row: Guarantee, unit: str, plan: Plan, unlike: str) -> bool:
    """Whether `row` bounds what zeroing the unit changes; see `epsilon_if_all_released`."""
    holding = plan.holding
    if not holding.is_whole and (unit == "client" or (unit == "patient" and unlike)):
        return False  # the unit may lie in several clients
    if row.is_any_replacement:
        return True
    if unlike or not row.relation.startswith(_ZEROED):
        return False
    if row.unit == unit:
        return unit != "client" or len(holding.sources) == 1
    return row.unit == "client" and unit == "patient" and holding.is_patient


def _unlike(unit: str, parts: Sequence[_Part]) -> str:
    """Why the runs' units of this name are not the same; "" where they are."""
    if unit == "tile" and len(tiles := _unique(part.run.tile for part in parts)) > 1:
        return f"tiles of {' and '.join(tiles)} are unlike units"
    if unit == "patient" and len({part.patients for part in parts}) > 1:
        return "the runs know different images to be one patient's"
    return ""


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _plain(total: Total) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return list(value)
        return "infinity" if value == math.inf else value

    return {name: plain(value) for name, value in dataclasses.asdict(total).items()}
