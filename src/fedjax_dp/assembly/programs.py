"""From a configuration and its clients to compiled programs and what lies on the devices."""

import pathlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from fedjax_dp.assembly.devices import make_mesh
from fedjax_dp.assembly.pools import resident_pool, resolve_pool
from fedjax_dp.assembly.sites import Sites
from fedjax_dp.checkpoint import load_params
from fedjax_dp.config import Config
from fedjax_dp.data.federation import Federation
from fedjax_dp.data.tiles import TileArrays
from fedjax_dp.evaluation import Evaluator
from fedjax_dp.federated import cohort
from fedjax_dp.federated.aggregators import noised_sum, secure_sum
from fedjax_dp.federated.algorithms.base import FederatedAlgorithm, ServerState
from fedjax_dp.federated.algorithms.fed_avg import fed_avg
from fedjax_dp.federated.algorithms.opened_sum import opened_sum
from fedjax_dp.federated.client import client_update
from fedjax_dp.federated.packing import Packing, pack, pool_capacity
from fedjax_dp.federated.rounds import client_constants
from fedjax_dp.federated.share import masked_share
from fedjax_dp.models.layers import compute_dtype_on, default_conv_variant
from fedjax_dp.models.unet import unet
from fedjax_dp.optimizers import make_optimizer
from fedjax_dp.privacy.adaptive_clipping import adaptive_clipping
from fedjax_dp.privacy.fixed_point import fixed_point
from fedjax_dp.privacy.mechanism import Mechanism
from fedjax_dp.privacy.noise import NOISE_REACH
from fedjax_dp.segmentation.objective import segmentation_loss
from fedjax_dp.typing import (
    ApplyFn,
    ClientKeys,
    ClientPlan,
    ClientPools,
    ServerRelease,
    TilePool,
)


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
        compute_dtype=compute_dtype_on(jax.default_backend(), model.compute_dtype),
    )
    shapes = jax.eval_shape(init, jax.random.key(0))
    return Model(init, apply, sum(leaf.size for leaf in jax.tree.leaves(shapes)), variant)


class Device(NamedTuple):
    """The device side of a run before anything is compiled.

    Attributes:
        mesh: the devices.
        plan: the resolved execution plan, for the environment's hash and for people.
        algorithm: the federated algorithm.
        apply: the model.
        state: the initial state, on the devices.
        pool: the training tiles, on the devices; None where they are packed.
        num_words: length of a message under secure aggregation.
        packing: how the tiles of a chunk are packed; None where the pool is on the devices.
    """

    mesh: Mesh
    plan: dict[str, Any]
    algorithm: FederatedAlgorithm
    apply: ApplyFn
    state: ServerState
    pool: TilePool | None
    num_words: int
    packing: Packing | None = None


def make_device(
    config: Config,
    federation: Federation,
    model: Model,
    sites: Sites,
    init_key: Any,
    *,
    mesh: Mesh | None = None,
) -> Device:
    """Algorithm, initial state and tile pool, placed on the devices.

    Args:
        config: the run's.
        federation: its training tiles become the pool, or what it is packed from.
        model: from `make_model`.
        sites: from `make_sites`.
        init_key: typed key of the initial parameters.
        mesh: instead of the one that the configuration names.
    """
    execution = config.execution
    mesh = make_mesh(execution, sites) if mesh is None else mesh
    # A loop over single units is fastest on CPU; a GPU wants many at once.
    on_cpu = jax.default_backend() == "cpu"
    microbatch_size = execution.microbatch_size or (1 if on_cpu else 32)
    params = model.init(init_key)
    if config.model.init_from:
        params = load_params(pathlib.Path(config.model.init_from) / "checkpoints", params)
    algorithm = _algorithm(config, model, sites, params, mesh, microbatch_size)
    everywhere = cohort.replicated(mesh)
    table = federation.train
    pool, packing = None, None
    where = resolve_pool(execution.pool, table, mesh)
    if where == "packed":
        packing = Packing(
            TileArrays(table.images, table.labels),
            _capacity(sites),
            cohort.local_slots(mesh, execution.clients_per_block),
        )
    else:
        pool = resident_pool(table, mesh)
    return Device(
        mesh=mesh,
        plan={
            "clients_per_block": execution.clients_per_block,
            "microbatch_size": microbatch_size,
            "devices": mesh.size,
            "devices_per_client": mesh.shape[cohort.UNITS],
            "processes": jax.process_count(),
            "conv_variant": model.conv_variant,
            # The bits are the same, but of two programs no compiler promises that.
            "pool": where,
        },
        algorithm=algorithm,
        apply=model.apply,
        state=cohort.place(algorithm.init(params), everywhere),
        pool=pool,
        num_words=model.dimension + config.privacy.adaptive_clip,
        packing=packing,
    )


def _plan_shape(sites: Sites) -> tuple[int, int, int]:
    """(S, U, T) of every client's plan."""
    mechanism = sites.sites[0].mechanism
    slots = max(site.num_slots for site in sites.sites)
    return mechanism.local_steps, slots, mechanism.tiles_per_unit


def _capacity(sites: Sites) -> int:
    """Room of a client's own pool."""
    return pool_capacity([sum(map(len, s.unit_tiles)) for s in sites.sites], *_plan_shape(sites))


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
            loss_fn,
            microbatch_size=microbatch_size,
            is_adaptive=adaptive is not None,
            axis_name=cohort.UNITS,
            **encoding,
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
        axis_name=cohort.UNITS,
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


class Programs(NamedTuple):
    """What runs on the devices: every function compiled, once, before the first round.

    Attributes:
        begin: `begin(state) -> acc`.
        visit: `visit(acc, state, chunk) -> (acc, client_state, info)`, the chunk as the host
            prepared it, packed where tiles are; `acc` is used up.
        finish: `finish(state, acc, release) -> state`, the release as the host prepared it.
        evaluator: counts pixels.
        compile_seconds: of all of them.
    """

    begin: Callable[..., Any]
    visit: Callable[..., Any]
    finish: Callable[..., Any]
    evaluator: Evaluator
    compile_seconds: float


def compile_programs(
    config: Config, device: Device, chunk: cohort.CohortChunk, release: ServerRelease
) -> Programs:
    """Compiles every program for the shapes of `chunk`, ahead of the first round.

    Args:
        config: the run's.
        device: from `make_device`.
        chunk: a chunk of the shapes that every call will have, on the host and not packed.
        release: a release of the shapes that every call will have, on the host.
    """
    start = time.perf_counter()
    algorithm, state = device.algorithm, device.state
    everywhere, by_client = cohort.replicated(device.mesh), cohort.by_client(device.mesh)

    def opening(release: ServerRelease) -> ServerRelease:
        if len(release.noise_key):
            key = jax.random.wrap_key_data(release.noise_key, impl="threefry2x32")
            release = release._replace(noise_key=key)
        return cohort.place(release, everywhere)

    def placed(chunk: cohort.AnyChunk) -> tuple[cohort.CohortChunk, TilePool | ClientPools | None]:
        there = cohort.place(chunk, by_client)
        if isinstance(there, cohort.PackedChunk):
            return there.cohort, there.pools
        return there, device.pool

    begin = jax.jit(algorithm.begin, out_shardings=everywhere).lower(state).compile()
    acc = begin(state)
    # What clients report goes everywhere: the process that keeps the log cannot reach all devices.
    visit = jax.jit(
        algorithm.visit, donate_argnums=0, out_shardings=(everywhere, by_client, everywhere)
    ).lower(acc, state, *placed(pack(chunk, device.packing)))
    # The state is not donated: a run that is stopped between call and assignment still has it.
    finish = jax.jit(algorithm.finish, out_shardings=everywhere).lower(state, acc, opening(release))
    with ThreadPoolExecutor() as pool:  # XLA compiles without Python's lock
        compiling = pool.submit(visit.compile), pool.submit(finish.compile)
        evaluator = Evaluator(
            device.apply,
            state.params,
            tile_size=config.data.tile_size,
            batch_size=config.execution.eval_batch_size,
            mesh=device.mesh,
        )
        run_visit, run_finish = (program.result() for program in compiling)
    return Programs(
        begin=begin,
        visit=lambda acc, state, chunk: run_visit(acc, state, *placed(chunk)),
        finish=lambda state, acc, release: run_finish(state, acc, opening(release)),
        evaluator=evaluator,
        compile_seconds=time.perf_counter() - start,
    )


def examples(
    device: Device, sites: Sites, clients_per_chunk: int
) -> tuple[cohort.CohortChunk, ServerRelease]:
    """A chunk and a release of the shapes every one has, holding nobody's randomness."""
    mechanism = sites.sites[0].mechanism
    steps, slots, tiles = _plan_shape(sites)
    keys, release = ClientKeys(np.zeros(2, np.uint32), np.zeros(2, np.uint32)), ServerRelease()
    if mechanism.placement == "distributed":
        words = np.zeros(device.num_words, np.uint32)
        keys, release = keys._replace(mask=words), release._replace(unmask=words)
    if mechanism.noise == "discrete_gaussian":
        keys = keys._replace(integer_noise=np.zeros(device.num_words, np.int32))
    if mechanism.placement == "central":
        release = release._replace(noise_key=np.zeros(2, np.uint32))
    client = cohort.CohortChunk(
        keys=keys,
        client_state=(),
        constants=client_constants(mechanism, 1.0),
        plan=ClientPlan(
            np.zeros((steps, slots, tiles), np.int32),
            np.zeros(steps, np.int32),
            np.zeros((steps, slots), np.int32),
        ),
    )
    return cohort.stack_chunk([client] * clients_per_chunk), release
