"""From a configuration to the objects of a run: federation, sites, compiled programs."""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from fedjax_dp.checkpoint import load_params
from fedjax_dp.config import Config, names
from fedjax_dp.data import units
from fedjax_dp.data.federation import Federation, federation_from_manifest
from fedjax_dp.data.sampling import draw_cohort
from fedjax_dp.data.synthetic import synthetic_federation
from fedjax_dp.data.tiles import UNKNOWN_PATIENT, TileTable
from fedjax_dp.evaluation import Evaluator
from fedjax_dp.federated import cohort
from fedjax_dp.federated.algorithms.base import FederatedAlgorithm, ServerState
from fedjax_dp.federated.algorithms.fed_avg import fed_avg
from fedjax_dp.federated.client import client_update
from fedjax_dp.federated.rounds import Site
from fedjax_dp.models.layers import default_conv_variant
from fedjax_dp.models.unet import unet
from fedjax_dp.optimizers import make_optimizer
from fedjax_dp.privacy.mechanism import make_mechanisms
from fedjax_dp.reporting.progress import busy
from fedjax_dp.segmentation.objective import segmentation_loss
from fedjax_dp.typing import ApplyFn, TilePool

POOLED = "pooled"
"""Name of the one client of centralised training."""


def load_federation(config: Config, *, progress: bool = False) -> Federation:
    """The federation `config.data` names: a manifest's, or the synthetic one.

    Args:
        config: the run's.
        progress: whether to show a bar while tiles are drawn.

    Raises:
        ValueError: the manifest is wrong (all findings in one error), or a size does not fit.
    """
    data = config.data
    side = 2**config.model.depth
    if data.tile_size < side or data.tile_size % side:
        raise ValueError(
            f"Expected data.tile_size to be a multiple of 2**model.depth = {side}, got "
            f"{data.tile_size}."
        )
    if data.manifest:
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


def pool_sites(federation: Federation) -> Federation:
    """The same tiles with one client, `POOLED`, that owns all the training tiles."""
    train = federation.train
    train = dataclasses.replace(train, sites=(POOLED,), site=np.zeros(len(train), np.int32))
    return dataclasses.replace(federation, train=train)


def _draw(config: Config, bar: Any) -> Federation:
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
    )


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


def make_sites(config: Config, federation: Federation, *, cache_dir: str | None = None) -> Sites:
    """Units, mechanisms and public weights of every site.

    Args:
        config: the run's.
        federation: with the training tiles.
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
    units.check_unit(table, unit, tiles_overlap=federation.tiles_overlap)
    if privacy.max_tiles_per_patient:
        table = cap_tiles(table, privacy.max_tiles_per_patient)
    unit_tiles = {site: units.unit_index(table, site, unit).tiles for site in table.sites}
    made = make_mechanisms(
        {site: len(tiles) for site, tiles in unit_tiles.items()},
        placement=privacy.placement,  # type: ignore[arg-type]
        unit=unit,  # type: ignore[arg-type]
        expected_batch_size=privacy.expected_batch_size,
        local_steps=config.federation.local_steps,
        rounds=config.federation.rounds,
        l2_clip_norm=privacy.l2_clip_norm,
        noise_multiplier=privacy.noise_multiplier or None,
        target_epsilon=None if privacy.noise_multiplier else privacy.target_epsilon,
        target_delta=privacy.target_delta,
        tiles_per_unit=1 if unit == "tile" else privacy.tiles_per_unit,
        max_units_per_patient=_units_cap(config, table, unit),
        cache_dir=cache_dir,
    )
    if config.federation.weights not in ("units", "uniform"):
        raise ValueError(
            f"Expected federation.weights 'units' or 'uniform', got {config.federation.weights!r}."
        )
    sites = tuple(
        Site(
            name=name,
            unit_tiles=unit_tiles[name],
            mechanism=mechanism,
            weight=float(len(unit_tiles[name])) if config.federation.weights == "units" else 1.0,
        )
        for name, mechanism in made.mechanisms.items()
    )
    draw_cohort(  # a trial, so that a mistake is told here and not in the first round
        np.random.default_rng(0),
        len(sites),
        mode=config.federation.cohort,  # type: ignore[arg-type]
        size=config.federation.cohort_size or None,
        prob=config.federation.cohort_prob or None,
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


def _units_cap(config: Config, table: TileTable, unit: str) -> int | None:
    """k, the most units of one patient, where it is enforced; None where nothing enforces one."""
    if unit == "patient":
        return 1
    if units.sites_without_patients(table):
        return None
    return config.privacy.max_tiles_per_patient or None


class Programs(NamedTuple):
    """What runs on the devices: every function compiled, once, before the first round.

    Attributes:
        begin: see `FederatedAlgorithm`.
        visit: see `FederatedAlgorithm`.
        finish: see `FederatedAlgorithm`.
        evaluator: counts pixels.
        compile_seconds: of all of them.
    """

    begin: Callable[..., Any]
    visit: Callable[..., Any]
    finish: Callable[..., Any]
    evaluator: Evaluator
    compile_seconds: float


class Device(NamedTuple):
    """The device side of a run before anything is compiled.

    Attributes:
        mesh: devices of the `clients` axis.
        plan: the resolved execution plan, for the environment's hash and for people.
        algorithm: the federated algorithm.
        apply: the model.
        state: the initial state, on the devices.
        pool: the training tiles, on the devices.
    """

    mesh: Mesh
    plan: dict[str, Any]
    algorithm: FederatedAlgorithm
    apply: ApplyFn
    state: ServerState
    pool: TilePool


def make_device(config: Config, federation: Federation, init_key: Any) -> Device:
    """Model, algorithm, initial state and tile pool, placed on the devices.

    Args:
        config: the run's.
        federation: its training tiles become the pool.
        init_key: typed key of the initial parameters.
    """
    execution, settings = config.execution, config.federation
    mesh = cohort.client_mesh(execution.devices)
    variant = execution.conv_variant
    if variant == "auto":
        variant = default_conv_variant(jax.default_backend())
    # A loop over single units is fastest on CPU; a GPU wants many at once.
    on_cpu = jax.default_backend() == "cpu"
    microbatch_size = execution.microbatch_size or (1 if on_cpu else 32)
    model = config.model
    init, apply = unet(
        len(federation.class_names),
        base_channels=model.base_channels,
        depth=model.depth,
        num_groups=model.num_groups,
        standardize=model.standardize,
        conv_variant=variant,  # type: ignore[arg-type]
    )
    update = client_update(
        segmentation_loss(apply, **vars(config.objective)),
        make_optimizer(
            settings.client_optimizer, settings.client_learning_rate, settings.client_momentum
        ),
        placement=config.privacy.placement,  # type: ignore[arg-type]
        microbatch_size=microbatch_size,
    )
    if settings.server_schedule not in ("constant", "cosine"):
        raise ValueError(
            "Expected federation.server_schedule 'constant' or 'cosine', got "
            f"{settings.server_schedule!r}."
        )
    algorithm = fed_avg(
        update,
        make_optimizer(
            settings.server_optimizer,
            settings.server_learning_rate,
            settings.server_momentum,
            decay_steps=settings.rounds if settings.server_schedule == "cosine" else 0,
        ),
        ema_decay=settings.ema_decay,
        clients_per_block=execution.clients_per_block,
        mesh=mesh,
    )
    params = init(init_key)
    if model.init_from:
        params = load_params(pathlib.Path(model.init_from) / "checkpoints", params)
    everywhere = cohort.replicated(mesh)
    table = federation.train
    return Device(
        mesh=mesh,
        plan={
            "clients_per_block": execution.clients_per_block,
            "microbatch_size": microbatch_size,
            "devices": mesh.size,
            "conv_variant": variant,
        },
        algorithm=algorithm,
        apply=apply,
        state=jax.device_put(algorithm.init(params), everywhere),
        pool=jax.device_put(TilePool(table.images, table.labels), everywhere),
    )


def compile_programs(config: Config, device: Device, chunk: cohort.CohortChunk) -> Programs:
    """Compiles every program for the shapes of `chunk`, ahead of the first round.

    Args:
        config: the run's.
        device: from `make_device`.
        chunk: a chunk of the shapes and sharding that every call will have.
    """
    start = time.perf_counter()
    algorithm, state = device.algorithm, device.state
    everywhere, by_client = cohort.replicated(device.mesh), cohort.by_client(device.mesh)
    begin = jax.jit(algorithm.begin, out_shardings=everywhere).lower(state).compile()
    acc = begin(state)
    visit = (
        jax.jit(algorithm.visit, donate_argnums=0, out_shardings=(everywhere, by_client, by_client))
        .lower(acc, state, chunk, device.pool)
        .compile()
    )
    # The state is not donated: a run that is stopped between call and assignment still has it.
    finish = jax.jit(algorithm.finish, out_shardings=everywhere).lower(state, acc).compile()
    evaluator = Evaluator(
        device.apply,
        state.params,
        tile_size=config.data.tile_size,
        batch_size=config.execution.eval_batch_size,
        mesh=device.mesh,
    )
    return Programs(begin, visit, finish, evaluator, time.perf_counter() - start)
