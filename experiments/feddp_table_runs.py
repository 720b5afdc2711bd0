"""The runs behind `experiments.feddp_table`: from one configuration to that of every row."""

import copy
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from dp_accounting import dp_event

from fedjax_dp import results, training
from fedjax_dp.assembly.federation import load_federation
from fedjax_dp.config import Config
from fedjax_dp.data.federation import Federation
from fedjax_dp.data.units import largest_known_unit
from fedjax_dp.privacy.calibration import calibrate_noise_multiplier

BASELINE = "fedavg"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The flags of `experiments.feddp_table`, of the same names."""

    seeds: tuple[int, ...] = (0, 1, 2)
    epsilons: tuple[float, ...] = (8.0, 3.0)
    rows: tuple[str, ...] = ()
    tiles_per_round: float = 192.0
    fedavg_steps: int = 4
    fedavg_learning_rate: float = 1e-3
    update_clip_norm: float = 3e-4


class Planned(NamedTuple):
    """One row before it is run.

    Attributes:
        name: of the row.
        config: of its runs, but for the seed.
        site: whose tiles alone are trained on; empty = all sites'.
    """

    name: str
    config: Config
    site: str = ""


class Row(NamedTuple):
    """One row of the table: the finished runs of a way of training.

    Attributes:
        name: of the row.
        folders: of its finished runs by seed; of "alone" one a site.
        planned: how many runs it has when it is complete.
    """

    name: str
    folders: dict[int, list[pathlib.Path]]
    planned: int


def plan(config: Config, options: Options, federation: Federation) -> list[Planned]:
    """What each row runs, the most telling first.

    Args:
        config: data, model, objective, unit, clip norm of a unit, delta, rounds and the server of
            the private rows.
        options: seeds, epsilons and sizes.
        federation: of `config.data`.

    Raises:
        ValueError: a row that is named is none, or fewer tiles than one a site and step.
    """
    sites = [site for site in federation.train.sites if len(federation.train.of_site(site))]
    unit = config.privacy.unit
    if unit == "auto":
        unit = largest_known_unit(federation.train)
    units = {"tile": len(federation.train), "slide": len(set(federation.train.slide.tolist())),
             "patient": len(set(federation.train.patient.tolist()))}[unit]  # fmt: skip
    of_unit = len(federation.train) / units if unit != "tile" else 1.0
    of_unit = min(of_unit, config.privacy.tiles_per_unit)
    per_round = options.tiles_per_round / of_unit  # units
    batch = per_round / len(sites)
    if batch < options.fedavg_steps:
        raise ValueError(
            f"Expected --tiles_per_round of at least a unit a site and step, got "
            f"{options.tiles_per_round} for {len(sites)} sites, {options.fedavg_steps} steps and "
            f"{of_unit:.3g} tiles a {unit}."
        )
    local = {
        "federation.local_steps": options.fedavg_steps,
        "federation.client_optimizer": "adam",
        "federation.client_learning_rate": options.fedavg_learning_rate,
        "federation.client_momentum": 0.9,
        "federation.server_optimizer": "sgd",
        "federation.server_learning_rate": 1.0,
        "federation.server_momentum": 0.0,
        "federation.server_schedule": "constant",
        "privacy.expected_batch_size": batch / options.fedavg_steps,
    }
    no_privacy = local | {"privacy.placement": "none"}
    update = local | {"privacy.l2_clip_norm": options.update_clip_norm}

    def made(settings: dict[str, Any]) -> Config:
        new = copy.deepcopy(config)
        for name, value in ({"privacy.unit": unit} | settings).items():
            section, field = name.split(".")
            setattr(getattr(new, section), field, value)
        return new

    planned = [Planned(BASELINE, made(no_privacy))]
    for epsilon in options.epsilons:
        target = {"privacy.target_epsilon": epsilon}
        probability = {"privacy.sampling_prob": min(1.0, per_round / units)}
        planned += [
            Planned(f"distributed-{epsilon:g}", made(
                target | probability | {"privacy.placement": "distributed"})),
            Planned(f"dp_sgd-{epsilon:g}", made(
                target | {"privacy.placement": "dp_sgd", "privacy.expected_batch_size": batch})),
        ]  # fmt: skip
    steps = max(1, round(options.fedavg_steps * len(sites) / 2))
    planned.append(Planned("centralised", made(no_privacy | {
        "federation.pooled": True, "federation.local_steps": steps,
        "privacy.expected_batch_size": per_round / steps,
    })))  # fmt: skip
    for epsilon in options.epsilons:
        settings = {"privacy.placement": "update", "privacy.target_epsilon": epsilon}
        planned.append(Planned(f"update-{epsilon:g}", made(update | settings)))
    # The noise that `update` has at the first epsilon, and nothing that bounds what it hides.
    multiplier = calibrate_noise_multiplier(
        dp_event.GaussianDpEvent,
        config.federation.rounds,
        options.epsilons[0],
        config.privacy.target_delta,
    )
    planned.append(Planned("update_unclipped", made(update | {
        "privacy.placement": "update_unclipped", "privacy.noise_multiplier": multiplier,
        "privacy.target_epsilon": 0.0,
    })))  # fmt: skip
    scored = {site for site in sites if len(federation.test.of_site(site))}
    planned += [Planned("alone", made(no_privacy), site) for site in sites if site in scored]
    known = list(dict.fromkeys(row.name for row in planned))
    if unknown := sorted(set(options.rows) - set(known)):
        raise ValueError(f"Expected --rows among {', '.join(known)}, got {', '.join(unknown)}.")
    return [row for row in planned if not options.rows or row.name in options.rows]


def rows(config: Config, options: Options, folder: pathlib.Path, *, train: bool) -> list[Row]:
    """Trains what has not finished, all seeds of a row before the next; then finds what there is.

    Raises:
        ValueError: a setting does not fit the data.
        Stopped: SIGINT or SIGTERM came; the run at work is saved.
    """
    federation = load_federation(config, progress=True)
    planned = plan(config, options, federation)
    if train:
        total = len(planned) * len(options.seeds)
        for number, (row, seed) in enumerate(
            ((row, seed) for row in planned for seed in options.seeds), start=1
        ):
            where = _folder(folder, row, seed)
            print(f"\n[{number}/{total}] {where.relative_to(folder)}", flush=True)
            training.run(
                dataclasses.replace(row.config, seed=seed),
                where,
                experiment=row.name,
                federation=_alone(federation, row.site) if row.site else federation,
            )
    found: dict[str, Row] = {}
    for row in planned:
        entry = found.setdefault(row.name, Row(row.name, {}, 0))
        found[row.name] = entry._replace(planned=entry.planned + len(options.seeds))
        for seed in options.seeds:
            where = _folder(folder, row, seed)
            if results.finished(where) is not None:
                entry.folders.setdefault(seed, []).append(where)
    return list(found.values())


def _folder(folder: pathlib.Path, row: Planned, seed: int) -> pathlib.Path:
    name = f"{row.name}-{row.site}" if row.site else row.name
    return folder / name / f"seed-{seed}"


def _alone(federation: Federation, site: str) -> Federation:
    """The federation of one training site, scored on all the others' tiles too."""
    table = federation.train
    index = table.of_site(site)
    pixels: Sequence[str] = ("images", "labels", "site", "slide", "patient")
    chosen = {name: np.asarray(getattr(table, name))[index] for name in pixels}
    chosen["site"] = np.zeros(len(index), np.int32)
    train = dataclasses.replace(table, **chosen, sites=(site,), digest=b"")
    sources = tuple(source for source in federation.sources if source.site == site)
    return dataclasses.replace(federation, train=train, sources=sources)
