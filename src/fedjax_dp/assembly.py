"""From a configuration to the objects of a run: federation, sites, compiled programs."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from fedjax_dp.checkpoint import load_params
from fedjax_dp.config import Config, by_site, names
from fedjax_dp.data import units
from fedjax_dp.data.federation import Federation, federation_from_manifest
from fedjax_dp.data.outline import outline_from_manifest
from fedjax_dp.data.sampling import draw_cohort
from fedjax_dp.data.synthetic import synthetic_federation
from fedjax_dp.data.tiles import UNKNOWN_PATIENT, TileTable
from fedjax_dp.evaluation import Evaluator
from fedjax_dp.federated import cohort
from fedjax_dp.federated.aggregators import noised_sum, secure_sum
from fedjax_dp.federated.algorithms.base import FederatedAlgorithm, ServerState
from fedjax_dp.federated.algorithms.fed_avg import fed_avg
from fedjax_dp.federated.algorithms.opened_sum import opened_sum
from fedjax_dp.federated.client import client_update
from fedjax_dp.federated.rounds import Site
from fedjax_dp.federated.share import masked_share
from fedjax_dp.models.layers import default_conv_variant
from fedjax_dp.models.unet import unet
from fedjax_dp.optimizers import make_optimizer
from fedjax_dp.privacy.adaptive_clipping import adaptive_clipping
from fedjax_dp.privacy.budgets import SiteBudget, make_mechanisms
from fedjax_dp.privacy.fixed_point import fixed_point
from fedjax_dp.privacy.mechanism import Mechanism
from fedjax_dp.privacy.noise import NOISE_REACH
from fedjax_dp.reporting.progress import busy
from fedjax_dp.segmentation.objective import segmentation_loss
from fedjax_dp.typing import ApplyFn, ServerRelease, TilePool

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
    _check_tile_size(config)
    data = config.data
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


def load_outline(config: Config) -> Federation:
    """The federation `config.data` names without its pixels: whose each tile is, and no more.

    Raises:
        ValueError: as of `load_federation`, as far as it can be seen without pixels; or
            `data.min_tissue` is set, which only pixels can tell.
    """
    _check_tile_size(config)
    data = config.data
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
    units.check_unit(table, unit, tiles_overlap=federation.tiles_overlap)
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
        num_words: length of a message under secure aggregation.
    """

    mesh: Mesh
    plan: dict[str, Any]
    algorithm: FederatedAlgorithm
    apply: ApplyFn
    state: ServerState
    pool: TilePool
    num_words: int


class Model(NamedTuple):
    """The network of a run.

    Attributes:
        init: `init(key) -> params`.
        apply: see `typing.ApplyFn`.
        dimension: number of parameters.
        conv_variant: resolved.
    """

    init: Callable[[Any], Any]
    apply: ApplyFn
    dimension: int
    conv_variant: str


def make_model(config: Config, num_classes: int) -> Model:
    """The network that `config.model` describes."""
    variant = config.execution.conv_variant
    if variant == "auto":
        variant = default_conv_variant(jax.default_backend())
    model = config.model
    init, apply = unet(
        num_classes,
        base_channels=model.base_channels,
        depth=model.depth,
        num_groups=model.num_groups,
        standardize=model.standardize,
        conv_variant=variant,  # type: ignore[arg-type]
    )
    shapes = jax.eval_shape(init, jax.random.key(0))
    return Model(init, apply, sum(leaf.size for leaf in jax.tree.leaves(shapes)), variant)


def make_device(
    config: Config, federation: Federation, model: Model, sites: Sites, init_key: Any
) -> Device:
    """Algorithm, initial state and tile pool, placed on the devices.

    Args:
        config: the run's.
        federation: its training tiles become the pool.
        model: from `make_model`.
        sites: from `make_sites`.
        init_key: typed key of the initial parameters.
    """
    execution = config.execution
    mesh = cohort.client_mesh(execution.devices)
    # A loop over single units is fastest on CPU; a GPU wants many at once.
    on_cpu = jax.default_backend() == "cpu"
    microbatch_size = execution.microbatch_size or (1 if on_cpu else 32)
    params = model.init(init_key)
    if config.model.init_from:
        params = load_params(pathlib.Path(config.model.init_from) / "checkpoints", params)
    algorithm = _algorithm(config, model, sites, params, mesh, microbatch_size)
    everywhere = cohort.replicated(mesh)
    table = federation.train
    return Device(
        mesh=mesh,
        plan={
            "clients_per_block": execution.clients_per_block,
            "microbatch_size": microbatch_size,
            "devices": mesh.size,
            "conv_variant": model.conv_variant,
        },
        algorithm=algorithm,
        apply=model.apply,
        state=jax.device_put(algorithm.init(params), everywhere),
        pool=jax.device_put(TilePool(table.images, table.labels), everywhere),
        num_words=model.dimension + config.privacy.adaptive_clip,
    )


def _algorithm(
    config: Config, model: Model, sites: Sites, params: Any, mesh: Mesh, microbatch_size: int
) -> FederatedAlgorithm:
    settings, privacy = config.federation, config.privacy
    loss_fn = segmentation_loss(model.apply, **vars(config.objective))
    if settings.server_schedule not in ("constant", "cosine"):
        raise ValueError(
            "Expected federation.server_schedule 'constant' or 'cosine', got "
            f"{settings.server_schedule!r}."
        )
    server_optimizer = make_optimizer(
        settings.server_optimizer,
        settings.server_learning_rate,
        settings.server_momentum,
        decay_steps=settings.rounds if settings.server_schedule == "cosine" else 0,
    )
    adaptive = None
    if privacy.adaptive_clip:
        adaptive = adaptive_clipping(privacy.clip_quantile, privacy.clip_learning_rate)
    common: dict[str, Any] = {
        "ema_decay": settings.ema_decay,
        "clients_per_block": config.execution.clients_per_block,
        "mesh": mesh,
        "adaptive": adaptive,
        "num_sites": len(sites.sites),
    }
    if privacy.placement == "distributed":
        encoding = _encoding([site.mechanism for site in sites.sites])
        share = masked_share(
            loss_fn, microbatch_size=microbatch_size, is_adaptive=adaptive is not None, **encoding
        )
        opened = secure_sum(params, encoding["step"], has_count=adaptive is not None)
        return opened_sum(share, server_optimizer, opened, **common)
    update = client_update(
        loss_fn,
        make_optimizer(
            settings.client_optimizer, settings.client_learning_rate, settings.client_momentum
        ),
        placement=privacy.placement,  # type: ignore[arg-type]
        microbatch_size=microbatch_size,
        is_adaptive=adaptive is not None,
    )
    if privacy.placement == "central":
        return opened_sum(update, server_optimizer, noised_sum(), **common)
    return fed_avg(update, server_optimizer, **common)


def _encoding(mechanisms: Sequence[Mechanism]) -> dict[str, Any]:
    """How messages become words, from public numbers, with room for all of them in a word.

    Under "add_or_remove" a site may draw more units than are declared; a sum that leaves its word
    then comes back modulo 2**32, which guards what is guarded and spoils that coordinate.
    """
    first = mechanisms[0]
    if first.noise == "discrete_gaussian":
        return {"step": 1.0 / first.levels, "levels": first.levels}
    # A share is largest when the fewest clients are left to share.
    share = first.share_stddev(first.min_sharing) / first.l2_clip_norm
    reach = max(m.capacity for m in mechanisms) + NOISE_REACH * share
    count = max(m.count_share_stddev(first.min_sharing) for m in mechanisms)
    max_abs = max(reach, max(m.capacity for m in mechanisms) / 2 + NOISE_REACH * count)
    return {"step": fixed_point(max_abs, len(mechanisms)).step}


def compile_programs(
    config: Config, device: Device, chunk: cohort.CohortChunk, release: ServerRelease
) -> Programs:
    """Compiles every program for the shapes of `chunk`, ahead of the first round.

    Args:
        config: the run's.
        device: from `make_device`.
        chunk: a chunk of the shapes and sharding that every call will have.
        release: a release of the shapes that every call will have.
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
    finish = (
        jax.jit(algorithm.finish, out_shardings=everywhere).lower(state, acc, release).compile()
    )
    evaluator = Evaluator(
        device.apply,
        state.params,
        tile_size=config.data.tile_size,
        batch_size=config.execution.eval_batch_size,
        mesh=device.mesh,
    )
    return Programs(begin, visit, finish, evaluator, time.perf_counter() - start)
