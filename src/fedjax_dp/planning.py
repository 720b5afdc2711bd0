"""What a run would promise and cost, from the outline of its data: nothing is trained or compiled.

The mechanisms are made by `assembly.sites.make_sites`, as those of a run are: the two agree.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedjax_dp.assembly.federation import client_kind
from fedjax_dp.assembly.sites import Sites
from fedjax_dp.config import Config, by_site
from fedjax_dp.data import units
from fedjax_dp.data.federation import Federation
from fedjax_dp.data.tiles import UNKNOWN_PATIENT, TileTable
from fedjax_dp.federated.rounds import Site
from fedjax_dp.models.unet import multiply_adds
from fedjax_dp.privacy.budgets import FEW_UNITS, SHARED_NOISE
from fedjax_dp.privacy.statement import decode, proven

FLOPS_PER_SECOND = 150e9
"""Two CPU cores: 33.6 private tiles of 128 pixels a second (`benchmarks/results/clipping.jsonl`),
at six floating-point operations for each multiply-add of the forward pass."""

_UNPROTECTED = ("none", "update_unclipped")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SitePlan:
    """What one client of a run would have.

    Attributes:
        name: of the client.
        num_units: public number of its units, n.
        num_patients: distinct known patients; None where one is unknown.
        num_tiles: training tiles that units can draw.
        sampling_prob: q.
        noise_multiplier: z.
        rounds_allowed: by its budget; None where there is none.
        epsilon: of the headline after the planned rounds, or as many as the budget allows.
        tile: `privacy.statement.proven` of one tile, for the same rounds.
        patient: the same of one patient.
        noise_to_signal: standard deviation of the noise on one parameter over the largest norm of
            the mean that it is added to; see `noise_to_signal`. None without noise.
        seconds: of computing its part of all rounds.
    """

    name: str
    num_units: int
    num_patients: int | None
    num_tiles: int
    sampling_prob: float
    noise_multiplier: float
    rounds_allowed: int | None
    epsilon: float
    tile: dict[str, Any]
    patient: dict[str, Any]
    noise_to_signal: float | None
    seconds: float


def site_plans(
    config: Config, federation: Federation, made: Sites, tiles_per_second: float
) -> tuple[SitePlan, ...]:
    """The plan of every client.

    Args:
        config: the run's.
        federation: of `assembly.federation.load_outline`, or with pixels, which are not looked at.
        made: of `assembly.sites.make_sites` for it.
        tiles_per_second: trained, by the machine that simulates all clients; > 0.
    """
    if not tiles_per_second > 0:
        raise ValueError(f"Expected tiles_per_second > 0, got {tiles_per_second}.")
    return tuple(
        _plan(config, federation.train, made, site, tiles_per_second) for site in made.sites
    )


def _plan(
    config: Config, table: TileTable, made: Sites, site: Site, tiles_per_second: float
) -> SitePlan:
    m, privacy, settings = site.mechanism, config.privacy, config.federation
    allowed, rounds = None, settings.rounds
    own = by_site(privacy.target_epsilon_by_site, "privacy.target_epsilon_by_site")
    target = own.get(site.name, privacy.target_epsilon)
    if privacy.placement not in _UNPROTECTED and target:
        # What each was calibrated for by itself is where its limit lies; of shared noise it is not.
        start = None if privacy.placement in SHARED_NOISE else settings.rounds
        allowed = m.max_rounds(target, privacy.target_delta, start=start)
        rounds = min(rounds, allowed)
    rows = [row for row in m.guarantees() if row.adversary == m.headline.adversary]
    kind = client_kind(config)
    covering = {
        row.name: row
        for unit in ("tile", "patient")
        for row in rows
        if row.covers(unit, client_is=kind)
    }
    epsilons = {name: row.epsilon(rounds, privacy.target_delta) for name, row in covering.items()}
    patients = table.patient[table.of_site(site.name)]
    return SitePlan(
        name=site.name,
        num_units=m.num_units,
        num_patients=None if (patients == UNKNOWN_PATIENT).any() else len(np.unique(patients)),
        num_tiles=sum(map(len, site.unit_tiles)),
        sampling_prob=m.sampling_prob,
        noise_multiplier=m.noise_multiplier,
        rounds_allowed=allowed,
        epsilon=m.headline.epsilon(rounds, privacy.target_delta),
        tile=proven(rows, epsilons, "tile", kind),
        patient=proven(rows, epsilons, "patient", kind),
        noise_to_signal=noise_to_signal(site, made.sites),
        seconds=rounds * tiles_per_round(config, site, len(made.sites)) / tiles_per_second,
    )


def noise_to_signal(site: Site, sites: Sequence[Site]) -> float | None:
    """Standard deviation of the noise on one parameter, over the largest norm of the mean it is on.

    Both are in units of the clip norm. "dp_sgd": of the site's mean gradient, z / (q n).
    "distributed": of the mean of all sites, which alone is opened, z / sum of q n. "update": of the
    site's update, z. "central": of the mean update, z over the expected sum of weights. Times the
    square root of the number of parameters it compares the norm of the noise with that of the mean.
    None where no noise is added, or nothing bounds the signal.
    """
    m = site.mechanism
    if m.placement in _UNPROTECTED:
        return None
    z = m.sum_noise_multiplier
    if m.placement == "dp_sgd":
        return z / m.expected_batch_size
    if m.placement == "distributed":
        return z / sum(s.mechanism.expected_batch_size for s in sites)
    if m.placement == "central":
        return z / sum(s.mechanism.cohort_prob * s.mechanism.relative_weight for s in sites)
    return z


def tiles_per_round(config: Config, site: Site, num_clients: int) -> float:
    """Tiles that `site`, one of `num_clients`, trains on in a round, on average."""
    m, settings = site.mechanism, config.federation
    tiles = sum(min(m.tiles_per_unit, len(owned)) for owned in site.unit_tiles)
    share = 1.0
    if settings.cohort == "poisson":
        share = settings.cohort_prob
    elif settings.cohort == "fixed":
        share = settings.cohort_size / num_clients
    return share * m.local_steps * m.sampling_prob * tiles * config.objective.multiplicity


def estimated_tiles_per_second(config: Config, num_classes: int) -> float:
    """Tiles trained in a second, from the network's operations at `FLOPS_PER_SECOND`.

    A multiply-add is two operations, and the way back costs twice the way forth.
    """
    model = config.model
    forward = multiply_adds(
        config.data.tile_size, num_classes, base_channels=model.base_channels, depth=model.depth
    )
    return FLOPS_PER_SECOND / (6 * forward)


def advice(
    config: Config, federation: Federation, made: Sites, plans: Sequence[SitePlan]
) -> list[str]:
    """What to think about before the run, each in a line."""
    lines = []
    for plan in plans:
        few = [
            f"{number} {what}{'s' * (number != 1)}"
            for number, what in ((plan.num_units, made.unit), (plan.num_patients, "patient"))
            if number is not None and number <= FEW_UNITS
        ]
        if few:
            lines.append(f"{plan.name}: leave this site out: {' of '.join(dict.fromkeys(few))}")
    lines += _draws(config, made, plans)
    lines += _unit(config, federation.train, made, plans)
    if config.privacy.placement == "distributed":
        lines += _sharing(config, made, plans)
    return lines


def _draws(config: Config, made: Sites, plans: Sequence[SitePlan]) -> list[str]:
    if config.privacy.placement in _UNPROTECTED:
        return ["nothing is promised: epsilon is infinite"]
    lines, delta = [], config.privacy.target_delta
    whole = [p.name for p in plans if p.sampling_prob == 1 and p.num_units > 1]
    if whole and config.privacy.placement != "central":
        lines.append(
            f"{_names(whole)}: every step draws all {made.unit}s, so sampling does not amplify: "
            "lower expected_batch_size"
        )
    wide = [p.name for p in plans if delta >= 1 / p.num_units]
    if wide:
        lines.append(f"{_names(wide)}: delta {delta:g} is not below 1/n: lower delta")
    return lines


def _unit(config: Config, table: TileTable, made: Sites, plans: Sequence[SitePlan]) -> list[str]:
    unknown = units.sites_without_patients(table)
    if made.unit == "patient":
        return []
    if unknown:
        return [
            f"unit patient is impossible: patients are unknown at {_names(unknown)}. Fill the "
            f"column patient, or leave these sites out; until then {made.unit} is what is protected"
            + (" and slide is the larger unit that is known" if made.unit == "tile" else "")
        ]
    worst = [plan.patient for plan in plans]
    if any(found["epsilon"] is None for found in worst):
        beside = "no patient epsilon is valid: set --max_tiles_per_patient"
    else:
        beside = f"a patient's epsilon is up to {max(decode(f['epsilon']) for f in worst):.2f}"
    return [
        f"all patients are known, but the unit is the {made.unit}: {beside}, or use unit patient"
    ]


def _sharing(config: Config, made: Sites, plans: Sequence[SitePlan]) -> list[str]:
    """What the sum of few sites hides, and what it does not."""
    lines = []
    mechanism = made.sites[0].mechanism
    if mechanism.num_shares <= 2 or mechanism.num_shares - mechanism.max_dropouts <= 2:
        lines.append(
            f"{mechanism.num_shares} sites, of which {mechanism.max_dropouts} may drop out, are "
            "few to share noise: who knows one of two messages in a sum sees the other"
        )
    worst = max(range(len(plans)), key=lambda i: plans[i].sampling_prob)
    site, plan = made.sites[worst], plans[worst]
    alone = next(
        row
        for row in site.mechanism.guarantees()
        if row.adversary != site.mechanism.headline.adversary
    )
    rounds = min(config.federation.rounds, plan.rounds_allowed or config.federation.rounds)
    epsilon = alone.epsilon(rounds, config.privacy.target_delta)
    lines.append(f"against {alone.adversary}: epsilon {epsilon:.2f} ({site.name})")
    return lines


def _names(sites: Sequence[str], most: int = 8) -> str:
    more = f" and {len(sites) - most} more" if len(sites) > most else ""
    return ", ".join(sites[:most]) + more
