"""Tiny runs for the tests of the host loop, and the moments at which one may be cut off.

    python -m tests.runs FOLDER MOMENT '{"federation.rounds": 4}'

goes on with one until MOMENT, and there dies as by `kill -9`; with MOMENT "" it runs to its end.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import signal
import sys
import time
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from fedjax_dp import results, training
from fedjax_dp.assembly.programs import compile_programs, make_device, make_model
from fedjax_dp.assembly.sites import make_sites
from fedjax_dp.config import (
    Config,
    DataConfig,
    ExecutionConfig,
    FederationConfig,
    ModelConfig,
    PrivacyConfig,
)
from fedjax_dp.data.synthetic import synthetic_federation
from fedjax_dp.privacy.ledger import ChargeLog
from fedjax_dp.privacy.secrets import Secrets
from fedjax_dp.reporting.log import MetricsLog, read_lines

ROOT = pathlib.Path(__file__).resolve().parents[1]
ALDER, BIRCH = "alder", "birch"

# --- a federation and a configuration that train in moments


@functools.cache
def federation():
    """Two hospitals of 6 and 4 patients, 2 tiles of 32 pixels each, and an external one."""
    made = synthetic_federation(
        patients_per_site=6, tiles_per_patient=2, tile_size=32, evaluation_patients_per_site=1,
        num_external_sites=1, num_training_sites=2, num_workers=1,
    )  # fmt: skip
    keep = np.arange(20)  # without the last two patients of the second site
    train = dataclasses.replace(
        made.train,
        **{
            name: getattr(made.train, name)[keep]
            for name in ("images", "labels", "site", "slide", "patient")
        },
    )
    return dataclasses.replace(made, train=train)


def tiny(**changes):
    """A run of seconds; changes by dotted name: `tiny(**{"federation.rounds": 2})`."""
    config = Config(
        data=DataConfig(tile_size=32),
        model=ModelConfig(base_channels=8, depth=1, num_groups=4),
        privacy=PrivacyConfig(
            noise_multiplier=1.0, target_epsilon=0.0, expected_batch_size=3.0, tiles_per_unit=2
        ),
        federation=FederationConfig(rounds=4, ema_decay=0.5),
        execution=ExecutionConfig(devices=1),
        seed=0,
        eval_every=2,
        checkpoint_every=2,
    )
    for name, value in changes.items():
        *sections, field = name.split(".")
        target = functools.reduce(getattr, sections, config)
        assert hasattr(target, field), name
        setattr(target, field, value)
    return config


def run(config, folder, **kwargs):
    return training.run(config, folder, federation=federation(), **{"progress": False} | kwargs)


# --- compiling once for all tests: what is tested is the loop around the programs

_PROGRAMS = {}


def remembered_programs(config, device, chunk, release):
    """`assembly.programs.compile_programs`, kept by all that the programs depend on."""
    settings = dataclasses.asdict(config.federation)
    if config.federation.server_schedule == "constant":
        del settings["rounds"]
    for name in ("weights", "pooled", "cohort", "cohort_size", "cohort_prob", "dropout_prob"):
        del settings[name]
    model = dataclasses.asdict(config.model) | {"init_from": ""}
    privacy = dataclasses.asdict(config.privacy)
    if config.privacy.placement != "distributed":  # its encoding depends on the noise
        adaptive = ("adaptive_clip", "clip_quantile", "clip_learning_rate")
        privacy = {name: privacy[name] for name in ("placement", *adaptive)}
    arrays = (chunk, release, device.pool, device.state)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), arrays)
    parts = (
        settings, model, config.objective, privacy, config.execution, config.data.tile_size, shapes,
    )  # fmt: skip
    if (key := repr(parts)) not in _PROGRAMS:
        _PROGRAMS[key] = compile_programs(config, device, chunk, release)
    return _PROGRAMS[key]


CHEAP = {
    "jax_disable_most_optimizations": (True, False),  # here, everywhere else
    "jax_persistent_cache_min_compile_time_secs": (0.0, 1.0),
}


def subprocess_environment(cache, **more):
    """Environment of a program that shares this session's compiled programs."""
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    } | more  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Folder of the session's compilation cache; a module that uses it compiles cheaply."""
    from jax.experimental.compilation_cache import compilation_cache

    folder = tmp_path_factory.getbasetemp() / "compiled"
    settings = CHEAP | {"jax_compilation_cache_dir": (str(folder), None)}
    for name, (here, _) in settings.items():
        jax.config.update(name, here)
    compilation_cache.reset_cache()
    with mock.patch.object(training, "compile_programs", remembered_programs):
        yield folder
    for name, (_, elsewhere) in settings.items():
        jax.config.update(name, elsewhere)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def no_pictures():
    """No drawing, which is most of a tiny run's time."""
    with mock.patch.multiple(
        results, draw_overlays=lambda *_: None, draw_curves=lambda *_: None
    ):  # fmt: skip
        yield


def device(config, seed=0):
    """The device side of a run before anything is compiled."""
    model = make_model(config, len(federation().class_names))
    sites = make_sites(config, federation(), dimension=model.dimension)
    return make_device(config, federation(), model, sites, jax.random.key(seed))


# --- what a run leaves


def saved(folder):
    """The newest checkpoint: state as NumPy arrays, and position."""
    handlers = {"state": ocp.StandardCheckpointHandler(), "position": ocp.JsonCheckpointHandler()}
    path = pathlib.Path(folder).absolute() / "checkpoints"
    with ocp.CheckpointManager(path, item_handlers=handlers) as manager:
        step = manager.latest_step()
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            manager.item_metadata(step)["state"],
        )
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(like), position=ocp.args.JsonRestore()
        )
        restored = manager.restore(step, args=args)
    return jax.tree.map(np.asarray, restored["state"]), restored["position"]


def limits(target_epsilon, **changes):
    """Rounds of each site within a budget, counted one by one."""
    config = tiny(**changes)
    found = {}
    for site in make_sites(config, federation()).sites:
        rounds = 0
        while site.mechanism.epsilon(rounds + 1, config.privacy.target_delta) <= target_epsilon:
            rounds += 1
        found[site.name] = rounds
    return found


def charges(folder):
    return [json.loads(line) for line in (folder / "charges.jsonl").read_text().splitlines()]


def read_json(path):
    return json.loads(path.read_text())


def without_times(tree):
    """A log line or summary without what the clock measured."""
    if isinstance(tree, dict):
        clocked = ("seconds", "device_seconds", "throughput", "across_runs")
        return {name: without_times(v) for name, v in tree.items() if name not in clocked}
    return tree


def assert_same_end(folder, whole):
    """The run in `folder` ended as the one in `whole`, bit for bit, and charged as much."""
    (state, position), (their_state, their_position) = saved(folder), saved(whole)
    jax.tree.map(np.testing.assert_array_equal, state, their_state)
    assert jax.tree.all(jax.tree.map(lambda leaf: np.isfinite(leaf).all(), state))
    for name in ("round", "ledger", "charge_head", "tiles"):
        assert position[name] == their_position[name]
    assert charges(folder) == charges(whole)
    for name in ("summary.json", "privacy.json"):
        assert without_times(read_json(folder / name)) == without_times(read_json(whole / name))
    lines, their_lines = (read_lines(f / "metrics.jsonl") for f in (folder, whole))
    assert [line["round"] for line in lines] == [line["round"] for line in their_lines]
    for line, their_line in zip(lines, their_lines, strict=True):
        assert without_times(line["nonprivate"]) == without_times(their_line["nonprivate"])
        for name in ("clients", "left"):
            assert line.get(name) == their_line.get(name)


# --- moments


@contextlib.contextmanager
def moments(folder, reached):
    """Calls `reached(name)` at each moment of a run in `folder`, in the thread it happens in.

    Names: "secrets saved"; "charged R" (round index R is on disk, nothing of it computed);
    "visited N" (N-th call to the devices done); "logged R" (R rounds are in the log); "before
    PATH" and "after PATH" (a file or folder of the workdir gets its final name), where the parts of
    a checkpoint that is being written are all called "a part of a checkpoint".
    """
    visits = 0

    def after(function, name):
        def wrapped(self, first, *rest):
            result = function(self, first, *rest)
            reached(name(first))
            return result

        return wrapped

    def renamed(function):
        def wrapped(source, target, *rest, **kwargs):
            path = pathlib.Path(os.fspath(target))
            inside = path.is_relative_to(folder)
            name = path.relative_to(folder).as_posix() if inside else ""
            if name.startswith("checkpoints/") and not name.split("/", 1)[1].isdigit():
                name = "a part of a checkpoint"
            if inside:
                reached(f"before {name}")
            result = function(source, target, *rest, **kwargs)
            if inside:
                reached(f"after {name}")
            return result

        return wrapped

    compiler = compile_programs

    def programs(*args):
        made = compiler(*args)

        def visit(*visit_args):
            nonlocal visits
            result = jax.block_until_ready(made.visit(*visit_args))
            visits += 1
            reached(f"visited {visits}")
            return result

        return made._replace(visit=visit)

    folder = pathlib.Path(folder).absolute()
    with (
        mock.patch.object(Secrets, "save", after(Secrets.save, lambda _: "secrets saved")),
        mock.patch.object(ChargeLog, "charge", after(ChargeLog.charge, "charged {}".format)),
        mock.patch.object(
            MetricsLog, "append", after(MetricsLog.append, lambda line: f"logged {line['round']}")
        ),
        mock.patch.object(os, "rename", renamed(os.rename)),
        mock.patch.object(os, "replace", renamed(os.replace)),
        mock.patch.object(training, "compile_programs", programs),
    ):
        yield


def run_with_crashes(config, folder, names, copies):
    """Runs to the end; returns, for each moment, the workdir as `kill -9` would have left it then.

    What a killed process has written stays in the file system, so a copy made at that moment is
    what the next process finds.

    Args:
        config: of the run.
        folder: its workdir, new.
        names: moments, each with the charges to wait for, for rounds are charged ahead.
        copies: where the copies go.
    """
    found = {}

    def reached(name):
        if name in names and name not in found:
            deadline = time.monotonic() + 30
            while names[name] and len(charges(folder)) < names[name]:
                assert time.monotonic() < deadline, f"{names[name]} charges by {name!r}"
                time.sleep(0.01)
            found[name] = copies / str(len(found))
            shutil.copytree(folder, found[name])

    folder.mkdir(parents=True)
    with moments(folder, reached):
        summary = run(config, folder)
    assert set(found) == set(names), f"never reached: {set(names) - set(found)}"
    return summary, found


def main():
    """What `python -m tests.runs` does; with the changes, all that is not drawing is as ever."""
    folder, moment, changes = sys.argv[1:]

    def reached(name):
        if name == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    for name in ("draw_overlays", "draw_curves"):
        setattr(results, name, lambda *_: None)
    with moments(folder, reached):
        run(tiny(**json.loads(changes)), folder)
    print("finished")


if __name__ == "__main__":
    main()
