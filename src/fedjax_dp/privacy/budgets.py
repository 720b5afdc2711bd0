"""From public numbers and budgets to the mechanisms of all clients."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from fedjax_dp.data import sampling
from fedjax_dp.privacy.mechanism import Mechanism
from fedjax_dp.privacy.overflow import conversion_capacity
from fedjax_dp.privacy.settings import MAX_LEVELS, UNITWISE, Noise, Placement, Relation, Unit

FEW_UNITS = 3
"""Up to so many units a guarantee for one of them, or a site's contribution, means little."""

SHARED_NOISE: tuple[Placement, ...] = ("distributed", "central")
"""Placements whose noise all clients have in common: one multiplier for all."""

COUNT_SHARE = 1 / 20
"""Noise of the adaptive clip's count over the expected count (Andrew et al. 2021, section 3.3)."""


class MechanismSet(NamedTuple):
    """Mechanisms of all clients, and what a user should know before trusting them."""

    mechanisms: dict[str, Mechanism]
    warnings: tuple[str, ...]

    @property
    def num_slots(self) -> int:
        """The largest capacity: U of the shape that all clients share."""
        return max(mechanism.capacity for mechanism in self.mechanisms.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteBudget:
    """What one client has of its own; None = as all others.

    Attributes:
        target_epsilon: its budget.
        noise_multiplier: its z; not for placements that share their noise.
        sampling_prob: its q.
    """

    target_epsilon: float | None = None
    noise_multiplier: float | None = None
    sampling_prob: float | None = None


def make_mechanisms(
    num_units: Mapping[str, int],
    *,
    placement: Placement,
    unit: Unit,
    expected_batch_size: float | None = None,
    sampling_prob: float | None = None,
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
    relation: Relation = "zero_out",
    nominal_num_units: int | None = None,
    noise: Noise = "gaussian",
    dimension: int | None = None,
    max_dropouts: int = 0,
    cohort_prob: float = 1.0,
    weights: Mapping[str, float] | None = None,
    is_adaptive: bool = False,
    is_equal_average: bool = False,
    protects: Literal["client", "unit"] = "client",
    budgets: Mapping[str, SiteBudget] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> MechanismSet:
    """Builds one mechanism per client from public numbers.

    By default every client draws `expected_batch_size` units a step on average, so unlike sites
    differ in their sampling probability; with `target_epsilon` each is calibrated by itself, so
    that all reach the target and none pays for another's size. Where the noise is shared
    ("distributed", "central") the client that needs most decides for all.

    Args:
        num_units: client -> n_k, public.
        placement: see `MechanismSettings`.
        unit: see `MechanismSettings`.
        expected_batch_size: units per step; a smaller site draws all its units in every step.
        sampling_prob: q of every client, instead of `expected_batch_size`.
        local_steps: L.
        rounds: rounds that `target_epsilon` must last.
        l2_clip_norm: clip of a unit's gradient or of the update; unused by "none".
        noise_multiplier: z of every client; exclusive with `target_epsilon`.
        target_epsilon: headline epsilon after `rounds` rounds at `target_delta`.
        target_delta: in (0, 1).
        tiles_per_unit: T.
        capacity: of every client (at most its n_k); where None, what a draw exceeds with
            probability 1e-7, or 1e-30 where a row needs it.
        max_units_per_patient: k; see `MechanismSettings`.
        is_stateless: see `MechanismSettings`.
        relation: "add_or_remove" needs `sampling_prob` and `nominal_num_units`, declared without a
            look at the data.
        nominal_num_units: n of every client under "add_or_remove": the divisor is q n.
        noise: see `MechanismSettings`.
        dimension: see `MechanismSettings`.
        max_dropouts: see `MechanismSettings`.
        cohort_prob: see `MechanismSettings`.
        weights: client -> public weight in the server's sum, for "central" (default: equal).
        is_adaptive: whether the clip norm adapts; the count's noise is a twentieth of what is
            counted on average.
        is_equal_average: whether every round averages all clients with equal weights.
        protects: see `MechanismSettings`.
        budgets: client -> what it has of its own.
        cache_dir: where calibrations are kept between runs.

    Returns:
        The mechanisms in the order of `num_units`, and warnings.

    Raises:
        ValueError: an argument is missing, superfluous or out of range; the message names the
            client where it concerns one.
    """
    budgets = budgets or {}
    is_private = placement != "none"
    if not num_units:
        raise ValueError("Expected at least one client in num_units.")
    if rounds < 1:
        raise ValueError(f"Expected rounds >= 1, got {rounds=}.")
    if not 0 < target_delta < 1:
        raise ValueError(f"Expected 0 < target_delta < 1, got {target_delta=}.")
    if unknown := sorted(set(budgets) - set(num_units)):
        raise ValueError(
            f"Expected budgets of training sites {sorted(num_units)}, got also {unknown}."
        )
    if relation == "add_or_remove" and (sampling_prob is None or nominal_num_units is None):
        raise ValueError(
            "Expected sampling_prob and nominal_num_units under the relation add_or_remove, got "
            f"{sampling_prob=}, {nominal_num_units=}. There the number of units is private: "
            "declare both without looking at the data."
        )
    if (expected_batch_size is None) == (sampling_prob is None):
        raise ValueError(
            "Expected exactly one of expected_batch_size and sampling_prob, got "
            f"{expected_batch_size=}, {sampling_prob=}."
        )
    if expected_batch_size is not None and not expected_batch_size > 0:
        raise ValueError(f"Expected expected_batch_size > 0, got {expected_batch_size=}.")
    if is_private and (noise_multiplier is None) == (target_epsilon is None):
        raise ValueError(
            f"Expected exactly one of noise_multiplier and target_epsilon for {placement=}, got "
            f"{noise_multiplier=}, {target_epsilon=}."
        )
    if placement == "update_unclipped" and noise_multiplier is None:
        raise ValueError(
            f"Expected noise_multiplier for {placement=}, got {target_epsilon=}: no noise gives an "
            "epsilon to what nothing clips."
        )
    if is_private and noise_multiplier is not None and not noise_multiplier > 0:
        raise ValueError(
            f"Expected noise_multiplier > 0, got {noise_multiplier=}. Give target_epsilon to have "
            "it calibrated."
        )
    if relation == "add_or_remove":  # nothing below sees the private numbers
        num_units = dict.fromkeys(num_units, int(nominal_num_units or 0))
    levels = MAX_LEVELS if noise == "gaussian" else _levels(num_units, dimension or 0)
    heaviest = max(weights.values()) if weights else 1.0
    mechanisms: dict[str, Mechanism] = {}
    warnings: list[str] = []
    for client, n in num_units.items():
        n = int(n)  # a NumPy integer would not go through JSON
        if n < 1:
            raise ValueError(f"Expected units at {client=}, got {n}. Leave it out of training.")
        own = budgets.get(client, SiteBudget())
        _check_own(client, own)
        z = own.noise_multiplier
        if z is None and own.target_epsilon is None:
            z = noise_multiplier
        q = own.sampling_prob if own.sampling_prob is not None else sampling_prob
        if q is None:
            q = min(1.0, (expected_batch_size or 0.0) / n)
        mechanism = _named(client, Mechanism)(
            placement=placement,
            unit=unit,
            num_units=n,
            sampling_prob=q,
            capacity=_capacity(capacity, n, q, placement, unit, max_units_per_patient, noise),
            local_steps=local_steps,
            tiles_per_unit=tiles_per_unit,
            l2_clip_norm=l2_clip_norm if is_private else math.inf,
            noise_multiplier=(1.0 if z is None else z) if is_private else 0.0,
            max_units_per_patient=max_units_per_patient,
            is_stateless=is_stateless,
            relation=relation,
            num_shares=len(num_units) if placement == "distributed" else 1,
            max_dropouts=max_dropouts,
            noise=noise,
            dimension=dimension,
            levels=levels,
            protects=protects,
            cohort_prob=cohort_prob,
            relative_weight=weights[client] / heaviest
            if weights and placement == "central"
            else 1.0,
        )
        target = own.target_epsilon if own.target_epsilon is not None else target_epsilon
        if is_private and z is None and target is not None:
            calibrated = _named(client, mechanism.calibrated)
            mechanism = calibrated(rounds, target, target_delta, cache_dir)
        mechanisms[client] = mechanism
        warnings += _warnings(client, mechanism, target_delta, len(num_units))
    if placement in SHARED_NOISE:
        mechanisms = _with_shared_noise(mechanisms, budgets)
    if is_adaptive:
        mechanisms = _with_counts(mechanisms)
    if placement == "update" and is_equal_average and not budgets:
        mechanisms = _averaged(mechanisms)
    return MechanismSet(mechanisms, tuple(warnings))


def _check_own(client: str, own: SiteBudget) -> None:
    """Refuses numbers of one client that are out of range, or contradict each other."""
    if own.target_epsilon is not None and own.noise_multiplier is not None:
        raise ValueError(
            f"Expected target_epsilon or noise_multiplier of {client=}, got both: "
            f"{own.target_epsilon}, {own.noise_multiplier}."
        )
    for name in ("target_epsilon", "noise_multiplier"):
        value = getattr(own, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"Expected a finite {name} > 0 of {client=}, got {value}.")
    if own.sampling_prob is not None and not 0 < own.sampling_prob <= 1:
        raise ValueError(f"Expected 0 < sampling_prob <= 1 of {client=}, got {own.sampling_prob}.")


def _named(client: str, make: Callable[..., Mechanism]) -> Callable[..., Mechanism]:
    """`make`, whose errors name the client."""

    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Mechanism:
        try:
            return make(*args, **kwargs)
        except ValueError as error:
            raise ValueError(f"{client}: {error}") from error

    return made


def _capacity(
    given: int | None,
    n: int,
    q: float,
    placement: Placement,
    unit: Unit,
    max_units_per_patient: int | None,
    noise: Noise,
) -> int:
    if given is not None:
        return min(given, n)
    size = sampling.default_capacity(n, q)
    if placement in UNITWISE and noise == "discrete_gaussian":
        size = max(size, conversion_capacity(n, q, 1))
    if placement in UNITWISE and unit != "patient" and max_units_per_patient is not None:
        size = max(size, conversion_capacity(n, q, max_units_per_patient))
    return min(size, n)


def _levels(num_units: Mapping[str, int], dimension: int) -> int:
    """The most integer steps of a clip norm for which no sum of all units leaves a 32-bit word.

    Half of the word is left for the noise, which is far smaller.
    """
    units, levels = sum(num_units.values()), MAX_LEVELS
    while units * (levels + math.sqrt(dimension) / 2) >= 2**30 and levels > 2:
        levels //= 2
    return levels


def _averaged(mechanisms: Mapping[str, Mechanism]) -> dict[str, Mechanism]:
    """All averaged over all, where their noise is the same, and where all leave together."""
    alike = {(m.noise_multiplier, m.l2_clip_norm, m.headline.event) for m in mechanisms.values()}
    over = len(mechanisms) if len(alike) == 1 else 1
    return {c: dataclasses.replace(m, averaged_over=over) for c, m in mechanisms.items()}


def _with_shared_noise(
    mechanisms: Mapping[str, Mechanism], budgets: Mapping[str, SiteBudget]
) -> dict[str, Mechanism]:
    """All with the largest multiplier: the noise on a sum is one."""
    own = sorted(c for c, budget in budgets.items() if budget.noise_multiplier is not None)
    if own:
        raise ValueError(
            f"Expected one noise_multiplier for all clients, got others for {own}: they share the "
            "noise of one sum. Give these sites a target_epsilon or a sampling_prob instead."
        )
    z = max(mechanism.noise_multiplier for mechanism in mechanisms.values())
    return {c: dataclasses.replace(m, noise_multiplier=z) for c, m in mechanisms.items()}


def _with_counts(mechanisms: Mapping[str, Mechanism]) -> dict[str, Mechanism]:
    """All with the noise of the count that adapts their clip norm."""
    first = next(iter(mechanisms.values()))
    if first.placement == "central":
        counted = dict.fromkeys(mechanisms, first.cohort_prob * len(mechanisms))
    else:
        counted = {client: m.expected_batch_size for client, m in mechanisms.items()}
        if first.placement == "distributed":
            counted = dict.fromkeys(mechanisms, sum(counted.values()))
    return {
        client: _named(client, dataclasses.replace)(
            mechanism, count_noise_stddev=COUNT_SHARE * counted[client]
        )
        for client, mechanism in mechanisms.items()
    }


def _warnings(client: str, m: Mechanism, target_delta: float, num_clients: int) -> list[str]:
    if m.placement == "none":
        return []
    found = []
    # Among how many the protected one hides: clients in the sum of the trusted server, units in
    # their site.
    is_client_of_sum = m.placement == "central" and m.protects == "client"
    n, what = (num_clients, "client") if is_client_of_sum else (m.num_units, m.unit)
    if m.sampling_prob == 1 and m.num_units > 1 and not is_client_of_sum:
        found.append(
            f"{client}: every step uses all of its {m.num_units} units, and sampling amplifies "
            "nothing."
        )
    if target_delta >= 1 / n:
        found.append(
            f"{client}: target_delta {target_delta:g} is not below 1/n = 1/{n}: a mechanism "
            f"that publishes one {what} outright could satisfy it."
        )
    if n <= FEW_UNITS:
        advice = "Leave the site out of training, or protect a smaller unit and say so."
        if is_client_of_sum:
            advice = "Add clients, or protect their units (protects=unit) and say so."
        elif m.placement != "central":  # whose noise is one, whatever a site's size
            advice = f"The noise outweighs what the site contributes. {advice}"
        found.append(
            f"{client}: with {n} {what}{'s' if n > 1 else ''} a guarantee for one of them hides "
            f"it among hardly anyone. {advice}"
        )
    return found
