"""Rows of the placements that clip the whole model update: "update" and "central"."""

import dataclasses
import math
from collections.abc import Callable

from dp_accounting import dp_event

from fedjax_dp.privacy import events
from fedjax_dp.privacy.guarantees import (
    ANY_REPLACEMENT,
    COHORT_AVERAGE,
    MODEL,
    SERVER,
    Guarantee,
)
from fedjax_dp.privacy.overflow import overflow_prob
from fedjax_dp.privacy.settings import MechanismSettings


def of_update(m: MechanismSettings) -> tuple[Guarantee, ...]:
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


def of_central(m: MechanismSettings) -> tuple[Guarantee, ...]:
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


def _record_event(m: MechanismSettings, k: int, half_multiplier: float) -> dp_event.DpEvent:
    """One round of "update" for k sampled units together; the proof is in `of_update`."""
    half = dp_event.GaussianDpEvent(half_multiplier)
    if m.sampling_prob == 1:
        return half
    p = -math.expm1(k * m.local_steps * math.log1p(-m.sampling_prob))
    sampled = dp_event.PoissonSampledDpEvent(p, half)
    overflow = overflow_prob(m, k)
    if overflow == 0:
        return sampled
    if overflow >= 1:
        return half
    any_step = -math.expm1(m.local_steps * math.log1p(-overflow))
    return events.MixtureDpEvent(events=(sampled, half), probs=(1 - any_step, any_step))
