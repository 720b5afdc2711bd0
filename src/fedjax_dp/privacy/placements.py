"""What each placement guarantees: for every adversary and unit one row.

A row states the DP event that one round costs. Where no event is proven the row says why instead.
"""

import functools
import math
from collections.abc import Callable

from fedjax_dp.privacy import unit_guarantees, update_guarantees
from fedjax_dp.privacy.guarantees import SERVER, Guarantee
from fedjax_dp.privacy.settings import MechanismSettings


@functools.lru_cache(maxsize=2**14)  # thousands of clients may be alike
def guarantees(m: MechanismSettings) -> tuple[Guarantee, ...]:
    """Every guarantee of a client with these settings, the headline first."""
    rows = _ROWS[m.placement](m)
    if m.protects == "unit":
        # Stable: the first row for the unit, against the first adversary, and all others as before.
        first = next(row for row in rows if row.unit == m.unit)
        rows = (first, *(row for row in rows if row is not first))
    return rows


def _unprotected(reason: str) -> Callable[[MechanismSettings], tuple[Guarantee, ...]]:
    def rows(m: MechanismSettings) -> tuple[Guarantee, ...]:
        units = (m.unit, "patient") if m.placement == "none" else ("client", m.unit, "patient")
        return tuple(
            Guarantee(
                name=unit,
                adversary=SERVER,
                unit=unit,
                relation="zero_out",
                sensitivity=math.inf,
                event=None,
                reason=reason,
            )
            for unit in dict.fromkeys(units)
        )

    return rows


_ROWS: dict[str, Callable[[MechanismSettings], tuple[Guarantee, ...]]] = {
    "dp_sgd": unit_guarantees.of_dp_sgd,
    "update": update_guarantees.of_update,
    "distributed": unit_guarantees.of_distributed,
    "central": update_guarantees.of_central,
    "update_unclipped": _unprotected(
        "the update is not clipped, so one unit can move it by any distance, and no finite noise "
        "hides that"
    ),
    "none": _unprotected("placement none adds no noise"),
}
