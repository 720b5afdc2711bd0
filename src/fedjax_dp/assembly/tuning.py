"""Which execution plan is fastest for a network, its shapes and a backend: measured, remembered.

A plan is two integers and the form of the convolutions' gradients. It never changes a result
beyond rounding, so it may be chosen by the clock; what is timed are draws of expected size over
one tile, so no private number steers the choice.
"""

import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_dp.assembly.devices import make_mesh
from fedjax_dp.assembly.programs import examples, make_device, make_model
from fedjax_dp.assembly.sites import Sites
from fedjax_dp.config import Config
from fedjax_dp.data.federation import Federation
from fedjax_dp.federated import cohort
from fedjax_dp.reporting.log import write_json
from fedjax_dp.workdir import environment_hash

_REPEATS = 3
_HOPELESS = 1.5
"""A plan so many times slower than the best at its first call is not timed again."""


class Plan(NamedTuple):
    """An execution plan.

    Attributes:
        clients_per_block: see `config.ExecutionConfig`.
        microbatch_size: see `config.ExecutionConfig`.
        conv_variant: see `models.layers.ConvVariant`.
    """

    clients_per_block: int
    microbatch_size: int
    conv_variant: str


class Choice(NamedTuple):
    """The plan that was chosen.

    Attributes:
        plan: the plan.
        seconds: of a client's round, by plan, as text; empty where it was remembered.
        key: what the choice depends on, hashed; public numbers alone, as it is kept for all runs.
        failures: plans that did not run, and why.
    """

    plan: Plan
    seconds: Mapping[str, float]
    key: str
    failures: tuple[str, ...] = ()


def with_plan(config: Config, plan: Plan) -> Config:
    """The configuration with the plan's execution; `config` itself stays as it is."""
    return dataclasses.replace(
        config, execution=dataclasses.replace(config.execution, **plan._asdict())
    )


def candidates(config: Config, backend: str, num_clients: int) -> tuple[Plan, ...]:
    """The few plans that can be fastest on a backend, the usual one first; what is set stays.

    On CPU clients with parameters of their own would turn convolutions into grouped ones, so they
    are never mapped together there.

    Args:
        config: the run's.
        backend: "cpu", "gpu" or "tpu".
        num_clients: clients of the run.
    """
    execution = config.execution
    blocks = [execution.clients_per_block]
    if backend == "cpu":
        sizes, variants = [1, 2, 8], ["matmul", "canonical"]
    else:
        sizes, variants = [32, 64, 128, 16], ["xla", "matmul"]
        blocks += [4] if num_clients >= 4 and blocks == [1] else []
    if execution.microbatch_size:
        sizes = [execution.microbatch_size]
    if execution.conv_variant != "auto":
        variants = [execution.conv_variant]
    # The second form pays for large blocks alone, and clients together for the usual form alone.
    return (
        *(Plan(block, size, variants[0]) for size in sizes for block in blocks),
        *(Plan(blocks[0], max(sizes), variant) for variant in variants[1:]),
    )


def choose(
    config: Config,
    federation: Federation,
    sites: Sites,
    *,
    remembered: Sequence[pathlib.Path] = (),
    clock: Callable[[Config, Federation, Sites], Callable[[], float]] | None = None,
) -> Choice:
    """The fastest plan: remembered, or timed.

    Args:
        config: the run's.
        federation: its tiles; none is looked at.
        sites: from `make_sites`.
        remembered: files of `remember`, the first that knows this network, shapes and machine
            decides.
        clock: makes, of a configuration, a function that runs a client's round and returns its
            seconds; for tests.

    Raises:
        RuntimeError: no plan runs, each for the reason given.
    """
    plans = candidates(config, jax.default_backend(), len(sites.sites))
    key = _key(config, sites, plans)
    for value in (_known(path).get(key) for path in remembered):
        for plan in plans:
            if plan._asdict() == value:
                return Choice(plan, {}, key)
    if len(plans) == 1:
        return Choice(plans[0], {}, key)
    rounds: dict[Plan, Callable[[], float]] = {}
    failures: list[str] = []
    for plan in plans:
        try:
            rounds[plan] = (clock or _client_round)(with_plan(config, plan), federation, sites)
        except (RuntimeError, ValueError) as error:  # out of memory, or not implemented there
            failures.append(f"{_text(plan)}: {error}")
    if not rounds:
        raise RuntimeError("No execution plan runs here. " + "; ".join(failures))
    seconds = {plan: [run()] for plan, run in rounds.items()}
    best = min(times[0] for times in seconds.values())
    promising = [plan for plan, times in seconds.items() if times[0] <= _HOPELESS * best]
    for _ in range(_REPEATS - 1):  # in turn, so that a slow moment hurts all alike
        for plan in promising:
            seconds[plan].append(rounds[plan]())
    medians = {plan: statistics.median(times) for plan, times in seconds.items()}
    fastest = min(promising, key=medians.__getitem__)
    texts = {_text(plan): value for plan, value in medians.items()}
    return Choice(fastest, texts, key, tuple(failures))


def _client_round(config: Config, federation: Federation, sites: Sites) -> Callable[[], float]:
    """Compiles `visit` for one tile drawn over and over, as often as is expected; warms it up."""
    table = federation.train
    one = dataclasses.replace(
        table,
        **{
            name: getattr(table, name)[:1]
            for name in ("images", "labels", "site", "slide", "patient")
        },
    )
    # One tile fits; and where the leader times alone, the others are not there to be asked.
    execution = dataclasses.replace(config.execution, pool="resident")
    config = dataclasses.replace(config, execution=execution)
    model = make_model(config, len(federation.class_names))
    device = make_device(
        config,
        dataclasses.replace(federation, train=one),
        model,
        sites,
        jax.random.key(0),
        mesh=cohort.local_mesh(make_mesh(config.execution, sites)),
    )
    slots = cohort.num_slots(device.mesh, config.execution.clients_per_block)
    chunk, _ = examples(device, sites, slots)
    mechanism = sites.sites[0].mechanism
    capacity = chunk.plan.tile_index.shape[2]
    expected = max(site.mechanism.expected_batch_size for site in sites.sites)
    units = min(capacity, max(1, round(expected)))
    chunk = chunk._replace(
        plan=chunk.plan._replace(
            num_units=np.full_like(chunk.plan.num_units, units),
            num_tiles=np.full_like(chunk.plan.num_tiles, mechanism.tiles_per_unit),
        )
    )
    chunk = cohort.place(chunk, cohort.by_client(device.mesh))
    acc = jax.jit(device.algorithm.begin)(device.state)
    visit = jax.jit(device.algorithm.visit).lower(acc, device.state, chunk, device.pool).compile()

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(visit(acc, device.state, chunk, device.pool))
        return (time.perf_counter() - start) / slots

    run()
    return run


def _key(config: Config, sites: Sites, plans: tuple[Plan, ...]) -> str:
    mechanism = sites.sites[0].mechanism
    parts = {
        "model": dataclasses.asdict(config.model) | {"init_from": ""},
        "objective": dataclasses.asdict(config.objective),
        "tile_size": config.data.tile_size,
        "placement": mechanism.placement,
        "steps": mechanism.local_steps,
        "tiles_per_unit": mechanism.tiles_per_unit,
        "units": max(round(site.mechanism.expected_batch_size) for site in sites.sites),
        "devices": (config.execution.devices, config.execution.devices_per_client),
        "plans": plans,
    }
    return environment_hash(parts)


def remember(choice: Choice, files: Sequence[pathlib.Path]) -> None:
    """Adds the choice to each file, whole or not at all; what they know of others stays."""
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        known = _known(path)
        if known.get(choice.key) != choice.plan._asdict():
            write_json(path, known | {choice.key: choice.plan._asdict()})


def _known(path: pathlib.Path) -> dict[str, Any]:
    """What a file remembers; nothing where it is absent or no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _text(plan: Plan) -> str:
    return (
        f"{plan.clients_per_block} client{'s' * (plan.clients_per_block > 1)} x "
        f"{plan.microbatch_size} units, {plan.conv_variant}"
    )


def describe(choice: Choice) -> str:
    """One line: the plan, and how it compared."""
    timed = "; ".join(f"{text} {1e3 * s:.0f} ms" for text, s in choice.seconds.items())
    failed = "".join(f" Did not run: {failure}" for failure in choice.failures)
    return f"Execution plan: {_text(choice.plan)} ({timed or 'remembered'}).{failed}"
