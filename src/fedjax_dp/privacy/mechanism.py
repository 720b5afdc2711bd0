"""The mechanism of one client: one object makes the sampler, the noise and the accountant's event.

The sampler that runs and the one that is accounted cannot disagree, because `Mechanism.sample` and
`Mechanism.guarantees` read the same sampling probability, capacity and steps.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from dp_accounting import dp_event
from scipy import stats

from fedjax_dp.data import sampling
from fedjax_dp.privacy import accounting

Placement = Literal["none", "dp_sgd", "update"]
Unit = Literal["tile", "slide", "patient"]

CONVERSION_TAIL = 1e-30
"""Overflow probability per step below which a mixture-of-Gaussians conversion stands."""

SERVER_ADVERSARY = "the server, and whoever sees anything it sends on"


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

    def epsilon(self, rounds: int, delta: float) -> float:
        """Epsilon of `rounds` rounds at `delta`; infinite where the row is not valid."""
        if self.event is None:
            return math.inf
        return accounting.epsilon(self.event, rounds, delta, self.accountant_relation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism:
    """Sampling, clipping, noise and accounting of one client, as one immutable value.

    All numbers here are public, the site's number of units among them; they are printed in the
    statement.

    Attributes:
        placement: "dp_sgd", noise on the clipped sum of every local step; "update", noise on the
            clipped model update once a round; "none", no privacy.
        unit: what is sampled and, for "dp_sgd", clipped and protected.
        num_units: units of the site, n_k.
        sampling_prob: probability of each unit in each step, q_k in (0, 1].
        capacity: the most units in a step; a draw above it is cut uniformly.
        local_steps: steps of a round, L.
        tiles_per_unit: the most tiles of a unit in a step, T; 1 for unit "tile".
        l2_clip_norm: of a unit's gradient ("dp_sgd", C) or of the update ("update", S).
        noise_multiplier: noise standard deviation over `l2_clip_norm`, z; 0 for "none".
        max_units_per_patient: k, the public and ENFORCED cap of units one patient owns; None where
            patients are unknown or nothing enforces a cap. 1 by definition for unit "patient".
        is_stateless: whether the client keeps nothing computed from its data between rounds
            (momentum, control variates, error feedback, personal layers).
        relation: "zero_out": the unit's contribution becomes zero, n_k stays.
    """

    placement: Placement
    unit: Unit
    num_units: int
    sampling_prob: float
    capacity: int
    local_steps: int
    tiles_per_unit: int = 1
    l2_clip_norm: float
    noise_multiplier: float
    max_units_per_patient: int | None = None
    is_stateless: bool = True
    relation: Literal["zero_out"] = "zero_out"

    def __post_init__(self) -> None:
        for name, choices in (
            ("placement", get_args(Placement)),
            ("unit", get_args(Unit)),
            ("relation", ("zero_out",)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"Expected {name} in {choices}, got {getattr(self, name)!r}.")
        for name in ("num_units", "capacity", "local_steps", "tiles_per_unit"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"Expected {name} >= 1, got {getattr(self, name)}. Leave a site without units "
                    "out of training."
                )
        if not 0 < self.sampling_prob <= 1:
            raise ValueError(
                f"Expected 0 < sampling_prob <= 1, got {self.sampling_prob} for "
                f"{self.num_units} units. Lower privacy.expected_batch_size."
            )
        if self.capacity > self.num_units:
            raise ValueError(
                f"Expected capacity <= num_units, got {self.capacity} > {self.num_units}."
            )
        if self.unit == "tile" and self.tiles_per_unit != 1:
            raise ValueError(f"Expected tiles_per_unit 1 for unit tile, got {self.tiles_per_unit}.")
        if self.max_units_per_patient is not None and self.max_units_per_patient < 1:
            raise ValueError(
                f"Expected max_units_per_patient >= 1 or None, got {self.max_units_per_patient}."
            )
        if self.placement == "none":
            if self.noise_multiplier != 0:
                raise ValueError(
                    f"Expected noise_multiplier 0 for placement none, got {self.noise_multiplier}."
                )
            if not self.l2_clip_norm > 0:
                raise ValueError(f"Expected l2_clip_norm > 0, got {self.l2_clip_norm}.")
            return
        for name in ("noise_multiplier", "l2_clip_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(
                    f"Expected a finite {name} > 0 for placement {self.placement}, got {value}. "
                    'Without noise or clip there is no guarantee: use placement "none" for that.'
                )

    def sample(
        self,
        rng: np.random.Generator,
        unit_tiles: Sequence[np.ndarray],
        num_slots: int | None = None,
    ) -> sampling.Plan:
        """Draws the plan of one round: THE sampler that `guarantees` accounts for.

        Args:
            rng: the client's sampling generator of this round.
            unit_tiles: for each of the `num_units` units, its tiles as indices into the pool.
            num_slots: U of the plan; `capacity` where None.

        Returns:
            The plan with S = local_steps, T = tiles_per_unit.

        Raises:
            ValueError: the number of units is not the accounted one.
        """
        if len(unit_tiles) != self.num_units:
            raise ValueError(
                f"Expected the {self.num_units} units that are accounted, got {len(unit_tiles)}."
            )
        return sampling.draw_plan(
            rng,
            unit_tiles,
            sampling_prob=self.sampling_prob,
            capacity=self.capacity,
            local_steps=self.local_steps,
            tiles_per_unit=self.tiles_per_unit,
            num_slots=num_slots,
        )

    @property
    def expected_batch_size(self) -> float:
        """q_k n_k: the public number that a noised sum is divided by."""
        return self.sampling_prob * self.num_units

    @property
    def sensitivity(self) -> float:
        """L2 sensitivity of what is noised, under the headline's relation."""
        return math.inf if self.placement == "none" else self.l2_clip_norm

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of the noise added to the SUM ("dp_sgd") or the update ("update")."""
        return 0.0 if self.placement == "none" else self.noise_multiplier * self.sensitivity

    @property
    def headline(self) -> Guarantee:
        """The row that calibration, budget and progress bar refer to."""
        return self.guarantees()[0]

    @property
    def patient_guarantee(self) -> Guarantee:
        """The row that protects a whole patient; not valid, with a reason, where none does."""
        return next(g for g in self.guarantees() if g.unit == "patient")

    def epsilon(self, rounds: int, delta: float) -> float:
        """The headline's epsilon after `rounds` rounds."""
        return self.headline.epsilon(rounds, delta)

    def max_rounds(self, target_epsilon: float, delta: float) -> int:
        """Rounds within the headline's budget; the next one would exceed it."""
        if self.headline.event is None:
            return 0
        return accounting.max_rounds(self.headline.event, target_epsilon, delta)

    def guarantees(self) -> tuple[Guarantee, ...]:
        """Every guarantee of this client, the headline first; the functions below prove them."""
        if self.placement == "dp_sgd":
            return _dp_sgd_guarantees(self)
        if self.placement == "update":
            return _update_guarantees(self)
        reason = "placement none adds no noise"
        units = dict.fromkeys((self.unit, "patient"))
        return tuple(
            Guarantee(
                name=unit,
                adversary=SERVER_ADVERSARY,
                unit=unit,
                relation="zero_out",
                sensitivity=math.inf,
                event=None,
                reason=reason,
            )
            for unit in units
        )

    def descriptor(self) -> dict[str, Any]:
        """A JSON-serialisable description; `mechanism_from_descriptor` rebuilds the mechanism."""
        fields = dataclasses.asdict(self)
        if math.isinf(self.l2_clip_norm):
            fields["l2_clip_norm"] = "infinity"
        return fields

    def fingerprint(self) -> str:
        """Hash of the description, for ledgers: equal mechanisms alone have equal ones."""
        body = json.dumps(self.descriptor(), sort_keys=True).encode()
        return hashlib.blake2b(body, digest_size=16).hexdigest()


def mechanism_from_descriptor(descriptor: Mapping[str, Any]) -> Mechanism:
    """Rebuilds the mechanism that `Mechanism.descriptor` described."""
    fields = dict(descriptor)
    fields["l2_clip_norm"] = float(fields["l2_clip_norm"])  # also of "infinity"
    return Mechanism(**fields)


class MechanismSet(NamedTuple):
    """Mechanisms of all clients, and what a user should know before trusting them."""

    mechanisms: dict[str, Mechanism]
    warnings: tuple[str, ...]

    @property
    def num_slots(self) -> int:
        """The largest capacity: U of the shape that all clients share."""
        return max(mechanism.capacity for mechanism in self.mechanisms.values())


def make_mechanisms(
    num_units: Mapping[str, int],
    *,
    placement: Placement,
    unit: Unit,
    expected_batch_size: float,
    local_steps: int,
    rounds: int,
    l2_clip_norm: float = math.inf,
    noise_multiplier: float | None = None,
    target_epsilon: float | None = None,
    target_delta: float = 1e-5,
    tiles_per_unit: int = 1,
    capacity: int | None = None,
    max_units_per_patient: int | None = None,
    is_stateless: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
) -> MechanismSet:
    """Builds one mechanism per client from public numbers.

    Every client draws `expected_batch_size` units a step on average, so unlike sites differ in
    their sampling probability; with `target_epsilon` each is calibrated by itself, so that all
    reach the target and none pays for another's size.

    Args:
        num_units: client -> n_k, public.
        placement: see `Mechanism`.
        unit: see `Mechanism`.
        expected_batch_size: units per step; a smaller site draws all its units in every step.
        local_steps: L.
        rounds: rounds that `target_epsilon` must last.
        l2_clip_norm: clip of a unit's gradient or of the update; unused by "none".
        noise_multiplier: z of every client; exclusive with `target_epsilon`.
        target_epsilon: headline epsilon after `rounds` rounds at `target_delta`.
        target_delta: in (0, 1).
        tiles_per_unit: T.
        capacity: of every client (at most its n_k); where None, what a draw exceeds with
            probability 1e-7, or 1e-30 where a patient conversion needs it.
        max_units_per_patient: k; see `Mechanism`.
        is_stateless: see `Mechanism`.
        cache_dir: where calibrations are kept between runs.

    Returns:
        The mechanisms in the order of `num_units`, and warnings.

    Raises:
        ValueError: an argument is missing, superfluous or out of range; the message names the
            client where it concerns one.
    """
    if not num_units:
        raise ValueError("Expected at least one client in num_units.")
    if not expected_batch_size > 0:
        raise ValueError(f"Expected expected_batch_size > 0, got {expected_batch_size=}.")
    if rounds < 1:
        raise ValueError(f"Expected rounds >= 1, got {rounds=}.")
    if not 0 < target_delta < 1:
        raise ValueError(f"Expected 0 < target_delta < 1, got {target_delta=}.")
    is_private = placement != "none"
    if is_private and (noise_multiplier is None) == (target_epsilon is None):
        raise ValueError(
            f"Expected exactly one of noise_multiplier and target_epsilon for {placement=}, got "
            f"{noise_multiplier=}, {target_epsilon=}."
        )

    mechanisms: dict[str, Mechanism] = {}
    warnings: list[str] = []
    for client, n in num_units.items():
        n = int(n)  # a NumPy integer would not go through JSON
        if n < 1:
            raise ValueError(f"Expected units at {client=}, got {n}. Leave it out of training.")
        if expected_batch_size > n:
            warnings.append(
                f"{client}: {n} units are fewer than expected_batch_size {expected_batch_size:g}: "
                "every step uses all of them, and sampling amplifies nothing."
            )
        if is_private and target_delta >= 1 / n:
            warnings.append(
                f"{client}: target_delta {target_delta:g} is not below 1/n = 1/{n}: a mechanism "
                "that publishes one unit outright could satisfy it."
            )
        q = min(1.0, expected_batch_size / n)
        size = capacity
        if size is None:
            size = sampling.default_capacity(n, q)
            if placement == "dp_sgd" and unit != "patient" and max_units_per_patient is not None:
                size = max(size, _conversion_capacity(n, q, max_units_per_patient))
        mechanism = Mechanism(
            placement=placement,
            unit=unit,
            num_units=n,
            sampling_prob=q,
            capacity=min(size, n),
            local_steps=local_steps,
            tiles_per_unit=tiles_per_unit,
            l2_clip_norm=l2_clip_norm if is_private else math.inf,
            noise_multiplier=(noise_multiplier or 1.0) if is_private else 0.0,
            max_units_per_patient=max_units_per_patient,
            is_stateless=is_stateless,
        )
        if is_private and noise_multiplier is not None and not noise_multiplier > 0:
            raise ValueError(f"Expected noise_multiplier > 0, got {noise_multiplier=}.")
        if is_private and target_epsilon is not None:
            mechanism = _calibrate(mechanism, rounds, target_epsilon, target_delta, cache_dir)
        mechanisms[client] = mechanism
    return MechanismSet(mechanisms, tuple(warnings))


def _calibrate(
    mechanism: Mechanism,
    rounds: int,
    target_epsilon: float,
    target_delta: float,
    cache_dir: str | os.PathLike[str] | None,
) -> Mechanism:
    def make_event(z: float) -> dp_event.DpEvent:
        return dataclasses.replace(mechanism, noise_multiplier=z).headline.event

    z = accounting.calibrate_noise_multiplier(
        make_event, rounds, target_epsilon, target_delta, cache_dir=cache_dir
    )
    return dataclasses.replace(mechanism, noise_multiplier=z)


def _dp_sgd_guarantees(m: Mechanism) -> tuple[Guarantee, ...]:
    """Rows of "dp_sgd".

    Unit, zero-out: each step releases a clipped Poisson sum, cut at the capacity, plus N(0, z C):
    the truncated event, L times. Under zero-out a unit may displace another from a full batch; the
    event's overflow branch (a replacement, 2C) covers that.

    Patient from smaller units: with all k units of a patient zeroed, the sum moves by at most
    (drawn number) x C and the number is Binomial(k, q), which is the mixture of Gaussians. Given
    the others' coins that holds exactly unless a batch overflows, so the overflow probability must
    be nothing: P(Binomial(n-k, q) > capacity - k) <= 1e-30 a step.

    Tile of a larger unit: zeroing one tile replaces the clipped gradient of its unit by another, so
    the unit's event under replace-one covers it. Drawing T of the unit's tiles is not claimed to
    amplify: the pair is a substitution, and its divergence under composition is not that of the
    zero-out pair at probability q T / n_j.
    """
    step = dp_event.TruncatedSubsampledGaussianDpEvent(
        dataset_size=m.num_units,
        sampling_probability=m.sampling_prob,
        truncated_batch_size=m.capacity,
        noise_multiplier=m.noise_multiplier,
    )
    sampled = "units are drawn by Poisson sampling with secret coins, afresh in each step"
    rows = [
        Guarantee(
            name=m.unit,
            adversary=SERVER_ADVERSARY,
            unit=m.unit,
            relation="zero_out",
            sensitivity=m.l2_clip_norm,
            event=_repeat(step, m.local_steps),
            assumptions=(sampled, f"a {m.unit} shares no pixels with another"),
        )
    ]
    if m.unit != "tile":
        rows.append(
            Guarantee(
                name=f"tile_of_{m.unit}",
                adversary=SERVER_ADVERSARY,
                unit="tile",
                relation=f"zero_out or replacement of one tile of a {m.unit}",
                sensitivity=2 * m.l2_clip_norm,
                event=_repeat(step, m.local_steps),
                accountant_relation="replace_one",
                assumptions=(sampled,),
            )
        )
    if m.unit == "patient":
        return tuple(rows)
    event, reason = None, _no_conversion(m)
    k = min(m.max_units_per_patient or 0, m.num_units)
    if not reason:
        overflow = _overflow(m, k)
        if overflow > CONVERSION_TAIL:
            reason = (
                f"a step overflows its capacity {m.capacity} with probability {overflow:.1e} > "
                f"{CONVERSION_TAIL:g}; raise the capacity to "
                f"{_conversion_capacity(m.num_units, m.sampling_prob, k)}"
            )
        else:
            event = _repeat(_group_event(m, k), m.local_steps)
    rows.append(
        Guarantee(
            name="patient",
            adversary=SERVER_ADVERSARY,
            unit="patient",
            relation="zero_out",
            sensitivity=k * m.l2_clip_norm if event else math.inf,
            event=event,
            assumptions=(sampled, f"no patient owns more than {k} units, enforced")
            if event
            else (),
            reason=reason,
        )
    )
    return tuple(rows)


def _update_guarantees(m: Mechanism) -> tuple[Guarantee, ...]:
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
    """
    z, half = m.noise_multiplier, dp_event.GaussianDpEvent(m.noise_multiplier / 2)
    clipped = "the whole update is clipped, and nothing else leaves the client"
    rows = [
        Guarantee(
            name="client",
            adversary=SERVER_ADVERSARY,
            unit="client",
            relation="zero_out",
            sensitivity=m.l2_clip_norm,
            event=dp_event.GaussianDpEvent(z),
            assumptions=(clipped,),
        ),
        Guarantee(
            name="client_replace",
            adversary=SERVER_ADVERSARY,
            unit="client",
            relation="replacement of any of the client's data (local DP)",
            sensitivity=2 * m.l2_clip_norm,
            event=half,
            assumptions=(clipped,),
        ),
    ]
    sizes: dict[str, int | None] = {m.unit: 1}
    if m.unit != "patient":
        sizes["patient"] = m.max_units_per_patient
    for unit, k in sizes.items():
        event: dp_event.DpEvent = half
        assumptions: tuple[str, ...]
        if unit != m.unit and k is None:
            assumptions = (
                clipped,
                "any change of the client's data is within 2S; sampling is not claimed, because no "
                "enforced cap of units per patient is known",
            )
        elif not m.is_stateless:
            assumptions = (clipped, "the client keeps state, so sampling amplifies nothing")
        else:
            event = _record_event(m, min(k or 1, m.num_units))
            assumptions = (
                clipped,
                "fresh secret Poisson draws, a stateless client, public divisors",
            )
            if unit != m.unit:
                assumptions += (f"no patient owns more than {k} units, enforced",)
        rows.append(
            Guarantee(
                name=f"record_{unit}",
                adversary=SERVER_ADVERSARY,
                unit=unit,
                relation="zero_out",
                sensitivity=2 * m.l2_clip_norm,
                event=event,
                assumptions=assumptions,
            )
        )
    return tuple(rows)


def _record_event(m: Mechanism, k: int) -> dp_event.DpEvent:
    """One round of "update" for k sampled units together; the proof is in `_update_guarantees`."""
    half = dp_event.GaussianDpEvent(m.noise_multiplier / 2)
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
    return accounting.MixtureDpEvent(events=(sampled, half), probs=(1 - any_step, any_step))


def _group_event(m: Mechanism, k: int) -> dp_event.DpEvent:
    """One step of "dp_sgd" for k sampled units together, without overflow."""
    if m.sampling_prob == 1:
        return dp_event.GaussianDpEvent(m.noise_multiplier / k)
    numbers = np.arange(k + 1)
    return dp_event.MixtureOfGaussiansDpEvent(
        standard_deviation=m.noise_multiplier,
        sensitivities=tuple(float(j) for j in numbers),
        sampling_probs=tuple(float(p) for p in stats.binom.pmf(numbers, k, m.sampling_prob)),
    )


def _overflow(m: Mechanism, k: int) -> float:
    """P(the other n-k units leave no room for k more) in one step: what k coins can matter to."""
    if m.capacity >= m.num_units:
        return 0.0
    return float(stats.binom.sf(m.capacity - k, m.num_units - k, m.sampling_prob))


def _conversion_capacity(n: int, q: float, k: int) -> int:
    """The smallest capacity at which a patient of k units can be converted."""
    k = min(k, n)
    return min(n, k + sampling.default_capacity(n - k, q, CONVERSION_TAIL))


def _no_conversion(m: Mechanism) -> str:
    if m.max_units_per_patient is not None:
        return ""
    return (
        f"no public, enforced cap of {m.unit}s per patient is known; give max_units_per_patient, "
        "or use unit patient"
    )


def _repeat(event: dp_event.DpEvent, times: int) -> dp_event.DpEvent:
    return event if times == 1 else dp_event.SelfComposedDpEvent(event, times)
