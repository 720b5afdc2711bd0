"""From a configuration and its tiles to the clients of a run: units, mechanisms, public weights."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fedjax_dp.config import Config, by_site
from fedjax_dp.data import units
from fedjax_dp.data.federation import Federation
from fedjax_dp.data.sampling import draw_cohort
from fedjax_dp.data.tiles import UNKNOWN_PATIENT, TileTable
from fedjax_dp.federated.rounds import Site
from fedjax_dp.privacy.budgets import SiteBudget, make_mechanisms
from fedjax_dp.privacy.mechanism import Mechanism


class Sites(NamedTuple):
    """The clients of a run, and what its user should know of them.

    Attributes:
        sites: one a client.
        unit: the unit of privacy, resolved.
        unit_note: how it was chosen.
        warnings: of the mechanisms.
    """

    sites: tuple[Site, ...]
    unit: str
    unit_note: str
    warnings: tuple[str, ...]


def make_sites(
    config: Config,
    federation: Federation,
    *,
    dimension: int | None = None,
    cache_dir: str | None = None,
) -> Sites:
    """Units, mechanisms and public weights of every site.

    Args:
        config: the run's.
        federation: with the training tiles.
        dimension: number of parameters; needed by the discrete Gaussian alone.
        cache_dir: where calibrations are kept.

    Raises:
        ValueError: the data cannot honour the unit, or a privacy setting is out of range.
    """
    privacy, table = config.privacy, federation.train
    unit, note = privacy.unit, "as configured"
    if unit == "auto":
        unit = units.largest_known_unit(table)
        note = "patient, known at every training site"
        if unit == "slide":
            unknown = ", ".join(units.sites_without_patients(table))
            note = f"privacy unit as known: the source image (patients unknown at {unknown})"
    units.check_unit(
        table,
        unit,
        tiles_overlap=federation.tiles_overlap,
        slides_decide=federation.slides_decide,
    )
    if privacy.max_tiles_per_patient:
        table = cap_tiles(table, privacy.max_tiles_per_patient)
    unit_tiles = {site: units.unit_index(table, site, unit).tiles for site in table.sites}
    num_units = {site: len(tiles) for site, tiles in unit_tiles.items()}
    _check_cohort(config, len(num_units))
    settings = config.federation
    weights = _weights(config, num_units)
    made = make_mechanisms(
        num_units,
        placement=privacy.placement,  # type: ignore[arg-type]
        unit=unit,  # type: ignore[arg-type]
        expected_batch_size=None if privacy.sampling_prob else privacy.expected_batch_size,
        sampling_prob=privacy.sampling_prob or None,
        local_steps=settings.local_steps,
        rounds=settings.rounds,
        l2_clip_norm=privacy.l2_clip_norm,
        noise_multiplier=privacy.noise_multiplier or None,
        target_epsilon=None if privacy.noise_multiplier else privacy.target_epsilon,
        target_delta=privacy.target_delta,
        tiles_per_unit=1 if unit == "tile" else privacy.tiles_per_unit,
        max_units_per_patient=_units_cap(config, table, unit),
        relation=privacy.relation,  # type: ignore[arg-type]
        nominal_num_units=privacy.nominal_num_units or None,
        noise=privacy.noise,  # type: ignore[arg-type]
        dimension=dimension,
        max_dropouts=privacy.max_dropouts,
        cohort_prob=(settings.cohort_prob or 1.0) if privacy.placement == "central" else 1.0,
        weights=weights,
        is_adaptive=privacy.adaptive_clip,
        protects=privacy.protects,  # type: ignore[arg-type]
        is_equal_average=settings.cohort == "all" and settings.weights == "uniform",
        budgets=_budgets(config),
        cache_dir=cache_dir,
    )
    if settings.weights == "inverse_variance":
        weights = {name: _precision(mechanism) for name, mechanism in made.mechanisms.items()}
    sites = tuple(
        Site(
            name=name,
            unit_tiles=unit_tiles[name],
            mechanism=mechanism,
            weight=weights[name],
            index=index,
        )
        for index, (name, mechanism) in enumerate(made.mechanisms.items())
    )
    return Sites(sites, unit, note, made.warnings)


def cap_tiles(table: TileTable, cap: int) -> TileTable:
    """`table` without the tiles beyond the first `cap` of each known patient.

    The cap is public and enforced, so that a guarantee for tiles has a conversion for patients.
    Which tiles stay depends on that patient's tiles alone.
    """
    if cap < 1:
        raise ValueError(f"Expected privacy.max_tiles_per_patient >= 0, got {cap}.")
    keep = np.ones(len(table), bool)
    for patient in np.unique(table.patient[table.patient != UNKNOWN_PATIENT]):
        keep[np.flatnonzero(table.patient == patient)[cap:]] = False
    site = np.where(keep, table.site, -1).astype(np.int32)
    return dataclasses.replace(table, site=site)


def _check_cohort(config: Config, num_clients: int) -> None:
    """Tells a mistake here and not in the first round."""
    settings, placement = config.federation, config.privacy.placement
    draw_cohort(  # a trial
        np.random.default_rng(0),
        num_clients,
        mode=settings.cohort,  # type: ignore[arg-type]
        size=settings.cohort_size or None,
        prob=settings.cohort_prob or None,
    )
    allowed = {"distributed": ("all",), "central": ("all", "poisson")}
    if settings.cohort not in allowed.get(placement, (settings.cohort,)):
        raise ValueError(
            f"Expected federation.cohort in {allowed[placement]} for placement {placement}, got "
            f"{settings.cohort!r}: that is what its accounting is proven for."
        )
    if not 0 <= settings.dropout_prob < 1 or (settings.dropout_prob and placement != "distributed"):
        raise ValueError(
            "Expected 0 <= federation.dropout_prob < 1, and 0 without placement distributed, got "
            f"{settings.dropout_prob}."
        )


def _weights(config: Config, num_units: Mapping[str, int]) -> dict[str, float]:
    """Public weights of the clients; those by precision follow the noise, and come later."""
    weights, privacy = config.federation.weights, config.privacy
    if weights not in ("units", "uniform", "inverse_variance"):
        raise ValueError(
            "Expected federation.weights 'units', 'uniform' or 'inverse_variance', got "
            f"{weights!r}."
        )
    if weights == "units" and privacy.relation == "add_or_remove":
        raise ValueError(
            "Expected federation.weights 'uniform' under the relation add_or_remove, got 'units': "
            "there the number of units is private."
        )
    if weights == "inverse_variance" and privacy.placement not in ("dp_sgd", "update"):
        raise ValueError(
            "Expected federation.weights 'units' or 'uniform' for placement "
            f"{privacy.placement}, got 'inverse_variance': no delta there has noise of its own."
        )
    is_by_units = weights == "units"
    return {name: float(n) if is_by_units else 1.0 for name, n in num_units.items()}


def _precision(mechanism: Mechanism) -> float:
    """1 / variance of the noise on the client's delta, up to a factor that all have in common."""
    divisor = mechanism.expected_batch_size if mechanism.placement == "dp_sgd" else 1.0
    return (divisor / mechanism.noise_stddev) ** 2


def _budgets(config: Config) -> dict[str, SiteBudget]:
    fields = ("target_epsilon", "noise_multiplier", "sampling_prob")
    given = {
        field: by_site(getattr(config.privacy, f"{field}_by_site"), f"privacy.{field}_by_site")
        for field in fields
    }
    sites = dict.fromkeys(site for numbers in given.values() for site in numbers)
    return {
        site: SiteBudget(**{field: numbers.get(site) for field, numbers in given.items()})
        for site in sites
    }


def _units_cap(config: Config, table: TileTable, unit: str) -> int | None:
    """k, the most units of one patient, where it is enforced; None where nothing enforces one."""
    if unit == "patient":
        return 1
    if units.sites_without_patients(table):
        return None
    return config.privacy.max_tiles_per_patient or None
