"""From a configuration to its tiles: whose each is, and which client trains on it."""

import dataclasses
from typing import Any

import numpy as np
from tqdm import tqdm

from fedjax_dp.config import Config, DataConfig, names
from fedjax_dp.data import units
from fedjax_dp.data.federation import Federation, federation_from_manifest
from fedjax_dp.data.outline import outline_from_manifest
from fedjax_dp.data.stored_federation import federation_from_store
from fedjax_dp.data.synthetic import synthetic_federation
from fedjax_dp.reporting.progress import busy

POOLED = "pooled"
"""Name of the one client of centralised training."""


def load_federation(config: Config, *, progress: bool = False) -> Federation:
    """The federation `config.data` names: a tile store's, a manifest's, or the synthetic one.

    Args:
        config: the run's.
        progress: whether to show a bar while tiles are drawn.

    Raises:
        ValueError: the manifest is wrong (all findings in one error), or a size does not fit.
    """
    _check_tile_size(config)
    data = config.data
    if data.store:
        federation = _open(config, with_pixels=True)
    elif data.manifest:
        with busy("Reading and checking the manifest", show=progress):
            federation = _read(config)
    else:
        with tqdm(unit="tile", desc="drawing", disable=not progress, dynamic_ncols=True) as bar:
            federation = _draw(config, bar)
        chosen = {"train_sites": names(data.train_sites), "external": names(data.external_sites)}
        if any(chosen.values()):
            raise ValueError(
                f"Expected data.train_sites and data.external_sites empty without a manifest, got "
                f"{chosen}. The synthetic federation's sites have fixed roles."
            )
    if not len(federation.train):
        raise ValueError(f"Expected training tiles in {federation.name}, got none.")
    return federation


def load_outline(config: Config) -> Federation:
    """The federation `config.data` names without its pixels: whose each tile is, and no more.

    Raises:
        ValueError: as of `load_federation`, as far as it can be seen without pixels; or
            `data.min_tissue` is set, which only pixels can tell.
    """
    _check_tile_size(config)
    data = config.data
    if data.store:
        return _open(config, with_pixels=False)
    if not data.manifest:
        return _draw(config, None)
    if data.min_tissue:
        raise ValueError(
            f"Expected data.min_tissue 0 for an outline, got {data.min_tissue}: which tiles hold "
            "tissue, only their pixels tell."
        )
    return outline_from_manifest(
        data.manifest,
        tile_size=data.tile_size,
        stride=data.stride or None,
        class_names=names(data.class_names),
        train_sites=names(data.train_sites),
        external_sites=names(data.external_sites),
    )


def _check_tile_size(config: Config) -> None:
    side, tile_size = 2**config.model.depth, config.data.tile_size
    if tile_size < side or tile_size % side:
        raise ValueError(
            f"Expected data.tile_size to be a multiple of 2**model.depth = {side}, got {tile_size}."
        )


def _open(config: Config, *, with_pixels: bool) -> Federation:
    """The federation of a tile store, whose recipe nothing here may contradict."""
    data, default = config.data, DataConfig()
    names_of_manifests = ("manifest", "stride", "min_tissue", "label_mode", "class_names")
    changed = [
        f"data.{name}={getattr(data, name)!r}"
        for name in names_of_manifests
        if getattr(data, name) != getattr(default, name)
    ]
    if changed:
        raise ValueError(
            f"Expected none of {', '.join(changed)} beside data.store: the store was prepared with "
            "its own. Leave them out, or prepare another store."
        )
    return federation_from_store(
        data.store,
        tile_size=data.tile_size,
        train_sites=names(data.train_sites),
        external_sites=names(data.external_sites),
        with_pixels=with_pixels,
    )


def _read(config: Config) -> Federation:
    data = config.data
    return federation_from_manifest(
        data.manifest,
        tile_size=data.tile_size,
        stride=data.stride or None,
        min_tissue=data.min_tissue,
        label_mode=data.label_mode,
        class_names=names(data.class_names),
        train_sites=names(data.train_sites),
        external_sites=names(data.external_sites),
    )


def _draw(config: Config, bar: Any) -> Federation:
    """The synthetic federation, whose progress a bar shows; where that is None, its outline."""

    def progress(drawn: int, total: int) -> None:
        bar.total = total
        bar.update(drawn - bar.n)

    data = config.data
    return synthetic_federation(
        seed=data.synthetic_seed,
        task=data.synthetic_task,  # type: ignore[arg-type]
        patients_per_site=data.patients_per_site,
        tiles_per_patient=data.tiles_per_patient,
        tile_size=data.tile_size,
        mpp=data.synthetic_mpp,
        variation=data.synthetic_variation,  # type: ignore[arg-type]
        progress=progress,
        with_pixels=bar is not None,
    )


def client_kind(config: Config) -> str:
    """What a client of the run is: a "site", a "patient", or the "pool" of all sites."""
    return "pool" if config.federation.pooled else config.federation.clients


def with_clients(config: Config, federation: Federation) -> Federation:
    """The federation whose training tiles belong to the clients that the configuration names.

    Raises:
        ValueError: patients shall be clients, and some are unknown.
    """
    settings, train = config.federation, federation.train
    if settings.clients not in ("site", "patient"):
        raise ValueError(
            f"Expected federation.clients 'site' or 'patient', got {settings.clients!r}."
        )
    if settings.pooled:
        return pool_sites(federation)
    if settings.clients == "site":
        return federation
    if unknown := units.sites_without_patients(train):
        raise ValueError(
            "Expected every patient to be known with federation.clients=patient, got unknown ones "
            f"at {', '.join(unknown)}. Fill the manifest's patient column, or leave them out."
        )
    owners, site = np.unique(train.patient, return_inverse=True)
    names_ = tuple(train.patients[owner] for owner in owners)
    train = dataclasses.replace(train, sites=names_, site=site.astype(np.int32))
    return dataclasses.replace(federation, train=train)


def pool_sites(federation: Federation) -> Federation:
    """The same tiles with one client, `POOLED`, that owns all the training tiles."""
    train = federation.train
    train = dataclasses.replace(train, sites=(POOLED,), site=np.zeros(len(train), np.int32))
    return dataclasses.replace(federation, train=train)
