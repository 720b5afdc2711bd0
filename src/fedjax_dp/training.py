"""The host loop of a run: rounds, epsilon, evaluation, checkpoints; stops and goes on anywhere."""

import contextlib
import hashlib
import math
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from fedjax_dp import processes, results, workdir
from fedjax_dp.assembly import tuning
from fedjax_dp.assembly.federation import load_federation, with_clients
from fedjax_dp.assembly.programs import (
    Device,
    Programs,
    compile_programs,
    examples,
    make_device,
    make_model,
)
from fedjax_dp.assembly.sites import Sites, make_sites
from fedjax_dp.checkpoint import Checkpoints, Position
from fedjax_dp.config import Config, by_site, check, config_hash
from fedjax_dp.data.federation import Federation, fingerprint, site_sources
from fedjax_dp.data.sources import holdings
from fedjax_dp.federated.algorithms.base import ServerState
from fedjax_dp.federated.client import ClientInfo
from fedjax_dp.federated.cohort import num_slots
from fedjax_dp.federated.rounds import ChunkInput, RoundInput, RoundMaker, ahead
from fedjax_dp.interrupts import Stopped, noted_signals
from fedjax_dp.privacy.clipping import UnitSums
from fedjax_dp.privacy.ledger import ChargeLog, Ledger
from fedjax_dp.privacy.secrets import Secrets
from fedjax_dp.privacy.secure_aggregation import AbortedRoundError
from fedjax_dp.registration import register_run
from fedjax_dp.reporting.log import MetricsLog, unwrap_nonprivate
from fedjax_dp.reporting.progress import busy
from fedjax_dp.segmentation.metrics import summarise
from fedjax_dp.typing import NonPrivate


class Run(NamedTuple):
    """What stays the same during a run."""

    config: Config
    folder: pathlib.Path
    experiment: str
    federation: Federation
    sites: Sites
    device: Device
    programs: Programs
    ledger: Ledger
    charges: ChargeLog
    checkpoints: Checkpoints
    log: MetricsLog
    stop: list[int]
    say: Any
    progress: bool


def run(
    config: Config,
    folder: str | os.PathLike[str],
    *,
    experiment: str = "feddp",
    federation: Federation | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Runs an experiment, or goes on with it where its workdir stands.

    Guarantees: a round is charged, durably, before anything of it is computed; the round that would
    exceed a client's budget is never run with that client; stopping at any moment loses at most the
    rounds since the last checkpoint. Resumed with the same machine type, versions and execution
    plan, a run ends with bit-identical parameters and the same ledger as one that was never
    stopped; with others, replayed rounds get fresh noise and are charged again.

    Args:
        config: what to run; it is not changed.
        folder: the workdir, see the README for what lies in it.
        experiment: name for reports.
        federation: tiles to use instead of those `config.data` names.
        progress: whether to show a progress bar and what happens before it.

    Returns:
        The summary, as in `summary.json`; an empty one in a process that does not lead, see
        `processes`.

    Raises:
        ValueError: the configuration, the data or the workdir does not fit; nothing was run.
        RuntimeError: a client's message was not finite; names the round and the client.
        Stopped: SIGINT or SIGTERM came; the last whole round is saved.
    """
    check(config)
    say = tqdm.write if progress else (lambda _: None)
    folder = pathlib.Path(folder)
    cache = config.execution.compilation_cache and pathlib.Path(config.execution.compilation_cache)
    if cache:
        jax.config.update("jax_compilation_cache_dir", str(cache))
    if federation is None:
        federation = load_federation(config, progress=progress)
    by_owner, sources = federation.train, site_sources(federation)
    federation = with_clients(config, federation)
    data_fingerprint = fingerprint(federation)
    workdir.check(folder, experiment, config, data_fingerprint)
    if (finished := results.finished(folder)) is not None:
        say(f"{folder} holds a finished run; its summary is returned.")
        (folder / "secrets").unlink(missing_ok=True)
        return finished
    model = make_model(config, len(federation.class_names))
    with busy("Calibrating noise and capacity", show=progress):
        sites = make_sites(
            config,
            federation,
            dimension=model.dimension,
            cache_dir=str((cache or folder) / "calibration"),
        )
    for line in results.describe(config, federation, sites):
        say(line)
    choice, files = None, []
    if config.execution.auto:
        files = [folder / "plan.json", *([cache / "plan.json"] if cache else [])]
        with busy("Timing execution plans", show=progress):
            choice = _choice(config, federation, sites, files)
        say(tuning.describe(choice))
        config = tuning.with_plan(config, choice.plan)
        model = make_model(config, len(federation.class_names))
    device = make_device(config, federation, model, sites, jax.random.key(max(config.seed, 0)))
    per_chunk = num_slots(device.mesh, config.execution.clients_per_block)
    with busy("Compiling", show=progress):
        chunk, release = examples(device, sites, per_chunk)
        programs = compile_programs(config, device, chunk, release)
    say(f"Compiled in {programs.compile_seconds:.1f} s.")
    if not processes.is_leader():
        processes.follow(programs, device, chunk, release)
        return {}
    held = holdings(by_owner, federation.train, sources)
    with processes.leading(programs) as programs, contextlib.ExitStack() as stack:
        workdir.claim(folder, experiment, config, data_fingerprint)
        if choice is not None:
            tuning.remember(choice, files)
        stop = stack.enter_context(noted_signals())
        this = Run(
            config=config,
            folder=folder,
            experiment=experiment,
            federation=federation,
            sites=sites,
            device=device,
            programs=programs,
            ledger=Ledger.start({s.name: s.mechanism.fingerprint() for s in sites.sites}),
            charges=stack.enter_context(ChargeLog(folder / "charges.jsonl")),
            checkpoints=stack.enter_context(
                contextlib.closing(Checkpoints(folder / "checkpoints"))
            ),
            log=stack.enter_context(contextlib.closing(MetricsLog(folder / "metrics.jsonl"))),
            stop=stop,
            say=say,
            progress=progress,
        )
        return _lead(this, held, data_fingerprint)


def _choice(
    config: Config, federation: Federation, sites: Sites, files: Sequence[pathlib.Path]
) -> tuning.Choice:
    """The execution plan: the workdir's own, so that a replay stays free; the cache's; or timed."""
    plans = tuning.candidates(config, jax.default_backend(), len(sites.sites))
    choice = tuning.Choice(plans[0], {}, "")
    if processes.is_leader():
        choice = tuning.choose(config, federation, sites, remembered=files)
    number = processes.agreed([plans.index(choice.plan)])[0]
    return choice._replace(plan=plans[number])


def _lead(this: Run, held: Any, data_fingerprint: str) -> dict[str, Any]:
    """All rounds that are left, and what is written at the end; returns the summary."""
    config, charges, sites = this.config, this.charges, this.sites.sites
    secrets_path = this.folder / "secrets"
    secrets = _secrets(config, secrets_path, this.sites, is_new=not charges.counts())
    state, position = _start(this)
    limits = _limits(config, this.sites)
    registration = register_run(
        this.folder,
        experiment=this.experiment,
        seed=config.seed,
        tile_size=config.data.tile_size,
        holdings=held,
        mechanisms={site.name: site.mechanism for site in sites},
        charged=charges.counts(),
        rounds_left=config.federation.rounds - position.round,
        limits=limits,
    )
    is_central = config.privacy.placement == "central"
    maker = RoundMaker(
        sites=sites,
        secrets=secrets,
        charges=charges,
        limits=limits,
        # The first parameters too: `model.init_from` names a folder that may change.
        environment=workdir.environment_hash(
            {**this.device.plan, "initial": _digest(this.device.state.params)}
        ),
        context=f"{data_fingerprint}/{config_hash(config)}".encode(),
        clients_per_chunk=num_slots(this.device.mesh, config.execution.clients_per_block),
        # Of "central" the mechanisms hold the probability that is accounted and drawn with.
        cohort_mode="all" if is_central else config.federation.cohort,
        cohort_size=config.federation.cohort_size or None,
        cohort_prob=None if is_central else config.federation.cohort_prob or None,
        num_words=this.device.num_words,
        dropout_prob=config.federation.dropout_prob,
        packing=this.device.packing,
    )
    state, position = _rounds(this, maker, state, position)
    registration.close(charges.counts())
    summary = results.finish(
        this.folder,
        config=config,
        experiment=this.experiment,
        federation=this.federation,
        sites=this.sites,
        evaluator=this.programs.evaluator,
        params=state.averaged_params,
        lines=this.log.lines(),
        charged=charges.counts(),
        position=position,
        compile_seconds=this.programs.compile_seconds,
        across_runs=registration.across_runs(config.privacy.target_delta),
        progress=this.progress,
    )
    if secrets.is_private:
        secrets.destroy(secrets_path)
    return summary


def _rounds(
    this: Run,
    maker: RoundMaker,
    state: ServerState,
    position: Position,
) -> tuple[ServerState, Position]:
    """Runs the rounds that are left; returns the last state and where it stands."""
    config, last = this.config, this.config.federation.rounds
    bar = tqdm(
        total=last, initial=position.round, desc=this.folder.name, unit="round",
        disable=not this.progress, dynamic_ncols=True, smoothing=0.1,
    )  # fmt: skip
    shown: dict[str, str] = {}
    rounds = ahead(maker.make, position.round, last)
    with bar, contextlib.closing(rounds):
        if this.log.last_round is None:
            this.log.append({"round": 0, "nonprivate": _validate(this, state, shown)})
        while True:
            start = time.perf_counter()  # to wait for the host is part of the round
            if (made := next(rounds, None)) is None:
                break
            done = _one_round(this, made, state, bar, shown)
            if done is None:
                this.checkpoints.save(state, position)
                raise Stopped(
                    f"Stopped by signal {this.stop[0]} after round {position.round}, which is "
                    "saved. The same command goes on."
                )
            state, work = done
            seconds = time.perf_counter() - start
            number = made.round_index + 1
            line = _line(this, made, work, seconds, shown)
            if number % config.eval_every == 0 or number == last:
                line["nonprivate"] |= _validate(this, state, shown)
            this.log.append(line)
            position = Position(
                round=number,
                ledger=Ledger.from_json(position.ledger).charge(made.clients).to_json(),
                charge_head=made.charge_head,
                seconds=position.seconds + seconds,
                device_seconds=position.device_seconds + work.device_seconds,
                tiles=position.tiles + work.tiles,
            )
            if number % config.checkpoint_every == 0 or number == last:
                this.checkpoints.save(state, position)
            if number == 1:  # shows early whether masks lie on their tissue
                results.draw_overlays(
                    this.folder, this.federation, this.programs.evaluator, state.averaged_params
                )
            if "validation" in line["nonprivate"]:
                results.draw_curves(this.folder, this.log.lines())
            bar.set_postfix(shown, refresh=False)
            bar.update()
    if position.round < last:
        this.say(f"The privacy budget of every client is spent after round {position.round}.")
    this.checkpoints.save(state, position)
    return state, position


class _Work(NamedTuple):
    """What the devices did in one round."""

    infos: list[tuple[tuple[str, ...], ClientInfo]]
    tiles: int
    device_seconds: float


def _one_round(
    this: Run,
    made: RoundInput,
    state: ServerState,
    bar: Any,
    shown: Mapping[str, str],
) -> tuple[ServerState, _Work] | None:
    """One round on the devices; None if it was asked to stop."""
    acc = this.programs.begin(state)
    infos: list[tuple[tuple[str, ...], ClientInfo]] = []
    tiles, device_seconds = 0, 0.0
    waiting: list[tuple[ChunkInput, ClientInfo]] = []

    def take() -> None:
        """Waits for the oldest chunk at work; its numbers leave the devices."""
        nonlocal tiles
        prepared, info = waiting.pop(0)
        infos.append((prepared.clients, jax.device_get(info)))
        tiles += prepared.num_tiles
        visited = sum(len(clients) for clients, _ in infos)
        bar.set_postfix({**shown, "clients": f"{visited}/{len(made.clients)}"})

    for prepared in made.chunks:
        if this.stop:
            return None
        start = time.perf_counter()
        acc, _, info = this.programs.visit(acc, state, prepared.chunk)
        waiting.append((prepared, info))
        if len(waiting) > 1:  # one chunk is handed over while another is at work
            take()
        device_seconds += time.perf_counter() - start
    start = time.perf_counter()
    while waiting:
        take()
    device_seconds += time.perf_counter() - start
    for clients, info in infos:
        for client, is_finite in zip(clients, info.is_finite, strict=False):
            if not is_finite:
                raise RuntimeError(
                    f"Round {made.round_index + 1}: the message of client {client!r} is not "
                    "finite. Lower the learning rates; the last checkpoint is whole."
                )
    try:
        release = made.release()
    except AbortedRoundError as aborted:
        this.say(f"Round {made.round_index + 1} opened nothing: {aborted}")
        return state, _Work(infos, tiles, device_seconds)
    start = time.perf_counter()
    state = this.programs.finish(state, acc, release)
    jax.block_until_ready(state)
    device_seconds += time.perf_counter() - start
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.params))):
        raise RuntimeError(
            f"Round {made.round_index + 1}: the server's parameters are not finite after the mean "
            f"of {list(made.clients)}, whose messages are. Lower the server's learning rate; the "
            "last checkpoint is whole."
        )
    return state, _Work(infos, tiles, device_seconds)


def _line(
    this: Run, made: RoundInput, work: _Work, seconds: float, shown: dict[str, str]
) -> dict[str, Any]:
    """The round's line of `metrics.jsonl`: what is accounted, and apart from it what is not."""
    delta = this.config.privacy.target_delta
    epsilon = {
        site.name: site.mechanism.epsilon(made.charged.get(site.name, 0), delta)
        if made.charged.get(site.name, 0)
        else 0.0
        for site in this.sites.sites
    }
    worst = max(epsilon.values())
    shown["epsilon"] = "infinite" if math.isinf(worst) else f"{worst:.2f}"
    nobody = NonPrivate(UnitSums(*np.zeros(len(UnitSums._fields))))  # a cohort may be empty
    sums = [nobody, *(info.units for _, info in work.infos)]
    total = jax.tree.map(lambda *parts: float(sum(part.sum() for part in parts)), *sums)
    units = max(total.value.units, 1.0)
    shown["loss"] = f"{total.value.loss / units:.3f}"
    # Durations follow the number of units drawn, so they are not released as private either.
    nonprivate = NonPrivate(
        {
            "loss": total.value.loss / units,
            "gradient_norm": total.value.norm / units,
            "clipped_fraction": total.value.clipped / units,
            "non_finite_units": total.value.non_finite,
            "units": total.value.units,
            "tiles": work.tiles,
            "seconds": seconds,
            "device_seconds": work.device_seconds,
            "update_norm": {
                client: float(norm)
                for clients, info in work.infos
                for client, norm in zip(clients, info.update_norm.value, strict=False)
            },
        }
    )
    return {
        "round": made.round_index + 1,
        "epsilon": {"max": worst, "per_client": epsilon},
        "clients": list(made.clients),
        "left": list(made.left),
        "dropped": list(made.dropped),
    } | unwrap_nonprivate(nonprivate)


def _validate(this: Run, state: ServerState, shown: dict[str, str]) -> dict[str, Any]:
    """Scores on the validation tiles, for `nonprivate/`; nothing steers by them."""
    table = this.federation.validation
    if not len(table):
        return {}
    counts = this.programs.evaluator.confusions(state.averaged_params, table)
    scores = summarise(counts, table, this.federation.class_names)
    assert scores is not None  # the table has tiles
    if scores["dice"] is not None:
        shown["dice"] = f"{scores['dice']:.3f}"
    return {"validation": scores}


def _start(this: Run) -> tuple[ServerState, Position]:
    """The newest checkpoint, or the beginning."""
    state = this.device.state
    if this.checkpoints.latest_round is None:
        this.log.cut_back(0)
        return state, Position(0, this.ledger.to_json(), "", 0.0, 0.0, 0)
    state, position = this.checkpoints.restore(state)
    state = processes.restored(state, this.device)
    this.ledger.restore(position.ledger)
    this.charges.rewind(position.charge_head)
    this.log.cut_back(position.round)
    this.say(f"Going on after round {position.round} of {this.folder}.")
    return state, position


def _secrets(config: Config, path: pathlib.Path, sites: Sites, *, is_new: bool) -> Secrets:
    """The run's secrets: loaded, made and saved before anything is charged, or from the seed."""
    clients = [site.name for site in sites.sites]
    if config.seed >= 0:
        return Secrets.from_seed(clients, config.seed)
    if path.exists():
        return Secrets.load(path, clients)
    if not is_new:
        raise ValueError(
            f"Rounds were charged in {path.parent}, but their secrets at {path} are gone, so they "
            "cannot be replayed. Start a new run in another --workdir."
        )
    secrets = Secrets.generate(clients)
    secrets.save(path)
    return secrets


def _digest(params: Any) -> str:
    """BLAKE2b, in hex, of all parameters."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(jax.device_get(params)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _limits(config: Config, sites: Sites) -> dict[str, int]:
    """Rounds each client's budget allows, computed beforehand."""
    privacy = config.privacy
    if privacy.placement in ("none", "update_unclipped"):  # no epsilon that a budget could bound
        return {}
    own = by_site(privacy.target_epsilon_by_site, "privacy.target_epsilon_by_site")
    targets = {site.name: own.get(site.name, privacy.target_epsilon) for site in sites.sites}
    return {
        site.name: site.mechanism.max_rounds(targets[site.name], privacy.target_delta)
        for site in sites.sites
        if targets[site.name]
    }
