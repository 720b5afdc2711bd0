"""Rows of the placements that clip each unit's gradient: "dp_sgd" and "distributed"."""

import dataclasses
import math
from fractions import Fraction

import attr
import numpy as np
from dp_accounting import dp_event
from scipy import stats

from fedjax_dp.privacy import discrete_gaussian, events
from fedjax_dp.privacy.guarantees import SERVER, SHARES, SUM, Guarantee
from fedjax_dp.privacy.overflow import CONVERSION_TAIL, overflow_prob, overflow_reason
from fedjax_dp.privacy.settings import MechanismSettings


def of_dp_sgd(m: MechanismSettings) -> tuple[Guarantee, ...]:
    """Rows of "dp_sgd": whatever the client computes from its noised steps is post-processing."""
    return _unitwise(m, m.noise_multiplier, SERVER)


def of_distributed(m: MechanismSettings) -> tuple[Guarantee, ...]:
    """Rows of "distributed".

    Each of K clients adds a share of standard deviation z C / sqrt(K - d). The opened sum of h >=
    K - d messages holds noise of z C sqrt(h / (K - d)) >= z C: the event of z is charged whatever
    h was, an upper bound. Given everything that other sites contribute, one unit of this site
    moves the sum as it moves its site's own, so the rows are those of "dp_sgd".

    Who sees a share alone, or subtracts those of all others, sees z / sqrt(K - d). Later rounds of
    fewer sites have larger shares, so K at the start is the worst.

    Fixed-point words: rounding a message to its grid and adding modulo 2^32 is done to each share,
    not to the sum; on the Gaussian path that rounding (some 2^-17 of the noise and less) is outside
    the proof, as floating point is. On the discrete path all is integers: what is opened is the
    exact sum modulo 2^32, and the bound is Kairouz et al. 2021, through zCDP, amplified by Renyi
    DP.
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
    replace-one covers it. Drawing T of the unit's tiles is not claimed to amplify: the pair is a
    substitution, and its divergence under composition is not that of the zero-out pair at
    probability q T / n_j.

    On the discrete path that replacement is of one quantised gradient by another, each of which has
    its integer norm checked, so the integer sum moves by at most twice the integer sensitivity. Its
    Renyi divergence is bounded by way of the sum without the unit, as far from either as the unit's
    zeroing allows, at its probability q; or, without amplification, by that of the two sums
    themselves (`renyi.replaced_rdp` proves both). The first needs what the unit's own row needs,
    that no draw is cut. The second does not, for who is cut depends on the coins alone, which both
    worlds share: where a draw may be cut it is what the row states, q = 1 in the event, though the
    unit's own row has no bound.
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
            reason="" if step is not None else overflow_reason(m, 1),
        )
    ]
    if m.unit != "tile":
        rows.append(_tile_of_unit(m, step, shares, adversary, (sampled, *trust)))
    if m.unit == "patient":
        return tuple(rows)
    event, reason = None, _no_conversion(m)
    k = m.max_units_per_patient or 0
    if m.relation == "zero_out":  # the number of units of add_or_remove is nominal, no bound on k
        k = min(k, m.num_units)
    if not reason and m.noise == "discrete_gaussian":
        reason = "no conversion from tiles to patients is proven for the discrete Gaussian"
    if not reason and overflow_prob(m, k) > CONVERSION_TAIL:
        reason = overflow_reason(m, k)
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
        if overflow_prob(m, 1) > CONVERSION_TAIL:
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
    shares: int,
    adversary: str,
    assumptions: tuple[str, ...],
) -> Guarantee:
    if step is None:  # the discrete path's draw may be cut: then no amplification is proven
        step = attr.evolve(_discrete_event(m, shares), sampling_probability=1.0)
    return Guarantee(
        name=f"tile_of_{m.unit}",
        adversary=adversary,
        unit="tile",
        relation=f"zero_out or replacement of one tile of a {m.unit}",
        sensitivity=2 * m.l2_clip_norm,
        event=_repeat(step, m.local_steps),
        accountant_relation="replace_one",
        assumptions=assumptions,
    )


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


def _no_conversion(m: MechanismSettings) -> str:
    if m.max_units_per_patient is not None:
        return ""
    return (
        f"no public, enforced cap of {m.unit}s per patient is known; give max_units_per_patient, "
        "or use unit patient"
    )


def _repeat(event: dp_event.DpEvent, times: int) -> dp_event.DpEvent:
    return event if times == 1 else dp_event.SelfComposedDpEvent(event, times)
