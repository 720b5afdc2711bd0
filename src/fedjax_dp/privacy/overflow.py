"""How often a step's draw overflows its capacity, and the capacity that it practically never does.

Where it does, a unit may displace another, also one that contributes zero. Some proofs cover that,
others need it not to happen.
"""

from scipy import stats

from fedjax_dp.data import sampling
from fedjax_dp.privacy.settings import MechanismSettings

CONVERSION_TAIL = 1e-30
"""Overflow probability of a step below which a proof stands that knows no cut."""


def overflow_prob(m: MechanismSettings, k: int) -> float:
    """P(the other n-k units leave no room for k more) in one step: what k coins can matter to."""
    if m.capacity >= m.num_units or m.relation == "add_or_remove":
        return 0.0
    return float(stats.binom.sf(m.capacity - k, m.num_units - k, m.sampling_prob))


def conversion_capacity(n: int, q: float, k: int) -> int:
    """The smallest capacity that k units of one patient never find too small, but for 1e-30."""
    k = min(k, n)
    return min(n, k + sampling.default_capacity(n - k, q, CONVERSION_TAIL))


def overflow_reason(m: MechanismSettings, k: int) -> str:
    """Why no row is given where a step may overflow, and what to do about it."""
    return (
        f"a step overflows its capacity {m.capacity} with probability {overflow_prob(m, k):.1e} > "
        f"{CONVERSION_TAIL:g}; raise the capacity to "
        f"{conversion_capacity(m.num_units, m.sampling_prob, k)}"
    )
