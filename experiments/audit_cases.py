"""What the audit attacks: every placement and adversary, as cases with their expected laws."""

import math
import os
from typing import Any, NamedTuple

from fedjax_dp.privacy.audit import Law, drawn_law
from fedjax_dp.privacy.guarantees import Guarantee
from fedjax_dp.privacy.mechanism import Mechanism

DELTA = 1e-5
TARGET_EPSILON = 4.0
DIMENSION = 5
"""Parameters of the audited model."""

HUGE = 100
"""Norm of a canary over the clip norm, where a clip stands in its way."""


class Case(NamedTuple):
    """One row of a placement's guarantees, as its adversary would attack it.

    Attributes:
        name: of the case; that of the placement where the row is the headline.
        mechanism: of the client that holds the canary.
        row: name of the guarantee that is audited.
        rounds: of one trial.
        size: norm of the canary over the clip norm.
    """

    name: str
    mechanism: Mechanism
    row: str
    rounds: int = 2
    size: int = HUGE

    @property
    def guarantee(self) -> Guarantee:
        """The row."""
        return next(row for row in self.mechanism.guarantees() if row.name == self.row)

    @property
    def theory(self) -> float:
        """The epsilon that the row states; infinite where nothing is promised."""
        return self.guarantee.epsilon(self.rounds, DELTA)

    @property
    def is_sampled(self) -> bool:
        """Whether the canary is not in every release."""
        return self.mechanism.sampling_prob < 1

    @property
    def releases(self) -> int:
        """Noised releases of one trial."""
        steps = self.mechanism.local_steps if self.mechanism.placement == "dp_sgd" else 1
        return steps * self.rounds

    @property
    def sees_share(self) -> bool:
        """Whether the adversary knows the masks."""
        return self.row.endswith("_against_shares")

    @property
    def multiplier(self) -> float:
        """Standard deviation of what is seen of one release, over the clip norm."""
        m = self.mechanism
        if m.placement != "distributed":
            return m.noise_multiplier
        contributing = m.num_shares - m.max_dropouts
        shares = 1 if self.sees_share else contributing
        if m.noise == "discrete_gaussian":
            return math.sqrt(shares * m.share_variance(m.num_shares)) / m.levels
        return m.noise_multiplier * math.sqrt(shares / contributing)

    @property
    def law(self) -> Law:
        """What the statistic follows if the mechanism is sound."""
        weight = self.size if self.mechanism.placement == "update_unclipped" else 1
        return drawn_law(self.multiplier / weight, self.releases, self.mechanism.sampling_prob)


def make_cases(cache_dir: str | os.PathLike[str] | None = None) -> tuple[Case, ...]:
    """Every placement and adversary, calibrated to an epsilon of 4, the headlines first.

    Args:
        cache_dir: where calibrations are kept.
    """
    once: dict[str, Any] = {"num_units": 1, "sampling_prob": 1.0, "capacity": 1}
    each: dict[str, Any] = {"num_units": 3, "sampling_prob": 1.0, "capacity": 3}
    half: dict[str, Any] = {"num_units": 3, "sampling_prob": 0.5, "capacity": 3}
    # The update of a canary of size 1 has norm 2.
    steps: dict[str, Any] = {"local_steps": 2, "l2_clip_norm": 2.0}
    shared: dict[str, Any] = {
        "placement": "distributed", "local_steps": 1, "num_shares": 3, "max_dropouts": 1,
    }  # fmt: skip
    discrete: dict[str, Any] = {"noise": "discrete_gaussian", "dimension": DIMENSION}

    def made(rounds: int = 2, **settings: Any) -> Mechanism:
        base: dict[str, Any] = {"unit": "patient", "l2_clip_norm": 1.0, "noise_multiplier": 1.0}
        return Mechanism(**base | settings).calibrated(rounds, TARGET_EPSILON, DELTA, cache_dir)

    dp_sgd = made(placement="dp_sgd", **each, local_steps=2)
    update = made(placement="update", **once, **steps)
    distributed = made(**shared, **each)
    integers = made(**shared, **each, **discrete)
    central = made(placement="central", **once, **steps)
    unclipped = Mechanism(
        placement="update_unclipped", unit="patient", **once, **steps,
        noise_multiplier=update.noise_multiplier,
    )  # fmt: skip
    return (
        Case("dp_sgd", dp_sgd, "patient"),
        Case("update", update, "client"),
        Case("distributed", distributed, "patient"),
        Case("distributed_share", distributed, "patient_against_shares"),
        Case("distributed_discrete", integers, "patient"),
        Case("distributed_discrete_share", integers, "patient_against_shares"),
        Case("central", central, "client"),
        Case("dp_sgd_sampled", made(placement="dp_sgd", **half, local_steps=2), "patient"),
        Case("distributed_sampled", made(rounds=4, **shared, **half), "patient", 4),
        *(Case(f"update_unclipped_{size}", unclipped, "client", 2, size) for size in (1, 4, 16)),
    )
