"""What each placement guarantees: for every adversary and unit one row, with its proof.

A row states the DP event that one round costs. Where no event is proven the row says why instead.

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
import functools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
from dp_accounting import dp_event
from scipy import stats

from fedjax_dp.data import sampling
from fedjax_dp.privacy import accounting, discrete_gaussian, events
from fedjax_dp.privacy.settings import MechanismSettings

CONVERSION_TAIL = 1e-30
"""Overflow probability per step below which a mixture-of-Gaussians conversion stands."""

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


@functools.lru_cache(maxsize=4096)  # asked for every client in every round
def guarantees(m: MechanismSettings) -> tuple[Guarantee, ...]:
    """Every guarantee of a client with these settings, the headline first."""
    rows = _ROWS[m.placement](m)
    if m.protects == "unit":
        # Stable: the first row for the unit, against the first adversary, and all others as before.
        first = next(row for row in rows if row.unit == m.unit)
        rows = (first, *(row for row in rows if row is not first))
    return rows


def _dp_sgd(m: MechanismSettings) -> tuple[Guarantee, ...]:
    """Rows of "dp_sgd": whatever the client computes from its noised steps is post-processing."""
    return _unitwise(m, m.noise_multiplier, SERVER)


def _distributed(m: MechanismSettings) -> tuple[Guarantee, ...]:
    """Rows of "distributed".

    Each of K clients adds a share of standard deviation z C / sqrt(K - d). The opened sum of h >=
    K - d messages holds noise of z C sqrt(h / (K - d)) >= z C: the event of z is charged whatever
    h was, an upper bound. Given everything that other sites contribute, one unit of this site
    moves the sum as it moves its site's own, so the rows are those of "dp_sgd".

    Who sees a share alone, or subtracts those of all others, sees z / sqrt(K - d). Later rounds of
    fewer sites have larger shares, so K at the start is the worst.

    Fixed-point words: rounding a message to its grid and adding modulo 2^32 is done to each share,
    not to the sum; on the Gaussian path that rounding (some 2^-17 of the noise and less) is outside the
    proof, as floating point is. On the discrete path all is integers: what is opened is the exact
    sum modulo 2^32, and the bound is Kairouz et al. 2021, through zCDP, amplified by Renyi DP.
    """
    sharing = m.num_shares - m.max_dropouts
    rows = _unitwise(m, m.noise_multiplier, SUM, shares=sharing)
    alone = _unitwise(m, m.noise_multiplier / math.sqrt(sharing), SHARES, shares=1)
    return rows + tuple(
        dataclasses.replace(row, name=f"{row.name}_against_shares") for row in alone
    )


def _unitwise(
    m: MechanismSettings, z: float, adversary: str, shares: int = 1
) -> tuple[Guarantee, ...]:
    """Rows of a placement that clips units, whose sum the adversary sees with noise z C.

    Unit, zero-out: each step releases a clipped Poisson sum, cut at the capacity, plus N(0, z C):
    the truncated event, L times (arXiv 2508.15089; it needs a uniform cut, which makes who fills
    the batch independent of how many were drawn). Under zero-out a unit may displace another from a
    full batch; the event's overflow branch (a replacement, 2C) covers that, and under replace-one
    too. Under add-or-remove no draw is cut, and the event is the plain Poisson one.

    Patient from smaller units: with all k units of a patient zeroed, the sum moves by at most
    (drawn number) x C and the number is Binomial(k, q), which is the mixture of Gaussians. Given
    the others' coins that holds exactly unless a batch overflows, so the overflow probability must
    be nothing: b = P(Binomial(n-k, q) > capacity - k) <= 1e-30 a step. Neighbours share the coins
    it depends on, so it adds b, and not (1 + e^epsilon) b, to delta.

    Tile of a larger unit: any change of one tile, and of which tiles are drawn with it, replaces
    the clipped gradient of its unit by another under the same coin, so the unit's event under
    replace-one covers it. Drawing T of the unit's tiles is not claimed to
    amplify: the pair is a substitution, and its divergence under composition is not that of the
    zero-out pair at probability q T / n_j.
    """
    step = _step_event(m, z, shares)
    sampled = "units are drawn by Poisson sampling with secret coins, afresh in each step"
    trust = () if adversary != SUM else (
        f"at most {m.max_dropouts} of {m.num_shares} sites drop out of a round; more abort it",
        "every other site adds its share of the noise and keeps it to itself",
    )  # fmt: skip
    rows = [
        Guarantee(
            name=m.unit,
            adversary=adversary,
            unit=m.unit,
            relation=m.relation,
            sensitivity=m.l2_clip_norm,
            event=None if step is None else _repeat(step, m.local_steps),
            accountant_relation=m.relation,
            assumptions=(sampled, f"a {m.unit} shares no pixels with another", *trust),
            reason="" if step is not None else _overflows(m, 1),
        )
    ]
    if m.unit != "tile":
        rows.append(_tile_of_unit(m, step, adversary, (sampled, *trust)))
    if m.unit == "patient":
        return tuple(rows)
    event, reason = None, _no_conversion(m)
    k = m.max_units_per_patient or 0
    if m.relation == "zero_out":  # the number of units of add_or_remove is nominal, no bound on k
        k = min(k, m.num_units)
    if not reason and m.noise == "discrete_gaussian":
        reason = "no conversion from tiles to patients is proven for the discrete Gaussian"
    if not reason and _overflow(m, k) > CONVERSION_TAIL:
        reason = _overflows(m, k)
    if not reason:
        event = _repeat(_group_event(m, z, k), m.local_steps)
    rows.append(
        Guarantee(
            name="patient",
            adversary=adversary,
            unit="patient",
            relation=m.relation,
            sensitivity=k * m.l2_clip_norm if event else math.inf,
            event=event,
            accountant_relation=m.relation,
            assumptions=(sampled, f"no patient owns more than {k} units, enforced", *trust)
            if event
            else (),
            reason=reason,
        )
    )
    return tuple(rows)


def _step_event(m: MechanismSettings, z: float, shares: int) -> dp_event.DpEvent | None:
    """One step for one sampled unit; None where the discrete path's draw may be cut."""
    if m.noise == "discrete_gaussian":
        # Its bound knows no cut of the batch, so the capacity must never be exceeded.
        if _overflow(m, 1) > CONVERSION_TAIL:
            return None
        return _discrete_event(m, shares)
    if m.relation == "add_or_remove":
        return dp_event.PoissonSampledDpEvent(m.sampling_prob, dp_event.GaussianDpEvent(z))
    return dp_event.TruncatedSubsampledGaussianDpEvent(
        dataset_size=m.num_units,
        sampling_probability=m.sampling_prob,
        truncated_batch_size=m.capacity,
        noise_multiplier=z,
    )


def _discrete_event(m: MechanismSettings, shares: int) -> dp_event.DpEvent:
    """One step of the discrete path: `shares` exact discrete Gaussians on an integer sum.

    Shares are charged before their variance is rounded up, and as many as at the start: later
    rounds of fewer, larger shares, whose sum is no smaller, cost no more.
    """
    dimension = m.dimension or 0
    return events.DistributedDiscreteGaussianDpEvent(
        sampling_probability=m.sampling_prob,
        noise_stddev_squared=_sum_variance(m) / (m.num_shares - m.max_dropouts),
        num_shares=shares,
        l2_sensitivity=discrete_gaussian.integer_l2_sensitivity(m.levels, dimension),
        dimension=dimension,
    )


def share_variance(m: MechanismSettings, num_sharing: int) -> int:
    """sigma^2 of one of `num_sharing` discrete shares, in squared integer steps, rounded up."""
    return math.ceil(_sum_variance(m) / (num_sharing - m.max_dropouts))


def _sum_variance(m: MechanismSettings) -> Fraction:
    return Fraction(m.noise_multiplier * m.levels) ** 2


def _tile_of_unit(
    m: MechanismSettings,
    step: dp_event.DpEvent | None,
    adversary: str,
    assumptions: tuple[str, ...],
) -> Guarantee:
    event = step if m.noise == "gaussian" else None
    return Guarantee(
        name=f"tile_of_{m.unit}",
        adversary=adversary,
        unit="tile",
        relation=f"zero_out or replacement of one tile of a {m.unit}",
        sensitivity=2 * m.l2_clip_norm,
        event=None if event is None else _repeat(event, m.local_steps),
        accountant_relation="replace_one",
        assumptions=assumptions,
        reason="" if event is not None else "no replace-one bound is proven for this noise",
    )


def _update(m: MechanismSettings) -> tuple[Guarantee, ...]:
    """Rows of "update".

    Client: the update is clipped to S, so zeroing it moves it by S and replacing all of the
    client's data by 2S: N(z) and N(z/2). The latter covers any change of the client's data.

    Record (the sampled unit), zero-out, by sampling: fix the coins of all others. If no step of the
    round can overflow, whatever the record's coins, then the others' batches do not depend on the
    record; with the record zeroed the update is one fixed vector a, and with it the update is a
    unless the record is drawn at least once, probability p = 1-(1-q)^L, and else a vector within 2S
    of a. That is the zero-out pair of P(p, N(z/2)), and convexity over the others' coins keeps it.
    If a step can overflow, the record's slot may displace another unit even when zeroed and no pair
    of that form is left; then any change is within 2S: N(z/2). The others' coins choose between the
    two with probability b = 1-(1-P(Binomial(n-1, q) > capacity-1))^L, hence the mixture event,
    which is P(p, N(z/2)) itself where capacity = n. It needs a client without state: what a record
    left behind in an earlier round makes a depend on it.

    Patient of k records: the same with p = 1-(1-q)^(kL) and the overflow of the other n-k; where
    no cap k is enforced, N(z/2).

    Who sees only the average of m clients of equal weight sees m independent noises for one
    client's change: z sqrt(m).
    """
    clipped = ("the whole update is clipped, and nothing else leaves the client",)

    def rows(z: float, adversary: str, assumptions: tuple[str, ...]) -> tuple[Guarantee, ...]:
        half = dp_event.GaussianDpEvent(z / 2)
        return (
            *_client_rows(m, adversary, dp_event.GaussianDpEvent(z), half, assumptions),
            *_record_rows(m, adversary, z / 2, half, assumptions),
        )

    alone = rows(m.noise_multiplier, SERVER, clipped)
    if m.averaged_over == 1:
        return alone
    equal = f"the average is of the same {m.averaged_over} clients, of equal weight and noise"
    averaged = rows(
        m.noise_multiplier * math.sqrt(m.averaged_over),
        COHORT_AVERAGE,
        (*clipped, equal, "the server, which sees single updates, is trusted"),
    )
    return (
        *alone,
        *(dataclasses.replace(row, name=f"{row.name}_in_average") for row in averaged),
    )


def _central(m: MechanismSettings) -> tuple[Guarantee, ...]:
    """Rows of "central" (DP-FedAvg: McMahan et al. 2018, Algorithm 1, the fixed-divisor estimator).

    Client: given the coins of the others, the opened sum is a without the client and, with
    probability p, a + w v with |v| <= S: the zero-out pair of P(p, N(z_k)), z_k the noise over
    w_k S. Replacing all of a client's data: v by v', both within S of nothing, under the same coin:
    the replace-one pair of P(p, N(z_k)).

    Record: the client's coin does not depend on its records, so telling it to the adversary only
    helps, and the pair is that of "update" with probability p and two equal worlds with 1 - p: the
    mixture of the record's event and nothing. P(p (1-(1-q)^L), N(z_k/2)) is NOT claimed: where the
    coin stays secret the pair is a substitution inside a mixture, which the zero-out pair of that
    probability does not dominate in both directions.
    """
    z = _central_multiplier(m)
    p, full = m.cohort_prob, dp_event.GaussianDpEvent(z)
    client = dp_event.PoissonSampledDpEvent(p, full)
    clipped = (
        "the server is trusted: it adds the noise and keeps secret who took part",
        "the whole update is clipped, the weight and the divisor are public",
    )
    rows = _client_rows(m, MODEL, client, client, clipped, replace_by_relation=True)

    def if_drawn(event: dp_event.DpEvent) -> dp_event.DpEvent:
        if p == 1:
            return event
        return events.MixtureDpEvent(events=(event, dp_event.NoOpDpEvent()), probs=(p, 1 - p))

    half = if_drawn(dp_event.GaussianDpEvent(z / 2))
    return (*rows, *_record_rows(m, MODEL, z / 2, half, clipped, wrap=if_drawn))


def _central_multiplier(m: MechanismSettings) -> float:
    """z_k of a client of relative weight w: its share of the sum's and of the count's budget."""
    sum_part = (m.relative_weight / m.sum_noise_multiplier) ** 2
    count_part = 0.0 if m.count_noise_stddev is None else (2 * m.count_noise_stddev) ** -2
    return (sum_part + count_part) ** -0.5


def _client_rows(
    m: MechanismSettings,
    adversary: str,
    event: dp_event.DpEvent,
    replaced: dp_event.DpEvent,
    assumptions: tuple[str, ...],
    *,
    replace_by_relation: bool = False,
) -> tuple[Guarantee, ...]:
    sensitivity = m.l2_clip_norm * m.relative_weight
    client = Guarantee(
        name="client",
        adversary=adversary,
        unit="client",
        relation="zero_out",
        sensitivity=sensitivity,
        event=event,
        assumptions=assumptions,
    )
    return client, dataclasses.replace(
        client,
        name="client_replace",
        relation=f"{ANY_REPLACEMENT} (local DP)" if adversary == SERVER else ANY_REPLACEMENT,
        sensitivity=2 * sensitivity,
        event=replaced,
        accountant_relation="replace_one" if replace_by_relation else "zero_out",
    )


def _record_rows(
    m: MechanismSettings,
    adversary: str,
    half_multiplier: float,
    half: dp_event.DpEvent,
    clipped: tuple[str, ...],
    wrap: Callable[[dp_event.DpEvent], dp_event.DpEvent] = lambda event: event,
) -> list[Guarantee]:
    """Rows of the sampled unit and of patients, where what is clipped is the whole update."""
    sizes: dict[str, int | None] = {m.unit: 1}
    if m.unit != "patient":
        sizes["patient"] = m.max_units_per_patient
    rows = []
    for unit, k in sizes.items():
        event: dp_event.DpEvent = half
        assumptions = clipped
        if unit != m.unit and k is None:
            assumptions += (
                "any change of the client's data is within 2S; sampling is not claimed, because no "
                "enforced cap of units per patient is known",
            )
        elif not m.is_stateless:
            assumptions += ("the client keeps state, so sampling amplifies nothing",)
        else:
            event = wrap(_record_event(m, min(k or 1, m.num_units), half_multiplier))
            assumptions += ("fresh secret Poisson draws, a stateless client, public divisors",)
            if unit != m.unit:
                assumptions += (f"no patient owns more than {k} units, enforced",)
        rows.append(
            Guarantee(
                name=f"record_{unit}",
                adversary=adversary,
                unit=unit,
                relation="zero_out",
                sensitivity=2 * m.l2_clip_norm * m.relative_weight,
                event=event,
                assumptions=assumptions,
            )
        )
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
    "dp_sgd": _dp_sgd,
    "update": _update,
    "distributed": _distributed,
    "central": _central,
    "update_unclipped": _unprotected(
        "the update is not clipped, so one unit can move it by any distance, and no finite noise "
        "hides that"
    ),
    "none": _unprotected("placement none adds no noise"),
}


def _record_event(m: MechanismSettings, k: int, half_multiplier: float) -> dp_event.DpEvent:
    """One round of "update" for k sampled units together; the proof is in `_update`."""
    half = dp_event.GaussianDpEvent(half_multiplier)
    if m.sampling_prob == 1:
        return half
    p = -math.expm1(k * m.local_steps * math.log1p(-m.sampling_prob))
    sampled = dp_event.PoissonSampledDpEvent(p, half)
    overflow = _overflow(m, k)
    if overflow == 0:
        return sampled
    if overflow >= 1:
        return half
    any_step = -math.expm1(m.local_steps * math.log1p(-overflow))
    return events.MixtureDpEvent(events=(sampled, half), probs=(1 - any_step, any_step))


def _group_event(m: MechanismSettings, z: float, k: int) -> dp_event.DpEvent:
    """One step for k sampled units together, without overflow."""
    if m.sampling_prob == 1:
        return dp_event.GaussianDpEvent(z / k)
    numbers = np.arange(k + 1)
    return dp_event.MixtureOfGaussiansDpEvent(
        standard_deviation=z,
        sensitivities=tuple(float(j) for j in numbers),
        sampling_probs=tuple(float(p) for p in stats.binom.pmf(numbers, k, m.sampling_prob)),
    )


def _overflow(m: MechanismSettings, k: int) -> float:
    """P(the other n-k units leave no room for k more) in one step: what k coins can matter to."""
    if m.capacity >= m.num_units or m.relation == "add_or_remove":
        return 0.0
    return float(stats.binom.sf(m.capacity - k, m.num_units - k, m.sampling_prob))


def conversion_capacity(n: int, q: float, k: int) -> int:
    """The smallest capacity that k units of one patient never find too small, but for 1e-30."""
    k = min(k, n)
    return min(n, k + sampling.default_capacity(n - k, q, CONVERSION_TAIL))


def _overflows(m: MechanismSettings, k: int) -> str:
    return (
        f"a step overflows its capacity {m.capacity} with probability {_overflow(m, k):.1e} > "
        f"{CONVERSION_TAIL:g}; raise the capacity to "
        f"{conversion_capacity(m.num_units, m.sampling_prob, k)}"
    )


def _no_conversion(m: MechanismSettings) -> str:
    if m.max_units_per_patient is not None:
        return ""
    return (
        f"no public, enforced cap of {m.unit}s per patient is known; give max_units_per_patient, "
        "or use unit patient"
    )


def _repeat(event: dp_event.DpEvent, times: int) -> dp_event.DpEvent:
    return event if times == 1 else dp_event.SelfComposedDpEvent(event, times)
