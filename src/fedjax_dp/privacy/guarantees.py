"""One row of what a mechanism guarantees: who is protected, against whom, and at what cost.

The rows, with their proofs, are made in `unit_guarantees` and `update_guarantees`.

Why one dimension stands for all. Given all coins but those of the protected unit (neighbours share
them, and joint convexity averages them away), a release is a mixture of N(v, 1), v in units of the
noise. Let P - a Q have one positive component N(u) only. By Neyman and Pearson a set of mass Phi(t)
under N(u) has mass Phi(t - |u - v|) at least under every other N(v), so the divergence of order a
is largest where all |u - v| are as large as they may be and point one way; there half-lines attain
it. Such pairs are N(0) against any mixture, for every a, which are the zero-out pairs and the
mixture of Gaussians, and (1-q) N(0) + q N(u) against (1-q) N(0) + q N(v), for a >= 1, which is the
replace-one pair. The other orders are those of the exchanged pair. A pair that dominates at every
order, the same way round in every step, composes (Zhu, Dong and Wang 2022), adaptively too.
"""

import dataclasses
import math

from dp_accounting import dp_event

from fedjax_dp.privacy import accounting

SERVER = "the server, and whoever sees anything it sends on"
SUM = "whoever sees only the opened sum: the server under secure aggregation, and all after it"
SHARES = "a server that sees the single shares, or all other sites together with the server"
MODEL = "whoever sees the model; the server, which adds the noise, is trusted"
COHORT_AVERAGE = "someone who sees only the average of a fixed public cohort"

ANY_REPLACEMENT = "replacement of any of the client's data"
"""How the relation of a row begins that allows for any change of the client's data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guarantee:
    """One row: who is protected, against whom, and the DP event that one round costs them.

    Attributes:
        name: key of the row.
        adversary: against whom it holds.
        unit: "tile", "slide", "patient" or "client": whose data may change.
        relation: how the data may change.
        sensitivity: absolute L2 sensitivity of what is noised.
        event: of ONE round, all its local steps; None where there is no valid guarantee.
        accountant_relation: the neighbouring relation `event` is to be composed under.
        assumptions: what the row needs to be true.
        reason: why there is no guarantee; "" where there is one.
    """

    name: str
    adversary: str
    unit: str
    relation: str
    sensitivity: float
    event: dp_event.DpEvent | None
    accountant_relation: accounting.Relation = "zero_out"
    assumptions: tuple[str, ...] = ()
    reason: str = ""

    @property
    def is_valid(self) -> bool:
        """Whether the row states a finite guarantee."""
        return self.event is not None

    @property
    def is_any_replacement(self) -> bool:
        """Whether the row allows for any change of the client's data."""
        return self.unit == "client" and self.relation.startswith(ANY_REPLACEMENT)

    def covers(self, unit: str, *, client_is: str = "site") -> bool:
        """Whether the row, where it is valid, bounds what the zeroing of one `unit` changes.

        A row of that unit does, and so does one for any replacement of the client's data, in which
        the unit lies. The zeroing of the whole client does not: one of its units zeroed leaves
        another update, and the two may be twice as far apart. Where the client is a patient, its
        zeroing is that of the patient.

        Args:
            unit: "tile", "slide", "patient" or "client".
            client_is: what holds the client's data: "site", "patient" or "pool".
        """
        is_client = self.unit == "client" and unit == client_is
        return self.unit == unit or is_client or self.is_any_replacement

    def epsilon(self, rounds: int, delta: float) -> float:
        """Epsilon of `rounds` rounds at `delta`; infinite where the row is not valid."""
        if self.event is None:
            return math.inf
        return accounting.epsilon(self.event, rounds, delta, self.accountant_relation)
